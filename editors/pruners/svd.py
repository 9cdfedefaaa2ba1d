"""SVD pruning: take the weakest singular directions out of maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from editors.base import Request
from editors.deltas import Delta
from editors.edit import Edit
from editors.pruning.spectra import chosen_maps, inside, maps_digest, most_of, taken_out, told
from memloc import progress
from memloc.errors import InputError
from memloc.provenance import Provenance, settings_of
from memloc.sites import Kind, Site
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Svd:
    """Take the weakest singular directions out of maps: W becomes U_k Σ_k V_kᵀ, the nearest matrix of rank k.

    k is the fewest directions that hold `energy` of Σ σ². No text is asked: the baseline of curvature pruning, which
    ranks directions by what ordinary text does with them instead of by their size.

    Attributes:
        energy: share of the sum of squared singular values that stays, no unit.
        kinds: only these maps, such as "mlp.in,mlp.out"; by default those of the selection, else those that bring
            the stream into the MLP, as published for the curvature edit.
        layers: only these; by default all.

    A selection chooses maps (components, layers) or entries of them (weights, neurons, heads): only there is the
    change written.

    Cost: one singular value decomposition a map, in float64.

    Source: Eckart & Young 1936; as a baseline for memorization: Merullo et al. 2025, arXiv:2510.24256.
    """

    settings_suffice: ClassVar[bool] = True

    energy: float = 0.9
    kinds: str | None = None
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.energy < 1:
            raise InputError(f"energy {self.energy}: expected from 0 to below 1, the share that stays")

    @torch.no_grad()
    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched.

        Raises:
            InputError: no map is left to prune, or every direction is needed for the energy that should stay.
        """
        maps = chosen_maps(
            view, request.selection, kinds=self.kinds, layers=self.layers, usual=(Kind.MLP_GATE, Kind.MLP_IN)
        )
        deltas: dict[Site, Delta] = {}
        kept: dict[str, Any] = {}
        for site in progress.steps(list(maps), "svd"):
            left, sizes, right = torch.linalg.svd(view.weight(site).detach().cpu().double(), full_matrices=False)
            stays = most_of(sizes.square(), self.energy)
            kept[str(site)] = [int(stays.sum()), len(sizes)]
            if not bool(stays.all()):
                deltas[site] = inside(taken_out(left, torch.diag(sizes.masked_fill(stays, 0)), right.T), maps[site])
        if not deltas:
            raise InputError(f"energy {self.energy}: every direction of every map is needed for it; lower it")
        notes = {"kept directions": kept, "taken out over weight": told(deltas, view)}
        given = {**request.inputs(view), "maps": maps_digest(maps)}
        return Edit.of(view, deltas, Provenance("svd", settings_of(self), None, given), notes=notes)
