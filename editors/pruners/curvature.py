"""Curvature pruning: take out of maps what ordinary text leans on least, in the eigenbasis of its curvature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from editors.base import Request
from editors.deltas import Delta
from editors.edit import Edit
from editors.pruning.curvature_pairs import kept_factors, passage_energies
from editors.pruning.spectra import chosen_maps, dearest, inside, maps_digest, most_of, taken_out, told
from memloc.errors import InputError
from memloc.gradients.curvature import Basis, Labels, corrected
from memloc.passages import Passages
from memloc.provenance import Provenance, settings_of
from memloc.sites import Kind, Site
from memloc.view import ModelView, left_to_right


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """Take the directions of least curvature out of maps: what memorized text uses and ordinary text hardly does.

    With U_A, U_G the eigenvectors of A = E[a aᵀ] and G = E[g gᵀ] over ordinary text (K-FAC: a what a map reads, g the
    gradient by what it puts out), C = U_Gᵀ W U_A and Π_ij = λ_i μ_j the curvature of pair (i, j),

        W becomes U_G (C ∘ M) U_Aᵀ,

    M the fewest pairs that hold `keep` of the price of all, per map. No forget set is asked. With aim "forget" the same
    price is spent where it takes most of the passages away: pairs go in falling order of

        share of the passages' squared gradient along the pair / Π_ij

    while those gone hold at most 1 - `keep` of the price, and a pair the passages do not pull on stays.

    Attributes:
        keep: share of the price that stays, no unit; 0.6 as published.
        price: of a pair: "curvature", Π_ij, as published; or "loss", Π_ij C_ij², what its removal adds to the loss of
            ordinary text, to second order.
        aim: "free" of any forget set, or "forget": restricted to what the passages to forget pull on.
        correction: estimate every pair's curvature again in the eigenbases (EK-FAC), per passage.
        kinds: only these maps, such as "attn.v,mlp.in"; by default those of the selection, else those that bring the
            stream into the MLP, as published.
        layers: only these; by default all. Published: three of 32, chosen by a sweep.
        labels: for G: "sampled" from the model at every token (the Fisher information), or the "true" next tokens.
        cache: folder where factors are kept and found again; by default they are not.
        batch_size: passages per pass; no effect beyond rounding.

    A selection chooses maps (components, layers) or entries of them (weights, neurons, heads): only there is the
    change written. Notes: pairs gone of all, the norm of what went over the weight's, and the share of the passages'
    gradient that went ("forget").

    Cost: one forward and one backward over `text` (twice with `correction`), one over the passages with aim "forget";
    two eigendecompositions and two products of the map's size in float64 a map; memory of all factors in float64.

    Source: Merullo et al. 2025, arXiv:2510.24256 (aim "free", price "curvature"). Price "loss" is optimal brain
    damage's (LeCun et al. 1989) in these bases; the restriction to passages and the correction are ours.
    """

    keep: float = 0.6
    price: Literal["curvature", "loss"] = "curvature"
    aim: Literal["free", "forget"] = "free"
    correction: bool = False
    kinds: str | None = None
    layers: tuple[int, ...] = ()
    labels: Labels = "sampled"
    cache: str | None = None
    batch_size: int = 8
    refuses = staticmethod(left_to_right)

    def __post_init__(self) -> None:
        if not 0 <= self.keep < 1:
            raise InputError(f"keep {self.keep}: expected from 0 to below 1, the share of the price that stays")

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched.

        Raises:
            InputError: no ordinary text, no passages where the aim is "forget", no map left to prune, or nothing flat
                enough to go.
        """
        view.need_causal("the method lives on what a token cannot hear")
        text = request.text or request.retain
        if not text:
            raise InputError("curvature: ordinary text (or passages to retain) is needed to measure it on")
        passages = request.need_forget() if self.aim == "forget" else None
        usual = (Kind.MLP_GATE, Kind.MLP_IN)
        maps = chosen_maps(view, request.selection, kinds=self.kinds, layers=self.layers, usual=usual)
        bases = self._bases(view, text, tuple(maps), request.seed)
        energies = None if passages is None else passage_energies(view, passages, bases, size=self.batch_size)
        deltas, notes = self._deltas(view, bases, energies, maps)
        given = {**request.inputs(view), "maps": maps_digest(maps)}
        provenance = Provenance("curvature", settings_of(replace(self, cache=None)), request.seed, given)
        return Edit.of(view, deltas, provenance, notes=notes)

    def _bases(self, view: ModelView, text: Passages, sites: tuple[Site, ...], seed: int) -> dict[Site, Basis]:
        how: dict[str, Any] = {"labels": self.labels, "seed": seed, "size": self.batch_size}
        factors = kept_factors(view, text, sites, folder=self.cache, **how)
        bases = {site: factors.basis(site) for site in sites}
        return corrected(view, text, bases, **how) if self.correction else bases

    @torch.no_grad()
    def _deltas(
        self,
        view: ModelView,
        bases: Mapping[Site, Basis],
        energies: Mapping[Site, Tensor] | None,
        maps: Mapping[Site, Tensor | None],
    ) -> tuple[dict[Site, Delta], dict[str, Any]]:
        deltas: dict[Site, Delta] = {}
        gone: dict[str, list[int]] = {}
        pulled: dict[str, float] = {}
        for site, basis in bases.items():
            weight = basis.coordinates(view.weight(site).detach().cpu())
            energy = None if energies is None else energies[site]
            mask = self._gone(basis, weight, energy)
            gone[str(site)] = [int(mask.sum()), mask.numel()]
            if energy is not None:
                pulled[str(site)] = float(energy[mask].sum())
            if bool(mask.any()):
                found = taken_out(basis.write, weight.masked_fill(~mask, 0), basis.read)
                deltas[site] = inside(found, maps[site])
        if not deltas:
            raise InputError(f"keep {self.keep}: no pair of any map may go; lower it")
        notes: dict[str, Any] = {"pairs gone": gone, "taken out over weight": told(deltas, view)}
        return deltas, notes if energies is None else {**notes, "forget": pulled}

    def _gone(self, basis: Basis, weight: Tensor, energy: Tensor | None) -> Tensor:
        """Mask of the pairs that go, [out, in]."""
        curvature = basis.curvature()
        if self.price == "loss":
            curvature = curvature * weight.square()
            energy = None if energy is None else energy * weight.square()
        if energy is None:
            return ~most_of(curvature, self.keep)
        return dearest(energy, curvature, (1 - self.keep) * float(curvature.sum()))
