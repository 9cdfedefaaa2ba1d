"""The report as Markdown, readable alone: the same blocks and numbers as the page, tables for figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from memloc.report.blocks import (
    ARM_NAMES,
    Block,
    Cell,
    Code,
    Heading,
    Marked,
    Passage,
    Picture,
    Prose,
    Table,
    Terms,
    Verdicts,
)
from memloc.report.outline import outline, overall
from memloc.report.texts import runs
from memloc.report.wording import short

_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~!$])")


def render_markdown(data: Mapping[str, Any]) -> str:
    """The whole report, from the JSON of `Report.to_json` alone; everything given by users is escaped."""
    model = data["model"]
    parts = [f"# {text(data['title'])}"]
    if model["name"]:
        digest = f" · digest {text(short(model['digest']))}" if model["digest"] else ""
        parts.append(f"Model: {text(model['name'])}{digest}")
    if data["summary"]:
        parts.append(text(data["summary"]))
    parts += [written for block in outline(data) if (written := _block(block))]
    return "\n\n".join(parts) + "\n"


def text(raw: str) -> str:
    """One line of plain text, with nothing in it that Markdown or HTML would act on."""
    flat = " ".join(str(raw).split())
    escaped = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"^([-+]|\d+[.)])(?=\s|$)", r"\\\1", _SPECIAL.sub(r"\\\1", escaped))


def _block(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {text(block.text)}"
        case Prose():
            return text(block.text)
        case Verdicts():
            return _verdicts(block)
        case Table():
            return _table(block)
        case Code():
            fence = "`" * max(
                3, 1 + max((len(run) for line in block.lines for run in re.findall("`+", line)), default=0)
            )
            return "\n".join((fence, *block.lines, fence))
        case Terms():
            return "\n".join(f"- **{text(term)}**: {text(meaning)}" for term, meaning in block.entries)
        case Passage():
            return _passage(block.row)
        case Picture() | Marked():
            return ""


def _verdicts(block: Verdicts) -> str:
    line, _ = overall(block.entries)
    marks = {True: "✓ holds", False: "✗ does not hold", None: "·"}
    lines = [f"**{line}.**", ""] if line else []
    for entry in block.entries:
        measured = f" ({text(entry['measured'])})" if entry["measured"] else ""
        lines.append(f"- {marks[entry['holds']]} — {text(entry['text'])}{measured}")
    return "\n".join(lines)


def _table(block: Table) -> str:
    if not block.rows:
        return f"{text(block.caption)}: none." if block.caption else ""
    align = ["---" if cell.kind != "number" else "---:" for cell in block.rows[0]]
    lines = [f"**{text(block.caption)}**", ""] if block.caption else []
    lines.append(f"| {' | '.join(text(column) for column in block.columns)} |")
    lines.append(f"| {' | '.join(align)} |")
    lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in block.rows]
    return "\n".join(lines)


def _cell(cell: Cell) -> str:
    return "<br>".join(text(line) for line in (cell.text, *cell.below.splitlines()))


def _passage(row: Mapping[str, Any]) -> str:
    lines = [f"#### {text(row['id'])}", "", f"- given: {text(row['prefix'])}", f"- true: {text(''.join(row['truth']))}"]
    for arm, found in row["arms"].items():
        said = " ".join(f"**{text(part)}**" if same and part.strip() else text(part)
                        for same, part in runs(row["truth"], found["text"]))  # fmt: skip
        lines.append(f"- {ARM_NAMES[arm]}: {said or '(nothing)'}")
    return "\n".join(lines)
