"""A ball around weights as they were, in the dtype in which they are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memloc.errors import InputError


@dataclass(frozen=True, eq=False)
class Ball:
    """What a vector of weights is projected onto.

    Attributes:
        origin: [k] its centre, in the dtype of the work.
        width: ε, in units of a weight.
        low: [k] the lowest number of the stored dtype within ε of each; None for the l2 ball.
        high: [k] the highest.
    """

    origin: Tensor
    width: float
    low: Tensor | None
    high: Tensor | None

    @classmethod
    def around(cls, origin: Tensor, stored: torch.dtype, width: float, norm: str) -> Ball:
        """The ball of `norm` "inf" or "l2".

        Raises:
            InputError: no entry can move: the next number of the stored dtype is outside.
        """
        if norm == "l2":
            return cls(origin.clone(), width, None, None)
        low, high = (_inward(origin, side * width, stored) for side in (-1, 1))
        if not bool((low < high).any()):
            name = str(stored).removeprefix("torch.")
            raise InputError(f"epsilon {width:.3g}: smaller than the spacing of every {name} weight, so none can move")
        return cls(origin.clone(), width, low, high)

    def __call__(self, moved: Tensor) -> Tensor:
        """The nearest point of the ball."""
        if self.low is not None and self.high is not None:
            return torch.minimum(torch.maximum(moved, self.low), self.high)
        far = moved - self.origin
        length = float(torch.linalg.vector_norm(far.double()))
        return moved if length <= self.width else self.origin + far * (self.width / length)


def steps_within(ball: Ball, stored: torch.dtype) -> float:
    """Share of entries with room for at least one other number of the stored dtype."""
    if ball.low is None or ball.high is None:
        return 1.0
    return float((ball.low < ball.high).double().mean())


def _inward(origin: Tensor, offset: float, stored: torch.dtype) -> Tensor:
    """The number of dtype `stored` nearest to `origin + offset` that is no further from `origin`; in its dtype."""
    exact = origin.double() + offset
    found = exact.to(stored)
    beyond = (found.double() - origin.double()).abs() > abs(offset)
    found = torch.where(beyond, torch.nextafter(found, origin.to(stored)), found)
    return found.to(origin.dtype)
