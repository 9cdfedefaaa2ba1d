"""Places that can be patched, by grain: where they are read, what counts as one, and how sums are taken over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memloc import hooks
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView

PatchGrain = Literal["neuron", "head", "component", "layer", "position"]
Stream = Literal["block", "mlp", "attn"]
Node = Literal["out", "query", "key", "value"]

READS: Mapping[str, Kind] = {"query": Kind.ATTN_Q, "key": Kind.ATTN_K, "value": Kind.ATTN_V}


@dataclass(frozen=True)
class Places:
    """Places of one grain.

    Attributes:
        view: the model.
        grain: "neuron": one entry of what enters `mlp.out`; "head": one head's part of what enters `attn.out`;
            "component": what `attn.out` or `mlp.out` puts out; "layer": both of a block, that is, all it adds;
            "position": one token's vector of `stream`. All but the last are patched at every position.
        stream: of positions: "block": the residual stream after a block (scored at its `mlp.out`); "mlp" or "attn":
            what that part adds.
        window: of positions of "mlp" or "attn": so many layers, centred on the one scored, are patched together.
        node: of heads: what the other run gives them: their output, or their queries, keys or values, from which their
            output follows.
    """

    view: ModelView
    grain: PatchGrain
    stream: Stream = "block"
    window: int = 1
    node: Node = "out"

    @property
    def after_blocks(self) -> bool:
        """Whether places are the residual stream itself."""
        return self.grain == "position" and self.stream == "block"

    @property
    def scored(self) -> tuple[Site, ...]:
        """Sites that get scores."""
        if self.grain == "component":
            return self.view.sites(Kind.ATTN_OUT, Kind.MLP_OUT)
        heads = self.grain == "head" or (self.grain == "position" and self.stream == "attn")
        return self.view.sites(Kind.ATTN_OUT if heads else Kind.MLP_OUT)

    @property
    def read_sites(self) -> tuple[Site, ...]:
        """Sites whose outputs are exchanged where heads are patched through what they read."""
        return () if self.node == "out" else self.view.sites(READS[self.node])

    def members(self, site: Site) -> tuple[Site, ...]:
        """Sites that are patched together as one scored site."""
        if self.grain == "layer":
            return (Site(site.layer, Kind.ATTN_OUT), site)
        if self.window == 1:
            return (site,)
        first = site.layer - (self.window - 1) // 2
        return tuple(
            Site(layer, site.kind) for layer in range(max(0, first), min(self.view.layers, first + self.window))
        )

    def points(self) -> dict[Site, hooks.Point]:
        """Where each site is read and replaced."""
        if self.after_blocks:
            return {site: hooks.Point(self.view.block(site.layer), "output") for site in self.scored}
        sites = [member for site in self.scored for member in self.members(site)]
        side: hooks.Side = "input" if self.grain in ("neuron", "head") else "output"
        return {site: self.view.point(site, None, side) for site in sorted(set(sites))}

    def count(self, tokens: int) -> int:
        """Places at one scored site, of a passage of so many tokens."""
        sizes = {"neuron": self.view.neurons, "head": self.view.heads, "position": tokens}
        return sizes.get(self.grain, 1)

    def mask(self, site: Site, units: Tensor, tokens: int, width: int) -> Tensor:
        """True where each of `units` [v] of a scored site is: [v, tokens or 1, width or 1]."""
        if self.grain in ("component", "layer"):
            return torch.ones(len(units), 1, 1, dtype=torch.bool, device=units.device)
        if self.grain == "position":
            return (torch.arange(tokens, device=units.device) == units[:, None])[..., None]
        at = torch.arange(width, device=units.device)
        owner = at if self.grain == "neuron" else at // self.view.head_width
        return (owner == units[:, None])[:, None]

    def sums(self, parts: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
        """Entries [n, t, width] added up over each place: scored site to [n, units], or [n] for one place a site."""
        return {site: sum_of([self._sum(parts[member]) for member in self.members(site)]) for site in self.scored}

    def shape(self, tokens: int) -> tuple[int, ...]:
        """Of one passage's scores at a site."""
        return () if self.grain in ("component", "layer") else (self.count(tokens),)

    def grain_of_scores(self) -> Grain:
        """As localizations call it."""
        return Grain(self.grain)

    def _sum(self, part: Tensor) -> Tensor:
        if self.grain == "position":
            return part.sum(-1)
        total = part.sum(1)
        if self.grain == "neuron":
            return total
        if self.grain == "head":
            return total.view(len(total), self.view.heads, self.view.head_width).sum(-1)
        return total.sum(-1)


def sum_of(parts: list[Tensor]) -> Tensor:
    """Their sum."""
    return torch.stack(parts).sum(0)
