"""What a format is, and how a record's fields are asked for: each error names the key, expected and found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from memloc.errors import InputError
from memloc.formats.content import Content, Row

PASSAGE_KEYS = frozenset({"id", "text", "prefix", "suffix", "prefix_ids", "suffix_ids"})
FACT_KEYS = frozenset({"id", "prompt", "subject", "target", "target_true", "paraphrases", "neighbors"})
OWN_PASSAGES = (frozenset({"prefix_ids", "suffix_ids"}), frozenset({"prefix", "suffix"}))
OWN_FACTS = (frozenset({"prompt", "subject", "target", "target_true"}),)
"""Keys by which records of memloc's own are known, whatever else they carry."""
PLACE = "{question}"
"""Where in a template the question stands."""
QUESTION = "Question: {question}\nAnswer:"
"""How TOFU and MUSE ask a base model."""
SPLIT = (50, 50)
"""Tokens of prefix and suffix where nobody says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a reader may need to be told.

    Attributes:
        prefix: tokens of a text, or of a row of ids, that make its prefix.
        suffix: at most that many tokens after it make its suffix.
        stride: tokens from one window of plain text to the next; a whole window where None.
        tokenizer: needed to cut plain text into windows.
        template: how a question becomes a prompt; {question} stands for it.
        patterns: file of templates with [X] and [Y], for facts that come without a sentence.
        suffixes: the other half of a matrix of prefixes.
    """

    prefix: int = SPLIT[0]
    suffix: int = SPLIT[1]
    stride: int | None = None
    tokenizer: Any = None
    template: str = QUESTION
    patterns: Path | None = None
    suffixes: Path | None = None

    def __post_init__(self) -> None:
        if min(self.prefix, self.suffix) < 1 or (self.stride is not None and self.stride < 1):
            raise InputError(f"prefix {self.prefix}, suffix {self.suffix}, stride {self.stride}: at least 1 of each")
        if PLACE not in self.template:
            raise InputError(f"template {self.template!r} has no place for {PLACE}")

    @property
    def given(self) -> bool:
        """Whether somebody asked for a split of their own."""
        return (self.prefix, self.suffix) != SPLIT


def rows_as_they_are(content: Content, settings: Settings) -> Iterable[Row]:
    """The file's own records."""
    return content.rows


@dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of file.

    Attributes:
        name: what it is called, also with --as.
        makes: what its records become.
        about: what it is, and how it is read, in one line.
        matches: whether a file is of this kind, from its first record or its shape.
        convert: one record to memloc's records; none where the record is of no use here (`left_out` says why).
        rows: the records of a file, where they are not its own.
        left_out: why a sound record may give nothing.
        noted: what whoever uses the records should know.
    """

    name: str
    makes: Literal["passages", "facts"]
    about: str
    matches: Callable[[Content], bool]
    convert: Callable[[Any, Settings], list[dict[str, Any]]]
    rows: Callable[[Content, Settings], Iterable[Row]] = rows_as_they_are
    left_out: str = ""
    noted: str = field(default="")


def text_at(record: Any, path: str, *, needed: str = "a text that is not empty") -> str:
    """The text at `path`, keys joined by dots.

    Raises:
        InputError: not there, empty or of another kind.
    """
    found = value_at(record, path)
    if not isinstance(found, str) or not found.strip():
        raise InputError(f"key {path!r}: expected {needed}, found {shown(found)}")
    return found


def texts_at(record: Any, path: str) -> list[str]:
    """The list of texts at `path`; empty where the key is missing or null.

    Raises:
        InputError: something else is there.
    """
    found = value_at(record, path)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(entry, str) and entry for entry in found):
        raise InputError(f"key {path!r}: expected a list of texts, found {shown(found)}")
    return found


def value_at(record: Any, path: str) -> Any:
    """The value at `path`, keys joined by dots; None where it is not there."""
    for key in path.split("."):
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def ids_at(record: Any, path: str) -> list[int]:
    """The token ids at `path`; a text such as "[1, 2]" or "1 2" (as tables hold them) is read too.

    Raises:
        InputError: none there, or not all whole numbers from 0.
    """
    found = value_at(record, path)
    if isinstance(found, str):
        parts = found.strip().strip("[]()").replace(",", " ").split()
        found = [int(part) if part.isascii() and part.isdigit() and len(part) < 19 else part for part in parts]
    whole = isinstance(found, list) and all(isinstance(part, int) and not isinstance(part, bool) for part in found)
    if not whole or not found or min(found) < 0:
        raise InputError(
            f"key {path!r}: expected token ids, whole numbers from 0, found {shown(value_at(record, path))}"
        )
    return list(found)


def object_at(record: Any) -> Mapping[str, Any]:
    """The record itself, if it is an object.

    Raises:
        InputError: it is not.
    """
    if not isinstance(record, Mapping):
        raise InputError(f"expected an object, found {shown(record)}")
    return record


def carried(record: Mapping[str, Any], used: Iterable[str], taken: frozenset[str]) -> dict[str, Any]:
    """What a record holds beyond `used`, as tags; a key that means something to memloc gets "source_" before it."""
    left = {key: value for key, value in record.items() if key not in set(used)}
    return {f"source_{key}" if key in taken else str(key): value for key, value in left.items()}


def shown(value: Any) -> str:
    """A value in an error message, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
