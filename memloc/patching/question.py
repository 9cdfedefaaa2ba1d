"""What patching asks of hidden states: how well the suffix is said. Larger is worse, in every metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.view import ModelView

Metric = Literal["nll", "logit", "logit-difference", "probability"]


@dataclass(frozen=True)
class Question:
    """What is asked of the hidden states of a batch: how well its suffixes are said.

    Attributes:
        view: the model.
        metric: "nll": mean NLL; "logit": minus the mean logit of the gold tokens; "logit-difference": the same, less
            that of the likeliest other token of the clean run; "probability": minus the gold tokens' mean probability.
        row: [k] of each suffix token; `column` predicts it, `token` is its id, `size` [n] counts each row's.
        rival: [k] the likeliest other token in the clean run; None where the metric has no use for it.
    """

    view: ModelView
    metric: Metric
    row: Tensor
    column: Tensor
    token: Tensor
    size: Tensor
    rival: Tensor | None

    @classmethod
    @torch.no_grad()
    def about(cls, view: ModelView, metric: Metric, batch: Batch, hidden: Tensor) -> Question:
        """`hidden` [n, t, d]: of the clean run of `batch`."""
        row, column, token, _ = batch.suffix_index()
        rival = None
        if metric == "logit-difference":
            logits = view.unembed(hidden[row, column]).clone()
            rival = logits.scatter(1, token[:, None], -torch.inf).argmax(1)
        return cls(view, metric, row, column, token, batch.length - batch.prefix, rival)

    def losses(self, hidden: Tensor) -> Tensor:
        """[n] of the batch's rows; differentiable."""
        each = self._each(self.view.unembed(hidden[self.row, self.column]), self.token, self.rival)
        return each.new_zeros(len(self.size)).index_add(0, self.row, each) / self.size

    def of_copies(self, hidden: Tensor) -> Tensor:
        """[m] of m variants of the batch's only row, [m, t, d]."""
        logits = self.view.unembed(hidden[:, self.column])
        token = self.token.expand(logits.shape[:-1])
        rival = None if self.rival is None else self.rival.expand(logits.shape[:-1])
        return self._each(logits, token, rival).mean(1)

    def _each(self, logits: Tensor, token: Tensor, rival: Tensor | None) -> Tensor:
        if self.metric == "nll":
            return -logits.log_softmax(-1).gather(-1, token[..., None])[..., 0]
        if self.metric == "probability":
            return -logits.softmax(-1).gather(-1, token[..., None])[..., 0]
        gold = logits.gather(-1, token[..., None])[..., 0]
        return -gold if rival is None else logits.gather(-1, rival[..., None])[..., 0] - gold
