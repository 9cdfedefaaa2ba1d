"""Bytes of an edit file that would be wasteful as plain tensors: positions of sparse deltas, repairs of rounding.

Everything is little-endian and goes through zlib; reading back never takes more memory than the header announces.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memloc.errors import ArtifactError

_WIDTHS = (1, 2, 4, 8)

_STEP = 1 << 20
"""Bytes unpacked at a time."""


def pack_repair(repair: Tensor) -> bytes:
    """Integers that are mostly zero: lowest bytes of all entries first, compressed; empty where all are zero."""
    if not bool(repair.any()):
        return b""
    return _squeeze(repair.contiguous().view(torch.uint8).view(len(repair), -1).numpy())


def unpack_repair(data: bytes, entries: int, width: int, what: str) -> np.ndarray[Any, Any] | None:
    """Back from `pack_repair`: uint8 `[width, entries]`, one row per byte of the integers; None where all are zero.

    Raises:
        ArtifactError: damaged, or of another size.
    """
    if not data:
        return None
    return np.frombuffer(unpack(data, entries * width, what), dtype=np.uint8).reshape(width, entries)


def pack_index(index: Tensor, total: int) -> tuple[str, bytes]:
    """Rising positions below `total`, as a bit mask or as gaps, whichever is shorter before compression.

    Returns:
        The form ("mask", "gaps-1", "gaps-2", ...: bytes a gap) and the bytes.
    """
    positions = index.numpy()
    gaps = np.diff(positions, prepend=0)
    most = int(gaps.max(initial=0))
    width = next(size for size in _WIDTHS if most < 1 << 8 * size)
    if total < 8 * width * len(positions):
        mask = np.zeros(total, dtype=bool)
        mask[positions] = True
        return "mask", zlib.compress(np.packbits(mask, bitorder="little").tobytes(), 6)
    return f"gaps-{width}", _squeeze(gaps.astype(f"<u{width}").view(np.uint8).reshape(-1, width))


def unpack_index(form: str, data: bytes, count: int, total: int, what: str) -> Tensor:
    """Back from `pack_index`: int64 `[count]`.

    Raises:
        ArtifactError: damaged, another form, or another number of positions.
    """
    if form == "mask":
        bits = np.unpackbits(np.frombuffer(unpack(data, (total + 7) // 8, what), dtype=np.uint8), bitorder="little")
        positions = bits[:total].nonzero()[0].astype(np.int64)
    elif form in [f"gaps-{width}" for width in _WIDTHS]:
        width = int(form[-1])
        planes = np.frombuffer(unpack(data, count * width, what), dtype=np.uint8).reshape(width, count)
        positions = np.cumsum(np.ascontiguousarray(planes.T).view(f"<u{width}").reshape(-1).astype(np.int64))
    else:
        raise ArtifactError(f"{what} are kept as {form!r}; this memloc knows mask and gaps; upgrade memloc")
    if len(positions) != count:
        raise ArtifactError(f"{what}: {len(positions)} positions, expected {count}; the file is damaged")
    return torch.from_numpy(positions)


def unpack(data: bytes, size: int, what: str) -> bytearray:
    """`size` bytes out of zlib's `data`, never more than that and some.

    Raises:
        ArtifactError: damaged, or of another size.
    """
    stream, found, done = zlib.decompressobj(), bytearray(size), 0
    try:
        part = stream.decompress(data, _STEP)
        while part and done + len(part) <= size:
            found[done : done + len(part)] = part
            done += len(part)
            part = stream.decompress(stream.unconsumed_tail, _STEP)
    except zlib.error as error:
        raise ArtifactError(f"{what} cannot be unpacked: {error}; the file is damaged") from error
    if part or done != size or not stream.eof or stream.unused_data:
        raise ArtifactError(f"{what} do not hold {size} bytes; the file is damaged")
    return found


def _squeeze(table: np.ndarray[Any, Any]) -> bytes:
    """Columns of a uint8 table one after the other, compressed: high bytes are nearly constant."""
    stream = zlib.compressobj(6)
    parts = [stream.compress(table[:, column].tobytes()) for column in range(table.shape[1])]
    return b"".join([*parts, stream.flush()])
