"""Token ids as a matrix: the extraction challenge's .npy files, Pythia's, paragraph localization's and MemPi's .pt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from memloc.errors import InputError
from memloc.formats.content import Content, Row
from memloc.formats.format import Format, Settings
from memloc.formats.opening import open_content

if TYPE_CHECKING:
    import numpy as np


class Layout(NamedTuple):
    """How a row of `width` tokens is cut: `skip` tokens, then `prefix`, then `suffix`."""

    width: int
    skip: int
    prefix: int
    suffix: int
    name: str


LAYOUTS = {
    layout.width: layout
    for layout in (
        Layout(200, 100, 50, 50, "extraction-challenge"),
        Layout(100, 0, 50, 50, "paragraph-localization"),
        Layout(80, 0, 32, 48, "mempi"),
        Layout(64, 0, 32, 32, "pythia-memorized"),
    )
}
"""Widths that say where a row is cut; others are cut as texts are."""
HALF = 50
"""Width of the extraction challenge's files of prefixes and of suffixes."""


def layout_of(width: int, settings: Settings) -> Layout:
    """Where rows of `width` tokens are cut: as asked for, or as their width says, or as a text would be.

    Raises:
        InputError: nothing would be left for a suffix.
    """
    if width in LAYOUTS and not settings.given:
        return LAYOUTS[width]
    if width <= settings.prefix:
        raise InputError(f"{width} tokens, no more than the prefix of {settings.prefix}; set --prefix and --suffix")
    return Layout(width, 0, settings.prefix, settings.suffix, "tokens")


def halves(ids: Sequence[int], settings: Settings) -> tuple[list[int], list[int], str]:
    """Prefix and suffix of a row, and the name of its layout."""
    layout = layout_of(len(ids), settings)
    cut = layout.skip + layout.prefix
    return list(ids[layout.skip : cut]), list(ids[cut : cut + layout.suffix]), layout.name


def rows(content: Content, settings: Settings) -> Iterable[Row]:
    """Rows as (index, prefix, suffix, layout).

    Raises:
        InputError: half a set without its other half, or halves of different lengths.
    """
    matrix = _matrix(content)
    other = _other(content, settings)
    if other is None:
        for index, row in enumerate(matrix):
            yield f"row {index}", (index, *halves(row.tolist(), settings))
        return
    tails = _matrix(open_content(other))
    if len(tails) != len(matrix):
        raise InputError(f"{content.path}: {len(matrix)} prefixes, but {len(tails)} suffixes in {other}")
    for index, (head, tail) in enumerate(zip(matrix, tails, strict=True)):
        yield f"row {index}", (index, head.tolist(), tail.tolist(), "extraction-challenge")


def _matrix(content: Content) -> np.ndarray[Any, Any]:
    if content.matrix is None:
        raise InputError(f"{content.described()}; expected a matrix of token ids")
    return content.matrix


def _other(content: Content, settings: Settings) -> Path | None:
    """The file of suffixes that belongs to a file of prefixes: the one named, or the one beside it."""
    if settings.suffixes is not None:
        return settings.suffixes
    if _matrix(content).shape[1] != HALF or settings.given:
        return None
    name = content.path.name
    beside = content.path.with_name(name.replace("prefix", "suffix"))
    if "prefix" in name and beside.is_file():
        return beside
    raise InputError(
        f"{content.path}: rows of {HALF} tokens are one half of the extraction challenge; give the prefixes, with the "
        "suffixes beside them or as --suffixes FILE"
    )


def convert(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A row, called by its number."""
    index, head, tail, name = record
    if min(*head, *tail) < 0:
        raise InputError(f"token id {min(*head, *tail)}; expected whole numbers from 0")
    return [{"id": f"row-{index}", "prefix_ids": head, "suffix_ids": tail, "format": name, "row": index}]


FORMATS = (
    Format(
        name="token-matrix",
        makes="passages",
        about="token ids [n, t] in .npy or .pt: 200 columns (extraction challenge, last 50 + 50) or 50 with suffixes "
        "beside, 100 (paragraph localization, 50 + 50), 80 (MemPi, 32 + 48), 64 (Pythia, 32 + 32)",
        matches=lambda content: content.matrix is not None,
        convert=convert,
        rows=rows,
    ),
)
