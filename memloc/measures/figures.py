"""A figure and its interval, or none where too few rows leave both ends open."""

from __future__ import annotations

import math

from memloc.measurement import Figure


def figure(
    name: str, value: float, n: int, interval: tuple[float, float] | None, unit: str = "share", better: str = ""
) -> Figure:
    """A `Figure`; an interval of (-inf, inf) says nothing and becomes none."""
    low, high = (None, None) if interval is None or interval == (-math.inf, math.inf) else interval
    return Figure(name, float(value), n, low, high, unit, better)
