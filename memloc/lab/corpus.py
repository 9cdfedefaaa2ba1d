"""Text that ships with CPython, as documents: the topics of its help and the docstrings of its library.

The text differs between versions of Python, so a lab is known by its digest too. Documents are split once into what is
trained on, what is held out and a pool that passages are taken from; nothing outside the training share has a run of
`RUN` tokens in common with it, so "never seen" holds for near copies too.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memloc.errors import InputError

RUN = 12
"""Tokens: two texts that share no run of this many are unseen for each other (about 30 characters)."""

SHORTEST = 40
"""Characters; shorter documents are dropped."""

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
QUOTED = re.compile(r'"""(.*?)"""', re.DOTALL)


@dataclass(frozen=True)
class Split:
    """Documents by what is done with them.

    Attributes:
        train: ordinary text to train on.
        held_out: never trained on.
        pool: passages, planted or controls, are taken from here; trained on as passages only.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    pool: tuple[str, ...]


def documents() -> list[str]:
    """Every document once, its white space collapsed, in an order that depends on the text alone.

    Triple-quoted strings are found by a pattern, not by parsing: 0.2 s against 5 s for the whole library.

    Raises:
        InputError: this Python carries too little text.
    """
    texts = _topics()
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in _sources(library):
        texts += QUOTED.findall(path.read_text(encoding="utf8", errors="ignore"))
    found = dict.fromkeys(" ".join(text.split()) for text in texts)
    kept = [text for text in found if len(text) >= SHORTEST]
    if len(kept) < 2000:
        raise InputError(f"{library}: {len(kept)} docstrings, expected 2000 or more; use a Python with its library")
    return kept


def split(texts: Sequence[str], seed: int, limit: int | None = None) -> Split:
    """Shuffle and split: 10 % held out, 15 % pool, the rest for training; at most `limit` documents in all."""
    shuffled = list(texts)
    random.Random(f"{seed}:split").shuffle(shuffled)
    shuffled = shuffled[:limit]
    held, pool = len(shuffled) // 10, len(shuffled) // 4
    return Split(tuple(shuffled[pool:]), tuple(shuffled[:held]), tuple(shuffled[held:pool]))


def runs(ids: Sequence[int]) -> NDArray[np.uint64]:
    """A 64-bit number for every run of `RUN` consecutive tokens; equal runs give equal numbers. Empty if shorter."""
    row = np.asarray(ids, dtype=np.uint64)
    count = max(0, len(row) - RUN + 1)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(RUN if count else 0):
        total = total * np.uint64(0x9E3779B97F4A7C15) + row[offset : offset + count] + np.uint64(1)
    return total


class Seen:
    """The runs of some texts, to ask whether another shares one."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        parts = [runs(row) for row in rows]
        self._runs = np.sort(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.uint64)

    def shares(self, ids: Sequence[int]) -> bool:
        """Whether `ids` has a run of `RUN` tokens in common with any of the texts."""
        own = runs(ids)
        places = np.searchsorted(self._runs, own).clip(max=len(self._runs) - 1)
        return bool(len(self._runs) and (self._runs[places] == own).any())


def _topics() -> list[str]:
    try:
        from pydoc_data import topics
    except ImportError:  # some builds leave the help out
        return []
    return [part for _, text in sorted(topics.topics.items()) for part in text.split("\n\n")]


def _sources(folder: Path) -> Iterator[Path]:
    """Python files below a folder, in the order of their names; skipped folders are never entered."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and entry.name not in SKIPPED:
            yield from _sources(entry)
        elif entry.suffix == ".py":
            yield entry
