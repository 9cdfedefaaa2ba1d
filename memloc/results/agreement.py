"""Do two localizations say the same? Overlap of their best places, beside what chance would give; stability.

Only orders are compared: methods score in different units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memloc.errors import InputError, MismatchError
from memloc.scores import Localization
from memloc.sites import OUTSIDE, Grain, Kind, Site


@dataclass(frozen=True)
class Agreement:
    """How far two rankings of the same places agree.

    Attributes:
        first, second: names.
        places: how many are ranked.
        jaccard: k to the Jaccard index of the two sets of k best: shared over either.
        chance: k to what two independent random rankings would give on average.
        overlap: rank-biased overlap, which weighs the top most; 1 for equal orders.
        correlation: Spearman's, over all places; None where a side has one value only.
    """

    first: str
    second: str
    places: int
    jaccard: Mapping[int, float]
    chance: Mapping[int, float]
    overlap: float
    correlation: float | None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        rows = [{"k": k, "jaccard": self.jaccard[k], "chance": self.chance[k]} for k in self.jaccard]
        return {
            "first": self.first, "second": self.second, "places": self.places, "top": rows,
            "rank_biased_overlap": self.overlap, "spearman": self.correlation,
        }  # fmt: skip


def agreement(
    first: Localization,
    second: Localization,
    *,
    at: Sequence[int] = (10, 50, 100),
    persistence: float = 0.98,
    names: tuple[str, str] = ("first", "second"),
) -> Agreement:
    """Compare two localizations of the same grain and sites.

    Args:
        first: one.
        second: another; an axis of passages is averaged away in both.
        at: sizes of the sets of best places; those larger than the number of places are left out.
        persistence: p of rank-biased overlap: the first 1/(1 - p) ranks carry most of the weight.
        names: what to call them.

    Raises:
        MismatchError: grains, sites or sizes differ; `by_layer` makes any two comparable.
        InputError: no size fits, or a persistence outside (0, 1).
    """
    mine, theirs = _flat(first), _flat(second)
    if first.grain != second.grain or mine.keys() != theirs.keys():
        raise MismatchError(f"{names[0]} scores {first.grain}s and {names[1]} {second.grain}s, or at other sites")
    if any(mine[site].shape != theirs[site].shape for site in mine):
        raise MismatchError(f"{names[0]} and {names[1]} score other numbers of places at a site")
    if not 0 < persistence < 1:
        raise InputError(f"persistence {persistence}: expected between 0 and 1")
    one, other = torch.cat(list(mine.values())), torch.cat(list(theirs.values()))
    sizes = [k for k in dict.fromkeys(at) if 0 < k <= len(one)]
    if not sizes:
        raise InputError(f"{len(one)} places are ranked; none of the sizes {list(at)} fits")
    mine_first, theirs_first = ranking(one), ranking(other)
    return Agreement(
        *names,
        len(one),
        {k: jaccard(mine_first[:k], theirs_first[:k]) for k in sizes},
        {k: chance_jaccard(len(one), k) for k in sizes},
        rank_biased_overlap(mine_first, theirs_first, persistence),
        spearman(one, other),
    )


def agreements(localizations: Mapping[str, Localization], **settings: Any) -> tuple[Agreement, ...]:
    """Every pair of `localizations`; settings as `agreement` takes them."""
    pairs = combinations(localizations.items(), 2)
    return tuple(agreement(one, other, names=(name, second), **settings) for (name, one), (second, other) in pairs)


@dataclass(frozen=True)
class Stability:
    """How far a ranking depends on which passages it was made from.

    Attributes:
        k: size of the sets of best places.
        passages: how many there are; each half has half of them.
        mean: Jaccard index of the best k of one half with the best k of the other, averaged over splits.
        low, high: 5 and 95 % of the splits.
        chance: what random rankings would give.
    """

    k: int
    passages: int
    mean: float
    low: float
    high: float
    chance: float


def stability(localization: Localization, *, k: int, splits: int = 100, seed: int = 0) -> Stability:
    """Split the passages in random halves and compare the best `k` places of each.

    Raises:
        InputError: scores are not kept per passage, fewer than four passages, or k is no number of places.
    """
    if localization.passages is None or len(localization.passages) < 4:
        raise InputError("stability is read from scores kept per passage, of at least 4 passages")
    rows = torch.cat([scores.reshape(len(scores), -1) for _, scores in sorted(localization.scores.items())], 1)
    if not 0 < k <= rows.shape[1]:
        raise InputError(f"k {k}: expected 1 to {rows.shape[1]}, the places scored")
    generator, half = torch.Generator().manual_seed(seed), len(rows) // 2
    found = []
    for _ in range(splits):
        order = torch.randperm(len(rows), generator=generator)
        sides = [ranking(rows[part].mean(0))[:k] for part in (order[:half], order[half : 2 * half])]
        found.append(jaccard(*sides))
    low, high = np.quantile(found, [0.05, 0.95])
    chance = chance_jaccard(rows.shape[1], k)
    return Stability(k, len(rows), float(np.mean(found)), float(low), float(high), chance)


def by_layer(localization: Localization) -> Localization:
    """Sums of absolute scores of every block, so that methods of any grain can be compared.

    Raises:
        InputError: nothing is scored inside the blocks.
    """
    axis = localization.passages is not None
    sums: dict[Site, Tensor] = {}
    for site, scores in sorted(localization.scores.items()):
        if site.layer == OUTSIDE:
            continue
        here = scores.double().abs()
        total = here.reshape(len(here), -1).sum(1) if axis else here.sum()
        place = Site(site.layer, Kind.MLP_OUT)
        sums[place] = sums[place] + total if place in sums else total
    if not sums:
        raise InputError(f"{localization.provenance.method}: nothing is scored inside the blocks")
    return replace(localization, grain=Grain.LAYER, scores=sums, lengths=None)


def ranking(scores: Tensor) -> list[int]:
    """Places from best to worst; ties in the order they stand."""
    order: list[int] = scores.sort(descending=True, stable=True).indices.tolist()
    return order


def jaccard(first: Sequence[int], second: Sequence[int]) -> float:
    """Shared over either; 1.0 when both are empty."""
    one, other = set(first), set(second)
    return len(one & other) / len(one | other) if one | other else 1.0


def chance_jaccard(places: int, k: int) -> float:
    """Mean Jaccard index of two independent random sets of `k` of `places`: exact, by the hypergeometric law."""
    total = 0.0
    whole = _log_choose(places, k)
    for shared in range(max(0, 2 * k - places), k + 1):
        weight = math.exp(_log_choose(k, shared) + _log_choose(places - k, k - shared) - whole)
        total += weight * shared / (2 * k - shared)
    return total


def rank_biased_overlap(first: Sequence[int], second: Sequence[int], persistence: float) -> float:
    """Rank-biased overlap of two orders of equal length, extrapolated beyond their end.

        RBO = (X_n / n) pⁿ + (1 - p)/p · Σ_d (X_d / d) p^d

    with X_d the number of places both have among their first d.

    Source: Webber, Moffat and Zobel 2010, ACM TOIS 28(4), equation 30 (for lists of equal length).
    """
    if len(first) != len(second):
        raise MismatchError(f"orders of {len(first)} and {len(second)} places; rank-biased overlap needs equal lengths")
    if not first:
        return 1.0
    seen_first, seen_second = set[int](), set[int]()
    shared, total, weight = 0, 0.0, 1.0
    for depth, (one, other) in enumerate(zip(first, second, strict=True), 1):
        weight *= persistence
        shared += (one in seen_second) + (other in seen_first) + (one == other)
        seen_first.add(one)
        seen_second.add(other)
        total += shared / depth * weight
    return shared / len(first) * weight + (1 - persistence) / persistence * total


def spearman(first: Tensor, second: Tensor) -> float | None:
    """Rank correlation, ties sharing their mean rank; None where a side has one value only."""
    ranks = [_mean_ranks(entry) for entry in (first, second)]
    centred = [entry - entry.mean() for entry in ranks]
    norms = [float(entry.norm()) for entry in centred]
    if min(norms) == 0:
        return None
    return float(centred[0] @ centred[1]) / (norms[0] * norms[1])


def _mean_ranks(scores: Tensor) -> Tensor:
    _, group, count = torch.unique(scores.double(), return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    found: Tensor = (last - (count - 1) / 2)[group]
    return found


def _flat(localization: Localization) -> dict[Site, Tensor]:
    return {site: scores.reshape(-1) for site, scores in sorted(localization.mean().scores.items())}


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
