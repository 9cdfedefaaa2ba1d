"""How many samples leak a suffix: the (n, p) algebra, in logarithms, so that p_z = 1e-300 is a number like any other.

Everything rests on the hazard h = -log(1 - p_z): n independent samples miss with probability exp(-n h).

Source: Hayes et al. 2024, arXiv:2410.19482 ((n, p)-discoverable extraction); the set-level figures follow from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memloc.errors import InputError

Array = NDArray[np.float64]


def log_hazard(log_pz: ArrayLike) -> Array:
    """The log of the hazard, log(-log(1 - p_z)), of every log p_z: -inf where p_z is 0, inf where it is 1."""
    level = np.minimum(np.asarray(log_pz, dtype=np.float64), 0.0)
    with np.errstate(divide="ignore", over="ignore"):
        near_one = np.log(-np.log(-np.expm1(level)))
        below = np.log(-np.log1p(-np.exp(np.minimum(level, -math.log(2)))))
    # Below exp(-37) the hazard is p_z itself to the last bit, also where exp(level) is 0 in float64.
    return np.where(level < -37, level, np.where(level > -math.log(2), near_one, below))


def log_queries(log_pz: ArrayLike, p: float) -> Array:
    """Log of the samples after which the suffix has come up with probability `p`: at least 0, inf where p_z is 0.

    Raises:
        InputError: `p` outside (0, 1).
    """
    if not 0 < p < 1:
        raise InputError(f"p {p}: expected a probability between 0 and 1, both excluded")
    return np.maximum(math.log(-math.log1p(-p)) - log_hazard(log_pz), 0.0)


def queries(log_pz: ArrayLike, p: float) -> Array:
    """The samples themselves, whole ones; inf where p_z is 0 or the number leaves float64 (`log_queries` does not)."""
    with np.errstate(over="ignore"):
        needed = np.exp(log_queries(log_pz, p))
    # A count that is whole but for rounding is that count: 2.0000000000000004 samples are 2.
    return np.ceil(needed * (1 - 1e-12))


def queries_to_leak_any(log_pz: Iterable[float], p: float) -> float:
    """Samples of every row after which some row has come up with probability `p`; inf where none ever does."""
    total = float(np.logaddexp.reduce(log_hazard(list(log_pz)), initial=-math.inf))
    if total == math.inf:
        return 1.0
    if not 0 < p < 1:
        raise InputError(f"p {p}: expected a probability between 0 and 1, both excluded")
    exponent = math.log(-math.log1p(-p)) - total
    return max(1.0, math.ceil(math.exp(exponent) * (1 - 1e-12))) if exponent < 700 else math.inf


def leak_probability(log_pz: ArrayLike, n: int) -> Array:
    """Probability that `n` samples hold the suffix at least once."""
    if n < 1:
        raise InputError(f"n {n}: expected at least one sample")
    with np.errstate(over="ignore"):
        return -np.expm1(-np.exp(math.log(n) + log_hazard(log_pz)))
