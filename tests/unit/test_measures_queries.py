"""The (n, p) algebra against exact decimals, far outside what float64 probabilities can hold."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest

from memloc.errors import InputError
from memloc.measures.queries import leak_probability, log_hazard, log_queries, queries, queries_to_leak_any

LEVELS = [-1e-15, -1e-9, -0.01, -0.3, -0.7, -1.0, -5.0, -20.0, -36.0, -38.0, -39.1, -115.0, -650.0]


def exact_hazard(level: float) -> Decimal:
    return -(1 - Decimal(level).exp()).ln()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_queries_agree_with_exact_arithmetic(level, p):
    with localcontext() as context:
        context.prec = 400
        needed = -(1 - Decimal(p)).ln() / exact_hazard(level)
    if needed > 1:
        np.testing.assert_allclose(log_queries(level, p), float(needed.ln()), rtol=1e-12, atol=1e-12)
    else:
        assert log_queries(level, p) == 0 and queries(level, p) == 1


def test_a_probability_of_1e_minus_17_keeps_all_its_digits():
    """In float64, 1 - 1e-17 is 1: the formula as printed divides by zero."""
    level = math.log(1e-17)
    assert math.log1p(-1e-17) != 0 and math.log(1 - 1e-17) == 0
    np.testing.assert_allclose(queries(level, 0.9), math.log(10) * 1e17, rtol=1e-12)


def test_nothing_needs_more_than_logarithms():
    np.testing.assert_allclose(log_queries(-5000.0, 0.9), 5000 + math.log(math.log(10)), rtol=1e-14)
    assert queries(-5000.0, 0.9) == math.inf


def test_certain_takes_one_and_impossible_takes_for_ever():
    assert queries([0.0, -math.inf], 0.9).tolist() == [1, math.inf]
    assert leak_probability([0.0, -math.inf], 7).tolist() == [1, 0]
    assert log_hazard([0.0, -math.inf, 1e-18]).tolist() == [math.inf, -math.inf, math.inf]


def test_whole_counts_come_out_whole():
    """p_z = 1/2: one sample for p = 1/2, two for 3/4, three for 7/8; a hair more asks for one more."""
    half = math.log(0.5)
    assert [float(queries(half, p)) for p in (0.5, 0.75, 0.875, 0.876)] == [1, 2, 3, 4]


def test_that_many_queries_do_reach_p_and_one_fewer_does_not():
    for level in (-0.5, -2.0, -7.3):
        n = int(queries(level, 0.9))
        assert leak_probability(level, n) >= 0.9 > leak_probability(level, n - 1 or 1) or n == 1


def test_leak_probability_agrees_with_exact_arithmetic():
    for level in LEVELS:
        with localcontext() as context:
            context.prec = 400
            exact = 1 - (-1000 * exact_hazard(level)).exp()
        np.testing.assert_allclose(leak_probability(level, 1000), float(exact), rtol=1e-11)


def test_leaking_any_row_of_a_set():
    levels = [-3.0, -4.0, -50.0, -math.inf]
    with localcontext() as context:
        context.prec = 60
        exact = math.ceil(-(1 - Decimal("0.9")).ln() / sum(exact_hazard(level) for level in levels[:3]))
    assert queries_to_leak_any(levels, 0.9) == exact
    assert queries_to_leak_any([-3.0], 0.9) == queries(-3.0, 0.9)
    assert queries_to_leak_any([-math.inf, -math.inf], 0.9) == math.inf
    assert queries_to_leak_any([-9.0, 0.0], 0.9) == 1
    assert queries_to_leak_any([-5000.0], 0.9) == math.inf


def test_a_set_of_equals_leaks_as_many_times_sooner():
    np.testing.assert_allclose(queries_to_leak_any([-40.0] * 1000, 0.5) * 1000, queries(-40.0, 0.5), rtol=1e-9)


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, math.nan])
def test_a_p_that_is_no_probability_is_refused(p):
    with pytest.raises(InputError, match="between 0 and 1"):
        queries(-3.0, p)
    with pytest.raises(InputError, match="between 0 and 1"):
        queries_to_leak_any([-3.0], p)


def test_no_sample_is_refused():
    with pytest.raises(InputError, match="at least one sample"):
        leak_probability(-3.0, 0)
