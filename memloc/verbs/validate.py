"""memloc validate: what data files are, how many records they hold, and which cannot be used."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from memloc.errors import InputError, MemlocError
from memloc.formats.format import Settings
from memloc.terminal import Terminal
from memloc.verbs.convert import reading_flags, settings_of


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.add_argument("files", type=Path, nargs="+", help="the files to look at", metavar="FILE")
    reading_flags(parser)
    parser.add_argument("--top", type=int, default=20, help="problems to print of each file (default: 20)")


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Print what each file is and what is wrong with it; problems end with exit code 2."""
    settings = settings_of(arguments)
    found = [_looked_at(path, settings, arguments.name) for path in arguments.files]
    rows = [[entry["file"], entry["format"], entry["source"], entry["records"], entry["left_out"],
             len(entry["problems"])] for entry in found]  # fmt: skip
    terminal.table("files", ["file", "format", "records", "usable", "left out", "problems"], rows)
    for entry in found:
        problems = [[problem["where"], problem["message"]] for problem in entry["problems"]]
        if problems:
            shown = f"{entry['file']}: {min(arguments.top, len(problems))} of {len(problems)} problems"
            terminal.table(shown, ["where", "problem"], problems[: arguments.top])
        if entry["note"]:
            terminal.note(f"{entry['file']}: {entry['note']}")
    terminal.result({"files": found})
    total, bad = sum(len(entry["problems"]) for entry in found), sum(bool(entry["problems"]) for entry in found)
    if total:
        raise InputError(f"{total} problems in {bad} of {len(found)} files")


def _looked_at(path: Path, settings: Settings, name: str | None) -> dict[str, Any]:
    from memloc.formats import table

    told: dict[str, Any] = {"file": str(path), "format": "", "source": 0, "records": 0, "left_out": 0, "note": ""}
    try:
        reading = table.read(path, settings, name=name)
    except MemlocError as error:
        message = str(error).removeprefix(str(path)).lstrip(":, ")
        return told | {"problems": [{"where": "file", "message": message}]}
    problems = table.problems_of(reading, settings)
    notes = [reading.format.left_out if reading.left_out else "", reading.format.noted]
    return told | {
        "format": reading.format.name,
        "makes": reading.format.makes,
        "seen": reading.described,
        "source": reading.source,
        "records": len(reading.rows),
        "left_out": reading.left_out,
        "note": "; ".join(note for note in notes if note),
        "problems": [{"where": problem.where, "message": problem.message} for problem in problems],
    }
