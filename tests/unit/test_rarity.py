"""Rarity and ranks, by hand and against slow definitions."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch.testing import assert_close

from memloc.passages import Passage
from memloc.reading.rarity import Types, average_ranks, passage_seed, pearson, spearman, token_counts


def slow_spearman(one, other):
    """Pearson's correlation of ranks, a rank being 1 + values below + half the other equal ones."""

    def ranks(values):
        return [1 + sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]

    a, b = ranks(one), ranks(other)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    top = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    bottom = math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))
    return top / bottom if bottom else 0.0


def test_equal_values_share_the_mean_of_their_ranks():
    values = torch.tensor([[5.0, 1.0, 5.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert average_ranks(values).tolist() == [[3.5, 1.0, 3.5, 2.0], [2.5, 2.5, 2.5, 2.5]]


def test_rounding_does_not_rank():
    """An even head in float32 is even, not a list of last bits; small but different values still differ."""
    even = torch.full((7,), 1 / 7) * (1 + 1e-7 * torch.arange(7).flip(0))
    assert average_ranks(even).tolist() == [4.0] * 7
    assert average_ranks(torch.tensor([1e-9, 2e-9, 1.0])).tolist() == [1.0, 2.0, 3.0]


def test_spearman_with_ties_is_the_slow_definition():
    source = random.Random(3)
    for size in (3, 4, 7, 23):
        for _ in range(20):
            one = [source.randint(0, 4) for _ in range(size)]
            other = [source.randint(0, 3) for _ in range(size)]
            found = float(spearman(torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)))
            assert math.isclose(found, slow_spearman(one, other), abs_tol=1e-12)


def test_a_worked_case_with_ties():
    """Ranks (1, 2.5, 2.5, 4) and (1, 2, 3, 4): covariance 4.5, lengths √4.5 and √5."""
    found = spearman(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0, 40.0]))
    assert math.isclose(float(found), 4.5 / math.sqrt(4.5 * 5), abs_tol=1e-12)


def test_counts_are_of_prefix_and_suffix():
    items = [Passage("a", (1, 1, 4), (2,)), Passage("b", (4,), (4, 4))]
    assert token_counts(items, 6).tolist() == [0, 2, 1, 0, 4, 0]


def text():
    """Token 7 stands three times and is common, 2 twice, 5 and 9 once and are rare; 9 the rarest."""
    corpus = torch.zeros(10, dtype=torch.long)
    corpus[[7, 2, 5, 9]] = torch.tensor([50, 20, 4, 1])
    return Types.of([7, 2, 7, 5, 2, 9, 7], corpus)


def test_a_type_counts_once_with_its_mean():
    types = text()
    assert len(types) == 4 and types.count.tolist() == [2, 1, 3, 1]
    received = torch.tensor([0.3, 0.1, 0.0, 0.2, 0.1, 0.3, 0.0])
    assert_close(types.mean(received), torch.tensor([0.1, 0.2, 0.1, 0.3], dtype=torch.float64), atol=1e-7, rtol=0)


def test_an_even_head_is_not_a_rarity_head_but_the_published_statistic_says_so():
    """The trap: bins that are summed are as full as their types are frequent, and frequent is what is not rare."""
    types, even = text(), torch.full((7,), 1 / 7)
    assert float(types.correlation(even)) == 0
    assert types.binned(even).tolist() == pytest.approx([1 / 7, 1 / 7, 2 / 7, 3 / 7])
    assert float(pearson(-types.binned(even))) < -0.9


def test_a_head_that_looks_for_rare_tokens_scores_one_and_its_opposite_minus_one():
    types = text()
    wanted = torch.tensor([0.01, 0.05, 0.01, 0.2, 0.05, 0.5, 0.01])
    assert float(types.correlation(wanted)) == pytest.approx(1)
    assert float(types.correlation(1 - wanted)) == pytest.approx(-1)
    # A first-token sink, here on the commonest type, does look like the opposite.
    assert float(types.correlation(torch.tensor([1.0, 0, 0, 0, 0, 0, 0]))) < -0.7


def test_types_of_equal_count_share_a_bin():
    corpus = torch.tensor([0, 3, 3, 9])
    assert Types.of([1, 2, 3, 3], corpus).binned(torch.tensor([0.5, 0.25, 0.125, 0.125])).tolist() == [0.75, 0.25]


def test_two_types_have_no_ranks_to_speak_of():
    types = Types.of([1, 2, 2], torch.tensor([0, 5, 1]))
    assert float(types.correlation(torch.rand(3))) == 0
    assert float(types.permuted(torch.rand(2, 3), 5, 0).abs().sum()) == 0


def test_dealt_at_random_a_correlation_has_mean_0_and_variance_1_in_types_minus_1():
    """Exactly, over all orders: the ground of the z-score; and so, about, over random ones."""
    types, received = text(), torch.tensor([0.3, 0.1, 0.0, 0.2, 0.3, 0.1, 0.0])
    mean = types.mean(received)
    every = [spearman(mean, types.rarity[list(order)]) for order in itertools.permutations(range(4))]
    every = torch.stack(every)
    assert abs(float(every.mean())) < 1e-12 and math.isclose(float((every**2).mean()), 1 / 3, abs_tol=1e-12)
    drawn = types.permuted(received, 2000, seed=5)
    assert abs(float(drawn.mean())) < 0.05 and abs(float((drawn**2).mean()) - 1 / 3) < 0.03


def test_one_dealing_serves_all_heads_and_its_seed_is_the_passages():
    types = text()
    received = torch.rand(7, generator=torch.Generator().manual_seed(0))
    twice = types.permuted(torch.stack([received, received]), 9, seed=1)
    assert_close(twice[:, 0], twice[:, 1])
    assert not torch.equal(twice[:, 0], types.permuted(received, 9, seed=2))
    one, other = Passage("a", (1, 2), (3,)), Passage("b", (1, 2), (3,))
    assert passage_seed(0, one) == passage_seed(0, one) != passage_seed(0, other)
    assert passage_seed(0, one) != passage_seed(1, one)
