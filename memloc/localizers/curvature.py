"""Curvature: which maps, neurons and weights serve memorized text along directions that ordinary text does not need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from memloc.costs import Cost, block_tokens, pass_bytes, widest
from memloc.errors import InputError
from memloc.gradients.curvature import Basis, Labels, all_predicting, corrected, curvature_factors
from memloc.gradients.curvature_bands import BANDS, band_energies
from memloc.gradients.flows import wide
from memloc.passages import Passage, Passages
from memloc.progress import steps
from memloc.provenance import Provenance, settings_of
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site, kinds_named
from memloc.view import ModelView, left_to_right

MLP = (Kind.MLP_GATE, Kind.MLP_IN, Kind.MLP_OUT)


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """Score of a map = how much more of what it reads lies along directions of low curvature than in ordinary text.

    Directions are the eigenvectors of A = E[a aᵀ] over ordinary text (K-FAC's factor of what the map reads), bands of
    them by rank: top 10%, 10-25%, 25-50%, bottom 50%. With ‖P a‖ the root mean square, over a passage's positions, of
    what it reads inside the bottom band,

        score = ‖P a‖ of the passage / ‖P a‖ of ordinary text - 1, no unit; 0: as ordinary text.

    Ordinary text is given as `contrast`; every fifth of its passages is left out of A and is what "of ordinary text"
    is measured on, since a basis flatters the text it was made of. The ratio of every band stands in the notes. By
    grain:

    - component: the score above, one axis of passages;
    - weight: |W_flat| ∘ rms a, [out, in]: what each weight's part outside the steepest `keep` of all curvature writes
      for the passages. W_flat = U_G (C ∘ M) U_Aᵀ with C = U_Gᵀ W U_A, pairs (i, j) ranked by λ_i μ_j;
    - neuron: ‖column of W_flat‖ · rms a at `mlp.out`, [f]: what the neuron writes with that part, in the residual
      stream's units; one axis of passages.

    Attributes:
        grain: "component", "neuron" or "weight".
        kinds: components and weights: these maps; by default those of the MLP, as in the paper.
        energy: of components: "input" as above, or "output", what the part of the weight whose pairs lie in the bottom
            band writes.
        measure: of components: "norm" as above, or "share", the band's share of all bands in the place of its norm,
            which does not see that a passage is louder as a whole.
        positions: those "predicting" the suffix, of the reference too, or "all" but the last. Plain text as windows has
            a prefix of one token: where places in the text matter, give ordinary text cut as the passages are.
        keep: neurons and weights: share of the curvature whose pairs are not counted.
        labels: for G: "sampled" from the model at every token (the paper's), or the "true" next tokens.
        correction: rank pairs by EK-FAC's curvatures, estimated per passage in the same bases.
        limit: passages of ordinary text used, at most, evenly spaced over those given; few thousand windows are enough
            for maps of a few hundred entries, and a map needs several times as many tokens as it has.
        seed: of sampled labels; each passage has a generator of its own.
        batch_size: passages per pass; no effect on scores.

    Cost: one forward and one backward of the contrast set, twice with `correction`; one forward a passage.

    Source: Merullo et al. 2025, arXiv:2510.24256. Held-out reference, weight and neuron scores are ours.
    """

    grain: Literal["component", "neuron", "weight"] = "component"
    kinds: str | None = None
    energy: Literal["input", "output"] = "input"
    measure: Literal["norm", "share"] = "norm"
    positions: Literal["predicting", "all"] = "predicting"
    keep: float = 0.6
    labels: Labels = "sampled"
    correction: bool = False
    limit: int = 2000
    seed: int = 0
    batch_size: int = 8
    refuses = staticmethod(left_to_right)

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score maps, neurons or weights; `contrast` is ordinary text, two passages at least.

        Raises:
            InputError: no passages, fewer than two of ordinary text, or kinds the grain cannot use.
        """
        view.need_causal("the method lives on what a token cannot hear")
        if not passages:
            raise InputError("curvature: no passages given")
        text, rest = self._split(contrast)
        sites = self._sites(view)
        notes: dict[str, Any] = {"text": len(text), "reference": len(rest)}
        bases = self._bases(view, text, sites)
        if self.grain == "component":
            scores, notes["bands"] = self._ratios(view, passages, rest, bases)
        else:
            scores = self._flat(view, passages, bases)
        inputs = {"model": view.digest, "passages": passages.digest}
        if contrast is not None:
            inputs["contrast"] = contrast.digest
        provenance = Provenance("curvature", settings_of(self), self.seed, inputs)
        axis = None if self.grain == "weight" else passages.ids
        return Localization(Grain(self.grain), scores, provenance, axis, notes)

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """Passes over ordinary text and the passages, told without running them."""
        text, rest = self._split(contrast)
        weights = [view.weight(site).shape for site in self._sites(view)]
        squares = sum(out**2 + into**2 + 3 * out * into for out, into in weights)
        rows, tokens = widest(text, size=self.batch_size)
        kept = 4 * rows * tokens * sum(map(sum, weights)) + 6 * rows * tokens * max(map(sum, weights))
        formed = 6 * max(out * into for out, into in weights) * rows
        memory = pass_bytes(view, rows * tokens, context=tokens, grad=True, unembedded=2 * rows * tokens)
        memory += 8 * (6 * squares + kept + formed + 2 * len(passages) * view.layers * view.neurons)
        here = block_tokens(view, text, size=self.batch_size) * (2 if self.correction else 1)
        found = Cost(here, here, memory) + Cost(block_tokens(view, passages, size=self.batch_size), 0, memory)
        if self.grain == "component":
            found = found + Cost(block_tokens(view, rest, size=self.batch_size), 0, memory)
        return found

    def _split(self, contrast: Passages | None) -> tuple[Passages, Passages]:
        """Ordinary text to take curvature from, and to compare with: every fifth passage, at least one."""
        if not contrast or min(len(contrast), self.limit) < 2:
            given = len(contrast or ())
            raise InputError(f"curvature: {given} passages of ordinary text, limit {self.limit}; give two or more")
        count = min(len(contrast), self.limit)
        every = min(5, count)
        parts: tuple[list[Passage], list[Passage]] = ([], [])
        for index in range(count):
            parts[index % every == every - 1].append(contrast[index * len(contrast) // count])
        return Passages(tuple(parts[0]), contrast.origin), Passages(tuple(parts[1]), contrast.origin)

    def _sites(self, view: ModelView) -> tuple[Site, ...]:
        if self.grain == "neuron":
            if self.kinds is not None:
                raise InputError("kinds: a neuron has none to choose from; leave it out")
            return view.sites(Kind.MLP_OUT)
        sites = view.sites(*(kinds_named(self.kinds) if self.kinds else MLP))
        if not sites:
            raise InputError(f"kinds {self.kinds}: this family has none of them")
        return sites

    def _bases(self, view: ModelView, text: Passages, sites: tuple[Site, ...]) -> dict[Site, Basis]:
        factors = curvature_factors(view, text, sites, labels=self.labels, seed=self.seed, size=self.batch_size)
        bases = {site: factors.basis(site) for site in sites}
        if not self.correction:
            return bases
        return corrected(view, text, bases, labels=self.labels, seed=self.seed, size=self.batch_size)

    def _ratios(
        self, view: ModelView, passages: Passages, rest: Passages, bases: Mapping[Site, Basis]
    ) -> tuple[dict[Site, Tensor], dict[str, dict[str, float]]]:
        """Scores [n], and every band's mean ratio by site."""
        found = []
        for part in (passages, rest):
            energies = band_energies(
                view, part, bases, energy=self.energy, positions=self.positions, size=self.batch_size
            )
            found.append({site: self._measured(entry) for site, entry in energies.items()})
        ratios = {site: mine / found[1][site].mean(0).clamp_min(1e-30) for site, mine in found[0].items()}
        bands = {
            str(site): dict(zip(BANDS, [float(value) for value in ratio.mean(0)], strict=True))
            for site, ratio in ratios.items()
        }
        return {site: ratio[:, -1] - 1 for site, ratio in ratios.items()}, bands

    def _measured(self, energies: Tensor) -> Tensor:
        """Norms [n, bands] of what is read in each band, or their squares as shares of the whole."""
        return energies.sqrt() if self.measure == "norm" else energies / energies.sum(1, keepdim=True).clamp_min(1e-30)

    def _flat(self, view: ModelView, passages: Passages, bases: Mapping[Site, Basis]) -> dict[Site, Tensor]:
        squares = {
            site: torch.zeros(len(passages), len(basis.read), dtype=torch.float64) for site, basis in bases.items()
        }
        for batch in steps(list(view.batches(passages, size=self.batch_size)), "what maps read"):
            with torch.no_grad(), view.record(list(bases)) as read:
                view.hidden(batch)
            where = batch.predicting if self.positions == "predicting" else all_predicting(batch)
            for site, entries in squares.items():
                loud = wide(read[site]).square().masked_fill(~where[..., None], 0).sum(1) / where.sum(1, keepdim=True)
                entries[list(batch.rows)] = loud.cpu().double()
        found = {}
        for site, basis in bases.items():
            flat = basis.flat_part(view.weight(site).detach().cpu(), self.keep)
            if self.grain == "neuron":
                found[site] = torch.linalg.vector_norm(flat, dim=0) * squares[site].sqrt()
            else:
                found[site] = flat.abs() * squares[site].mean(0).sqrt()
        return found
