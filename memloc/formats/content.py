"""What is in a file, before anyone says what it means: records with their lines, a matrix of token ids, or text.

Files come from strangers: nothing here, in `arrays` or in `records` runs what a file holds. Pickles are refused, arrays
and tensors are mapped and checked against the size of their file before a row is read, JSON with a key twice or a
number that is none is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memloc.errors import InputError

if TYPE_CHECKING:
    import numpy as np

LIMIT = 2**31
"""Bytes of the largest JSON, CSV or text file that is read whole."""

Row = tuple[str, Any]
"""Where a record stands ("line 3", "row 0"), and the record."""


@dataclass(frozen=True)
class Problem:
    """A record that cannot be used, and why."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        path: the file.
        container: how it is written: "JSON list", "JSON lines", "JSON object", "CSV", "parquet", "npy", "pt", "text".
        rows: its records, for containers of records.
        problems: records that could not even be parsed.
        matrix: token ids [n, t], for "npy" and "pt".
        text: the whole text, for "text".
    """

    path: Path
    container: str
    rows: tuple[Row, ...] = ()
    problems: tuple[Problem, ...] = ()
    matrix: np.ndarray[Any, Any] | None = field(default=None, repr=False)
    text: str = field(default="", repr=False)

    @cached_property
    def first(self) -> Any:
        """The first record, by which a file is recognised; None where there is none."""
        return self.rows[0][1] if self.rows else None

    @property
    def keys(self) -> frozenset[str]:
        """Keys of the first record; empty where it is no object."""
        return frozenset(self.first) if isinstance(self.first, Mapping) else frozenset()

    def has(self, *keys: str) -> bool:
        """Whether the first record has all of `keys`."""
        return self.keys.issuperset(keys)

    def described(self) -> str:
        """What was seen first, and where, in a few words."""
        if self.matrix is not None:
            return f"{self.path}: found a matrix of {self.matrix.dtype}, {list(self.matrix.shape)}"
        if self.container == "text":
            return f"{self.path}: found text of {len(self.text)} characters"
        where = f"{self.path}, {self.rows[0][0]}: found"
        if isinstance(self.first, Mapping):
            return f"{where} keys {', '.join(sorted(self.keys)) or 'none'}"
        return f"{where} {type(self.first).__name__}"


def filled(content: Content) -> Content:
    """`content`, if there is something in it.

    Raises:
        InputError: there is not.
    """
    if not content.rows and not content.problems:
        raise InputError(f"{content.path}: {content.container} with no record in it")
    return content


def short(error: BaseException) -> str:
    """What an error says, on one line and cut short."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
