"""A matrix as a checkpoint folder stores it: one tensor, one of a stack, or several tensors one above the other.

In memory a mixture keeps the maps of its experts in two parameters; on disk every expert's maps are tensors of their
own in most folders, and its part of the stack in others. Both are read and written here as the same matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from editors.disk.disk_names import Stored, locate
from editors.disk.shards import Entry, Weights, open_weights
from memloc.architectures import Place
from memloc.errors import CheckpointError
from memloc.provenance import digest_parts


@dataclass(frozen=True)
class Matrix:
    """Where a matrix's bytes lie.

    Attributes:
        parts: name to place of what holds its rows, from the first row on. The name of one of a stack has its number.
    """

    parts: Mapping[str, Entry]

    @property
    def dtype(self) -> str:
        """Safetensors' name."""
        return next(iter(self.parts.values())).dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        entries = list(self.parts.values())
        return (
            entries[0].shape if len(entries) == 1 else (sum(part.shape[0] for part in entries), *entries[0].shape[1:])
        )

    @property
    def files(self) -> str:
        """Names of the files it lies in, for messages."""
        return " and ".join(dict.fromkeys(part.file for part in self.parts.values()))

    def read(self, folder: Path) -> bytearray:
        """Its bytes, from the files in `folder`."""
        entries = list(self.parts.values())
        if len(entries) == 1:
            return entries[0].read(folder)
        data = bytearray()
        for part in entries:
            data += part.read(folder)
        return data

    def digest(self, folder: Path) -> str:
        """Its digest, as `provenance.digest_raw` of its bytes; they are read some at a time."""
        return digest_parts(self.dtype, self.shape, self._chunks(folder))

    def within(self, rows: slice | tuple[int, ...] | None) -> list[str]:
        """Names of the parts that hold any of `rows`."""
        found, start = [], 0
        for name, part in self.parts.items():
            stop = start + (part.shape[0] if part.shape else 1)
            chosen = rows if not isinstance(rows, slice) else range(*rows.indices(self.shape[0]))
            if chosen is None or len(self.parts) == 1 or any(start <= row < stop for row in chosen):
                found.append(name)
            start = stop
        return found

    def cut(self, data: bytearray) -> Iterator[tuple[str, Entry, memoryview]]:
        """The parts, each with its share of the whole matrix's bytes."""
        view, start = memoryview(data), 0
        for name, part in self.parts.items():
            stop = start + part.stop - part.start
            yield name, part, view[start:stop]
            start = stop

    def _chunks(self, folder: Path) -> Iterator[memoryview]:
        for part in self.parts.values():
            yield from part.chunks(folder)


def experts_of(folder: Path, parameter: str) -> int:
    """How many experts' matrices a parameter holds, as the folder's headers tell.

    Raises:
        CheckpointError: it is not there, or holds none.
    """
    weights = open_weights(folder)
    stored = locate(weights, [parameter])[parameter]
    shape = weights.entries[stored.names[0]].shape
    if not stored.experts and (stored.converted or len(shape) != 3):
        raise CheckpointError(f"{folder}: {parameter} holds no experts; nothing was written")
    return len(stored.experts) or shape[0]


def stored_matrix(weights: Weights, stored: Stored, place: Place) -> Matrix:
    """Where the matrix of `place` lies.

    Args:
        weights: of the folder.
        stored: where its parameter is kept, as `disk_names.locate` tells.
        place: of a weight in it.

    Raises:
        CheckpointError: it is computed on load in another way than by stacking, or the folder's shapes do not fit.
    """
    first = stored.names[0]
    if stored.experts and place.expert is not None and place.expert < len(stored.experts):
        names = stored.experts[place.expert]
        entries = [weights.entries[name] for name in names]
        if len({(part.dtype, part.shape[1:]) for part in entries}) > 1 or any(len(part.shape) != 2 for part in entries):
            raise CheckpointError(f"{weights.folder}: {' and '.join(names)} do not fit together; nothing was written")
        return Matrix(dict(zip(names, entries, strict=True)))
    if stored.converted or len(stored.names) > 1:
        raise CheckpointError(
            f"{weights.folder}: {place.parameter} is computed on load from {len(stored.names)} stored tensors, the "
            f"first {first}; save the model in its own layout and edit that; nothing was written"
        )
    entry = weights.entries[first]
    if place.expert is None:
        return Matrix({first: entry})
    if len(entry.shape) != 3 or place.expert >= entry.shape[0]:
        raise CheckpointError(
            f"{weights.folder}: {first} is {list(entry.shape)}, it holds no expert {place.expert}; nothing was written"
        )
    size = (entry.stop - entry.start) // entry.shape[0]
    start = entry.start + place.expert * size
    return Matrix({f"{first}[{place.expert}]": replace(entry, shape=entry.shape[1:], start=start, stop=start + size)})
