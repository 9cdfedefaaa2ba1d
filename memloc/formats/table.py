"""The table of formats, how a file is recognised by it, and how its records are read."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memloc.errors import InputError, UnknownName
from memloc.formats import cloze, matrices, rewrites, ripple, texts
from memloc.formats.content import Content, Problem
from memloc.formats.format import OWN_FACTS, OWN_PASSAGES, Format, Settings
from memloc.formats.opening import open_content
from memloc.formats.results import WRITERS, is_measurement
from memloc.passages import Facts, Passages
from memloc.progress import steps

FORMATS: dict[str, Format] = {
    entry.name: entry for family in (rewrites, ripple, cloze, texts, matrices) for entry in family.FORMATS
}
"""Every format, by name."""


@dataclass(frozen=True)
class Reading:
    """What was read of a file.

    Attributes:
        path: the file.
        format: what it was recognised as.
        rows: memloc's own records, each with an id, and where in the file each comes from.
        problems: records that were refused, in the order of the file.
        source: records the file holds, refused ones included.
        left_out: sound records that are of no use (`format.left_out` says why).
        described: what was seen.
    """

    path: Path
    format: Format
    rows: tuple[tuple[str, dict[str, Any]], ...]
    problems: tuple[Problem, ...]
    source: int
    left_out: int
    described: str

    @property
    def records(self) -> tuple[dict[str, Any], ...]:
        """Memloc's own records."""
        return tuple(record for _, record in self.rows)

    def sound(self) -> Reading:
        """This reading, if every record could be used.

        Raises:
            InputError: names the first that could not, and how many there are.
        """
        if self.problems:
            more = len(self.problems) - 1
            tail = f" (and {more} more of {self.source} records; `memloc validate` lists them)" if more else ""
            raise InputError(f"{self.path}, {self.problems[0]}{tail}")
        if not self.records:
            why = f": {self.format.left_out}" if self.format.left_out else ""
            raise InputError(f"{self.path}: none of {self.source} records gives {self.format.makes}{why}")
        return self

    def jsonl(self) -> str:
        """The records as canonical JSON lines."""
        return "".join(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n" for entry in self.records)


def detect(content: Content) -> Format:
    """The one format that a file's content is of.

    Raises:
        InputError: none or several; what was seen and what is known is said.
    """
    for name, shapes in (("passages", OWN_PASSAGES), ("facts", OWN_FACTS)):
        if any(content.has(*shape) for shape in shapes):
            return FORMATS[name]
    found = [entry for entry in FORMATS.values() if entry.matches(content)]
    if len(found) == 1:
        return found[0]
    if found:
        names = " or ".join(entry.name for entry in found)
        raise InputError(f"{content.described()}, which may be {names}; say which with --as")
    if content.problems and not content.rows:
        raise InputError(f"{content.path}, {content.problems[0]}")
    raise InputError(f"{content.described()}; known are {', '.join(FORMATS)}; see memloc validate --help")


def named(name: str) -> Format:
    """The format called `name`.

    Raises:
        UnknownName: no such format; the message suggests near names.
    """
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UnknownName(f"no format called {name!r}; {hint}Known: {', '.join(sorted(FORMATS))}.")
    return FORMATS[name]


def read(path: str | Path, settings: Settings | None = None, *, name: str | None = None) -> Reading:
    """Every record of a file, as memloc's own; records that cannot be used are told, not skipped.

    Args:
        path: the file.
        settings: what the format may need to be told.
        name: the format, where it should not be recognised.

    Raises:
        InputError: the file cannot be opened, or is of no known kind.
    """
    settings = settings or Settings()
    content = open_content(path)
    if is_measurement(content.first):
        writers = ", ".join(WRITERS)
        raise InputError(f"{path}: a measurement; `memloc show` prints it, convert writes it --as {writers}")
    form = detect(content) if name is None else named(name)
    found: list[tuple[str, dict[str, Any]]] = []
    problems = list(content.problems)
    source = len(problems)
    left_out = 0
    for where, record in steps(form.rows(content, settings), f"reading {content.path.name}"):
        try:
            made = form.convert(record, settings)
        except InputError as error:
            problems.append(Problem(where, str(error)))
            made = None
        if made is not None:
            left_out += not made
            found += [(where, _identified(entry, form, source, index, len(made))) for index, entry in enumerate(made)]
        source += 1
    problems += _twice(found)
    return Reading(content.path, form, tuple(found), tuple(problems), source, left_out, content.described())


def _identified(entry: dict[str, Any], form: Format, number: int, index: int, of: int) -> dict[str, Any]:
    """The record with an id: its own, or the format's name and its number in the file."""
    name = str(entry["id"]) if entry.get("id") not in (None, "") else f"{form.name}-{number}"
    if of > 1 and entry.get("id") in (None, ""):
        name = f"{name}-{index}"
    return {"id": name, **{key: value for key, value in entry.items() if key != "id"}}


def _twice(found: list[tuple[str, dict[str, Any]]]) -> list[Problem]:
    counts = Counter(entry["id"] for _, entry in found)
    first: dict[str, str] = {}
    problems = []
    for where, entry in found:
        name = entry["id"]
        if counts[name] > 1 and name in first:
            problems.append(Problem(where, f"the id {name!r} was taken at {first[name]}"))
        first.setdefault(name, where)
    return problems


def passages(reading: Reading, settings: Settings) -> Passages:
    """A reading as passages; facts as their prompts with the present answer.

    Raises:
        InputError: a record was refused, or cannot be tokenised.
    """
    if reading.format.makes == "facts":
        return facts(reading, settings).as_passages("true")
    lengths = {"prefix": settings.prefix, "suffix": settings.suffix}
    rows = reading.sound().rows
    return Passages.from_records(rows, settings.tokenizer, path=reading.path, **lengths)


def facts(reading: Reading, settings: Settings) -> Facts:
    """A reading as facts.

    Raises:
        InputError: passages and no facts, a record was refused, or cannot be tokenised.
    """
    if reading.format.makes != "facts":
        raise InputError(f"{reading.path}: {reading.format.name} holds passages; facts are needed here")
    return Facts.from_records(reading.sound().rows, settings.tokenizer, path=reading.path)


def tokenised(reading: Reading, settings: Settings) -> Reading:
    """Passages as ids, where there is a tokenizer; facts stay text, for their prompts and answers belong together."""
    if settings.tokenizer is None or reading.format.makes == "facts":
        return reading
    rows = []
    for (where, record), item in zip(reading.rows, passages(reading, settings), strict=True):
        halves = {"prefix_ids": list(item.prefix), "suffix_ids": list(item.suffix)}
        halves |= {"after_ids": list(item.after)} if item.after else {}
        merged = {"boundary_merged": True} if item.boundary_merged else {}
        text = {key: record[key] for key in ("text",) if key in record}
        rows.append((where, {"id": item.id, **halves, **text, **item.tags, **merged}))
    return replace(reading, rows=tuple(rows))


def problems_of(reading: Reading, settings: Settings) -> tuple[Problem, ...]:
    """Every problem of a reading; where there is a tokenizer, those that only tokenising shows too."""
    found = list(reading.problems)
    if settings.tokenizer is None:
        return tuple(found)
    for row in steps(reading.rows, f"tokenising {reading.path.name}"):
        one = replace(reading, rows=(row,), problems=())
        try:
            passages(one, settings).check(len(settings.tokenizer), None)
        except InputError as error:
            found.append(Problem(row[0], str(error).removeprefix(f"{reading.path}, {row[0]}: ")))
    return tuple(found)
