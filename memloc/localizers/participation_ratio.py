"""Inverse participation ratio: neurons that answer by a rule read few waves, those that memorize read many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memloc.costs import Cost
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.progress import steps
from memloc.provenance import Provenance, settings_of
from memloc.reading.fourier import participation
from memloc.scores import Localization
from memloc.sites import OUTSIDE, Grain, Kind, Site
from memloc.view import ModelView

FEWEST = 5
"""Tokens below which a spectrum says nothing."""


@dataclass(frozen=True, kw_only=True)
class ParticipationRatio:
    """Score of a neuron = 1 - mean inverse participation ratio of what it reads and writes over tokens in cyclic order.

    For tokens 0, 1, …, n-1 of a cycle (the numbers of modular arithmetic), a neuron reads the series ⟨w, e_t⟩, with w
    its row of `mlp.in` (and, where the family is gated, the series of its row of `mlp.gate` too) and e_t the token's
    embedding, and writes the series ⟨v, u_t⟩, with v its column of `mlp.out` and u_t the token's unembedding. Each
    series x has the ratio Σ|x̃|⁴/(Σ|x̃|²)² of its Fourier transform: near 1 for one wave, near 4/n for noise. Neurons
    that answer by the rule are periodic, so a high score, a low ratio, marks what is not rule and may memorize. It says
    nothing of which passage, and nothing where tokens have no cyclic order. No unit.

    Attributes:
        tokens: "FIRST-LAST" (ids, both counted in) or ids with commas between, in cyclic order. Where not given: the
            distinct tokens of the contrast set, or else of the passages, by id, less those that stand in every row of
            several (the "=" of "a b =").
        convention: "half" (frequencies 0 to n/2: a cosine has 1; the reference code's) or "full" (a cosine has 1/2).
        centred: take each series' mean away first; embeddings share a mean that is no wave. The reference, whose
            inputs are one-hot, does not.

    Cost: no pass; one product of each map with the tokens' embeddings.

    Source: Doshi et al. 2023, arXiv:2310.13061, for a two-layer network; its carrying over to transformers, through
    embedding and unembedding with no norm between, is ours.
    """

    tokens: str | None = None
    convention: Literal["half", "full"] = "half"
    centred: bool = True

    @torch.no_grad()
    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score neurons; passages and `contrast` say which tokens count where `tokens` does not.

        Raises:
            InputError: fewer than five tokens, or one outside the vocabulary.
        """
        ids = torch.tensor(self._ids(view, passages, contrast), device=view.device)
        read = _wide(view.weight(Site(OUTSIDE, Kind.EMBED)).detach()[ids])
        spoken = _wide(view.weight(Site(OUTSIDE, Kind.UNEMBED)).detach()[ids])
        scores, least, most = {}, 1.0, 0.0
        for site in steps(list(view.sites(Kind.MLP_OUT)), "spectra"):
            ratio = torch.stack([self._ratio(series) for series in _series(view, site.layer, read, spoken)]).mean(0)
            scores[site] = 1 - ratio
            least, most = min(least, float(ratio.min())), max(most, float(ratio.max()))
        inputs = {"model": view.digest, "passages": passages.digest}
        if contrast is not None and not self.tokens:
            inputs["contrast"] = contrast.digest
        provenance = Provenance("participation-ratio", settings_of(self), inputs=inputs)
        notes = {"tokens": len(ids), "ratio_least": least, "ratio_most": most}
        return Localization(Grain.NEURON, scores, provenance, notes=notes)

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """No pass through the model."""
        count = len(self._ids(view, passages, contrast))
        wide = 2 if view.dtype == torch.float64 else 1
        series = 3 * view.neurons * count * 40
        maps = 16 * view.width * (view.neurons + count)
        return Cost(0, bytes=wide * (series + maps) + 8 * view.layers * view.neurons)

    def _ratio(self, series: Tensor) -> Tensor:
        return participation(series, self.convention, centred=self.centred)

    def _ids(self, view: ModelView, passages: Passages, contrast: Passages | None) -> list[int]:
        if self.tokens:
            ids, where = _parsed(self.tokens), f"tokens {self.tokens}"
        else:
            given = contrast or passages
            if not given:
                raise InputError("participation-ratio: no passages given to take the cycle from, and no tokens named")
            ids, where = _apart(given), given.origin or "passages"
        if len(ids) < FEWEST:
            raise InputError(f"participation-ratio: {where}: {len(ids)} tokens; a spectrum needs at least {FEWEST}")
        if not 0 <= min(ids) <= max(ids) < view.vocab:
            raise InputError(f"participation-ratio: {where}: a token outside the vocabulary of {view.vocab}")
        return ids


def _series(view: ModelView, layer: int, read: Tensor, spoken: Tensor) -> list[Tensor]:
    """What each neuron reads and writes, token by token: tensors [f, n]."""
    found = []
    for kind in (Kind.MLP_IN, Kind.MLP_GATE):
        if view.has(Site(layer, kind)):
            found.append(view.weight(Site(layer, kind)).detach().to(read) @ read.T)
    found.append(view.weight(Site(layer, Kind.MLP_OUT)).detach().to(spoken).T @ spoken.T)
    return found


def _apart(given: Passages) -> list[int]:
    """The distinct tokens by id, less those that stand in every row of several."""
    rows = [set(item.ids) for item in given]
    everywhere = set.intersection(*rows) if len(rows) > 1 else set()
    return sorted(set().union(*rows) - everywhere)


def _parsed(text: str) -> list[int]:
    try:
        if "," not in text and "-" in text.strip()[1:]:
            first, _, last = text.partition("-")
            return list(range(int(first), int(last) + 1))
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"participation-ratio: tokens {text!r}; expected FIRST-LAST or ids with commas") from None


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
