"""One cast from float arithmetic to the stored dtype: to nearest, or stochastic with the same bits on every machine.

Nearest rounding eats small edits of bfloat16 weights (most entries do not move at all). Stochastic rounding moves
each entry to one of its two stored neighbours with the probability that keeps the mean, so the edit survives in the
sum over a row. Its noise is counter-based: entry `i` of a site draws word `i` of a Philox stream keyed by the seed
and the site's name, whatever the order or the size of the pieces the work is done in.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from memloc.errors import InputError

Rounding = Literal["nearest", "stochastic"]

_FORMATS = {torch.bfloat16: (-126, 7), torch.float16: (-14, 10)}
"""Dtype to its least normal exponent and its fraction bits."""

_WORDS_PER_BLOCK = 8
"""32-bit words in one step of the Philox counter (four of 64 bits)."""


def cast(
    values: Tensor, dtype: torch.dtype, *, rounding: Rounding = "nearest", seed: int = 0, name: str = "", start: int = 0
) -> Tensor:
    """`values` in `dtype`, rounded once.

    Args:
        values: float32 or float64 on the CPU, any shape.
        dtype: what is stored.
        rounding: "nearest" (ties to even) or "stochastic". Stochastic differs from nearest only for bfloat16 and
            float16: the wider types hold what the arithmetic gave.
        seed: of the noise; with `name` it fixes every bit.
        name: of the place that is written, so that two places do not share their noise.
        start: which word of the stream the first value draws; the others follow in row-major order.

    Returns:
        Same shape, `dtype`. Values beyond the largest stored number become infinite; the caller checks.

    Raises:
        InputError: another `rounding`.

    Cost: nearest, one pass; stochastic, about ten passes in float64.
    """
    if rounding not in ("nearest", "stochastic"):
        raise InputError(f"rounding {rounding!r}: expected 'nearest' or 'stochastic'")
    if rounding == "nearest" or dtype not in _FORMATS:
        return values.to(dtype)
    least, fraction_bits = _FORMATS[dtype]
    wide = values.double()
    # Every step below is exact in float64: scaling by a power of two, floor, a difference of neighbours.
    exponent = (wide.view(torch.int64) >> 52 & 0x7FF) - 1023
    quantum = (exponent.clamp(min=least) - fraction_bits + 1023 << 52).view(torch.float64)
    scaled = wide / quantum
    below = scaled.floor()
    up = noise(wide.numel(), seed=seed, name=name, start=start).view(wide.shape) < scaled - below
    return ((below + up) * quantum).to(dtype)


def noise(count: int, *, seed: int, name: str, start: int = 0) -> Tensor:
    """Words `start` to `start + count` of the stream of (`seed`, `name`), as float64 in [0, 1), multiples of 2⁻³².

    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (Philox4x64-10, as numpy has it; numpy
    promises the raw stream of a bit generator across versions).
    """
    key = np.frombuffer(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], dtype="<u8").astype(np.uint64)
    block, skip = divmod(start, _WORDS_PER_BLOCK)
    generator = np.random.Philox(key=key)
    generator.advance(block)
    longs = np.asarray(generator.random_raw((skip + count + 1) // 2), dtype="<u8")
    words = longs.view("<u4")[skip : skip + count]
    return torch.from_numpy(words.astype(np.float64) * 2.0**-32)
