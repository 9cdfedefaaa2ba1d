"""Intervals: what a figure of n rows can and cannot say. Numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    p, z2 = hits / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


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
