"""Tables a report is given ready made: for findings that are neither a measurement nor a localization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from memloc.errors import InputError
from memloc.report.blocks import Block, Cell, Heading, Prose, Table


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One cell.

    Attributes:
        text: what it says.
        below: smaller lines under it: an interval, an n.
        kind: "number" or "text".
        tone: "good", "bad", "quiet" or nothing.
        share: in [0, 1], drawn as a bar.
    """

    text: str
    below: str = ""
    kind: Literal["number", "text"] = "number"
    tone: Literal["good", "bad", "quiet", ""] = ""
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table under a heading of its own, shown after the result and before the figures in full.

    Attributes:
        title: of the part of the page; sheets of one title in a row share it.
        columns: their names.
        rows: as many entries each as there are columns.
        caption: above the table.
        text: one paragraph before it.

    Raises:
        InputError: a row of another length.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    caption: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise InputError(f"{self.title}: a row of {len(row)} entries under {len(self.columns)} columns")

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        rows = [[dict(vars(entry)) for entry in row] for row in self.rows]
        found = {"title": self.title, "text": self.text, "caption": self.caption}
        return {**found, "columns": list(self.columns), "rows": rows}


def sheets(data: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    """Blocks of the sheets of a report's JSON, each title once."""
    title = None
    for entry in data:
        if entry["title"] != title:
            title = entry["title"]
            yield Heading(2, title)
        if entry["text"]:
            yield Prose(entry["text"])
        rows = tuple(tuple(Cell(**cell) for cell in row) for row in entry["rows"])
        yield Table(tuple(entry["columns"]), rows, entry["caption"], role="full")
