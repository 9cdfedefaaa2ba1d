"""Random scores: the control every localizer stands beside."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from memloc.costs import Cost
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.provenance import Provenance, digest_json, settings_of
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site, kinds_named
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Random:
    """Score of a place = a uniform random number: what a method must beat.

    The model and the passages have no say, only the places' names and sizes: the same seed gives the same scores at a
    site, whichever other sites are asked for. For a control of the same size as a selection, site by site, see
    `Selection.random_like`.

    Attributes:
        grain: "layer" (at `mlp.out`), "component", "head", "neuron" or "weight".
        kinds: component and weight: only these maps, such as "mlp.in,mlp.out"; by default all.
        seed: of a generator of its own.

    Cost: no forward pass.
    """

    grain: Literal["layer", "component", "head", "neuron", "weight"] = "neuron"
    kinds: str | None = None
    seed: int = 0

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score all places of the grain; passages and `contrast` count in the provenance only."""
        sites = self._sites(view)
        if not sites:
            raise InputError(f"kinds {self.kinds}: this family has none of them")
        scores = {site: torch.rand(self._shape(view, site), generator=self._generator(site)) for site in sites}
        inputs = {"model": view.digest, "passages": passages.digest}
        return Localization(Grain(self.grain), scores, Provenance("random", settings_of(self), self.seed, inputs))

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """No pass at all; memory is the scores'."""
        return Cost(0, bytes=64 * sum(math.prod(self._shape(view, site)) + 64 for site in self._sites(view)))

    def _sites(self, view: ModelView) -> tuple[Site, ...]:
        if self.grain in ("component", "weight"):
            return view.sites(*(kinds_named(self.kinds) if self.kinds else view.kinds))
        if self.kinds is not None:
            raise InputError(f"kinds: a {self.grain} has none to choose from; leave it out")
        return view.sites(Kind.ATTN_OUT if self.grain == "head" else Kind.MLP_OUT)

    def _shape(self, view: ModelView, site: Site) -> tuple[int, ...]:
        sizes: dict[str, tuple[int, ...]] = {"neuron": (view.neurons,), "head": (view.heads,)}
        return tuple(view.weight(site).shape) if self.grain == "weight" else sizes.get(self.grain, ())

    def _generator(self, site: Site) -> torch.Generator:
        return torch.Generator().manual_seed(int(digest_json([self.seed, str(site)])[:15], 16))
