"""Components by name, and where they are changed: layers, sublayers, heads, neurons, positions and directions.

Whatever is named ends as ports: a place where activations can be read and replaced, and which of its numbers are meant.
Layers, sublayers, heads and neurons are `Selection`s, so that each has its random control.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memloc.ablations.ports import Port, width
from memloc.errors import InputError
from memloc.provenance import Provenance, digest_json, digest_tensor
from memloc.scores import Selection
from memloc.sites import OUTSIDE, Grain, Kind, Site
from memloc.view import ModelView

NAMES = "L2 (a layer), L2.attn or L2.mlp (a sublayer), L2.attn.v (a map), L2H0 (a head), L2N17 (a neuron)"


@dataclass(frozen=True, eq=False)
class Part:
    """What is changed at one port.

    Attributes:
        port: where.
        units: [u] long, which of its numbers; None for all.
        basis: [r, width], orthonormal rows: what is changed are the coefficients along them; None for the numbers.
        at: [p] long, absolute positions; None for all.
    """

    port: Port
    units: Tensor | None = None
    basis: Tensor | None = None
    at: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions in activation space.

    Attributes:
        rows: where to orthonormal rows [r, width]. Where is a site (the input of its map), or the number of a block
            (the residual stream after it; -1: what enters the first).

    Raises:
        InputError: rows that are not orthonormal.
    """

    rows: Mapping[Site | int, Tensor]

    def __post_init__(self) -> None:
        for place, rows in self.rows.items():
            if rows.dim() != 2 or not rows.is_floating_point():
                raise InputError(f"directions at {place}: shape {list(rows.shape)}; expected [rows, width]")
            gap = float((rows.double() @ rows.double().T - torch.eye(len(rows), dtype=torch.float64)).abs().max())
            if not gap < 1e-4:
                raise InputError(f"directions at {place}: rows are not orthonormal (off by {gap:.2g}); use their Q")

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(len(rows) for rows in self.rows.values())

    @property
    def digest(self) -> str:
        """Digest of places and rows."""
        return digest_json(sorted([str(place), digest_tensor(rows)] for place, rows in self.rows.items()))

    def random_like(self, seed: int) -> Directions:
        """The matched control: as many directions at each place, drawn at random."""
        generator = torch.Generator().manual_seed(seed)
        found = {}
        for place, rows in sorted(self.rows.items(), key=lambda entry: str(entry[0])):
            drawn = torch.randn(rows.shape[1], len(rows), generator=generator, dtype=torch.float64)
            found[place] = torch.linalg.qr(drawn).Q.T.contiguous().to(rows.dtype)
        return Directions(found)


Components = Selection | Directions


# -- by name ----------------------------------------------------------------------------------------------------------


def layers(view: ModelView, wanted: Iterable[int]) -> Selection:
    """Whole blocks."""
    return _chosen(Grain.LAYER, view, dict.fromkeys((Site(layer, Kind.MLP_OUT) for layer in wanted), ()))


def sublayers(view: ModelView, wanted: Iterable[Site]) -> Selection:
    """What attention (`attn.out`) or the MLP (`mlp.out`) adds to the residual stream, or what another map puts out."""
    return _chosen(Grain.COMPONENT, view, dict.fromkeys(wanted, ()))


def heads(view: ModelView, wanted: Iterable[tuple[int, int]]) -> Selection:
    """Attention heads as (layer, head)."""
    return _chosen(Grain.HEAD, view, _gathered(wanted, Kind.ATTN_OUT))


def neurons(view: ModelView, wanted: Iterable[tuple[int, int]]) -> Selection:
    """Neurons as (layer, neuron)."""
    return _chosen(Grain.NEURON, view, _gathered(wanted, Kind.MLP_OUT))


def named(view: ModelView, names: Sequence[str]) -> tuple[Selection, ...]:
    """Components from names such as `L2`, `L2.attn`, `L2.mlp`, `L2.attn.v`, `L2H0`, `L2N17`: one selection a grain.

    Raises:
        InputError: a name of another form, or of something the model has not.
    """
    found: dict[Grain, list[tuple[int, int]]] = {}
    maps: list[Site] = []
    for name in names:
        parts = re.fullmatch(r"L(\d+)(?:([HN])(\d+)|\.([a-z.]+))?", name)
        if parts is None:
            raise InputError(f"no component called {name!r}; names are like {NAMES}")
        layer, letter, index, sublayer = int(parts[1]), parts[2], parts[3], parts[4]
        if letter:
            found.setdefault(Grain.HEAD if letter == "H" else Grain.NEURON, []).append((layer, int(index)))
        elif sublayer:
            maps.append(Site.parse(f"L{layer}.{ {'attn': 'attn.out', 'mlp': 'mlp.out'}.get(sublayer, sublayer) }"))
        else:
            found.setdefault(Grain.LAYER, []).append((layer, 0))
    chosen = [layers(view, (layer for layer, _ in found[Grain.LAYER]))] if Grain.LAYER in found else []
    chosen += [sublayers(view, maps)] if maps else []
    chosen += [heads(view, found[Grain.HEAD])] if Grain.HEAD in found else []
    chosen += [neurons(view, found[Grain.NEURON])] if Grain.NEURON in found else []
    if not chosen:
        raise InputError("no component is named")
    return tuple(chosen)


def names_of(components: Components) -> tuple[str, ...]:
    """What `named` would call them; directions and positions by their places."""
    if isinstance(components, Directions):
        return tuple(f"{place if isinstance(place, Site) else f'L{place}'}~{len(rows)}"
                     for place, rows in components.rows.items())  # fmt: skip
    letters = {Grain.HEAD: "H", Grain.NEURON: "N", Grain.POSITION: "@"}
    short = {Kind.ATTN_OUT: "attn", Kind.MLP_OUT: "mlp"}
    found = []
    for site, entries in components.indices().items():
        if components.grain == Grain.LAYER:
            found.append(f"L{site.layer}")
        elif components.grain == Grain.COMPONENT:
            found.append(f"L{site.layer}.{short.get(site.kind, site.kind)}")
        else:
            found += [f"L{site.layer}{letters[components.grain]}{entry}" for entry in entries]
    return tuple(found)


def everything(view: ModelView, grain: Grain) -> Selection:
    """All layers, sublayers, heads or neurons of the model."""
    sites = _sites(view, grain)
    sizes = _sizes(view, grain)
    masks = {site: torch.ones(sizes[site], dtype=torch.bool) for site in sites}
    return Selection(grain, masks, Provenance("everything"))


def apart(selection: Selection) -> tuple[Selection, ...]:
    """Each of the chosen places alone."""
    # The empty masks are shared by all: thousands of neurons would each hold masks of the whole model.
    nowhere = {site: torch.zeros_like(mask) for site, mask in selection.masks.items()}
    found = []
    for site, entries in selection.indices().items():
        for entry in entries:
            mask = torch.zeros_like(selection.masks[site])
            mask.view(-1)[entry] = True
            found.append(Selection(selection.grain, {**nowhere, site: mask}, selection.provenance))
    return tuple(found)


def _sites(view: ModelView, grain: Grain) -> tuple[Site, ...]:
    kinds = {Grain.HEAD: (Kind.ATTN_OUT,), Grain.COMPONENT: (Kind.ATTN_OUT, Kind.MLP_OUT)}
    return view.sites(*kinds.get(grain, (Kind.MLP_OUT,)))


def _sizes(view: ModelView, grain: Grain) -> dict[Site, tuple[int, ...]]:
    wide = {Grain.HEAD: (view.heads,), Grain.NEURON: (view.neurons,)}.get(grain, ())
    return dict.fromkeys(_sites(view, grain), wide)


def _gathered(wanted: Iterable[tuple[int, int]], kind: Kind) -> dict[Site, tuple[int, ...]]:
    found: dict[Site, tuple[int, ...]] = {}
    for layer, index in wanted:
        site = Site(layer, kind)
        found[site] = (*found.get(site, ()), index)
    return found


def _chosen(grain: Grain, view: ModelView, wanted: Mapping[Site, tuple[int, ...]]) -> Selection:
    sizes = _sizes(view, grain)
    if grain == Grain.COMPONENT:
        sizes |= {site: () for site in wanted if site.kind in view.kinds and view.has(site) and not site.bias}
    masks = {site: torch.zeros(size, dtype=torch.bool) for site, size in sizes.items()}
    for site, entries in wanted.items():
        most = sizes[site][0] if sizes.get(site) else 0
        if site not in sizes or any(not 0 <= entry < most for entry in entries):
            what = f"{grain} {list(entries)} of {site}" if entries else f"{grain} {site}"
            raise InputError(f"no {what}: the model has {view.layers} layers of {view.heads} heads and {view.neurons} "
                             "neurons, counted from 0")  # fmt: skip
        if entries:
            masks[site][list(entries)] = True
        else:
            masks[site].fill_(True)
    return Selection(grain, masks, Provenance("by hand"))


# -- as parts ---------------------------------------------------------------------------------------------------------


def parts_of(view: ModelView, components: Components) -> tuple[Part, ...]:
    """Where `components` are changed.

    Raises:
        InputError: a selection of weights, of another model's shape, or a site the model has not.
    """
    if isinstance(components, Directions):
        return tuple(_direction(view, place, rows) for place, rows in components.rows.items())
    return tuple(
        _part(view, components.grain, site, mask) for site, mask in sorted(components.masks.items()) if mask.any()
    )


def _direction(view: ModelView, place: Site | int, rows: Tensor) -> Part:
    port = Port("input", place.layer, place.kind) if isinstance(place, Site) else Port("residual", place)
    if port.kind is None and not -1 <= port.layer < view.layers:
        raise InputError(f"directions after block {place}: the model has {view.layers}, counted from 0")
    if port.kind is not None and not view.has(port.site):
        raise InputError(f"directions at {place}: not in {view.row.family} with {view.layers} layers")
    if rows.shape[1] != width(view, port):
        raise InputError(f"directions at {place}: width {rows.shape[1]}, the model has {width(view, port)} there")
    return Part(port, basis=rows.to(view.device))


def _part(view: ModelView, grain: Grain, site: Site, mask: Tensor) -> Part:
    if grain in (Grain.WEIGHT, Grain.DIRECTION):
        raise InputError(f"a selection of {grain}s cannot be ablated: it names no activations; select heads or neurons")
    if not view.has(site):
        raise InputError(f"{site}: not in {view.row.family} with {view.layers} layers")
    chosen = mask.reshape(-1).nonzero().reshape(-1).to(view.device)
    expected = {Grain.HEAD: (view.heads,), Grain.LAYER: (), Grain.COMPONENT: ()}.get(grain)
    if grain == Grain.NEURON:
        expected = (width(view, Port("input", site.layer, site.kind)),)
    if expected is not None and tuple(mask.shape) != expected:
        raise InputError(f"{site}: a selection of shape {list(mask.shape)}, the model has {list(expected)} {grain}s")
    if grain == Grain.LAYER:
        return Part(Port("added", site.layer))
    if grain == Grain.COMPONENT:
        return Part(Port("output", site.layer, site.kind), units=_own_outputs(view, site))
    if grain == Grain.POSITION:
        port = Port("residual", -1) if site.layer == OUTSIDE else Port("input", site.layer, site.kind)
        return Part(port, at=chosen)
    if grain == Grain.HEAD:
        inside = torch.arange(view.head_width, device=view.device)
        return Part(Port("input", site.layer, site.kind), units=(chosen[:, None] * view.head_width + inside).flatten())
    return Part(Port("input", site.layer, site.kind), units=chosen)


def _own_outputs(view: ModelView, site: Site) -> Tensor | None:
    """Outputs of a map that shares its matrix with others; None where it has one of its own."""
    rows = view.place(site).rows
    if isinstance(rows, slice):
        return torch.arange(rows.start, rows.stop, device=view.device)
    return None if rows is None else torch.tensor(rows, device=view.device)
