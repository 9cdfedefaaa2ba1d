"""One stored tensor and a delta: forward with one cast, and back to the bit.

Works on a copy on the CPU that the caller owns, in its stored dtype and layout; `edit.py` puts the result into a
live model, `checkpoint.py` into a file. Nothing here knows either.

The way back. Rounding loses bits, so `cast(new - delta)` is not always `old`. What differs is kept: the exclusive or
of the two bit patterns on the touched entries, mostly zeros, compressed. A small update of bfloat16 weights costs next
to nothing; float32 weights that grew lose about one bit an entry, and those bits have to be kept somewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from editors.deltas import Delta, Piece
from editors.packing import pack_repair, unpack_repair
from editors.rounding import Rounding, cast
from memloc.architectures import Place
from memloc.errors import InputError, ModelError
from memloc.provenance import DTYPE_NAMES

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Stored dtypes that can be edited, by their safetensors names."""

_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@dataclass(frozen=True)
class Survival:
    """What one cast left of a delta.

    Attributes:
        requested: Frobenius norm of the delta.
        realised: Frobenius norm of new minus old weight, both as stored.
        error: norm of (realised minus requested change) over `requested`; 0 where nothing was lost.
        asked: entries whose delta is not zero.
        changed: entries whose stored value changed.
    """

    requested: float
    realised: float
    error: float
    asked: int
    changed: int

    @property
    def share(self) -> float:
        """Changed entries over asked ones; 1.0 where none was asked."""
        return self.changed / self.asked if self.asked else 1.0

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def dtype_name(tensor: Tensor) -> str:
    """The safetensors name of a tensor's dtype (torch's own where there is none)."""
    name = str(tensor.dtype).removeprefix("torch.")
    return DTYPE_NAMES.get(name, name)


def weight_shape(stored: tuple[int, ...], place: Place) -> tuple[int, ...]:
    """Shape of the weight (or bias) that `place` cuts out of a parameter of shape `stored`."""
    whole = stored[::-1] if place.transposed else stored
    if place.rows is None:
        return whole
    rows = len(range(*place.rows.indices(whole[0]))) if isinstance(place.rows, slice) else len(place.rows)
    return (rows, *whole[1:])


def add_to(
    stored: Tensor,
    place: Place,
    delta: Delta,
    *,
    name: str,
    rounding: Rounding = "nearest",
    seed: int = 0,
    repair: Tensor | None = None,
    measure: bool = True,
    exact: bytes | None = None,
) -> Survival | None:
    """Change `stored` in place by `delta`: float32 arithmetic (float64 for F64), one cast.

    Entries whose delta is zero keep their bits (unless `exact` says otherwise).

    Args:
        stored: a parameter in its stored dtype and layout, on the CPU; the caller's own copy.
        place: where the weight lies in it.
        delta: `[out, in]`, or `[out]` for a bias.
        name: of the site, for messages and for the noise of stochastic rounding.
        rounding: see `rounding.cast`.
        seed: of stochastic rounding.
        repair: filled, where given: per touched entry the bits by which `cast(new - delta)` misses `old`, see
            `empty_repair`.
        measure: whether to work out what survived, which takes as long as all the rest.
        exact: bits that turn the result into what was meant, as `bits_short_of` packed them; the cast is to nearest
            then, because that is what they were found for.

    Returns:
        What survived the cast, or None where it is not asked for.

    Raises:
        InputError: shapes differ.
        ModelError: an old, added or new value is not finite; `stored` may be half changed then.
    """
    tally = np.zeros(5)
    how: dict[str, Any] = {"rounding": rounding, "seed": seed, "name": name} if exact is None else {}
    missing = unpack_repair(exact or b"", delta.touched, stored.element_size(), f"{name}: the bits that were meant")
    for piece, key, whole in _walk(stored, place, delta, name):
        old = whole[key].clone(memory_format=torch.contiguous_format)
        new = _flipped(_step(old, piece.values, **how, start=piece.start), missing, piece.start)
        # One value that is not finite makes the sum so; the reverse is a false alarm, which the check below finds out.
        if not math.isfinite(float(new.sum())):
            _check_finite(name, dtype_name(stored), old, piece.values, new)
        if repair is not None:
            missed = _bits(old) ^ _bits(_step(new, -piece.values))
            repair[piece.start : piece.start + piece.values.numel()] = missed.reshape(-1)
        if measure:
            tally += _tally(old, new, piece.values)
        whole[key] = new
    if not measure:
        return None
    requested, realised, lost = np.sqrt(tally[:3]).tolist()
    return Survival(requested, realised, lost / requested if requested else 0.0, int(tally[3]), int(tally[4]))


def bits_short_of(stored: Tensor, place: Place, delta: Delta, meant: Tensor, *, name: str) -> bytes:
    """What `add_to` lacks to `meant`, packed: rounding and float32 deltas cannot always reach a given number.

    Args:
        stored: the parameter before, as for `add_to`; not written.
        place: where the weight lies in it.
        delta: about `meant` less the old weight where it touches an entry; what it does not touch stays.
        meant: [out, in] or [out], in the stored dtype.
        name: of the site, for messages.

    Raises:
        InputError: another dtype, or shapes differ.
    """
    if meant.dtype != stored.dtype or tuple(meant.shape) != delta.shape:
        raise InputError(f"{name}: meant {dtype_name(meant)} {list(meant.shape)}, expected {dtype_name(stored)} "
                         f"{list(delta.shape)}")  # fmt: skip
    short = empty_repair(stored, delta)
    for piece, key, whole in _walk(stored, place, delta, name):
        reached = _step(whole[key].clone(memory_format=torch.contiguous_format), piece.values)
        wanted = meant[piece.rows] if piece.columns is None else meant[piece.rows, piece.columns]
        short[piece.start : piece.start + reached.numel()] = (_bits(reached) ^ _bits(wanted)).reshape(-1)
    return pack_repair(short)


def empty_repair(stored: Tensor, delta: Delta) -> Tensor:
    """Room for the repair of `delta` in `stored`: zeros, one integer of the stored width a touched entry."""
    return torch.zeros(delta.touched, dtype=_BITS[stored.element_size()])


def take_from(stored: Tensor, place: Place, delta: Delta, way_back: bytes, *, name: str) -> None:
    """Undo `add_to` in place, to the bit.

    Args:
        stored: the parameter as `add_to` left it.
        place: as given to `add_to`.
        delta: as given to `add_to`.
        way_back: the repair, as `packing.pack_repair` packed it.
        name: of the site, for messages.

    Raises:
        ArtifactError: the way back is damaged.
        InputError: shapes differ.
    """
    planes = unpack_repair(way_back, delta.touched, stored.element_size(), f"{name}: the bits of the way back")
    for piece, key, whole in _walk(stored, place, delta, name):
        back = _step(whole[key].clone(memory_format=torch.contiguous_format), -piece.values)
        whole[key] = _flipped(back, planes, piece.start)


def _flipped(values: Tensor, planes: np.ndarray[Any, Any] | None, start: int) -> Tensor:
    """`values` with the bits of `planes` [width, entries] turned, from entry `start`; themselves where that is None."""
    if planes is None:
        return values
    part = np.array(planes[:, start : start + values.numel()].T, order="C")
    flips = torch.from_numpy(part).view(_BITS[values.element_size()]).view(values.shape)
    return (_bits(values) ^ flips).view(values.dtype)


def _walk(stored: Tensor, place: Place, delta: Delta, name: str) -> Iterator[tuple[Piece, Any, Tensor]]:
    """Pieces of `delta`, the key of each in the whole `[out, in]` matrix, and that matrix, a view on `stored`."""
    expected = weight_shape(tuple(stored.shape), place)
    if delta.shape != expected:
        raise InputError(f"{name}: delta {list(delta.shape)}, weight {list(expected)}; nothing was changed")
    whole = stored.T if place.transposed else stored
    rows = place.rows
    table = None if rows is None else torch.arange(len(whole))[rows if isinstance(rows, slice) else list(rows)]
    steady = table is not None and table.numel() > 0 and bool((table.diff() == 1).all())
    for piece in delta.pieces():
        wanted: slice | Tensor = piece.rows
        if steady and table is not None:
            first = int(table[0])
            shifted = isinstance(wanted, slice)
            wanted = slice(wanted.start + first, wanted.stop + first) if shifted else wanted + first  # type: ignore
        elif table is not None:
            wanted = table[wanted]
        yield piece, wanted if piece.columns is None else (wanted, piece.columns), whole


def _step(old: Tensor, values: Tensor, **how: Any) -> Tensor:
    wide = torch.float64 if old.dtype == torch.float64 else torch.float32
    new, still = cast(old.to(wide) + values.to(wide), old.dtype, **how), values == 0
    # Adding zero would turn a minus zero into a plus.
    return torch.where(still, old, new) if bool(still.any()) else new


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])


def _tally(old: Tensor, new: Tensor, values: Tensor) -> np.ndarray[Any, Any]:
    """Squared norms of wanted, made and missed change, in float64; entries asked for and changed."""
    change = new.to(torch.float64, copy=True).sub_(old)
    made = _square(change)
    missed = _square(change.sub_(values))
    counts = int(torch.count_nonzero(values)), int(torch.count_nonzero(new != old))
    return np.array([_square(values.double()), made, missed, *counts])


def _square(values: Tensor) -> float:
    flat = values.reshape(-1)
    return float(torch.dot(flat, flat))


def _check_finite(name: str, dtype: str, old: Tensor, values: Tensor, new: Tensor) -> None:
    for tensor, what in (
        (old, "the weight holds values that are not finite"),
        (values, "the delta holds values that are not finite"),
        (new, f"old + delta does not fit {dtype}"),
    ):
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{name}: {what}; nothing was changed")
