"""Random numbers that belong to a text: what a token draws depends on a seed and on the tokens up to it, and no more.

A generator that walks over a batch gives a row other numbers in other company, in another batch size, or once its keys
and values are cached. These are computed from their address instead, all at once and on any device: the same text draws
the same, padded or not, teacher-forced or decoded token by token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memloc.provenance import digest_bytes

_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""The constants of splitmix64, as signed 64-bit numbers; its products are meant to overflow."""


def salt(*parts: str | int) -> int:
    """A signed 64-bit number from names and seeds."""
    return int(digest_bytes(*(str(part).encode() for part in parts))[:16], 16) - 2**63


def addresses(ids: Tensor, start: int, before: Tensor | None = None) -> Tensor:
    """An address for every token, from all tokens of its row up to it.

    Args:
        ids: [n, t] long.
        start: position of the first column in its row, counted from 0.
        before: [n] long, the addresses of the tokens just before; needed where `start` is not 0.

    Returns:
        [n, t] long. Rows that begin alike have equal addresses as far as they are alike.
    """
    at = torch.arange(start, start + ids.shape[1], device=ids.device)
    own = _mixed(_mixed(ids.long() + 1) + at * _GOLDEN)
    total = own.cumsum(1)
    return total if before is None else total + before[:, None]


def normals(address: Tensor, units: Tensor, salt: int) -> Tensor:
    """Standard normal numbers `[*address, u]`, float64: one for every address and every unit `[u]`."""
    column = _mixed(units.long() * _GOLDEN + salt)
    bits = _mixed(_mixed(address)[..., None] + column)
    # 52 bits and a half: never 0 or 1, and exact in float64.
    share = (_shifted(bits, 12).double() + 0.5) * 2.0**-52
    return math.sqrt(2.0) * torch.erfinv(2 * share - 1)


def choices(address: Tensor, count: int, salt: int) -> Tensor:
    """One of `count` numbers from 0, for every address."""
    return _shifted(_mixed(_mixed(address) + salt), 1) % count


def _mixed(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64. Source: Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, zeros coming in from the left."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
