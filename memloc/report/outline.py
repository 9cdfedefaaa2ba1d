"""The report as a list of blocks, made from its JSON alone; HTML and Markdown both write it, so they cannot differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memloc.report import wording
from memloc.report.blocks import (
    ARM_NAMES,
    Block,
    Cell,
    Code,
    Heading,
    Passage,
    Picture,
    Prose,
    Table,
    Terms,
    Verdicts,
    entries_of,
    pairs_table,
)
from memloc.report.evidence import comparison, headline
from memloc.report.glossary import FIGURES, TERMS
from memloc.report.places import edit, located
from memloc.report.sheets import sheets
from memloc.report.wording import NONE, scalar


def outline(data: Mapping[str, Any]) -> list[Block]:
    """All blocks below the title, in reading order."""
    judged = data["verdicts"] or data["comparisons"]
    blocks: list[Block] = [Heading(2, "Result")] if judged else []
    if data["verdicts"]:
        blocks.append(Verdicts(tuple(data["verdicts"])))
    tables = data.get("sheets", ())  # reports of an earlier version have none
    if data["comparisons"] or not (data["localizations"] or data["curves"] or tables):
        blocks += headline(data["comparisons"])
    blocks += sheets(tables)
    for title, part in (
        ("Findings", _notes(data["notes"])),
        ("Curves", _curves(data["curves"])),
        ("The figures in full", [block for entry in data["comparisons"] for block in comparison(entry)]),
        ("Where it was found", [block for entry in data["localizations"] for block in located(entry)]),
        ("What was changed", [block for entry in data["edits"] for block in edit(entry)]),
        ("The passages", _texts(data)),
        ("Where the numbers come from", _provenance(data)),
        ("Words used here", [_glossary(data)]),
    ):
        if part:
            blocks += [Heading(2, title), *part]
    return blocks


def overall(verdicts: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The line above the verdicts and its tone: how many of the conditions hold."""
    judged = [entry["holds"] for entry in verdicts if entry["holds"] is not None]
    failed = judged.count(False)
    if not judged:
        return "", ""
    if not failed:
        return ("The condition holds" if len(judged) == 1 else f"All {len(judged)} conditions hold"), "good"
    return f"{failed} of {len(judged)} conditions {'does' if failed == 1 else 'do'} not hold", "bad"


def _notes(notes: Sequence[Mapping[str, str]]) -> list[Block]:
    blocks: list[Block] = []
    for note in notes:
        blocks.append(Heading(3, note["heading"]))
        blocks += [Prose(" ".join(part.split())) for part in note["text"].split("\n\n") if part.strip()]
    return blocks


def _curves(curves: Sequence[Mapping[str, Any]]) -> list[Block]:
    blocks: list[Block] = []
    for entry in curves:
        blocks += [Heading(3, entry["title"])]
        blocks += [Prose(entry["text"])] if entry["text"] else []
        names = tuple(entry["series"])
        blocks.append(Picture("curve", entry, f"{entry['y']} against {entry['x']}; bars are 95 % intervals.", names))
        places = sorted({point["x"] for points in entry["series"].values() for point in points}, key=float)
        points = {(name, point["x"]): point for name in names for point in entry["series"][name]}
        rows = tuple(
            (Cell(scalar(x)), *(_point(points.get((name, x)), entry["unit"]) for name in names)) for x in places
        )
        blocks.append(Table((entry["x"], *names), rows))
    return blocks


def _point(point: Mapping[str, Any] | None, unit: str) -> Cell:
    if point is None:
        return Cell(NONE, tone="quiet")
    made = {"value": point["y"], "low": point.get("low"), "high": point.get("high"), "unit": unit}
    made |= {"hits": point.get("hits"), "n": point.get("n")}
    ends = wording.interval(made)
    return Cell(wording.cell(made), f"95 %: {ends}" if ends else "")


def _texts(data: Mapping[str, Any]) -> list[Block]:
    if not data["texts"]:
        return []
    arms = [arm for arm in ("before", "after", "random") if any(arm in row["arms"] for row in data["texts"])]
    blocks: list[Block] = []
    if data["text_shown"]:
        blocks.append(Prose("Recited pieces, the true one at its place, are marked; differing ones are not."))
        blocks += [Passage(row) for row in data["texts"]]
    else:
        blocks.append(Prose("Texts are withheld: this page would otherwise give away what was to be forgotten. Each "
                            "passage is named by its id, length and digest; a continuation by how much of the truth "
                            "it holds."))  # fmt: skip
    rows = []
    for row in data["texts"]:
        cells = [Cell(row["id"], "", "code"), Cell(f"{row['prefix_length']} + {row['truth_length']} {row['unit']}")]
        cells += [_agreed(row, arm) for arm in arms]
        rows.append((*cells, Cell(wording.short(row["digest"]), "", "code")))
    columns = ("id", "prefix + suffix", *(f"recited {ARM_NAMES[arm]}" for arm in arms), "digest")
    blocks.append(Table(columns, tuple(rows), "How much of each passage is recited"))
    return blocks


def _agreed(row: Mapping[str, Any], arm: str) -> Cell:
    found = row["arms"].get(arm)
    if found is None:
        return Cell(NONE, tone="quiet")
    return Cell(f"{found['matching']} of {row['truth_length']}", f"longest run {found['longest_run']}")


def _provenance(data: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    rows = []
    for entry in data["comparisons"]:
        for arm, made in entry["provenance"].items():
            inputs = "; ".join(
                f"{key} {wording.short(value)}" for key, value in made["inputs"].items() if key != "model"
            )
            model = wording.short(made["inputs"].get("model", NONE))
            settings = "; ".join(f"{key} {scalar(value)}" for key, value in made["settings"].items())
            rows.append((
                Cell(entry["name"], ARM_NAMES[arm], "text"), Cell(made["method"], "", "text"), Cell(model, "", "code"),
                Cell(inputs or NONE, "", "code"), Cell(settings or NONE, "", "text"), Cell(scalar(made["seed"])),
            ))  # fmt: skip
    if rows:
        columns = ("measured", "measure", "model", "data", "settings", "seed")
        blocks.append(Table(columns, tuple(rows), "Measurements", fold=len(rows) > 8))
    pairs: list[tuple[str, Any]] = []
    for key, value in data["provenance"].items():
        if key == "versions" and isinstance(value, Mapping):
            continue
        pairs += [(f"{key}: {inner}", found) for inner, found in entries_of(value)] or [(key, value)]
    pairs += [(f"version of {name}", version) for name, version in _versions(data).items()]
    if pairs:
        rows_of = pairs_table(pairs, "Versions and origins")
        blocks.append(Table(rows_of.columns, rows_of.rows, rows_of.caption, rows_of.role))
    if data["commands"]:
        blocks += [Heading(3, "Commands"), Code(tuple(data["commands"]))]
    return blocks


def _versions(data: Mapping[str, Any]) -> dict[str, str]:
    """Versions of everything that went in; where they differ, all are named."""
    found: dict[str, list[str]] = {}
    made = [entry for comparison in data["comparisons"] for entry in comparison["provenance"].values()]
    made += [entry["provenance"] for entry in data["localizations"]]
    made += [data["provenance"]] if isinstance(data["provenance"].get("versions"), Mapping) else []
    for entry in made:
        for name, version in entry["versions"].items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: " and ".join(versions) for name, versions in found.items()}


def _glossary(data: Mapping[str, Any]) -> Terms:
    present = {figure["name"] for entry in data["comparisons"] for figure in entry["figures"]}
    figures = [(f"{known.label} ({name})", known.meaning) for name, known in FIGURES.items() if name in present]
    return Terms((*figures, *TERMS.items()))
