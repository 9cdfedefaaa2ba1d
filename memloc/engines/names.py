"""Our places in other libraries' words, and back: TransformerLens hook names, nnsight paths. Imports neither library.

A site's *input* is where neurons (`mlp.out`) and heads (`attn.out`) are read; its *output* is what the map puts out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from memloc.architectures import Row
from memloc.errors import InputError
from memloc.hooks import Side
from memloc.scores import Selection
from memloc.sites import MAPS, OUTSIDE, Grain, Kind, Site

_LENS: dict[tuple[Kind, Side], str] = {
    (Kind.ATTN_Q, "input"): "attn.q.hook_in",
    (Kind.ATTN_K, "input"): "attn.k.hook_in",
    (Kind.ATTN_V, "input"): "attn.v.hook_in",
    (Kind.ATTN_OUT, "input"): "attn.hook_z",
    (Kind.MLP_GATE, "input"): "mlp.gate.hook_in",
    (Kind.MLP_IN, "input"): "mlp.in.hook_in",
    (Kind.MLP_OUT, "input"): "mlp.hook_post",
    (Kind.ATTN_Q, "output"): "attn.hook_q",
    (Kind.ATTN_K, "output"): "attn.hook_k",
    (Kind.ATTN_V, "output"): "attn.hook_v",
    (Kind.ATTN_OUT, "output"): "attn.o.hook_out",
    (Kind.MLP_GATE, "output"): "mlp.gate.hook_out",
    (Kind.MLP_IN, "output"): "mlp.in.hook_out",
    (Kind.MLP_OUT, "output"): "mlp.out.hook_out",
    (Kind.EMBED, "input"): "embed.hook_in",
    (Kind.EMBED, "output"): "embed.hook_out",
    (Kind.UNEMBED, "input"): "unembed.hook_in",
    (Kind.UNEMBED, "output"): "unembed.hook_out",
}
_LENS_ALIASES: dict[str, tuple[Kind, Side]] = {
    "attn.q.hook_out": (Kind.ATTN_Q, "output"),
    "attn.k.hook_out": (Kind.ATTN_K, "output"),
    "attn.v.hook_out": (Kind.ATTN_V, "output"),
    "attn.o.hook_in": (Kind.ATTN_OUT, "input"),
    "mlp.out.hook_in": (Kind.MLP_OUT, "input"),
    "mlp.hook_pre_linear": (Kind.MLP_IN, "output"),
}
_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")
_PARTS = re.compile(r"\.?([A-Za-z_]\w*)|\[(\d+)\]")
_TAKEN = ("input", "output", "inputs", "source")
_AXES: dict[Grain, tuple[Side, int]] = {
    Grain.NEURON: ("input", 1), Grain.HEAD: ("input", 1), Grain.COMPONENT: ("output", 0), Grain.LAYER: ("output", 0),
}  # fmt: skip


class Names(Protocol):
    """One library's names for our places."""

    def name(self, site: Site, side: Side = "input") -> str:
        """What the library calls that side of a site."""

    def block(self, layer: int) -> str:
        """What it calls the residual stream after block `layer`."""

    def parse(self, name: str) -> tuple[Site, Side]:
        """The site and side of a name."""

    def index(self, grain: Grain, entry: int) -> str:
        """How entry `entry` of a place of this grain is taken from the tensor, as Python writes it."""


@dataclass(frozen=True)
class LensNames:
    """TransformerLens's hook names, as a TransformerBridge's `hook_dict` has them: `blocks.3.mlp.hook_post`.

    Attributes:
        gated: whether the MLP has a gate, which `mlp.hook_pre` then means; None where that is not known.
    """

    gated: bool | None = None

    def name(self, site: Site, side: Side = "input") -> str:
        """The hook's name.

        Raises:
            InputError: a bias, which no hook shows.
        """
        if site.bias:
            raise InputError(f"{site}: no hook shows a bias")
        if not site.kind.is_map:
            raise InputError(f"{site}: only linear maps have a hook name here")
        inner = _LENS[site.kind, side]
        return f"blocks.{site.layer}.{inner}" if site.kind.in_block else inner

    def block(self, layer: int) -> str:
        """The hook after a block."""
        return f"blocks.{layer}.hook_resid_post"

    def parse(self, name: str) -> tuple[Site, Side]:
        """The site and side of a hook name; older aliases are understood.

        Raises:
            InputError: it names no side of one linear map.
        """
        found = _BLOCK.match(name)
        inner, layer = (found[2], int(found[1])) if found else (name, OUTSIDE)
        known = {own: place for place, own in _LENS.items()} | _LENS_ALIASES
        if inner == "mlp.hook_pre" and found:
            if self.gated is None:
                raise InputError(f"{name}: mlp.gate where the MLP has a gate, else mlp.in; say which, LensNames(gated)")
            known[inner] = (Kind.MLP_GATE if self.gated else Kind.MLP_IN, "output")
        if inner not in known or known[inner][0].in_block != bool(found):
            raise InputError(
                f"{name}: not a side of one linear map, such as blocks.0.mlp.hook_post, blocks.0.attn.hook_z"
            )
        kind, side = known[inner]
        return Site(layer, kind), side

    def index(self, grain: Grain, entry: int) -> str:
        """A neuron on the last axis; a head on the axis before."""
        return {Grain.NEURON: f"[:, :, {entry}]", Grain.HEAD: f"[:, :, {entry}, :]"}.get(grain, "")


@dataclass(frozen=True)
class NnsightNames:
    """nnsight's paths, to be written after the model's name and a dot: `transformer.h[3].mlp.c_proj.input`.

    Attributes:
        row: the family's layout.
        head_width: entries of one head, where heads are to be indexed.
    """

    row: Row
    head_width: int | None = None

    def name(self, site: Site, side: Side = "input") -> str:
        """The path of the module's input or output (of a fused map: the whole map's).

        Raises:
            InputError: a bias, or the family has no such site.
        """
        if site.bias:
            raise InputError(f"{site}: nothing passes a bias; no path shows it")
        if not site.kind.is_map:
            raise InputError(f"{site}: only linear maps have a path here")
        if not site.kind.in_block:
            path = self.row.embed if site.kind is Kind.EMBED else self.row.unembed
            return f"{_safe(path)}.{side}"
        inner = self.row.path(site.kind)
        if inner is None:
            raise InputError(f"{site}: not in {self.row.family}")
        return f"{_safe(self.row.blocks)}[{site.layer}].{_safe(inner)}.{side}"

    def block(self, layer: int) -> str:
        """The block's output: a tuple in some families, whose first part is meant."""
        return f"{_safe(self.row.blocks)}[{layer}].output"

    def parse(self, name: str) -> tuple[Site, Side]:
        """The site and side of a path, with or without a leading model name, "model".

        Raises:
            InputError: no linear map of the family, or a fused one that holds several.
        """
        for given in (name, name.removeprefix("model.")):
            path, side = given.rpartition(".")[::2]
            kinds = [(kind, layer) for kind, layer in self._at(path) if side in ("input", "output")]
            if len(kinds) > 1:
                shared = ", ".join(kind for kind, _ in kinds)
                raise InputError(f"{name}: a fused map of {self.row.family}, shared by {shared}; name the site instead")
            if kinds:
                return Site(kinds[0][1], kinds[0][0]), "input" if side == "input" else "output"
        example = self.name(Site(0, Kind.MLP_OUT))
        raise InputError(f"{name}: not a side of one linear map of {self.row.family}; such is {example}")

    def index(self, grain: Grain, entry: int) -> str:
        """A neuron, or a head's entries, on the last axis.

        Raises:
            InputError: a head, and the head's width was not given.
        """
        if grain is Grain.HEAD:
            if self.head_width is None:
                raise InputError("heads lie side by side in nnsight's tensor: give NnsightNames their head_width")
            return f"[:, :, {entry * self.head_width}:{(entry + 1) * self.head_width}]"
        return f"[:, :, {entry}]" if grain is Grain.NEURON else ""

    def _at(self, path: str) -> Iterator[tuple[Kind, int]]:
        plain = ".".join(word or number for word, number in _PARTS.findall(path))
        plain = plain.replace("E_", "") if "E_" in path else plain
        for kind in MAPS:
            if not kind.in_block:
                if plain == (self.row.embed if kind is Kind.EMBED else self.row.unembed):
                    yield kind, OUTSIDE
                continue
            inner = self.row.path(kind)
            found = re.fullmatch(rf"{re.escape(self.row.blocks)}\.(\d+)\.{re.escape(inner)}", plain) if inner else None
            if found:
                yield kind, int(found[1])


@dataclass(frozen=True)
class Exported:
    """One place in another library's words.

    Attributes:
        site: ours.
        entry: which neuron or head, or None where a map or a layer is meant.
        name: the library's name of the tensor.
        index: how the place is taken from it, as Python writes it; "" for the whole tensor.
    """

    site: Site
    entry: int | None
    name: str
    index: str


def exported(chosen: Selection, names: Names) -> tuple[Exported, ...]:
    """Chosen places in a library's words: neurons and heads where they are read, maps and layers by what they put out.

    Raises:
        InputError: weights, positions or directions, which are no part of a tensor that passes one place.
    """
    if chosen.grain not in _AXES:
        kinds = ", ".join(_AXES)
        raise InputError(f"{chosen.grain}s have no hook name or path of their own; those that have: {kinds}")
    side, axes = _AXES[chosen.grain]
    found = []
    for site, entries in chosen.indices().items():
        name = names.block(site.layer) if chosen.grain is Grain.LAYER else names.name(site, side)
        for entry in entries:
            index = names.index(chosen.grain, entry) if axes else ""
            found.append(Exported(site, entry if axes else None, name, index))
    return tuple(found)


def _safe(path: str) -> str:
    """A module path as Python: digits as indices, and children that nnsight has moved by the name they have there."""
    parts = [f"E_{part}" if part in _TAKEN else part for part in path.split(".")]
    return re.sub(r"\.(\d+)", r"[\1]", ".".join(parts))
