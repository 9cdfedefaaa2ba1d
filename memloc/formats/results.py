"""A measurement in the result files of others: lm-eval's and open-unlearning's.

Names lose their spaces (and lm-eval's their commas, which part metric and filter there). A standard error is given
only where the measurement's own rows have the figure as their mean, so that it is that mean's error; elsewhere it is
"N/A", as lm-eval writes it. Intervals, controls and provenance, for which neither format has a place, go under "memloc"
in lm-eval's; a control stands beside as a task, or a metric, of its own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from memloc.measurement import Figure, Measurement

ROW_KEYS = {"strict rate": "strict", "mean nll": "nll"}
"""Figures whose rows have another name."""


def lm_eval(measured: Measurement) -> dict[str, Any]:
    """As `results_*.json` of lm-eval's `EvaluationTracker`: one task a measure, its control as NAME_control."""
    tasks = {measured.measure: measured}
    if measured.control is not None:
        tasks[f"{measured.measure}_control"] = measured.control
    return {
        "results": {name: _task(name, part) for name, part in tasks.items()},
        "group_subtasks": {name: [] for name in tasks},
        "configs": {
            name: {"task": name, "metadata": {"version": 1.0}, "settings": dict(part.provenance.settings)}
            for name, part in tasks.items()
        },
        "versions": dict.fromkeys(tasks, 1.0),
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": {
            name: {_name(key): figure.better == "higher" for key, figure in part.figures.items() if figure.better}
            for name, part in tasks.items()
        },
        "n-samples": {name: {"original": len(part.rows), "effective": len(part.rows)} for name, part in tasks.items()},
        "config": {"model": "memloc", "model_args": f"digest={measured.provenance.inputs.get('model', '')}"},
        "git_hash": None,
        "memloc": {
            "provenance": measured.provenance.to_json(),
            "intervals": {name: _intervals(part) for name, part in tasks.items()},
        },
    }


def open_unlearning(measured: Measurement) -> dict[str, Any]:
    """As open-unlearning's `…_EVAL.json`: metric to agg_value and value_by_index; the control's as control_NAME."""
    found = _metrics(measured, "")
    if measured.control is not None:
        found |= _metrics(measured.control, "control_")
    return dict(sorted(found.items()))


def open_unlearning_summary(measured: Measurement) -> dict[str, Any]:
    """As open-unlearning's `…_SUMMARY.json`: metric to agg_value."""
    found = open_unlearning(measured)
    return {name: metric["agg_value"] for name, metric in found.items() if metric["agg_value"] is not None}


WRITERS: dict[str, Callable[[Measurement], dict[str, Any]]] = {
    "lm-eval": lm_eval,
    "open-unlearning": open_unlearning,
    "open-unlearning-summary": open_unlearning_summary,
}
"""Result formats by the name --as takes."""


def _task(name: str, measured: Measurement) -> dict[str, Any]:
    found: dict[str, Any] = {"alias": name}
    for key, figure in measured.figures.items():
        found[f"{_name(key)},none"] = _plain(figure.value)
        found[f"{_name(key)}_stderr,none"] = _stderr(measured, figure)
    return found


def _stderr(measured: Measurement, figure: Figure) -> float | str:
    values = [value for value in _column(measured, figure).values() if value is not None]
    if len(values) < 2:
        return "N/A"
    return statistics.stdev(values) / math.sqrt(len(values))


def _column(measured: Measurement, figure: Figure) -> dict[int, float | None]:
    """The figure's value of every row, None where a row has none; empty where the figure is not the rows' mean."""
    key = next((name for name in (figure.name, ROW_KEYS.get(figure.name, ""), _name(figure.name))
                if any(name in row for row in measured.rows)), None)  # fmt: skip
    if key is None:
        return {}
    values = {index: _number(row.get(key)) for index, row in enumerate(measured.rows)}
    given = [value for value in values.values() if value is not None]
    mean = math.fsum(given) / len(given) if given else math.nan
    return values if math.isclose(mean, figure.value, rel_tol=1e-9, abs_tol=1e-12) else {}


def _metrics(measured: Measurement, head: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, figure in measured.figures.items():
        rows = _column(measured, figure)
        metric: dict[str, Any] = {"agg_value": _number(figure.value)}
        if rows:
            metric["value_by_index"] = {str(index): {"score": value} for index, value in rows.items()}
        found[head + _name(key)] = metric
    losses = {index: _number(row.get("nll")) for index, row in enumerate(measured.rows)}
    if losses and all(loss is not None for loss in losses.values()):
        # Their "probability": exp of minus the mean loss of a row's tokens.
        rows_of = {str(index): {"prob": math.exp(-(loss or 0.0)), "avg_loss": loss} for index, loss in losses.items()}
        mean = math.fsum(row["prob"] or 0.0 for row in rows_of.values()) / len(rows_of)
        found[head + "probability"] = {"agg_value": mean, "value_by_index": rows_of}
    return found


def _intervals(measured: Measurement) -> dict[str, Any]:
    return {
        _name(key): {"low": _plain(figure.low), "high": _plain(figure.high), "n": figure.n, "unit": figure.unit}
        for key, figure in measured.figures.items()
    }


def _name(name: str) -> str:
    return name.replace(",", "").replace(" ", "_")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """A number for strict JSON: one that is not finite by its name."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def is_measurement(record: Any) -> bool:
    """Whether a JSON object is a measurement of ours."""
    return isinstance(record, Mapping) and str(record.get("schema", "")).startswith("memloc.measurement/")
