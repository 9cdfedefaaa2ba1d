"""Comparisons with controls, on rows whose log p_z is written by hand."""

from __future__ import annotations

import math

import pytest

from memloc.measurement import Figure, Measurement
from memloc.measures.control import compared
from memloc.provenance import Provenance


def measured(log_pz: list[float], strict: list[bool] | None = None) -> Measurement:
    verdicts = strict or [False] * len(log_pz)
    pairs = zip(log_pz, verdicts, strict=True)
    rows = tuple({"id": f"{i}", "log_pz": level, "strict": hit} for i, (level, hit) in enumerate(pairs))
    return Measurement("extraction", {"strict rate": Figure("strict rate", 0.0, len(rows))}, rows, Provenance("x"))


def test_ranges_and_flags_are_counted():
    control = measured([-float(level) for level in range(10, 29)])  # 19 controls: -10 .. -28
    found = compared(measured([-1.0, -9.9, -10.0, -20.0, -28.0, -28.1]), control)
    assert found["inside controls' range"] == 4 / 6
    assert found["below controls' range"] == 1 / 6
    assert found["flagged against controls"] == 2 / 6
    assert [row["conformal_p"] for row in found.rows] == [0.05, 0.05, 0.1, 0.6, 1.0, 1.0]
    assert found.control is control and "strict rate" in found.figures


def test_eighteen_controls_flag_nothing_so_the_figure_is_left_out():
    found = compared(measured([-1.0]), measured([-10.0] * 18))
    assert "flagged against controls" not in found.figures
    assert found.rows[0]["conformal_p"] == pytest.approx(1 / 19)


def test_the_excess_is_a_difference_with_its_interval():
    control = measured([-9.0] * 80, [True] * 48 + [False] * 32)
    excess = compared(measured([-9.0] * 70, [True] * 56 + [False] * 14), control).figures["excess strict rate"]
    assert (excess.value, excess.low, excess.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_scores_of_minus_infinity_on_both_sides_are_inside():
    found = compared(measured([-math.inf, -3.0]), measured([-math.inf] * 19))
    assert found["inside controls' range"] == 0.5 == found["flagged against controls"]
    assert [row["conformal_p"] for row in found.rows] == [1.0, 0.05]


def test_a_measure_without_log_pz_just_gets_its_control_beside_it():
    plain = Measurement("perplexity", {}, ({"id": "a", "nll": 1.0},), Provenance("x"))
    assert compared(plain, plain) == plain.with_control(plain)
