"""Rare tokens: how often a token occurs in a corpus, and whether what each token receives follows it, by rank.

A token type that stands five times in a text receives five shares. Sums over such types say more about how often they
stand there than about who looks at them, so here each type counts once, with its mean; the published statistic, which
sums, is kept beside it for comparison.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from memloc.passages import Passage
from memloc.provenance import digest_json


def token_counts(passages: Iterable[Passage], vocab: int) -> Tensor:
    """How often each token id occurs in prefixes and suffixes: [v] long."""
    counts = torch.zeros(vocab, dtype=torch.long)
    for item in passages:
        counts += torch.bincount(torch.tensor(item.ids), minlength=vocab)
    return counts


ROUNDING = 1e-6
"""Neighbours in rank that differ by no more than this share of the larger are equal: else rounding would rank them."""


def average_ranks(values: Tensor) -> Tensor:
    """Ranks along the last axis from 1 up, equal values sharing the mean of theirs: `[..., m]` as float64."""
    ordered, order = values.sort(dim=-1, stable=True)
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    below, above = ordered[..., :-1], ordered[..., 1:]
    fresh[..., 1:] = above - below > ROUNDING * torch.maximum(above.abs(), below.abs())
    group = fresh.long().cumsum(-1) - 1
    place = torch.arange(1, values.shape[-1] + 1, dtype=torch.float64, device=values.device).expand(values.shape)
    total = torch.zeros_like(place).scatter_add(-1, group, place)
    count = torch.zeros_like(place).scatter_add(-1, group, torch.ones_like(place))
    mean = (total / count.clamp_min(1)).gather(-1, group)
    return torch.zeros_like(mean).scatter(-1, order, mean)


def standardised(ranks: Tensor) -> Tensor:
    """Centred along the last axis and of length 1 (0 where all are equal): products are then correlations."""
    centred = ranks - ranks.mean(-1, keepdim=True)
    length = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    return torch.where(length > 1e-9, centred / length.clamp_min(1e-9), 0)


def spearman(one: Tensor, other: Tensor) -> Tensor:
    """Rank correlation along the last axis, ties sharing ranks; 0 where either side is constant."""
    return (standardised(average_ranks(one)) * standardised(average_ranks(other))).sum(-1)


@dataclass(frozen=True)
class Types:
    """The token types of one text, each once.

    Attributes:
        index: [p] long, the type of each token.
        count: [m], how often each type stands in the text.
        rarity: [m], larger is rarer in the corpus.
    """

    index: Tensor
    count: Tensor
    rarity: Tensor

    @classmethod
    def of(cls, ids: Iterable[int], corpus: Tensor) -> Types:
        """The types among `ids`; `corpus` [v] are counts, by which the rarest has the largest rarity."""
        kinds, index, count = torch.unique(torch.tensor(list(ids)), return_inverse=True, return_counts=True)
        return cls(index, count.double(), -corpus[kinds].double())

    def __len__(self) -> int:
        return len(self.count)

    def mean(self, received: Tensor) -> Tensor:
        """What a token of each type receives on average: `[..., p]` as `[..., m]`."""
        return self._sum(received) / self.count

    def correlation(self, received: Tensor) -> Tensor:
        """Rank correlation of the mean of a type with its rarity, `[...]`; 0 with fewer than 3 types."""
        if len(self) < 3:
            return received.new_zeros(received.shape[:-1], dtype=torch.float64)
        return spearman(self.mean(received), self.rarity.expand(*received.shape[:-1], -1))

    def permuted(self, received: Tensor, draws: int, seed: int) -> Tensor:
        """The same correlations with rarities dealt to types at random: `[draws, ...]`.

        Each draw deals once for all that is received, so that what several heads share stays shared.
        """
        if len(self) < 3 or not draws:
            return received.new_zeros(draws, *received.shape[:-1], dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        order = torch.stack([torch.randperm(len(self), generator=generator) for _ in range(draws)])
        dealt = standardised(average_ranks(self.rarity))[order]
        return torch.einsum("...m,dm->d...", standardised(average_ranks(self.mean(received))), dealt)

    def binned(self, received: Tensor) -> Tensor:
        """What is received by dense rank of corpus count, rarest first, summed: `[..., p]` as `[..., ranks]`.

        The published statistic's bins: not divided by how many tokens fall into each.
        """
        _, rank = torch.unique(-self.rarity, return_inverse=True)
        total = self._sum(received)
        bins = total.new_zeros(*total.shape[:-1], int(rank.max()) + 1)
        return bins.index_add(-1, rank, total)

    def _sum(self, received: Tensor) -> Tensor:
        received = received.double()
        return received.new_zeros(*received.shape[:-1], len(self)).index_add(-1, self.index, received)


def pearson(values: Tensor) -> Tensor:
    """Correlation of `[..., m]` values with their index along the last axis: the published statistic of summed bins."""
    place = torch.arange(values.shape[-1], dtype=torch.float64)
    return (standardised(values.double()) * standardised(place)).sum(-1)


def passage_seed(seed: int, passage: Passage) -> int:
    """A seed of the passage's own, so that what is drawn for it does not depend on its company."""
    return int(digest_json([seed, passage.id, passage.prefix, passage.suffix])[:15], 16)
