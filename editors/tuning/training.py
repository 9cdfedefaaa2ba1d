"""The loop of every gradient editor: a target term, a keep term, Adam on a mask, a rule that stops it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from editors.tuning.descent import MaskedAdam
from memloc import progress
from memloc.batches import Batch
from memloc.objectives import suffix_logprobs
from memloc.passages import Passages
from memloc.view import ModelView

OVERSHOOT = 0.8
"""Share of the text's mean that is the default floor, because tokens end below the floor they are pushed to: on three
labs (scripts/claims/unlearning_on_lab.py) the targets ended inside the controls' range, below its median."""

WITHOUT_TEXT = -4.0
"""The floor, in nats per token, where there is no text to take it from."""


class Losses(NamedTuple):
    """What one step is about.

    Attributes:
        target: scalar, differentiable.
        kept: the keep term, not weighted; None without one.
        met: whether every target seen in this step is where it should be.
    """

    target: Tensor
    kept: Tensor | None
    met: bool


class Stop:
    """Stops once, for `patience` steps in a row, all targets have been met and the keep term was below `close`."""

    def __init__(self, patience: int, close: float) -> None:
        self.patience, self.close = patience, close
        self._met: deque[bool] = deque(maxlen=patience)
        self._far: deque[float] = deque(maxlen=patience)

    def __call__(self, met: bool, far: float) -> bool:
        """Whether to stop, after a step with these outcomes."""
        self._met.append(met)
        self._far.append(far)
        return len(self._met) == self.patience and all(self._met) and sum(self._far) <= self.close * self.patience


def descend(
    optimiser: MaskedAdam,
    losses: Callable[[int], Losses],
    stop: Stop | None,
    *,
    steps: int,
    keep_weight: float,
    label: str,
) -> dict[str, Any]:
    """Train the optimiser's model in place.

    Args:
        optimiser: of a working copy.
        losses: from the number of a step, counted from 0, to what it is about.
        stop: None to take all steps.
        steps: at most that many.
        keep_weight: of the keep term.
        label: for progress.

    Returns:
        What happened, for the notes: steps, whether it stopped early, and every tenth [step, target, keep].
    """
    history: list[list[float]] = []
    with optimiser.training():
        for step in range(steps):
            loss, kept, met = losses(step)
            (loss if kept is None else loss + keep_weight * kept).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            far = 0.0 if kept is None else float(kept.detach())
            history.append([float(loss.detach()), far])
            progress.tell(label, step + 1, steps, f"target {history[-1][0]:.3f} keep {far:.4f}")
            if stop is not None and stop(met, far):
                break
    thinned = [[step + 1, *row] for step, row in enumerate(history) if step % 10 == 9 or step + 1 == len(history)]
    return {"steps": len(history), "stopped": len(history) < steps, "history": thinned}


def cycle(view: ModelView, targets: Passages, size: int, seed: int) -> Iterator[Batch]:
    """Batches of targets for ever, shuffled each round where they do not fit in one; `rows` count within a batch."""
    for batch, _ in numbered_cycle(view, targets, size, seed):
        yield batch


def numbered_cycle(view: ModelView, targets: Passages, size: int, seed: int) -> Iterator[tuple[Batch, list[int]]]:
    """As `cycle`, each batch with the number in `targets` of each of its rows."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        fits = len(targets) <= size
        order = list(range(len(targets))) if fits else torch.randperm(len(targets), generator=generator).tolist()
        for start in range(0, len(order), size):
            part = order[start : start + size]
            for batch in view.batches(Passages(tuple(targets[row] for row in part), targets.origin), size=size):
                yield batch, [part[row] for row in batch.rows]


@dataclass(frozen=True)
class Term:
    """The bounded target term.

    Attributes:
        level: nats per token.
        above: tokens should rise above `level`, not fall below it.
    """

    level: float
    above: bool

    def __call__(self, view: ModelView, batch: Batch) -> tuple[Tensor, bool]:
        """Mean shortfall over target tokens (differentiable), and whether every row meets the level on average."""
        spoken = suffix_logprobs(view, batch)
        length, counted = batch.length - batch.prefix, counted_of(batch, spoken)
        short = (self.level - spoken if self.above else spoken - self.level).clamp_min(0) * counted
        mean = spoken.detach().sum(1) / length
        met = mean >= self.level if self.above else mean <= self.level
        return short.sum() / counted.sum(), bool(met.all())


def counted_of(batch: Batch, spoken: Tensor) -> Tensor:
    """`[n, s]` bool: which entries of `suffix_logprobs` are tokens of a suffix and not padding."""
    length = batch.length - batch.prefix
    return torch.arange(spoken.shape[1], device=spoken.device) < length[:, None]


def floor_of(view: ModelView, text: Passages | None, floor: float | None) -> float:
    """Nats per token that a forgotten token should fall to: `floor`, or `OVERSHOOT` times the mean on `text`."""
    if floor is not None or not text:
        return WITHOUT_TEXT if floor is None else floor
    return OVERSHOOT * mean_logprob(view, text[:64])


@torch.no_grad()
def mean_logprob(view: ModelView, text: Passages) -> float:
    """Mean nats per token of the suffixes of `text`."""
    total = sum(float(suffix_logprobs(view, batch).sum()) for batch in view.batches(text, size=16))
    return total / sum(len(item.suffix) for item in text)
