"""What a report is written in: a handful of blocks that HTML and Markdown both know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from memloc.report.wording import scalar


@dataclass(frozen=True)
class Cell:
    """A table's cell: its text, smaller lines below, how it is set, and a share to draw as a bar."""

    text: str
    below: str = ""
    kind: str = "number"  # number | text | code
    tone: str = ""  # good | bad | quiet
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """Columns, rows and a caption; role "headline" is the first screen's, `fold` hides it behind its caption."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    role: str = ""
    fold: bool = False


@dataclass(frozen=True)
class Heading:
    """A heading of level 2 to 4."""

    level: int
    text: str


@dataclass(frozen=True)
class Prose:
    """A paragraph; `quiet` for remarks."""

    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure by its kind and numbers; HTML draws it, Markdown leaves it to the table beside it."""

    kind: str
    data: Any
    caption: str
    legend: tuple[str, ...] = ()


@dataclass(frozen=True)
class Marked:
    """A text, its pieces coloured by a number each; `prefix` pieces come before the line that divides it."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    caption: str
    prefix: int | None = None


@dataclass(frozen=True)
class Verdicts:
    """The sentences of the result."""

    entries: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Passage:
    """A passage's text and its continuations, shown."""

    row: Mapping[str, Any]


@dataclass(frozen=True)
class Code:
    """Lines to be typed."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Terms:
    """Words and what they mean."""

    entries: tuple[tuple[str, str], ...]


Block = Table | Heading | Prose | Picture | Marked | Verdicts | Passage | Code | Terms

ARM_NAMES = {"before": "before", "after": "after", "random": "random control", "control": "never seen",
             "control_before": "never seen, before"}  # fmt: skip


def entries_of(value: Any) -> list[tuple[str, Any]]:
    """The entries of a mapping; none of anything else."""
    return list(value.items()) if isinstance(value, Mapping) else []


def pairs_table(found: Iterable[tuple[str, Any]], caption: str) -> Table:
    """Names and values, behind their caption."""
    rows = tuple((Cell(str(key), "", "text"), Cell(scalar(value), "", "text")) for key, value in found)
    return Table(("", ""), rows, caption, role="pairs", fold=True)
