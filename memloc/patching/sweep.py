"""Every place of a grain patched exactly, passage by passage; and what any patching has to prepare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from memloc import hooks
from memloc.batches import Batch
from memloc.costs import Cost, block_tokens, pass_bytes, widest
from memloc.errors import InputError
from memloc.passages import Passage, Passages
from memloc.patching.corruption import Corrupted, Corruption
from memloc.patching.pairs import Direction, Pair
from memloc.patching.places import Places
from memloc.patching.question import Metric
from memloc.progress import steps
from memloc.sites import Site
from memloc.view import ModelView


@dataclass(frozen=True)
class Swept:
    """What patching every place did.

    Attributes:
        scores: scored site to [n, units], or [n] where a site is one place; positions beyond a passage are 0.
        clean: [n], each passage's loss in the clean run.
        corrupted: [n], in the corrupted run; the clean one's where there is none.
    """

    scores: Mapping[Site, Tensor]
    clean: Tensor
    corrupted: Tensor


@dataclass(frozen=True)
class Sweep:
    """How a set of passages is patched.

    Attributes:
        corruption: of the other run.
        direction: which run is patched.
        metric: what is asked of it.
        rows: variants run together, times corrupted rows.

    Raises:
        InputError: a constant has no run that could be restored.
    """

    corruption: Corruption
    direction: Direction = "noise"
    metric: Metric = "nll"
    rows: int = 32

    def __post_init__(self) -> None:
        if self.corruption.constant and self.direction == "denoise":
            raise InputError(f"corrupt={self.corruption.how!r} is no run that could be restored; take direction=noise")
        if min(self.rows, self.corruption.draws, self.corruption.alternatives) < 1:
            raise InputError("batch_size, draws and alternatives: expected at least 1 each")

    def pairs(
        self, view: ModelView, places: Places, passages: Passages, contrast: Passages | None
    ) -> Iterator[tuple[Passage, int, Pair]]:
        """Each passage with the first position that can matter and its two runs."""
        passages.check(view.vocab, view.context)
        with view.frozen():
            given = self.corruption.of(view, passages, contrast)
            constants = self.constants(view, places, contrast) if self.corruption.constant else {}
            for index, item in enumerate(passages):
                corrupted: Corrupted | Mapping[Site, Tensor] = given[index] if given else constants
                first = given[index].first if given else 0
                pair = Pair.of(view, places, item, corrupted, direction=self.direction, metric=self.metric)
                yield item, first, pair

    def __call__(self, view: ModelView, places: Places, passages: Passages, contrast: Passages | None) -> Swept:
        """Patch every place of every passage; positions left of the corruption, and the last, are 0 by themselves."""
        longest = max(len(item.ids) for item in passages)
        shape = (len(passages), *places.shape(longest))
        scores = {site: torch.zeros(shape, dtype=torch.float64) for site in places.scored}
        clean, corrupted = [], []
        pairs = self.pairs(view, places, passages, contrast)
        for row, (item, first, pair) in enumerate(steps(pairs, "patching", len(passages))):
            units = self.units(places, item, first).to(view.device)
            for site in places.scored:
                effects = pair.effects(site, units, rows=self.rows).cpu()
                scores[site][row] = (
                    effects[0] if len(shape) == 1 else scores[site][row].index_put((units.cpu(),), effects)
                )
            clean.append(pair.clean)
            corrupted.append(pair.clean if pair.corrupted is None else pair.corrupted)
        return Swept(scores, torch.tensor(clean).double(), torch.tensor(corrupted).double())

    def units(self, places: Places, passage: Passage, first: int) -> Tensor:
        """Places at one site that are worth a run."""
        if places.grain == "position":
            return torch.arange(first, len(passage.ids) - 1)
        return torch.arange(places.count(0))

    def constants(self, view: ModelView, places: Places, contrast: Passages | None) -> dict[Site, Tensor]:
        """Site to [width]: 0, or the mean over all tokens of the contrast. Cost of the latter: one forward over it."""
        self.corruption.check(contrast)
        points = places.points() | {site: hooks.Point(view.module(site), "output") for site in places.read_sites}
        if self.corruption.how == "zero":
            return {site: torch.zeros(1, device=view.device) for site in points}
        sums: dict[Site, Tensor] = {}
        count = 0
        for batch in view.batches(contrast or Passages(()), size=self.rows):
            with torch.no_grad(), hooks.record(points) as seen:
                view.hidden(batch)
            count += int(batch.length.sum())
            for site, tensor in seen.items():
                real = (tensor.double() * batch.mask[..., None]).sum((0, 1))
                sums[site] = sums.get(site, 0) + real
        reads = set(places.read_sites)
        means = {site: total / count for site, total in sums.items()}
        return {site: _own_rows(view, site, mean) if site in reads else mean for site, mean in means.items()}

    def cost(self, view: ModelView, places: Places, passages: Passages, contrast: Passages | None) -> Cost:
        """What a call takes; where the corrupted position is searched for, at most so much."""
        total = self.prepared(view, passages, contrast)
        given = [] if self.corruption.how == "perturbed" else self.corruption.of(view, passages, contrast)
        forward = 0
        for index, item in enumerate(passages):
            units = len(self.units(places, item, given[index].first if given else 0))
            forward += self.pair_tokens(view, places, item) + units * self.variant_tokens(view, places, item)
        searched = places.grain == "position" and self.corruption.how == "perturbed"
        cost = total + Cost(forward, bytes=self.bytes(view, places, passages))
        return Cost(cost.forward, cost.backward, cost.bytes, "at most" if searched else cost.bound)

    def prepared(self, view: ModelView, passages: Passages, contrast: Passages | None) -> Cost:
        """Of finding corrupted rows and means."""
        total = self.corruption.cost(view, passages)
        self.corruption.check(contrast)
        if self.corruption.how == "mean" and contrast:
            rows, tokens = widest(contrast, size=self.rows)
            memory = (
                3 * pass_bytes(view, rows * tokens, context=tokens) + 24 * view.layers * rows * tokens * view.neurons
            )
            total = total + Cost(block_tokens(view, contrast, size=self.rows), bytes=memory)
        return total

    def pair_tokens(self, view: ModelView, places: Places, item: Passage) -> int:
        """Block-tokens of the two runs of a passage."""
        rows = 1 + self.corruption.rows + (max(1, self.corruption.rows) if places.read_sites else 0)
        return rows * view.layers * (len(item.ids) - 1)

    def variant_tokens(self, view: ModelView, places: Places, item: Passage) -> int:
        """Block-tokens of one variant at every scored site."""
        starts = [min(member.layer for member in places.members(site)) + places.after_blocks for site in places.scored]
        blocks = sum(view.layers - start for start in starts)
        return max(1, self.corruption.rows) * blocks * (len(item.ids) - 1)

    def bytes(self, view: ModelView, places: Places, passages: Passages) -> int:
        """Working memory of the longest passage's runs and of the results: an upper estimate."""
        longest = max(passages, key=lambda item: len(item.ids))
        tokens, suffix = len(longest.ids), max(len(item.suffix) for item in passages)
        draws = max(1, self.corruption.rows)
        together = max(self.rows, draws)
        wide = view.neurons + view.heads * view.head_width + 4 * view.width
        kept = 8 * (3 + 3 * draws) * view.layers * tokens * wide
        variants = 8 * 4 * together * tokens * wide
        run = 2 * pass_bytes(view, together * tokens, context=tokens, unembedded=together * suffix)
        noise = 8 * 4 * (len(passages) + 2) * draws * tokens * view.width
        results = 8 * 4 * len(passages) * len(places.scored) * places.count(tokens)
        return kept + variants + run + noise + results + 8 * 2 * view.vocab * view.width + 2**16


def batch_of(corrupted: list[Corrupted], draw: int, like: Batch) -> tuple[Batch, Tensor | None]:
    """One corrupted row of every passage of a padded batch: the batch's own shape, token for token."""
    ids = like.ids.clone()
    noise = None
    for row, index in enumerate(like.rows):
        mine = corrupted[index]
        ids[row, : mine.ids.shape[1]] = mine.ids[draw].to(ids.device)
        if mine.noise is not None:
            if noise is None:
                noise = torch.zeros(*ids.shape, mine.noise.shape[-1], dtype=mine.noise.dtype)
            noise[row, : mine.noise.shape[1]] = mine.noise[draw]
    return Batch(ids, like.length, like.prefix, like.rows), None if noise is None else noise.to(ids.device)


def _own_rows(view: ModelView, site: Site, mean: Tensor) -> Tensor:
    rows = view.place(site).rows
    if rows is None:
        return mean
    return mean[rows] if isinstance(rows, slice) else mean[list(rows)]
