"""What is being explained: the suffix, in nats per token."""

from __future__ import annotations

import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.view import ModelView


def suffix_logprobs(view: ModelView, batch: Batch) -> Tensor:
    """Log-probability of every suffix token, teacher-forced: `[n, s]` nats, 0 beyond a row's suffix; differentiable.

    s is the longest suffix in the batch. float32, or float64 where the model is.
    Cost: one forward; only the positions that predict a suffix token are unembedded.
    """
    row, column, token, step = batch.suffix_index()
    spoken = view.logits_at(batch, row, column).log_softmax(-1).gather(1, token[:, None])[:, 0]
    longest = int((batch.length - batch.prefix).max())
    return spoken.new_zeros(len(batch), longest).index_put((row, step), spoken)


def suffix_nll(view: ModelView, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of each row's suffix: `[n]`, nats per token; differentiable."""
    return -suffix_logprobs(view, batch).sum(1) / (batch.length - batch.prefix)


def divergence(view: ModelView, batch: Batch, reference: Tensor) -> Tensor:
    """Mean over suffix positions of KL(reference ‖ model): scalar, nats per token; differentiable.

    Args:
        view: the model, perhaps changed.
        batch: the rows.
        reference: [k, v] log-probabilities at the batch's suffix positions (`batch.suffix_index` order), detached.
    """
    row, column, _, _ = batch.suffix_index()
    spoken = view.logits_at(batch, row, column).log_softmax(-1)
    return torch.nn.functional.kl_div(spoken, reference, log_target=True, reduction="batchmean")


@torch.no_grad()
def reference_logprobs(view: ModelView, batch: Batch) -> Tensor:
    """`[k, v]` log-probabilities at the batch's suffix positions, for `divergence`."""
    row, column, _, _ = batch.suffix_index()
    return view.logits_at(batch, row, column).log_softmax(-1)
