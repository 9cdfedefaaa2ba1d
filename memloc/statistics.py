"""Intervals: what a figure of n rows can and cannot say. Numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

Z95 = 1.959963984540054


def rate_interval(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a rate; at 0 of n the upper end is the exact 1 - 0.05^(1/n), at n of n its mirror.

    Args:
        hits: rows that count.
        n: all rows; with 0 rows the interval is (0, 1).

    Source: Wilson 1927; the exact ends are the one-sided binomial bound ("rule of three").
    """
    if n == 0:
        return 0.0, 1.0
    bound = 1 - 0.05 ** (1 / n)
    if hits == 0:
        return 0.0, bound
    if hits == n:
        return 1 - bound, 1.0
    return _wilson(hits, n)


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of `values` (rows are resampled).

    Infinite values make the ends infinite; fewer than two rows give (-inf, inf).
    """
    rows = np.asarray(values, dtype=np.float64)
    if len(rows) < 2:
        return -math.inf, math.inf
    picks = np.random.default_rng(seed).integers(0, len(rows), (draws, len(rows)))
    with np.errstate(invalid="ignore"):
        means = rows[picks].mean(1)
    low, high = np.quantile(means, [0.025, 0.975], method="nearest")
    return float(low), float(high)


def ratio_interval(
    parts: Sequence[float], wholes: Sequence[float], *, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """95 % bootstrap interval of sum(parts) / sum(wholes), rows resampled in pairs (a token-weighted mean)."""
    top, bottom = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)
    if len(top) < 2:
        return -math.inf, math.inf
    picks = np.random.default_rng(seed).integers(0, len(top), (draws, len(top)))
    low, high = np.quantile(top[picks].sum(1) / bottom[picks].sum(1), [0.025, 0.975])
    return float(low), float(high)


def share_interval(shares: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of shares in [0, 1], one a row: `rate_interval` where all are 0 or 1, else bootstrap.

    So a mean of exactly 0 or 1 gets the exact bound, not a bootstrap interval of width 0.
    """
    if all(share in (0, 1) for share in shares):
        return rate_interval(int(sum(shares)), len(shares))
    low, high = bootstrap_interval(shares, seed=seed)
    return max(0.0, low), min(1.0, high)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Interval of the median that covers at least 95 %, whatever the distribution: two of the ordered values.

    Infinite values are values like others. Below 6 rows not even (min, max) covers 95 %: the ends are infinite.

    Source: the sign test's interval; rows below the median are Binomial(n, 1/2).
    """
    n = len(values)
    ordered = sorted(float(value) for value in values)
    tail, rank = 0.0, 0
    while rank < n // 2:
        tail += math.exp(math.lgamma(n + 1) - math.lgamma(rank + 1) - math.lgamma(n - rank + 1) - n * math.log(2))
        if tail > 0.025:
            break
        rank += 1
    return (ordered[rank - 1], ordered[n - rank]) if rank else (-math.inf, math.inf)


def difference_interval(hits: int, n: int, control_hits: int, control_n: int) -> tuple[float, float]:
    """95 % interval of a rate minus an independent control rate; with no rows on a side, (-1, 1).

    Source: Newcombe 1998, hybrid of the two Wilson intervals.
    """
    if n == 0 or control_n == 0:
        return -1.0, 1.0
    rate, control = hits / n, control_hits / control_n
    (low, high), (control_low, control_high) = _wilson(hits, n), _wilson(control_hits, control_n)
    difference = rate - control
    return (
        max(-1.0, difference - math.hypot(rate - low, control_high - control)),
        min(1.0, difference + math.hypot(high - rate, control - control_low)),
    )


def conformal_p(scores: Sequence[float], controls: Sequence[float]) -> tuple[float, ...]:
    """For every score, (1 + controls at least as large) / (1 + controls).

    If a row were one more control, exchangeable with them, this would be at most α with probability at most α. It
    cannot fall below 1 / (1 + controls): 19 controls are the least that can flag at 5 %.

    Source: Vovk et al. 2005, conformal p-values.
    """
    ordered = np.sort(np.asarray(controls, dtype=np.float64))
    larger = len(ordered) - np.searchsorted(ordered, np.asarray(scores, dtype=np.float64), side="left")
    return tuple(float(value) for value in (1 + larger) / (1 + len(ordered)))


def mcnemar_exact(lost: int, gained: int) -> float:
    """Two-sided p of the flips between two paired verdicts: how surprising this split would be if either way was even.

    Args:
        lost: rows that held before and do not after.
        gained: rows that hold only after.

    Returns:
        min(1, 2 * P(Binomial(lost + gained, 1/2) <= min(lost, gained))); 1.0 when nothing flipped.

    Source: McNemar 1947, exact form. Agreement on the rows that did not flip says nothing and does not enter.
    """
    flips = lost + gained
    tail = sum(math.comb(flips, k) for k in range(min(lost, gained) + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 1 << flips)))


def paired_rate_interval(both: int, lost: int, gained: int, neither: int) -> tuple[float, float]:
    """95 % interval of the change of a rate on the same rows: rate after minus rate before.

    Unlike a bootstrap it has a width when every row flips the same way, so 5 of 5 becoming 0 of 5 is not "-100 %
    exactly".

    Args:
        both: rows that hold before and after.
        lost: only before.
        gained: only after.
        neither: never.

    Returns:
        Lower and upper end, in [-1, 1]; (-1, 1) without rows.

    Source: Newcombe 1998, Statistics in Medicine 17:2635, method 10 (Wilson limits joined with the correlation phi).
    """
    n = both + lost + gained + neither
    if n == 0:
        return -1.0, 1.0
    after, before = (both + gained) / n, (both + lost) / n
    (low1, high1), (low2, high2) = _wilson(both + gained, n), _wilson(both + lost, n)
    product = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    excess = both * neither - lost * gained
    phi = 0.0 if product == 0 else (max(excess - n / 2, 0) if excess > 0 else excess) / math.sqrt(product)
    down = (after - low1) ** 2 - 2 * phi * (after - low1) * (high2 - before) + (high2 - before) ** 2
    up = (high1 - after) ** 2 - 2 * phi * (high1 - after) * (before - low2) + (before - low2) ** 2
    change = after - before
    return max(-1.0, change - math.sqrt(max(0.0, down))), min(1.0, change + math.sqrt(max(0.0, up)))


def _wilson(hits: int, n: int) -> tuple[float, float]:
    p, z2 = hits / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
