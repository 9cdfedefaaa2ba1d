"""One group of items measured before, after and under the random control: what changed, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from memloc.errors import MismatchError
from memloc.measurement import Figure, Measurement
from memloc.report.glossary import FIGURES
from memloc.report.wording import value_of
from memloc.statistics import mcnemar_exact, paired_rate_interval

Goal = Literal["forget", "keep", "learn", ""]

DATA = ("passages", "facts", "text", "tokenizer")
"""The inputs in which two measurements must agree to stand in one row."""

WITHOUT_EFFECT = {"batch", "batch_size", "size"}
"""Settings of a measure that may differ: they change the cost, not the number."""

HEADLINES: Mapping[str, tuple[str, ...]] = {
    "extraction": ("strict rate", "median log p_z", "queries to leak any"),
    "perplexity": ("perplexity",),
    "facts": ("efficacy success", "paraphrase success", "neighbour success"),
}

_FIELDS = {
    "strict rate": "strict", "first miss": "first_miss", "median log p_z": "log_pz",
    "log10 p_z": "log_pz", "exact memorization": "exact_memorization", 
    "extraction strength": "extraction_strength", "mean nll": "nll",
}  # fmt: skip
"""Which entry of a row a figure is made from, where the names differ."""

_COUNTS = {"inside controls' range", "below controls' range", "flagged against controls"}
"""Rates that count rows although no entry of a row says which."""

DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A named group of items, measured by one measure on the same data each time.

    Attributes:
        name: such as "targets", "retained passages", "held-out text".
        before: on the model as it came.
        after: on the edited model; None where there is nothing to compare yet.
        random: on the model under the random edit of equal size.
        goal: "forget" and "learn" want the figures to move the good way, "keep" wants them to stay.
        explanation: one sentence on what the group is.
        headline: names of the figures for the first screen; empty for the measure's usual ones.

    Raises:
        MismatchError: the measurements are of different measures, settings, data or items; also where their controls
            are. The message names the group and both sides.
    """

    name: str
    before: Measurement
    after: Measurement | None = None
    random: Measurement | None = None
    goal: Goal = ""
    explanation: str = ""
    headline: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for arm, other in (("after", self.after), ("random control", self.random)):
            if other is not None:
                _same_data(self.name, arm, self.before, other)
                if self.before.control is not None and other.control is not None:
                    _same_data(f"{self.name}, never-seen controls", arm, self.before.control, other.control)

    @property
    def arms(self) -> dict[str, Measurement]:
        """The measurements that are there, by the names the report's JSON uses."""
        after = self.after or self.before
        found = {"before": self.before, "after": self.after, "random": self.random}
        found |= {"control_before": self.before.control, "control": after.control or self.before.control}
        return {name: arm for name, arm in found.items() if arm is not None}

    def to_json(self) -> dict[str, Any]:
        """Figures, changes, flips and rows as strict JSON values."""
        arms = self.arms
        usual = self.headline or HEADLINES.get(self.before.measure, tuple(self.before.figures))[:3]
        if self.goal == "keep" and not self.headline:
            usual = usual[:1]
        return {
            "name": self.name,
            "explanation": self.explanation,
            "measure": self.before.measure,
            "goal": self.goal,
            "headline": [name for name in usual if name in self.before.figures],
            "figures": [self._figure(name) for name in self._names()],
            "flips": [found for found in (self._flips("before"), self._flips("random")) if found is not None],
            "rows": {name: arm.to_json()["rows"] for name, arm in arms.items() if name != "control_before"},
            "provenance": {name: arm.provenance.to_json() for name, arm in arms.items()},
        }

    def _names(self) -> list[str]:
        after = self.after.figures if self.after else {}
        return [*self.before.figures, *(name for name in after if name not in self.before.figures)]

    def _figure(self, name: str) -> dict[str, Any]:
        cells = {arm: figure_cell(measured, name) for arm, measured in self.arms.items()}
        first = self.before.figures.get(name) or (self.after or self.before).figures[name]
        known = FIGURES.get(name)
        return {
            "name": name,
            "unit": first.unit,
            "better": first.better or (known.better if known else ""),
            **{arm: cells.get(arm) for arm in ("before", "after", "random", "control_before", "control")},
            "change": self._change(name, self.after),
            "change_random": self._change(name, self.random),
        }

    def _change(self, name: str, other: Measurement | None) -> dict[str, Any] | None:
        if other is None or name not in self.before.figures or name not in other.figures:
            return None
        old, new = self.before.figures[name], other.figures[name]
        kind = {"share": "points", "perplexity": "relative", "queries": "factor"}.get(old.unit, "difference")
        low, high, how = _change_interval(name, kind, self.before, other)
        value = plain(_moved(kind, old.value, new.value))
        return {"kind": kind, "value": value, "low": plain(low), "high": plain(high), "how": how}

    def _flips(self, against: str) -> dict[str, Any] | None:
        other = self.before if against == "before" else self.random
        key = None if self.after is None or other is None else _verdict(other, self.after)
        if key is None or other is None or self.after is None:
            return None
        held, holds = _by_id(other, key), _by_id(self.after, key)
        lost = [name for name in held if held[name] and not holds[name]]
        gained = [name for name in held if holds[name] and not held[name]]
        p = mcnemar_exact(len(lost), len(gained))
        kept = sum(bool(held[name] and holds[name]) for name in held)
        return {
            "verdict": key,
            "against": against,
            "n": len(held),
            "kept": kept,
            "lost": lost,
            "gained": gained,
            "p": p,
        }


def plain(value: Any) -> Any:
    """A number as strict JSON: infinite ones as "inf" and "-inf", missing ones as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _same_data(group: str, arm: str, one: Measurement, other: Measurement) -> None:
    if one.measure != other.measure:
        raise MismatchError(
            f"{group}: {one.measure} before but {other.measure} for {arm}; measure both with one measure"
        )
    mine, theirs = one.provenance, other.provenance
    for name in DATA:
        if name in mine.inputs and name in theirs.inputs and mine.inputs[name] != theirs.inputs[name]:
            raise MismatchError(
                f"{group}: {name} {mine.inputs[name][:12]} before but {theirs.inputs[name][:12]} for {arm}; "
                "measure the same data again, nothing was written"
            )
    for name in sorted((mine.settings.keys() | theirs.settings.keys()) - WITHOUT_EFFECT):
        if mine.settings.get(name) != theirs.settings.get(name):
            raise MismatchError(
                f"{group}: {one.measure} with {name}={mine.settings.get(name)!r} before but "
                f"{theirs.settings.get(name)!r} for {arm}; measure with the same settings, nothing was written"
            )
    ids, others = [row.get("id") for row in one.rows], [row.get("id") for row in other.rows]
    if sorted(map(str, ids)) != sorted(map(str, others)):
        odd = sorted(set(map(str, ids)) ^ set(map(str, others)))[:1] or ["one of them twice"]
        raise MismatchError(
            f"{group}: {len(ids)} items before, {len(others)} for {arm}, which do not agree on {odd[0]}"
        )


def figure_cell(measured: Measurement, name: str) -> dict[str, Any] | None:
    """One figure of one measurement as the report's JSON holds it; `hits` where it counts rows."""
    figure = measured.figures.get(name)
    if figure is None:
        return None
    return {
        "value": plain(float(figure.value)),
        "n": figure.n,
        "low": plain(figure.low),
        "high": plain(figure.high),
        "hits": _hits(measured, figure),
        "unit": figure.unit,
    }


def _hits(measured: Measurement, figure: Figure) -> int | None:
    """How many rows a rate counts; None where the figure is not a count of rows."""
    count = figure.value * figure.n
    if figure.name in _COUNTS and math.isclose(count, round(count), abs_tol=1e-6):
        return round(count)
    verdicts = [row.get(_FIELDS.get(figure.name, figure.name)) for row in measured.rows]
    if figure.unit != "share" or not verdicts or not all(isinstance(entry, bool) for entry in verdicts):
        return None
    hits = sum(bool(entry) for entry in verdicts)
    return hits if len(verdicts) == figure.n and math.isclose(hits, figure.value * figure.n, abs_tol=1e-6) else None


def _verdict(one: Measurement, other: Measurement) -> str | None:
    """The first entry that is a yes or no in every row of both."""
    keys = ["strict", *(key for key in (one.rows[0] if one.rows else {}) if key != "id")]
    rows = (*one.rows, *other.rows)
    return next((key for key in keys if all(isinstance(row.get(key), bool) for row in rows)), None)


def _by_id(measured: Measurement, key: str) -> dict[str, Any]:
    return {str(row["id"]): row.get(key) for row in measured.rows}


def _moved(kind: str, old: float, new: float) -> float:
    if kind == "relative":
        return new / old - 1 if old and math.isfinite(old) else math.nan
    if kind == "factor":
        return math.nan if not old or (math.isinf(old) and math.isinf(new)) else new / old
    return 0.0 if old == new else new - old


Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _change_interval(name: str, kind: str, one: Measurement, other: Measurement) -> tuple[float, float, str]:
    """Ends and method of the 95 % interval of a change; NaN ends where rows cannot reproduce the figure."""
    key = _FIELDS.get(name, name)
    if all(isinstance(row.get(key), bool) for row in (*one.rows, *other.rows)) and one.rows and kind == "points":
        held, holds = _by_id(one, key), _by_id(other, key)
        pairs = [(held[name], holds[name]) for name in held]
        counts = [pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]
        return *paired_rate_interval(*counts), "Newcombe, paired"
    values = _paired_values("nll" if name == "perplexity" else key, one, other)
    if values is not None and name == "log10 p_z":
        values = (values[0] / math.log(10), values[1] / math.log(10), values[2])
    if values is None or len(values[0]) < 2 or kind == "factor":
        return math.nan, math.nan, ""
    old, new, weights = values
    for statistic in (_mean, _median, _perplexity, _mean_tokens):
        with np.errstate(all="ignore"):
            found = [float(statistic(side[None], weights[None])[0]) for side in (old, new)]
        if all(_close(a, m.figures[name].value) for a, m in zip(found, (one, other), strict=True)):
            if kind == "points" and len(set((new - old).tolist())) == 1:
                return *_alike(float(new[0] - old[0]), len(old)), "exact bound where all rows change alike"
            return *_paired_bootstrap(statistic, kind, old, new, weights), f"paired bootstrap, {DRAWS} draws, seed 0"
    return math.nan, math.nan, ""


def _paired_values(key: str, one: Measurement, other: Measurement) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    held, holds = _by_id(one, key), _by_id(other, key)
    tokens = _by_id(one, "tokens")
    pairs = [(value_of(held[name]), value_of(holds[name]), value_of(tokens[name] or 1)) for name in held]
    if not pairs or any(entry is None for pair in pairs for entry in pair):
        return None
    old, new, weights = np.asarray(pairs, dtype=np.float64).T
    return old, new, weights


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.asarray(values.mean(1))


def _median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.asarray(np.median(values, axis=1))


def _mean_tokens(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.asarray((values * weights).sum(1) / weights.sum(1))


def _perplexity(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(_mean_tokens(values, weights)))


def _close(one: float, other: float) -> bool:
    return one == other or math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6)


def _alike(change: float, n: int) -> tuple[float, float]:
    """Bounds of a mean change in [-1, 1] when n rows all change alike, where a bootstrap would have no width.

    With 95 % confidence at most a share 1 - 0.05^(1/n) of all rows does otherwise, by no more than to -1 or to 1.
    """
    others = 1 - 0.05 ** (1 / n)
    return change - others * (change + 1), change + others * (1 - change)


def _paired_bootstrap(
    statistic: Statistic, kind: str, old: np.ndarray, new: np.ndarray, weights: np.ndarray
) -> tuple[float, float]:
    picks = np.random.default_rng(0).integers(0, len(old), (DRAWS, len(old)))
    with np.errstate(all="ignore"):
        first, second = statistic(old[picks], weights[picks]), statistic(new[picks], weights[picks])
        moved = second / first - 1 if kind == "relative" else np.where(first == second, 0, second - first)
    low, high = np.quantile(moved, [0.025, 0.975], method="nearest")
    return float(low), float(high)
