"""The measured part of a report: the first screen's table, and each group in full."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from memloc.report import wording
from memloc.report.blocks import ARM_NAMES, Block, Cell, Heading, Prose, Table
from memloc.report.wording import NONE, scalar

ITEMS_SHOWN, IDS_SHOWN = 200, 40


def headline(comparisons: Sequence[Mapping[str, Any]]) -> list[Block]:
    """The table of the first screen: each group's main figures before, after and under the controls."""
    rows = [
        (entry, f) for entry in comparisons for name in entry["headline"] for f in entry["figures"] if f["name"] == name
    ]
    if not rows:
        return [Prose("Nothing was measured.", quiet=True)]
    edited = any(figure["after"] for _, figure in rows)
    columns = ("", "before", "after", "random control of equal size", "never-seen controls")
    keys = ("before", "after", "random", "control") if edited else ("before", "control")
    shown = columns if edited else ("", "measured", "never-seen controls")
    made = tuple(
        (
            _named(e, f),
            *(_value(f, key, e["goal"], absent="not run" if key == "random" and f["after"] else NONE) for key in keys),
        )
        for e, f in rows
    )
    blocks: list[Block] = [Table(shown, made, role="headline")]
    if edited and any(figure["after"] and figure["random"] is None for _, figure in rows):
        blocks.append(Prose("Where the random control is “not run”, nothing separates the choice of places from mere "
                            "damage of that size.", quiet=True))  # fmt: skip
    return blocks


def _named(entry: Mapping[str, Any], figure: Mapping[str, Any]) -> Cell:
    mark = wording.direction(entry["goal"], figure["better"])
    meaning = f" ({mark} {wording.DIRECTIONS[mark]})" if mark else ""
    return Cell(entry["name"], wording.label(figure["name"]) + meaning, "text")


def _value(figure: Mapping[str, Any], arm: str, goal: str, *, absent: str = NONE) -> Cell:
    found = figure[arm]
    if found is None or not found["n"]:
        return Cell(absent if found is None else NONE, tone="quiet")
    ends = wording.interval(found)
    share = wording.value_of(found["value"]) if found["unit"] == "share" else None
    tone = _tone(figure["change"], goal, figure["better"]) if arm == "after" else ""
    return Cell(wording.cell(found), f"95 %: {ends}" if ends else "", tone=tone, share=share)


def _tone(moved: Mapping[str, Any] | None, goal: str, better: str) -> str:
    """Good or bad when the change has a side and its interval leaves out zero; else nothing."""
    value = None if moved is None else wording.value_of(moved["value"])
    if moved is None or value is None or not better or goal not in ("forget", "learn"):
        return ""
    zero = 1.0 if moved["kind"] == "factor" else 0.0
    ends = [wording.value_of(moved[end]) for end in ("low", "high")]
    if value == zero or (all(end is not None for end in ends) and ends[0] <= zero <= ends[1]):  # type: ignore[operator]
        return ""
    return "good" if (value < zero) == (better == "lower") else "bad"


_GOALS = {
    "forget": "Meant to be forgotten.",
    "keep": "Meant to stay as it was: the closer to “before”, the better.",
    "learn": "Meant to be learnt.",
}


def comparison(entry: Mapping[str, Any]) -> Iterator[Block]:
    """One group in full: all figures, flips by id, item by item."""
    yield Heading(3, entry["name"])
    said = " ".join(part for part in (entry["explanation"], _GOALS.get(entry["goal"], "")) if part)
    if said:
        yield Prose(said)
    edited = any(figure["after"] for figure in entry["figures"])
    columns: tuple[str, ...] = ("figure", "measured", "never-seen controls", "n")
    if edited:
        columns = ("figure", "before", "after", "change", "random control of equal size", *columns[2:])
    rows = tuple(_full_row(entry, figure, edited) for figure in entry["figures"])
    yield Table(
        columns, rows, f"{entry['name']}, measure “{entry['measure']}”; small print: 95 % intervals", role="full"
    )
    hows = sorted({f["change"]["how"] for f in entry["figures"] if f["change"] and f["change"]["how"]})
    if hows:
        yield Prose(f"Intervals of changes: {'; '.join(hows)}.", quiet=True)
    yield from _flips(entry)
    yield from _items(entry)


def _full_row(entry: Mapping[str, Any], figure: Mapping[str, Any], edited: bool) -> tuple[Cell, ...]:
    goal = entry["goal"]
    mark = wording.direction(goal, figure["better"])
    known = wording.label(figure["name"])
    name = Cell(f"{known} {mark}".strip(), figure["name"] if known != figure["name"] else "", "text")
    counts = {figure[arm]["n"] for arm in ("before", "after", "random") if figure[arm]}
    n = Cell(" / ".join(scalar(count) for count in sorted(counts)) or NONE)
    before = _small(_value(figure, "before", goal))
    if not edited:
        return name, before, _never_seen(figure), n
    moved = figure["change_random"]
    control = _small(_value(figure, "random", goal, absent="not run"))
    if moved is not None:
        control = Cell(control.text, "\n".join(x for x in (control.below, f"change {wording.change(moved)}") if x))
    ends = wording.change_interval(figure["change"])
    tone = _tone(figure["change"], goal, figure["better"])
    change = Cell(wording.change(figure["change"]), ends if ends != NONE else "", tone=tone)
    return name, before, _small(_value(figure, "after", goal)), change, control, _never_seen(figure), n


def _small(cell: Cell) -> Cell:
    """Without the words that the caption says once for the table."""
    return replace(cell, below=cell.below.removeprefix("95 %: "), share=None)


def _never_seen(figure: Mapping[str, Any]) -> Cell:
    now, then = figure["control"], figure["control_before"]
    shown = _small(_value(figure, "control", ""))
    old = wording.cell(then)
    notes = [shown.below] if shown.below else []
    if now is not None and then is not None and old != shown.text:
        notes.append(f"before: {old}")
    if now is not None:
        notes.append(f"n = {now['n']}")
    return Cell(shown.text, "\n".join(notes), tone=shown.tone)


def _flips(entry: Mapping[str, Any]) -> Iterator[Block]:
    if not entry["flips"]:
        return
    rows = []
    for flip in entry["flips"]:
        against = "before" if flip["against"] == "before" else "the random control"
        lost, gained = (Cell(scalar(len(flip[way])), _ids(flip[way]), "text") for way in ("lost", "gained"))
        neither = flip["n"] - flip["kept"] - len(flip["lost"]) - len(flip["gained"])
        cells = Cell(f"against {against}", "", "text"), lost, gained, Cell(scalar(flip["kept"])), Cell(scalar(neither))
        rows.append((*cells, Cell(wording.p_value(flip["p"]))))
    verdict = entry["flips"][0]["verdict"]
    verdict = wording.label("strict rate" if verdict == "strict" else verdict)
    columns = ("after the edit", "held there, lost after", "holds only after", "in both", "in neither", "exact p")
    yield Table(columns, tuple(rows), f"{entry['name']}: flips of “{verdict}”, by id; p after McNemar")


def _ids(names: Sequence[str]) -> str:
    more = len(names) - IDS_SHOWN
    return ", ".join(names[:IDS_SHOWN]) + (f" and {more} more in the JSON" if more > 0 else "")


_ITEM_KEYS = ("strict", "first_miss", "log_pz", "queries", "efficacy success", "efficacy accuracy",
              "paraphrase success", "neighbour success", "nll", "tokens")  # fmt: skip


def _items(entry: Mapping[str, Any]) -> Iterator[Block]:
    arms = [arm for arm in ("before", "after", "random") if arm in entry["rows"]]
    first = entry["rows"]["before"]
    if not first:
        yield Prose("No items.", quiet=True)
        return
    usual = [key for key in _ITEM_KEYS if key in first[0]][:4]
    keys = (
        usual or [key for key, value in first[0].items() if key != "id" and isinstance(value, bool | int | float)][:3]
    )
    by_id = {arm: {str(row["id"]): row for row in entry["rows"][arm]} for arm in arms}
    rows = []
    for row in first[:ITEMS_SHOWN]:
        name = str(row["id"])
        cells = (Cell(_item(by_id[arm].get(name, {}).get(key))) for key in keys for arm in arms)
        rows.append((Cell(name, "", "code"), *cells))
    columns = ("id", *(f"{key}, {ARM_NAMES[arm]}" if len(arms) > 1 else key for key in keys for arm in arms))
    more = f", first {ITEMS_SHOWN} of {len(first)}; all in the JSON" if len(first) > ITEMS_SHOWN else ""
    yield Table(columns, tuple(rows), f"{entry['name']}, item by item{more}", fold=True)


def _item(value: Any) -> str:
    return wording.number(value) if isinstance(value, int | float) and not isinstance(value, bool) else scalar(value)
