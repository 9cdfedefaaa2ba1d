"""Agreement of rankings against brute force and hand-made cases; stability; chance."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from memloc.errors import InputError, MismatchError
from memloc.provenance import Provenance
from memloc.results.agreement import (
    agreement,
    agreements,
    by_layer,
    chance_jaccard,
    jaccard,
    rank_biased_overlap,
    ranking,
    spearman,
    stability,
)
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site

A, B = Site(0, Kind.MLP_OUT), Site(1, Kind.MLP_OUT)


def localization(*rows, grain=Grain.NEURON, passages=None):
    scores = {site: torch.as_tensor(row) for site, row in zip((A, B), rows, strict=False)}
    return Localization(grain, scores, Provenance("by hand"), passages)


def slow_overlap(first, second, p):
    """Webber's formula as written."""
    n = len(first)
    shared = [len(set(first[:d]) & set(second[:d])) for d in range(1, n + 1)]
    return shared[-1] / n * p**n + (1 - p) / p * sum(x / d * p**d for d, x in enumerate(shared, 1))


def test_rank_biased_overlap_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 7, 40):
        first, second = (torch.randperm(n, generator=generator).tolist() for _ in range(2))
        for p in (0.5, 0.9, 0.98):
            assert math.isclose(rank_biased_overlap(first, second, p), slow_overlap(first, second, p), abs_tol=1e-12)
            assert math.isclose(rank_biased_overlap(first, first, p), 1.0)
    assert rank_biased_overlap([0, 1, 2, 3], [0, 1, 3, 2], 0.9) > rank_biased_overlap([0, 1, 2, 3], [1, 0, 2, 3], 0.9)
    with pytest.raises(MismatchError, match="orders of 2 and 1 places"):
        rank_biased_overlap([0, 1], [0], 0.9)


def test_chance_is_the_mean_over_all_pairs_of_sets():
    for places, k in ((4, 1), (5, 2), (6, 3), (5, 5), (6, 4)):
        sets = list(itertools.combinations(range(places), k))
        mean = sum(jaccard(one, other) for one in sets for other in sets) / len(sets) ** 2
        assert math.isclose(chance_jaccard(places, k), mean)


def test_spearman_shares_ranks_among_ties():
    assert math.isclose(spearman(torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 20, 30, 99])), 1.0)
    assert math.isclose(spearman(torch.tensor([1.0, 2, 3, 4]), torch.tensor([4.0, 3, 2, 1])), -1.0)
    one, other = torch.tensor([1.0, 2, 2, 3]), torch.tensor([1.0, 3, 2, 4])
    ranks, others = torch.tensor([1, 2.5, 2.5, 4]), torch.tensor([1.0, 3, 2, 4])
    assert math.isclose(spearman(one, other), float(torch.corrcoef(torch.stack([ranks, others]))[0, 1]), abs_tol=1e-6)
    assert spearman(torch.ones(4), one) is None


def test_agreement_of_a_localization_with_itself_is_whole_and_with_a_random_one_chance():
    generator = torch.Generator().manual_seed(1)
    one, other = (localization(*torch.rand(2, 2000, generator=generator)) for _ in range(2))
    same = agreement(one, one, at=(10, 100))
    assert same.jaccard == {10: 1.0, 100: 1.0} and math.isclose(same.overlap, 1.0)
    found = agreement(one, other, at=(400, 9999), names=("a", "b"))
    assert set(found.jaccard) == {400} and abs(found.jaccard[400] - found.chance[400]) < 0.03
    assert abs(found.correlation) < 0.06
    assert found.to_json()["top"][0]["k"] == 400


def test_every_pair_is_compared_once():
    named = {name: localization([1.0, 2.0, index]) for index, name in enumerate("abc")}
    assert [(entry.first, entry.second) for entry in agreements(named, at=(1,))] == [("a", "b"), ("a", "c"), ("b", "c")]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(MismatchError, match="a scores neurons and b heads, or at other sites"):
        agreement(localization([1.0]), localization([1.0], grain=Grain.HEAD), names=("a", "b"))
    with pytest.raises(MismatchError, match="other numbers of places"):
        agreement(localization([1.0]), localization([1.0, 2.0]))
    with pytest.raises(InputError, match=r"2 places are ranked; none of the sizes \[5\] fits"):
        agreement(localization([1.0, 2.0]), localization([1.0, 2.0]), at=(5,))
    with pytest.raises(InputError, match="persistence 1"):
        agreement(localization([1.0]), localization([1.0]), at=(1,), persistence=1.0)


def test_by_layer_makes_grains_comparable():
    neurons = by_layer(localization([1.0, -2.0], [3.0, 3.0]))
    assert {site.layer: float(score) for site, score in neurons.scores.items()} == {0: 3.0, 1: 6.0}
    weights = by_layer(localization(torch.ones(2, 3), 2 * torch.ones(2, 3), grain=Grain.WEIGHT))
    assert agreement(neurons, weights, at=(1,)).jaccard[1] == 1.0
    kept = by_layer(localization([[1.0, 2.0], [0.0, 1.0]], passages=("p", "q")))
    assert kept.scores[A].tolist() == [3.0, 1.0]


def test_stability_tells_a_steady_ranking_from_noise():
    generator, names = torch.Generator().manual_seed(2), tuple(f"p{index}" for index in range(20))
    steady = torch.arange(200.0).repeat(20, 1) + torch.rand(20, 200, generator=generator)
    noise = torch.rand(20, 200, generator=generator)
    assert stability(localization(steady, passages=names), k=10).mean > 0.95
    found = stability(localization(noise, passages=names), k=50)
    assert abs(found.mean - found.chance) < 0.08 and found.low <= found.mean <= found.high
    with pytest.raises(InputError, match="at least 4 passages"):
        stability(localization([1.0, 2.0]), k=1)
    with pytest.raises(InputError, match="expected 1 to 200"):
        stability(localization(noise, passages=names), k=201)


def test_ties_keep_their_order():
    assert ranking(torch.tensor([1.0, 2.0, 2.0, 0.0])) == [1, 2, 0, 3]
