"""What a model makes of passages, whole or changed: the suffix's loss, exact recall, and how sure it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.view import ModelView

CHUNK = 256
"""Positions unembedded at once."""


@dataclass(frozen=True)
class Outcome:
    """What became of n rows, each [n] on the CPU, float64.

    Attributes:
        nll: mean negative log-likelihood of the suffix, nats per token.
        accuracy: share of the suffix's tokens that are the model's first choice, teacher-forced.
        exact: 1 where all of them are, which is where greedy decoding recites the suffix; else 0.
        entropy: mean entropy of what the model expects at those positions, nats.
    """

    nll: Tensor
    accuracy: Tensor
    exact: Tensor
    entropy: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, view: ModelView, batch: Batch, hidden: Tensor | None = None) -> Outcome:
        """Of a batch; `hidden` [n, t, d] after the final norm saves the forward where it is known."""
        normed = view.hidden(batch) if hidden is None else hidden
        row, column, token, _ = batch.suffix_index()
        pieces = (slice(start, start + CHUNK) for start in range(0, len(row), CHUNK))
        parts = [_at(view, normed[row[piece], column[piece]], token[piece]) for piece in pieces]
        sums = torch.zeros(len(batch), 3, dtype=torch.float64)
        sums.index_add_(0, row.cpu(), torch.cat(parts))
        mean = sums / (batch.length - batch.prefix).cpu()[:, None]
        return cls(mean[:, 0], mean[:, 1], (mean[:, 1] == 1).double(), mean[:, 2])

    @classmethod
    def gathered(cls, parts: Iterable[tuple[Batch, Outcome]], count: int) -> Outcome:
        """Outcomes of batches as one, in the order of the passages."""
        table = torch.zeros(count, 4, dtype=torch.float64)
        for batch, part in parts:
            table[list(batch.rows)] = torch.stack([part.nll, part.accuracy, part.exact, part.entropy], 1)
        return cls(*table.unbind(1))

    def means(self) -> dict[str, float]:
        """Mean of each figure over the rows."""
        return {name: float(getattr(self, name).mean()) for name in ("nll", "accuracy", "exact", "entropy")}


def outcome_bytes(view: ModelView, positions: int) -> int:
    """About what `Outcome.of` takes beside the forward."""
    return 8 * (6 * min(positions, CHUNK) * view.vocab + positions * (view.width + 8))


def _at(view: ModelView, normed: Tensor, token: Tensor) -> Tensor:
    """Loss, hit and entropy at k positions: [k, 3], float64 on the CPU."""
    spoken = view.unembed(normed).log_softmax(-1)
    loss = -spoken.gather(1, token[:, None])[:, 0]
    hit = spoken.argmax(-1) == token
    entropy = -(spoken.exp() * spoken.clamp_min(torch.finfo(spoken.dtype).min)).sum(-1)
    return torch.stack([loss.double(), hit.double(), entropy.double()], 1).cpu()
