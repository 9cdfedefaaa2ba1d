"""The band in which a forgotten passage should end: where text that the model never saw is, and no deeper.

A passage pushed far below that is as easy to tell from unseen text as one that is recited, and what pushed it so far
pushed other things too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from editors.tuning.training import counted_of, floor_of
from editors.tuning.unlearning_losses import row_mean
from memloc.objectives import suffix_logprobs
from memloc.passages import Passages
from memloc.view import ModelView

LOWEST = 0.01
"""Share of the pieces of unseen text that lie below the band."""


@dataclass(frozen=True)
class Band:
    """Mean log p per token of a row, in nats.

    Attributes:
        upper: at or below it a target is forgotten.
        lower: below it a target is forgotten too much; None where no text says where that is.
    """

    upper: float
    lower: float | None

    @classmethod
    def of(cls, view: ModelView, targets: Passages, text: Passages | None, floor: float | None) -> Band:
        """The band of `view`, before any training.

        The upper end is `floor`, or four fifths of the mean on `text`, or -4 nats without text. The lower end is
        where the lowest hundredth of pieces of `text` lies, each as long as the median target's suffix.

        Cost: one forward over at most 64 windows of `text`.
        """
        upper = floor_of(view, text, floor)
        if not text:
            return cls(upper, None)
        lengths = sorted(len(item.suffix) for item in targets)
        found = _pieces(view, text[:64], lengths[len(lengths) // 2])
        return cls(upper, min(upper, float(torch.quantile(found, LOWEST))))

    def report(self, view: ModelView, targets: Passages) -> dict[str, Any]:
        """Where the targets are, for the notes: and the alarm, if some were pushed too far.

        Returns:
            "band", "log p" (lowest, median and highest mean per token of the targets), "lowest token", "in band",
            "over-forgotten" (targets below it) and "too deep" (nats per token by which the lowest is).
        """
        rows, lowest = _rows(view, targets)
        means = rows.sort().values
        deep = 0.0 if self.lower is None else max(0.0, self.lower - float(means[0]))
        over = 0 if self.lower is None else int((means < self.lower).sum())
        inside = int((means <= self.upper).sum()) - over
        return {
            "band": [self.lower, self.upper],
            "log p": [float(means[0]), float(means.median()), float(means[-1])],
            "lowest token": lowest,
            "in band": inside,
            "over-forgotten": over,
            "too deep": deep,
        }


@torch.no_grad()
def _rows(view: ModelView, targets: Passages) -> tuple[torch.Tensor, float]:
    """Mean log p per token of every target, `[n]` in no order, and the lowest of any token."""
    found, lowest = [], 0.0
    for batch in view.batches(targets, size=16):
        spoken = suffix_logprobs(view, batch)
        found.append(row_mean(spoken, counted_of(batch, spoken)).double().cpu())
        lowest = min(lowest, float(spoken.min()))
    return torch.cat(found), lowest


@torch.no_grad()
def _pieces(view: ModelView, text: Passages, length: int) -> torch.Tensor:
    """Mean log p per token of consecutive pieces of `length` tokens (a shorter row is one piece)."""
    found = []
    for batch in view.batches(text, size=16):
        spoken = suffix_logprobs(view, batch).double().cpu()
        for row, tokens in zip(spoken, (batch.length - batch.prefix).tolist(), strict=True):
            size = min(length, tokens)
            found.append(row[: tokens // size * size].view(-1, size).mean(1))
    return torch.cat(found)
