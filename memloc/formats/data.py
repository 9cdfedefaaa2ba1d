"""Any file of passages or facts, for a command that takes one: memloc's own as it is, others through the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memloc.formats import table
from memloc.formats.format import OWN_FACTS, OWN_PASSAGES, Settings
from memloc.passages import Facts, Passages

PEEK = 2**20
"""Bytes looked at for a first line of memloc's own; a longer one is recognised with the whole file."""


def passages(path: str | Path, tokenizer: Any, *, prefix: int = 50, suffix: int = 50) -> Passages:
    """Passages of any known file; facts give their prompts with the present answer.

    Raises:
        InputError: no such file, of no known kind, or with a record that cannot be used.
    """
    if _own(Path(path), *OWN_PASSAGES):
        return Passages.read(path, tokenizer, prefix=prefix, suffix=suffix)
    settings = Settings(prefix=prefix, suffix=suffix, tokenizer=tokenizer)
    return table.passages(table.read(path, settings), settings)


def facts(path: str | Path, tokenizer: Any) -> Facts:
    """Facts of any known file.

    Raises:
        InputError: no such file, of no known kind, of passages, or with a record that cannot be used.
    """
    if _own(Path(path), *OWN_FACTS):
        return Facts.read(path, tokenizer)
    settings = Settings(tokenizer=tokenizer)
    return table.facts(table.read(path, settings), settings)


def _own(path: Path, *shapes: frozenset[str]) -> bool:
    """Whether the first line is a record of memloc's own."""
    try:
        with path.open("rb") as file:
            line = next((line for line in file.read(PEEK).splitlines() if line.strip()), b"")
        record = json.loads(line.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and any(shape <= set(record) for shape in shapes)
