"""What a sweep found: one row an edit, one curve a method with its area beside its controls'."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editors.trade_offs.fronts import Judged, Point, area, area_interval, frontier
from editors.trade_offs.plan import LARGEST, OWN, RANDOM
from editors.trade_offs.work import Outcome
from memloc import store
from memloc.statistics import share_interval


@dataclass(frozen=True)
class Curve:
    """All edits of one localizer with one editor.

    Attributes:
        where: label of the localizer; "" for an editor alone.
        how: label of the editor.
        points: budget to point, the mean over seeds and draws, in the order of budgets.
        area: under the frontier of its edits.
        low: lower end of the area's interval (other targets, not other seeds).
        high: upper end.
        random: area of the random selections; None without.
        magnitude: area of the largest weights; None without.
        edits: how many were made.
        refused: how many were not, and why the first of them.
    """

    where: str
    how: str
    points: Mapping[float | None, Point]
    area: float | None
    low: float | None
    high: float | None
    random: float | None
    magnitude: float | None
    edits: int
    refused: tuple[int, str]

    @property
    def label(self) -> str:
        """As people read it."""
        return f"{self.where} → {self.how}" if self.where else self.how

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        points = [{"budget": at, "memorized": p.memorized, "utility": p.utility} for at, p in self.points.items()]
        return {**vars(self), "points": points, "refused": {"count": self.refused[0], "why": self.refused[1]}}


def rows_of(outcomes: Sequence[Outcome], before: Judged) -> list[dict[str, Any]]:
    """One row an edit, the model before first: shares with their intervals, utility, perplexity, what was moved."""
    found = [_row({"editor": "none", "control": OWN}, before, before, {})]
    for entry in outcomes:
        cell = entry.cell
        about = {
            "localizer": cell.where, "editor": cell.how, "budget": cell.budget, "seed": cell.seed,
            "control": cell.control, "draw": cell.draw,
        }  # fmt: skip
        if entry.judged is None:
            found.append({**about, "refused": entry.failed})
        else:
            more = {**entry.figures, "weights": entry.weights, "moved": entry.moved}
            found.append(_row(about, entry.judged, before, more))
    return found


def _row(about: Mapping[str, Any], judged: Judged, before: Judged, more: Mapping[str, Any]) -> dict[str, Any]:
    point, (low, high) = judged.point(before), share_interval(list(judged.targets))
    kept = {f"kept {name}": sum(rows) / len(rows) for name, rows in judged.kept.items() if len(rows)}
    return {
        **about, "memorized": point.memorized, "memorized low": low, "memorized high": high, "n": len(judged.targets),
        "utility": point.utility, **kept, "perplexity": judged.perplexity, **more,
    }  # fmt: skip


def curves_of(outcomes: Sequence[Outcome], before: Judged) -> list[Curve]:
    """A curve for each localizer and editor, the largest area first; those of which no edit was made last."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for entry in outcomes:
        groups.setdefault((entry.cell.where, entry.cell.how), []).append(entry)
    found = [_curve(key, entries, before) for key, entries in groups.items()]
    return sorted(found, key=lambda curve: (-(curve.area if curve.area is not None else -1.0), curve.label))


def _curve(key: tuple[str, str], entries: Sequence[Outcome], before: Judged) -> Curve:
    start = before.point(before).memorized
    sides = {side: [e for e in entries if e.cell.control == side and e.judged] for side in (OWN, RANDOM, LARGEST)}
    points = {side: [e.judged.point(before) for e in side_ if e.judged] for side, side_ in sides.items()}
    areas = {side: area(found, start) if found else None for side, found in points.items()}
    low, high = area_interval([e.judged for e in sides[OWN] if e.judged], before) if sides[OWN] else (None, None)
    failed = [entry.failed for entry in entries if entry.failed]
    return Curve(
        *key, _means(sides[OWN], before), areas[OWN], low, high, areas[RANDOM], areas[LARGEST],
        len(entries) - len(failed), (len(failed), failed[0] if failed else ""),
    )  # fmt: skip


def _means(entries: Sequence[Outcome], before: Judged) -> dict[float | None, Point]:
    groups: dict[float | None, list[Point]] = {}
    for entry in entries:
        if entry.judged is not None:
            groups.setdefault(entry.cell.budget, []).append(entry.judged.point(before))
    return {
        budget: Point(sum(p.memorized for p in points) / len(points), sum(p.utility for p in points) / len(points))
        for budget, points in sorted(groups.items(), key=lambda item: item[0] or 0.0)
    }


def best_of(outcomes: Sequence[Outcome], before: Judged) -> list[tuple[Point, Outcome]]:
    """The edits that no other beats in both, controls left out."""
    pairs = [(e.judged.point(before), e) for e in outcomes if e.judged is not None and e.cell.control == OWN]
    front = set(frontier([point for point, _ in pairs]))
    return sorted({point: (point, entry) for point, entry in reversed(pairs) if point in front}.values(), key=_first)


def _first(pair: tuple[Point, Outcome]) -> Point:
    return pair[0]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a row, columns in the order they first occur; atomically."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    store.write_text(path, text.getvalue())
