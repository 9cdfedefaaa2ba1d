"""McNemar's exact p and Newcombe's interval, against sums written out and published numbers."""

from __future__ import annotations

import math

import pytest

from memloc.statistics import mcnemar_exact, paired_rate_interval


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 0), (9, 3), (3, 9), (7, 7), (40, 12)])
def test_p_is_the_binomial_sum_written_out(lost, gained):
    flips = lost + gained
    outcomes = [math.comb(flips, k) / 2**flips for k in range(flips + 1)]
    written_out = sum(p for k, p in enumerate(outcomes) if k <= min(lost, gained))
    assert mcnemar_exact(lost, gained) == pytest.approx(min(1.0, 2 * written_out), rel=1e-12)


def test_p_survives_counts_beyond_what_a_float_can_hold():
    assert 0.0 <= mcnemar_exact(2000, 0) < 1e-300
    assert mcnemar_exact(1000, 1000) == 1.0


def test_interval_of_a_change_agrees_with_the_published_example():
    """Newcombe 1998: 36 both, 12 and 2 discordant, 0 neither; difference 0.2, method 10 gives 0.0569 to 0.3404."""
    assert paired_rate_interval(36, 2, 12, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)


@pytest.mark.parametrize("counts", [(0, 5, 0, 0), (12, 2, 9, 21), (3, 0, 0, 4), (0, 0, 0, 7), (1, 4, 4, 1)])
def test_interval_holds_the_change_and_turns_round_with_time(counts):
    both, lost, gained, neither = counts
    low, high = paired_rate_interval(both, lost, gained, neither)
    assert -1 <= low <= (gained - lost) / sum(counts) <= high <= 1
    assert low < high, "even when every row flips the same way"
    assert paired_rate_interval(both, gained, lost, neither) == pytest.approx((-high, -low))


def test_no_rows_say_nothing():
    assert paired_rate_interval(0, 0, 0, 0) == (-1.0, 1.0)
    assert mcnemar_exact(0, 0) == 1.0
