"""Intervals against exact probabilities and published examples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from memloc.statistics import (
    bootstrap_interval,
    conformal_p,
    difference_interval,
    median_interval,
    rate_interval,
    ratio_interval,
    share_interval,
)


def chance(hits: int, n: int, rate: float) -> float:
    return math.comb(n, hits) * rate**hits * (1 - rate) ** (n - hits)


def test_wilson_as_published():
    """81 of 263: Newcombe 1998, table I, gives 0.2553 to 0.3662."""
    assert rate_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@pytest.mark.parametrize("n", [1, 3, 442])
def test_no_hit_of_n_is_bounded_exactly(n):
    """At the upper end, seeing no hit has probability 5 %; all hits is its mirror."""
    low, high = rate_interval(0, n)
    assert low == 0 and (1 - high) ** n == pytest.approx(0.05)
    assert rate_interval(n, n) == pytest.approx((1 - high, 1))


def test_no_row_says_nothing():
    assert rate_interval(0, 0) == (0, 1)


@pytest.mark.parametrize("rate", [0.1, 0.37, 0.5, 0.8])
def test_rate_intervals_cover_about_as_often_as_they_say(rate):
    n = 60
    cover = sum(
        chance(hits, n, rate) for hits in range(n + 1) if rate_interval(hits, n)[0] <= rate <= rate_interval(hits, n)[1]
    )
    assert 0.92 < cover < 0.98


def test_a_mean_of_shares_is_a_rate_where_all_are_whole():
    assert share_interval([1.0, 0.0, 1.0]) == rate_interval(2, 3)
    assert share_interval([1.0] * 20) == rate_interval(20, 20)
    low, high = share_interval([0.5, 1.0, 0.0, 0.75, 0.5])
    assert 0 < low < 0.55 < high < 1


def test_the_bootstrap_of_a_mean_is_as_wide_as_theory_says():
    values = np.random.default_rng(3).normal(5, 2, 400)
    low, high = bootstrap_interval(values.tolist(), draws=4000)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert bootstrap_interval(values.tolist(), seed=1) != bootstrap_interval(values.tolist(), seed=2)


def test_the_bootstrap_is_seeded_and_needs_two_rows():
    assert bootstrap_interval([1.0, 2.0, 5.0]) == bootstrap_interval([1.0, 2.0, 5.0])
    assert bootstrap_interval([1.0]) == (-math.inf, math.inf)
    assert ratio_interval([1.0], [2.0]) == (-math.inf, math.inf)


def test_infinite_values_make_infinite_ends():
    assert bootstrap_interval([-math.inf, 1.0, 1.0, 1.0])[0] == -math.inf


def test_a_ratio_is_token_weighted():
    """Rows of equal rate and unequal length: the ratio is that rate whatever is drawn."""
    assert ratio_interval([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == pytest.approx((2, 2))
    low, high = ratio_interval([1.0, 20.0, 3.0, 9.0], [1.0, 10.0, 1.0, 9.0])
    assert low < 33 / 21 < high


@pytest.mark.parametrize("n", [6, 7, 20, 101])
def test_median_intervals_cover_at_least_95_percent_and_the_next_narrower_does_not(n):
    """Of ordered values 0..n-1 the ends are ranks; coverage is a binomial sum, exact for every distribution."""
    low, high = median_interval([float(value) for value in range(n)][::-1])
    rank = int(low) + 1
    assert high == n - rank
    outside = [2 * sum(chance(hits, n, 0.5) for hits in range(r)) for r in (rank, rank + 1)]
    assert outside[0] <= 0.05 < outside[1]


def test_five_rows_cannot_bound_a_median():
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (-math.inf, math.inf)
    assert median_interval([]) == (-math.inf, math.inf)


def test_a_median_takes_infinite_values_as_they_come():
    assert median_interval([-math.inf] * 5 + [1.0]) == (-math.inf, 1.0)


def test_a_median_of_very_many_rows_is_quick():
    low, high = median_interval(np.linspace(0, 1, 20001).tolist())
    assert (low, high) == pytest.approx((0.5 - 0.98 / math.sqrt(20001), 0.5 + 0.98 / math.sqrt(20001)), abs=1e-4)


@pytest.mark.parametrize(
    ("counts", "ends"),
    [((56, 70, 48, 80), (0.0524, 0.3339)), ((9, 10, 3, 10), (0.1705, 0.8090)), ((10, 10, 0, 20), (0.6791, 1.0)),
     ((5, 56, 0, 29), (-0.0381, 0.1926))],
)  # fmt: skip
def test_a_difference_of_rates_as_published(counts, ends):
    """Newcombe 1998, table II, method 10."""
    assert difference_interval(*counts) == pytest.approx(ends, abs=5e-5)


def test_a_difference_without_rows_says_nothing():
    assert difference_interval(3, 4, 0, 0) == (-1, 1) == difference_interval(0, 0, 3, 4)


def test_conformal_p_is_small_no_oftener_than_it_says():
    """Any of m + 1 exchangeable values may be the new one: count over all, ties included."""
    values = np.random.default_rng(0).integers(0, 9, 40).astype(float).tolist()
    found = [conformal_p([value], values[:i] + values[i + 1 :])[0] for i, value in enumerate(values)]
    for alpha in (0.025, 0.05, 0.1, 0.5):
        assert sum(p <= alpha + 1e-12 for p in found) <= alpha * len(values) + 1e-9


def test_conformal_p_counts_controls_at_least_as_large():
    assert conformal_p([5.0, 3.0, 2.5, -1.0], [1.0, 2.0, 3.0]) == (0.25, 0.5, 0.5, 1.0)
    assert conformal_p([-math.inf], [-math.inf, 0.0]) == (1.0,)
    assert conformal_p([0.0], []) == (1.0,)
