"""What a report is made of besides measurements: verdicts, notes, curves, localizations and edits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from memloc.errors import InputError
from memloc.measurement import Measurement
from memloc.report.comparison import Comparison, figure_cell, plain
from memloc.report.texts import guarded
from memloc.report.wording import cell, label, number, signed
from memloc.results import maps, profiles
from memloc.sites import Grain
from memloc.statistics import rate_interval

if TYPE_CHECKING:
    from memloc.scores import Localization, Selection


@dataclass(frozen=True)
class Verdict:
    """One sentence of the result.

    Attributes:
        text: what was asked, such as "No target is recited word for word".
        holds: whether it does; None where the sentence only informs.
        measured: the numbers it rests on.
    """

    text: str
    holds: bool | None = None
    measured: str = ""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"text": self.text, "holds": self.holds, "measured": self.measured}


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A policy: a bound on one figure of one group after the edit. `judge` turns it into a verdict.

    Attributes:
        text: the sentence shown.
        group: name of the comparison.
        figure: name of the figure.
        at_most: upper bound, in the figure's unit; None for none.
        at_least: lower bound.
        relative: bounds are on after / before - 1 instead (0.03 for +3 %).
        within_controls: the figure must lie between the smallest and largest row of the never-seen controls, taking
            the row entry of that name; the gap is stated if it does not.
        arm: "after" or "random".
    """

    text: str
    group: str
    figure: str
    at_most: float | None = None
    at_least: float | None = None
    relative: bool = False
    within_controls: str = ""
    arm: str = "after"

    def judge(self, comparisons: Sequence[Comparison]) -> Verdict:
        """The verdict, with the numbers it rests on.

        Raises:
            InputError: no such group, arm or figure, or the condition bounds nothing.
        """
        group = next((entry for entry in comparisons if entry.name == self.group), None)
        arms = group.arms if group else {}
        if group is None or self.arm not in arms or self.figure not in arms[self.arm].figures:
            raise InputError(f"no {self.figure!r} of {self.group!r} under {self.arm!r} to judge {self.text!r} by")
        figure = arms[self.arm].figures[self.figure]
        value = figure.value
        if self.within_controls:
            return self._within(arms, value, figure.unit)
        if self.at_most is None and self.at_least is None:
            raise InputError(f"{self.text!r} bounds nothing; give at_most, at_least or within_controls")
        if self.relative:
            before = group.before[self.figure]
            value = value / before - 1 if before else math.nan
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        unit = "share" if self.relative else figure.unit
        bounds = [f"at least {number(plain(low), unit)}"] if self.at_least is not None else []
        bounds += [f"at most {number(plain(high), unit)}"] if self.at_most is not None else []
        kind = "change of " if self.relative else ""
        said = f"{signed(plain(value), unit)} (n = {figure.n})" if self.relative else self._counted(arms[self.arm])
        measured = f"{kind}{label(self.figure).lower()}: {said}; asked for: "
        return Verdict(self.text, low <= value <= high, measured + " and ".join(bounds))

    def _counted(self, measured: Measurement) -> str:
        found = figure_cell(measured, self.figure)
        return cell(found) if found is None or found["hits"] is not None else f"{cell(found)} (n = {found['n']})"

    def _within(self, arms: Mapping[str, Measurement], value: float, unit: str) -> Verdict:
        rows = arms["control"].rows if "control" in arms else ()
        values = [float(row[self.within_controls]) for row in rows if row.get(self.within_controls) is not None]
        if not values:
            raise InputError(f"{self.text!r} needs never-seen controls with {self.within_controls!r} in their rows")
        low, high = min(values), max(values)
        gap = max(low - value, value - high, 0.0)
        said = f"{label(self.figure).lower()}: {number(plain(value), unit)}; never-seen controls "
        said += f"{number(plain(low), unit)} to {number(plain(high), unit)} (n = {len(values)})"
        return Verdict(self.text, gap == 0, said + (f"; gap {number(plain(gap), unit)}" if gap else ""))


@dataclass(frozen=True)
class Note:
    """A finding in prose.

    Attributes:
        heading: what it is about.
        text: paragraphs, separated by an empty line; shown as plain text.
    """

    heading: str
    text: str

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"heading": self.heading, "text": self.text}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Small lines or bars with their numbers.

    Attributes:
        title: above the figure.
        x, y: labels of the axes.
        series: name to points `{"x", "y", "low", "high", "n", "hits"}`; all but x and y may be missing.
        kind: "line", "bars", or "dose" (a share against duplicates, in doublings).
        unit: of y, as figures have it.
        text: one paragraph under the title.
    """

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[Mapping[str, Any]]]
    kind: str = "line"
    unit: str = ""
    text: str = ""

    def to_json(self) -> dict[str, Any]:
        """As strict JSON values."""
        series = {
            name: [{key: plain(value) for key, value in point.items()} for point in points]
            for name, points in self.series.items()
        }
        found = {"title": self.title, "x": self.x, "y": self.y, "kind": self.kind, "unit": self.unit}
        return {**found, "text": self.text, "series": series}


def dose_curve(measurements: Mapping[str, Measurement], *, title: str = "Extraction by dose", text: str = "") -> Curve:
    """Share recited word for word against how often a passage stood in the training text, with Wilson intervals.

    Args:
        measurements: name of the line ("before", "after") to an extraction whose rows have "dose" and "strict".
        title: above the figure.
        text: one paragraph under it.

    Raises:
        InputError: no row of a measurement has both.
    """
    series = {}
    for name, measured in measurements.items():
        doses: dict[float, list[bool]] = {}
        for row in measured.rows:
            if row.get("dose") is not None and row.get("strict") is not None:
                doses.setdefault(row["dose"], []).append(bool(row["strict"]))
        if not doses:
            raise InputError(f"{name}: no row has a dose and a strict verdict, so there is no curve to draw")
        series[name] = [_rate_point(dose, verdicts) for dose, verdicts in sorted(doses.items())]
    x, y = "times seen in training", "recited word for word"
    return Curve(title=title, x=x, y=y, series=series, kind="dose", unit="share", text=text)


def _rate_point(x: float, verdicts: Sequence[bool]) -> dict[str, Any]:
    hits, n = sum(verdicts), len(verdicts)
    low, high = rate_interval(hits, n)
    return {"x": x, "y": hits / n, "low": low, "high": high, "hits": hits, "n": n}


@dataclass(frozen=True, kw_only=True)
class Located:
    """A localization to show.

    Attributes:
        localization: of the memorized passages.
        title: above it; the method's name if empty.
        control: the same method on controls.
        selection: what was chosen from it.
        text: one paragraph.
        n: passages it stands on, where the localization does not keep them.
        tokens: passage to the text of each of its tokens, for maps of positions; on the page only with `show_text`.
        prefixes: passage to the tokens of its prefix, likewise.
    """

    localization: Localization
    title: str = ""
    control: Localization | None = None
    selection: Selection | None = None
    text: str = ""
    n: int | None = None
    tokens: Mapping[str, Sequence[str]] | None = None
    prefixes: Mapping[str, int] | None = None

    def to_json(self, *, show_text: bool = False) -> dict[str, Any]:
        """Shares by layer and component, best neurons, maps, settings and notes, as JSON values."""
        mine, made = self.localization, self.localization.provenance
        spoken = self.tokens if show_text else None
        by_position = mine.grain is Grain.POSITION
        chosen = self.selection
        return {
            "title": self.title or made.method,
            "text": self.text,
            "grain": str(mine.grain),
            "n": self.n if mine.passages is None else len(mine.passages),
            "count": mine.count,
            "provenance": guarded(made.to_json(), show_text=show_text),
            "notes": guarded(jsonable(mine.notes), show_text=show_text),
            "layers": profiles.layer_profile(mine, self.control),
            "components": profiles.component_profile(mine, self.control),
            "heads": maps.head_map(mine, self.control, self.selection) if mine.grain is Grain.HEAD else None,
            "positions": (
                maps.position_maps(mine, tokens=spoken, prefixes=self.prefixes) if by_position else None
            ),
            "neurons": profiles.neuron_profile(mine, chosen) if _has_neurons(mine) else None,
            "selection": None if chosen is None else {
                "grain": str(chosen.grain), "count": chosen.count, "fraction": chosen.fraction,
                "by_layer": [[layer, count] for layer, count in profiles.chosen_by_layer(chosen).items()],
                "provenance": guarded(chosen.provenance.to_json(), show_text=show_text),
            },
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EditSummary:
    """An edit as its file's header tells it.

    Attributes:
        name: such as "unlearn" or "random control".
        header: the edit's header, JSON values; shown whatever it holds.
        sites: site to numbers (norm, share of entries touched, what survived rounding), shown as a table.
        bytes: size of the edit's file, or None.
        text: one paragraph.
    """

    name: str
    header: Mapping[str, Any] = field(default_factory=dict)
    sites: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    bytes: int | None = None
    text: str = ""

    def to_json(self, *, show_text: bool = False) -> dict[str, Any]:
        """As strict JSON values, free text in the header guarded."""
        return {
            "name": self.name,
            "text": self.text,
            "bytes": self.bytes,
            "header": guarded(jsonable(self.header), show_text=show_text),
            "sites": guarded(jsonable(self.sites), show_text=show_text),
        }


def _has_neurons(localization: Localization) -> bool:
    """Whether a strip of best places says anything: rows of scores, and not of tokens."""
    rows = bool(localization.scores) and localization.grain is not Grain.POSITION
    return rows and profiles.has_rows(localization)


def jsonable(value: Any) -> Any:
    """Strict JSON of nested mappings: infinite numbers as strings, anything unknown as its string."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return plain(value)
    return str(value)
