"""A rate is evidence only against text of the same kind that was never trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from memloc.measurement import Figure, Measurement
from memloc.measures.figures import figure
from memloc.passages import Passages
from memloc.statistics import conformal_p, difference_interval, rate_interval
from memloc.view import ModelView

ALPHA = 0.05
"""Share of controls that conformal flags may cost."""


def with_controls(
    measure: Callable[[ModelView, Passages], Measurement], view: ModelView, passages: Passages, controls: Passages
) -> Measurement:
    """Measure `passages` and `controls` alike, and compare where rows carry a verdict.

    For extraction, rows gain "conformal_p" (of their log p_z among the controls') and the figures:

    - "excess strict rate": the rate minus the controls' rate.
    - "inside controls' range": share of rows with log p_z at most the largest of the controls. After an edit this is
      the aim.
    - "below controls' range": share below the smallest: forgotten so hard that it shows.
    - "flagged against controls": share with conformal_p ≤ 5 %; left out below 19 controls, which could flag none.

    log p_z is a sum over tokens, so controls should have suffixes as long as the passages'.

    Args:
        measure: such as `Extraction()`.
        view: the model.
        passages: what is asked about.
        controls: text of the same kind that the model never saw; not a sample of the passages.

    Returns:
        The measurement of `passages`, with that of `controls` as its `control`.

    Cost: the measure, twice.

    Source: Cooper et al. 2026, arXiv:2607.12649 (calibration against matched text); Vovk et al. 2005 (conformal).
    """
    return compared(measure(view, passages), measure(view, controls))


def compared(found: Measurement, control: Measurement) -> Measurement:
    """`found` with `control` beside it and the figures that compare them; see `with_controls`."""
    beside = found.with_control(control)
    if not all("log_pz" in row for row in (*found.rows, *control.rows)):
        return beside
    scores, floor = ([float(row["log_pz"]) for row in part.rows] for part in (found, control))
    chances = conformal_p(scores, floor)
    rows = tuple({**row, "conformal_p": chance} for row, chance in zip(found.rows, chances, strict=True))
    figures = {item.name: item for item in _comparisons(found, control, scores, floor, chances)}
    return replace(beside, rows=rows, figures={**found.figures, **figures})


def _comparisons(
    found: Measurement, control: Measurement, scores: list[float], floor: list[float], chances: tuple[float, ...]
) -> Iterator[Figure]:
    n, m = len(scores), len(floor)
    hits, control_hits = (sum(bool(row["strict"]) for row in part.rows) for part in (found, control))
    ends = difference_interval(hits, n, control_hits, m)
    yield figure("excess strict rate", hits / n - control_hits / m, n, ends, "share", "lower")
    yield _rate("inside controls' range", sum(score <= max(floor) for score in scores), n, "higher")
    yield _rate("below controls' range", sum(score < min(floor) for score in scores), n, "")
    if 1 / (m + 1) <= ALPHA:
        yield _rate("flagged against controls", sum(chance <= ALPHA for chance in chances), n, "lower")


def _rate(name: str, hits: int, n: int, better: str) -> Figure:
    return figure(name, hits / n, n, rate_interval(hits, n), "share", better)
