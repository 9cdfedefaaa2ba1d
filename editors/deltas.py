"""What is added to one matrix: low rank, sparse or dense; and the small algebra of sums and negatives.

All are float32 on the CPU and `[out, in]` (or `[out]` for a bias), whatever the storage of the weight. Their entries
are the same to the bit on every machine, because undoing an edit from its file alone depends on it: products of two
float32 are exact in float64, sums run over the rank in order, and there is one cast at the end. No BLAS is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from memloc.errors import InputError

PIECE = 1 << 16
"""Entries worked on at a time: bounds the memory of everything that walks a delta, and fits the cache."""


class Piece(NamedTuple):
    """Some of a delta's entries.

    Attributes:
        start: how many entries came before.
        rows: a range of rows, or the row of each entry.
        columns: the column of each entry; None where `rows` is a range, or for a bias.
        values: float32, `[rows, in]` or one per entry.
    """

    start: int
    rows: slice | Tensor
    columns: Tensor | None
    values: Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """`left @ right`.

    Attributes:
        left: [out, r] float32.
        right: [r, in] float32.

    Raises:
        InputError: shapes do not agree, or a value is not finite.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        left, right = _plain(self.left), _plain(self.right)
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise InputError(
                f"low rank: left {list(left.shape)} and right {list(right.shape)}, expected [out, r], [r, in]"
            )
        object.__setattr__(self, "left", left)
        object.__setattr__(self, "right", right)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(out, in)`."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """How many terms are summed: an upper bound of the matrix's rank."""
        return self.right.shape[0]

    @property
    def touched(self) -> int:
        """Entries it may change: all."""
        return math.prod(self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the matrix, float32. Cost: r passes over them in float64."""
        if self.rank == 1:
            # One exact product rounded once is what a float32 multiplication gives.
            return self.left[start:stop] * self.right
        total = torch.zeros(stop - start, self.shape[1], dtype=torch.float64)
        left = self.left[start:stop].double()
        for term in range(self.rank):
            # A fused multiply-add gives the same bits as two steps here: the product is exact.
            total.addcmul_(left[:, term, None], self.right[term].double())
        return total.float()

    def dense(self) -> Tensor:
        """All of it, `[out, in]` float32, the same bits on every machine."""
        return _stack(self)

    def pieces(self) -> Iterator[Piece]:
        """Its entries, row-major, some rows at a time."""
        for start, stop in _row_ranges(self.shape):
            yield Piece(start * self.shape[1], slice(start, stop), None, self.rows(start, stop))

    def norm(self) -> float:
        """Frobenius norm, from the two small Gram matrices."""
        left, right = self.left.double(), self.right.double()
        return math.sqrt(max(0.0, float(((left.T @ left) * (right @ right.T)).sum())))

    def __neg__(self) -> LowRank:
        return LowRank(-self.left, self.right)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        return {"left": self.left, "right": self.right}


@dataclass(frozen=True, eq=False)
class Sparse:
    """Values at some entries, zero elsewhere.

    Attributes:
        shape: `(out, in)`, or `(out,)` for a bias.
        index: [k] int64, flat row-major positions, rising.
        values: [k] float32.

    Raises:
        InputError: positions do not rise, lie outside the shape, or are not as many as the values.
    """

    shape: tuple[int, ...]
    index: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        object.__setattr__(self, "index", self.index.detach().to("cpu", torch.int64).contiguous())
        object.__setattr__(self, "values", _plain(self.values))
        total = math.prod(self.shape)
        if self.index.ndim != 1 or self.index.shape != self.values.shape or len(self.shape) not in (1, 2):
            found = f"index {list(self.index.shape)}, values {list(self.values.shape)} in {list(self.shape)}"
            raise InputError(f"sparse: {found}; expected one position a value in [out, in] or [out]")
        if len(self.index) and (int(self.index[0]) < 0 or int(self.index[-1]) >= total):
            raise InputError(
                f"sparse: positions {int(self.index[0])} to {int(self.index[-1])} outside the {total} entries"
            )
        if not bool((self.index[1:] > self.index[:-1]).all()):
            raise InputError("sparse: positions must rise, each once")

    @classmethod
    def of(cls, change: Tensor, where: Tensor | None = None) -> Sparse:
        """From a dense `change` and a boolean mask `where` of the same shape (by default where it is not zero)."""
        chosen = change != 0 if where is None else where
        index = chosen.reshape(-1).nonzero().reshape(-1)
        return cls(tuple(change.shape), index, change.reshape(-1)[index])

    @property
    def touched(self) -> int:
        """Entries it may change."""
        return len(self.index)

    def dense(self) -> Tensor:
        """All of it, float32."""
        whole = torch.zeros(math.prod(self.shape))
        whole[self.index] = self.values
        return whole.view(self.shape)

    def pieces(self) -> Iterator[Piece]:
        """Its entries, in order."""
        for start in range(0, self.touched, PIECE):
            flat, values = self.index[start : start + PIECE], self.values[start : start + PIECE]
            if len(self.shape) == 1:
                yield Piece(start, flat, None, values)
            else:
                width = self.shape[1]
                yield Piece(start, torch.div(flat, width, rounding_mode="floor"), flat % width, values)

    def norm(self) -> float:
        """Frobenius norm."""
        return float(self.values.double().norm())

    def __neg__(self) -> Sparse:
        return Sparse(self.shape, self.index, -self.values)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name (`edit.py` packs the positions smaller)."""
        return {"index": self.index, "values": self.values}


@dataclass(frozen=True, eq=False)
class Dense:
    """Every entry.

    Attributes:
        values: `[out, in]`, or `[out]` for a bias, float32.

    Raises:
        InputError: another number of axes, or a value is not finite.
    """

    values: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _plain(self.values))
        if self.values.ndim not in (1, 2):
            raise InputError(f"dense: {list(self.values.shape)}, expected [out, in] or [out]")

    @property
    def shape(self) -> tuple[int, ...]:
        """`(out, in)` or `(out,)`."""
        return tuple(self.values.shape)

    @property
    def touched(self) -> int:
        """Entries it may change: all."""
        return self.values.numel()

    def dense(self) -> Tensor:
        """The values themselves."""
        return self.values

    def pieces(self) -> Iterator[Piece]:
        """Its entries, row-major, some rows at a time."""
        for start, stop in _row_ranges(self.shape):
            yield Piece(start * math.prod(self.shape[1:]), slice(start, stop), None, self.values[start:stop])

    def norm(self) -> float:
        """Frobenius norm."""
        return float(self.values.double().norm())

    def __neg__(self) -> Dense:
        return Dense(-self.values)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        return {"values": self.values}


Delta: TypeAlias = LowRank | Sparse | Dense


def add(first: Delta, second: Delta) -> Delta:
    """The sum, as small as it can be kept.

    Two of low rank give one whose rank is the sum (dense once that is no larger); two sparse ones give the union;
    anything else is dense. Sums of entries are taken in float32; low ranks are only put side by side.

    Raises:
        InputError: shapes differ.
    """
    if first.shape != second.shape:
        raise InputError(f"cannot add deltas of shapes {list(first.shape)} and {list(second.shape)}")
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        joined = LowRank(torch.cat([first.left, second.left], 1), torch.cat([first.right, second.right], 0))
        return joined if joined.rank * sum(joined.shape) < joined.touched else Dense(joined.dense())
    if isinstance(first, Sparse) and isinstance(second, Sparse):
        index = torch.unique(torch.cat([first.index, second.index]))
        values = torch.zeros(len(index))
        for part in (first, second):
            values[torch.searchsorted(index, part.index)] += part.values
        return Sparse(first.shape, index, values)
    return Dense(first.dense() + second.dense())


def by_expert(delta: Delta, experts: int, *, columns: bool) -> list[Delta]:
    """A delta of the maps of all experts side by side, as one of each expert's own map.

    Args:
        delta: `[out, experts · in]` where `columns`, else `[experts · out, in]`.
        experts: how many.
        columns: which axis they stand along.
    """
    if isinstance(delta, LowRank):
        if columns:
            return [LowRank(delta.left.clone(), part) for part in delta.right.chunk(experts, 1)]
        return [LowRank(part, delta.right.clone()) for part in delta.left.chunk(experts, 0)]
    if isinstance(delta, Dense):
        return [Dense(part) for part in delta.values.chunk(experts, 1 if columns else 0)]
    rows, column = delta.index // delta.shape[1], delta.index % delta.shape[1]
    shape = (delta.shape[0], delta.shape[1] // experts) if columns else (delta.shape[0] // experts, delta.shape[1])
    whose = column // shape[1] if columns else rows // shape[0]
    index = rows % shape[0] * shape[1] + column % shape[1]
    chosen = [whose == number for number in range(experts)]
    return [Sparse(shape, index[mine], delta.values[mine]) for mine in chosen]


def from_tensors(form: str, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> Delta:
    """Back from `tensors()`.

    Args:
        form: class name in lower case: "lowrank", "sparse" or "dense".
        shape: of the delta.
        tensors: as `tensors()` gave them.

    Raises:
        InputError: another form, a tensor is missing, or the shape is another.
    """
    wanted = {"lowrank": ("left", "right"), "sparse": ("index", "values"), "dense": ("values",)}
    if form not in wanted or not set(wanted[form]) <= set(tensors):
        raise InputError(f"delta of form {form!r} with tensors {sorted(tensors)}; expected one of {wanted}")
    found: Delta
    if form == "lowrank":
        found = LowRank(tensors["left"], tensors["right"])
    elif form == "sparse":
        found = Sparse(shape, tensors["index"], tensors["values"])
    else:
        found = Dense(tensors["values"])
    if found.shape != tuple(shape):
        raise InputError(f"delta of shape {list(found.shape)}, expected {list(shape)}")
    return found


def _plain(tensor: Tensor) -> Tensor:
    plain = tensor.detach().to("cpu", torch.float32).contiguous()
    if not bool(torch.isfinite(plain).all()):
        raise InputError("a delta holds values that are not finite; nothing was changed")
    return plain


def _row_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    step = max(1, PIECE // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield start, min(shape[0], start + step)


def _stack(delta: LowRank) -> Tensor:
    whole = torch.empty(delta.shape)
    for piece in delta.pieces():
        whole[piece.rows] = piece.values
    return whole
