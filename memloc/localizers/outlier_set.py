"""Outlier sets: the fewest neurons, among those unusually loud on a passage, whose silence ends its recital."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from memloc.ablations.gates import gate_sites, gated
from memloc.batches import Batch
from memloc.costs import Cost, block_tokens, pass_bytes, widest
from memloc.errors import InputError
from memloc.objectives import suffix_logprobs
from memloc.passages import Passages
from memloc.progress import steps
from memloc.provenance import Provenance, settings_of
from memloc.scores import Localization
from memloc.sites import Grain
from memloc.view import ModelView

Search = Generator[Tensor, bool, tuple[Tensor, bool]]
"""Asks "is it still recited without these?" of masks [l, f], is told, and ends with a set and whether it sufficed."""


@dataclass(frozen=True, kw_only=True)
class OutlierSet:
    """Score of a neuron = its place in the smallest set found whose silence ends the recital: members above 1.

    With a_i a neuron's mean activation where the suffix is predicted, μ_i and σ_i its mean and deviation over the
    contrast set (never-trained controls, or ordinary text: it is needed), candidates of level j are the neurons with

        |a_i - μ_i| / σ_i > θ_j,  or  |a_i| among the j · growth largest of their layer

    where θ_j falls from `highest` to `lowest` step by step. The first level whose silence ends the recital is found by
    bisection; then its candidates are let speak again, whole layers first, then single neurons, the least unusual
    first, each left free unless the recital comes back. What is left is the set: each member was needed when tried.

    Scores are ranks: members lie in (1, 2], by |a - μ| / σ, all others in [0, 1), first by the level at which they
    become candidates. So `top(n)`, with n the passage's set size in the notes, is the set. One axis of passages.

    Attributes:
        until: what ends a recital: "exact": greedy decoding no longer gives the suffix to the last token; "nll": its
            mean NLL reaches that of the contrast set, the mean less one deviation. The latter is much to ask of a
            model that learned the text well: on the lab model all candidates together do not reach it.
        highest: the first θ, and
        lowest: the last.
        decrement: by which it falls.
        growth: neurons of each layer that join with every level for |a| alone.
        batch_size: passages searched together; no effect on scores.

    Cost: one forward over passages and contrast set, then one row for every question: about log2 of the levels, one a
    layer, and for m candidates left and k kept about k · log2(m / k) more (groups that can be freed together are).

    Source: after Hintersdorf et al. 2024 (NeMo), arXiv:2406.02366: there cross-attention values of image models, and
    similarity of first steps as the end. Bisection, groups, text and its two ends are ours.
    """

    until: Literal["exact", "nll"] = "exact"
    highest: float = 5.0
    lowest: float = 1.0
    decrement: float = 0.25
    growth: int = 1
    batch_size: int = 16
    in_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.highest >= self.lowest >= 0 and self.decrement > 0):
            found = f"highest {self.highest}, lowest {self.lowest}, decrement {self.decrement}"
            raise InputError(f"outlier-set: {found}; expected highest ≥ lowest ≥ 0, and a decrement above 0")
        if self.growth < 0 or self.batch_size < 1:
            found = f"growth {self.growth}, batch_size {self.batch_size}"
            raise InputError(f"outlier-set: {found}; expected at least 0 and 1")

    @torch.no_grad()
    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Find the set of every passage.

        Raises:
            InputError: no passages, a contrast set of fewer than two, or a passage the model cannot take (named).
        """
        if not passages:
            raise InputError("outlier-set: no passages given")
        if contrast is None or len(contrast) < 2:
            found = 0 if contrast is None else len(contrast)
            raise InputError(f"outlier-set: a contrast set of {found}; it needs two passages or more, never trained on")
        usual, spent = self._heard(view, contrast)
        bar = float(spent.mean() - spent.std())
        loud, _ = self._heard(view, passages)
        unusual = _coarse((loud - usual.mean(0)).abs() / usual.std(0).clamp_min(torch.finfo(usual.dtype).tiny))
        levels = torch.stack([self._levels(*entry) for entry in zip(unusual, loud, strict=True)])
        scores, ended = torch.zeros_like(unusual), [False] * len(passages)
        sizes, candidates = [0] * len(passages), [0] * len(passages)
        for batch in steps(list(view.batches(passages, size=self.batch_size)), "outlier sets"):
            searches = [_search(levels[row], unusual[row], self._count()) for row in batch.rows]
            for row, (chosen, end) in zip(batch.rows, self._answer(view, batch, searches, bar), strict=True):
                scores[row], ended[row], sizes[row] = _ranks(chosen, levels[row], unusual[row]), end, int(chosen.sum())
                candidates[row] = int((levels[row] < self._count()).sum())
        notes = {"sizes": sizes, "ended": ended, "candidates": candidates, "nll_bar": bar}
        inputs = {"model": view.digest, "passages": passages.digest, "contrast": contrast.digest}
        provenance = Provenance("outlier-set", settings_of(self), inputs=inputs)
        places = {site: scores[:, index] for index, site in enumerate(gate_sites(view, Grain.NEURON))}
        return Localization(Grain.NEURON, places, provenance, passages.ids, notes)

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """At most: all neurons are candidates, and none can be freed with another."""
        other = contrast or passages[:0]
        heard = block_tokens(view, passages, size=self.batch_size)
        heard += block_tokens(view, other, size=self.batch_size) if other else 0
        most = 1 + math.ceil(math.log2(self._count() + 1)) + view.layers + 2 * view.layers * view.neurons
        shapes = [widest(given, size=self.batch_size) for given in (passages, other) if given]
        rows, tokens = (max(shape[side] for shape in shapes) for side in (0, 1))
        unembedded = rows * max(len(item.suffix) for item in (*passages, *other))
        memory = pass_bytes(view, rows * tokens, context=tokens, unembedded=unembedded)
        kept = view.layers * view.neurons * (8 * (len(passages) + len(other)) + 10 * rows + 2 * rows * tokens)
        forward = heard + most * block_tokens(view, passages, size=self.batch_size)
        return Cost(forward, bytes=memory + 8 * kept, bound="at most")

    def _count(self) -> int:
        """Levels there are."""
        return int((self.highest - self.lowest) / self.decrement + 1e-9) + 1

    def _levels(self, unusual: Tensor, loud: Tensor) -> Tensor:
        """The level at which each neuron becomes a candidate, [l, f]; `_count()` where it never does."""
        by_deviation = (torch.floor((self.highest - unusual) / self.decrement) + 1).clamp_min(0)
        rank = loud.abs().argsort(dim=-1, descending=True, stable=True).argsort(-1)
        by_size = rank // self.growth if self.growth else torch.full_like(rank, self._count())
        return torch.minimum(by_deviation, by_size.to(by_deviation)).clamp_max(self._count()).long()

    def _heard(self, view: ModelView, passages: Passages) -> tuple[Tensor, Tensor]:
        """Mean activation of every neuron where the suffix is predicted, [n, l, f], and the suffix's NLL, [n]."""
        sites = gate_sites(view, Grain.NEURON)
        kind = torch.float64 if view.dtype == torch.float64 else torch.float32
        loud = torch.zeros(len(passages), len(sites), view.neurons, dtype=kind)
        spent = torch.zeros(len(passages), dtype=kind)
        for batch in view.batches(passages, size=self.batch_size):
            with view.record(sites) as entering:
                spoken = suffix_logprobs(view, batch)
            count = batch.length - batch.prefix
            rows = list(batch.rows)
            for layer, site in enumerate(sites):
                total = (entering[site].to(kind) * batch.predicting[..., None]).sum(1)
                loud[rows, layer] = (total / count[:, None]).cpu()
            spent[rows] = (-spoken.sum(1) / count).cpu().to(kind)
        return loud, spent

    def _answer(self, view: ModelView, batch: Batch, searches: list[Search], bar: float) -> list[tuple[Tensor, bool]]:
        """Run the searches of a batch side by side: one forward answers a question of each that still asks."""
        found: dict[int, tuple[Tensor, bool]] = {}
        asked = {place: next(search) for place, search in enumerate(searches)}
        while asked:
            places = list(asked)
            told = self._recited(view, batch.part(places), torch.stack([asked[place] for place in places]), bar)
            for place, answer in zip(places, told, strict=True):
                try:
                    asked[place] = searches[place].send(answer)
                except StopIteration as end:
                    found[place] = end.value
                    del asked[place]
        return [found[place] for place in range(len(searches))]

    def _recited(self, view: ModelView, batch: Batch, silent: Tensor, bar: float) -> Iterator[bool]:
        """Whether each row is recited while the neurons of its mask [l, f] are silent."""
        gates = (~silent).to(view.device, torch.float32)
        with gated(view, dict(zip(gate_sites(view, Grain.NEURON), gates.unbind(1), strict=True))):
            if self.until == "nll":
                spent = -suffix_logprobs(view, batch).sum(1) / (batch.length - batch.prefix)
                return iter((spent < bar).tolist())
            row, column, token, _ = batch.suffix_index()
            wrong = view.logits_at(batch, row, column).argmax(-1) != token
        # Greedy decoding gives the suffix exactly where every step of it, taught the steps before, does.
        misses = torch.zeros(len(batch), device=wrong.device).index_add(0, row, wrong.float())
        return iter((misses == 0).tolist())


def _coarse(sizes: Tensor) -> Tensor:
    """To 13 bits: what differs by rounding only is equal then, and its order no matter of chance.

    Neurons that are silent more often than not (rectified ones) give the very same deviation by the dozen.
    """
    mantissa, exponent = torch.frexp(sizes)
    return torch.ldexp((mantissa * 2**13).round() / 2**13, exponent)


def _search(levels: Tensor, unusual: Tensor, count: int) -> Search:
    """The search for one passage's set: [l, f] bool, and whether its silence ends the recital."""
    none = torch.zeros_like(levels, dtype=torch.bool)
    if not (yield none):
        return none, True
    # The last level that does not end it is `low`, the first known to end it `high`.
    low, high = -1, count - 1
    if (yield levels <= high):
        return levels <= high, False
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (yield levels <= middle) else (low, middle)
    chosen = levels <= high
    for layer in range(len(levels)):
        freed = chosen.clone()
        freed[layer] = False
        if chosen[layer].any() and not (yield freed):
            chosen = freed
    flat = chosen.view(-1).nonzero()[:, 0]
    groups = [flat[unusual.view(-1)[flat].argsort(stable=True)]]
    while groups:
        group = groups.pop()
        freed = chosen.clone()
        freed.view(-1)[group] = False
        if not len(group):
            continue
        if not (yield freed):
            chosen = freed
        elif len(group) > 1:
            half = (len(group) + 1) // 2
            groups += [group[half:], group[:half]]
    return chosen, True


def _ranks(chosen: Tensor, levels: Tensor, unusual: Tensor) -> Tensor:
    """Scores [l, f]: members in (1, 2], others in [0, 1); by level, then by how unusual."""
    order = sorted(
        range(levels.numel()),
        key=lambda place: (bool(chosen.view(-1)[place]), -int(levels.view(-1)[place]), float(unusual.view(-1)[place])),
    )
    rank = torch.zeros(levels.numel())
    rank[order] = torch.arange(levels.numel()) / levels.numel()
    inside = chosen.view(-1)
    # Members hold the highest ranks; among them those are spread over (1, 2].
    members = int(inside.sum())
    rank[inside] = 2 - (levels.numel() - 1 - (rank[inside] * levels.numel()).round()) / max(1, members)
    return rank.view_as(levels)
