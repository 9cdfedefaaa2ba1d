"""JSON and CSV as records, each with the line it starts on."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from memloc.errors import InputError
from memloc.formats.content import Content, Problem, Row, filled, short


def read_json_list(path: Path, text: str) -> Content:
    """The entries of a list, one by one, so that each has its line.

    Raises:
        InputError: not JSON; its line is named.
    """
    rows: list[Row] = []
    decoder, at, line, seen = _decoder(), text.index("[") + 1, 1, 0
    try:
        at = _space(text, at)
        while not text.startswith("]", at):
            line, seen = line + text.count("\n", seen, at), at
            record, at = decoder.raw_decode(text, at)
            rows.append((f"record {len(rows)} (line {line})", record))
            at = _space(text, at)
            if text.startswith(",", at):
                at = _space(text, at + 1)
            elif not text.startswith("]", at):
                raise ValueError(f"expected ',' or ']' after record {len(rows) - 1}")
        if text[at + 1 :].strip():
            raise ValueError("more text after the list")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {1 + text.count(chr(10), 0, at)}: not JSON ({short(error)})") from error
    return Content(path, "JSON list", tuple(rows))


def read_json_objects(path: Path, text: str) -> Content:
    """One object in the whole file, or one a line; lines that are no JSON become problems.

    Raises:
        InputError: not even the first object is JSON; its line is named.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows, problems = [], []
    for number, line in lines:
        try:
            rows.append((f"line {number}", _decoder().decode(line.strip())))
        except (ValueError, RecursionError) as error:
            if number == lines[0][0]:
                return _one_object(path, text)
            problems.append(Problem(f"line {number}", f"not JSON ({short(error)})"))
    return Content(path, "JSON lines" if len(lines) > 1 else "JSON object", tuple(rows), tuple(problems))


def _one_object(path: Path, text: str) -> Content:
    try:
        return Content(path, "JSON object", (("line 1", _decoder().decode(text.strip())),))
    except (ValueError, RecursionError) as error:
        at = re.search(r"line (\d+)", str(error))
        line = int(at.group(1)) + text[: len(text) - len(text.lstrip())].count("\n") if at else 1
        raise InputError(f"{path}, line {line}: not JSON ({short(error)})") from error


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) < float("inf") else _no_number(text)


def _space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


COLUMNS = frozenset({
    "text", "prefix", "suffix", "prompt", "completion", "question", "answer", "paragraph", "id", "count", "em", "nll",
    "index", "tokens", "score", "subject", "target", "target_true", "target_new",
})  # fmt: skip
"""Columns that some format reads; a first line of two of them, or a .csv name, makes a text a table."""


def read_csv(path: Path, text: str) -> Content | None:
    """A table with a first line of names; None for a text that is none.

    Raises:
        InputError: a column named twice, a quote that does not end.
    """
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        header = [name.strip() for name in next(reader)]
    except (csv.Error, StopIteration):
        return None
    if path.suffix.lower() != ".csv" and len(COLUMNS.intersection(header)) < 2:
        return None
    if len(set(header)) < len(header):
        raise InputError(f"{path}, line 1: a column named twice in {', '.join(header)}")
    rows, problems, line = [], [], reader.line_num + 1
    for cells, line in _csv_lines(path, reader):
        if len(cells) == len(header):
            rows.append((f"line {line}", dict(zip(header, map(_cell, cells), strict=True))))
        elif cells:
            problems.append(Problem(f"line {line}", f"{len(cells)} cells, expected {len(header)}"))
    return filled(Content(path, "CSV", tuple(rows), tuple(problems)))


def _csv_lines(path: Path, reader: Any) -> Iterator[tuple[list[str], int]]:
    """Cells and the line on which they start; a quoted cell may run over several."""
    while True:
        line = reader.line_num + 1
        try:
            yield next(reader), line
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{path}, line {line}: not CSV ({short(error)})") from error


def _cell(text: str) -> Any:
    """A cell as its number where it is one."""
    if re.fullmatch(r"0|-?[1-9]\d{0,17}", text):  # 007 is a name
        return int(text)
    if re.fullmatch(r"-?\d{0,18}\.\d{1,18}(e-?\d{1,2})?", text):
        return float(text)
    return text
