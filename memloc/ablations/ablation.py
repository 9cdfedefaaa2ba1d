"""Ablations: components silenced, replaced or changed while a model runs. No weight is written.

An ablation holds in every forward pass inside its block: whole padded rows, teacher-forced or greedy on cached keys and
values. What it does to a token depends on the text up to that token and on nothing else: not on the batch, the padding
or the cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from memloc.ablations.components import Components, Part, names_of, parts_of
from memloc.ablations.draws import choices, normals, salt
from memloc.ablations.passes import Passes
from memloc.ablations.ports import changing
from memloc.ablations.reference import Reference, Usual, coefficients
from memloc.errors import InputError
from memloc.provenance import digest_json, digest_tensor
from memloc.running.patterns import short_circuit
from memloc.scores import Selection
from memloc.sites import Kind
from memloc.view import ModelView

How = Literal["zero", "mean", "resample", "noise", "scale", "short-circuit"]
HOWS: tuple[How, ...] = get_args(How)
FACTORS = {"scale": 2.0, "noise": 1.0}
"""What takes a factor, and which by default."""
REFERRING = ("mean", "resample", "noise")
"""What takes a reference text."""

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Ablation:
    """What is done to which components.

    - "zero": their numbers are 0. A layer is skipped (its output is its input), a sublayer adds nothing (its bias
      neither), a direction is projected out.
    - "mean": their mean over the reference text, number by number.
    - "resample": their numbers at a token drawn from the reference text, one token for all components together.
    - "noise": plus N(0, (factor · std)²), std of each number over the reference text.
    - "scale": times `factor` (2 amplifies).
    - "short-circuit": attention looks at its own token only (its pattern becomes the identity); for attention
      sublayers, heads and layers, where the layer's attention is meant.

    Attributes:
        of: selections of layers, components (sublayers), heads, neurons or positions, and directions; those that share
            a place are changed one after another, in this order.
        how: what is done.
        factor: of "scale" (2 where None) and "noise" (1).
        seed: of "resample" and "noise"; what a token draws follows from it and from the text up to the token.
        positions: at which tokens: "all", those of the "prefix" or of the "suffix", or absolute positions, counted
            from 0 at the row's first token.

    Raises:
        InputError: a setting that does not fit.

    Source: mean and resample ablation: Chan et al. 2022 (causal scrubbing); short-circuit: Menta et al. 2025; noise in
    units of std: Meng et al. 2022, arXiv:2202.05262.
    """

    of: tuple[Components, ...]
    how: How = "zero"
    factor: float | None = None
    seed: int = 0
    positions: Literal["all", "prefix", "suffix"] | tuple[int, ...] = "all"

    def __post_init__(self) -> None:
        if self.how not in HOWS:
            raise InputError(f"how {self.how!r}: expected one of {', '.join(HOWS)}")
        if self.factor is not None and self.how not in FACTORS:
            raise InputError(f"factor {self.factor}: {self.how!r} takes none; only {', '.join(FACTORS)} do")
        if not self.of:
            raise InputError("an ablation needs at least one component")
        named = isinstance(self.positions, str)
        if named and self.positions not in ("all", "prefix", "suffix"):
            raise InputError(f"positions {self.positions!r}: expected all, prefix, suffix or numbers")
        if not named and (not self.positions or any(at < 0 for at in self.positions if isinstance(at, int))):
            raise InputError(f"positions {list(self.positions)}: expected numbers from 0, at least one")
        if self.how == "short-circuit" and self.positions != "all":
            raise InputError("positions: short-circuit changes whole patterns; leave it at 'all'")

    @property
    def strength(self) -> float | None:
        """The factor that is used, or None where none is."""
        return self.factor if self.factor is not None else FACTORS.get(self.how)

    @property
    def names(self) -> tuple[str, ...]:
        """The components, by name."""
        return tuple(name for components in self.of for name in names_of(components))

    @property
    def digest(self) -> str:
        """Digest of all that decides what the ablation does, the reference text apart."""
        of = [
            [str(entry.grain), [[str(site), digest_tensor(mask)] for site, mask in sorted(entry.masks.items())]]
            if isinstance(entry, Selection)
            else entry.digest
            for entry in self.of
        ]
        positions = self.positions if isinstance(self.positions, str) else list(self.positions)
        drawn = self.seed if self.how in ("resample", "noise") else None
        return digest_json([of, self.how, self.strength, drawn, positions])

    @contextlib.contextmanager
    def applied(
        self, view: ModelView, *, reference: Reference | None = None, prefixes: Sequence[Sequence[int]] = ()
    ) -> Iterator[None]:
        """Every forward pass of the view's model inside the block is ablated; afterwards it is as it was.

        Args:
            view: the model.
            reference: needed for mean, resample and noise; read from the model as it is, once.
            prefixes: the prefixes of the rows that will be run, where `positions` is "prefix" or "suffix": none may
                begin another, and every row must begin with one.

        Raises:
            InputError: components that the model has not, a reference or prefixes that are needed and not given.

        Cost: none but for the reference, if it does not know these places yet.
        """
        parts = [part for components in self.of for part in parts_of(view, components)]
        if self.how == "short-circuit":
            wanted = attention_of(view, parts)
            with short_circuit(view, wanted, wanted):
                yield
            return
        if self.how in REFERRING and reference is None:
            raise InputError(f"{self.how!r} takes its numbers from a reference text, and none is given")
        behind = self.positions in ("prefix", "suffix")
        if behind and not prefixes:
            raise InputError(f"positions {self.positions!r}: the rows' prefixes are needed, and none are given")
        usual: list[Usual | None] = [None] * len(parts)
        if reference is not None and self.how in REFERRING:
            usual = list(reference.usual(view, parts))
        passes = Passes(prefixes if behind else ())
        with contextlib.ExitStack() as stack:
            # Only what asks where a token stands needs whole forward passes; the rest works on any run of a block.
            if self.how in ("resample", "noise") or self.positions != "all" or any(p.at is not None for p in parts):
                stack.enter_context(passes.follow(view))
            for part, known in zip(parts, usual, strict=True):
                stack.enter_context(changing(view, part.port, self._change(part, known, passes)))
            yield

    def _change(self, part: Part, usual: Usual | None, passes: Passes) -> Change:
        def change(values: Tensor) -> Tensor:
            old = coefficients(values, part.basis)
            if part.units is not None:
                old = old[..., part.units]
            new = self._new(old, part, usual, passes)
            where = self._where(part, values, passes)
            if where is not None:
                new = torch.where(where[..., None], new, old)
            if part.basis is not None:
                basis = part.basis.to(new.dtype)
                return (values + (new - old) @ basis).to(values.dtype)
            new = new.to(values.dtype)
            return new if part.units is None else values.index_copy(-1, part.units, new)

        return change

    def _new(self, old: Tensor, part: Part, usual: Usual | None, passes: Passes) -> Tensor:
        """What takes the place of `old` [n, t, u]."""
        if self.how == "zero":
            return torch.zeros_like(old)
        if self.how == "scale":
            return old * float(self.strength or 0.0)
        if usual is None:
            raise InputError(f"{self.how!r} takes its numbers from a reference text, and none is given")
        if self.how == "mean":
            return _units(usual.mean, part).to(old).expand_as(old)
        address = passes.of(old).address
        if self.how == "noise":
            std = _units(usual.std, part).to(old)
            units = torch.arange(len(usual.std), device=old.device) if part.units is None else part.units
            drawn = normals(address, units, salt("noise", self.seed, str(part.port)))
            return old + float(self.strength or 0.0) * std * drawn.to(old.dtype)
        # One draw for all ports, so that numbers which belong together come together; never the very same text.
        pick = choices(address, len(usual.tokens), salt("resample", self.seed))
        same = usual.address[pick] == address
        pick = torch.where(same, (pick + 1) % len(usual.tokens), pick)
        return _units(usual.tokens, part)[pick].to(old)

    def _where(self, part: Part, values: Tensor, passes: Passes) -> Tensor | None:
        """[n, t] bool, the tokens that are changed; None for all."""
        if part.at is None and self.positions == "all":
            return None
        now = passes.of(values)
        where = torch.ones_like(now.address, dtype=torch.bool)
        if part.at is not None:
            where &= torch.isin(now.at, part.at)
        if not isinstance(self.positions, str):
            where &= torch.isin(now.at, torch.tensor(self.positions, device=now.at.device))
        elif now.suffix is not None:
            where &= now.suffix if self.positions == "suffix" else ~now.suffix
        return where


def attention_of(view: ModelView, parts: Sequence[Part]) -> dict[int, tuple[int, ...]]:
    """Layer to the heads that are meant.

    Raises:
        InputError: parts that are not of attention.
    """
    found: dict[int, set[int]] = {}
    for part in parts:
        port = part.port
        whole = port.side == "added" or (port.side == "output" and port.kind is Kind.ATTN_OUT)
        some = port.side == "input" and port.kind is Kind.ATTN_OUT and part.units is not None
        if not (whole or some) or part.basis is not None or part.at is not None:
            raise InputError(f"short-circuit: {port} is not attention; name layers, attention sublayers or heads")
        units = torch.arange(view.heads * view.head_width) if whole or part.units is None else part.units
        found.setdefault(port.layer, set()).update((units // view.head_width).tolist())
    return {layer: tuple(sorted(heads)) for layer, heads in found.items()}


def _units(values: Tensor, part: Part) -> Tensor:
    return values if part.units is None else values[..., part.units]
