"""Negative preference optimisation: ascent that fades once a target is far less likely than it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from editors.base import Request
from editors.edit import Edit
from editors.tuning.unlearning import PUBLISHED, Rows, Unlearning, unlearn
from editors.tuning.unlearning_losses import npo
from memloc.errors import InputError
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Npo(Unlearning):
    """Unlearn by negative preference: forget term + keep_weight · keep term.

    Forget term: forget_weight · (2/β) · mean over targets of log(1 + (p / p_original)^β).

    p is the suffix's probability given its prefix, and that of the original is computed once, before training. The
    forget term is bounded below by 0 and its pull fades as p falls, so it cannot run away as ascent does.

    With `per_token` both probabilities are per token (geometric means), so that neither the pull nor where it fades
    depends on the suffix's length. The published form takes those of the whole suffix (log p summed, not averaged);
    its pull, with β 0.1, is gone once that has fallen by some 100 nats: two nats a token for a suffix of 50, which is
    well above unseen text.

    Without a selection every map of every block is trained, as published (but embeddings and norms, which are left).

    Attributes:
        beta: inverse temperature, per nat of the log-ratio.
        per_token: take log-probabilities per token, not summed over the suffix.

    The other settings are those of `Unlearning`, `Descending` and `Keeping`.

    Raises:
        InputError: no targets, a passage both to forget and to retain, or targets that are forgotten already.

    Cost: a step is one forward and one backward over `target_rows` + `keep_rows` rows; Adam's state is three floats a
    trained weight; the original is asked once about every target.

    Source: Zhang et al. 2024, arXiv:2404.05868. Band and self-replay are ours.
    """

    beta: float = 1.0
    per_token: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0:
            raise InputError(f"beta {self.beta}: expected above 0")

    @classmethod
    def published(cls, **settings: Any) -> Npo:
        """β 0.1, both weights 1, the NLL of `retain`, lr 1e-5, rows of 32, all steps taken."""
        return cls(**{**PUBLISHED, "beta": 0.1, "per_token": False, **settings})

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched."""
        return unlearn(self, "npo", view, request, self._objective)

    def _objective(self, rows: Rows) -> Tensor:
        length = rows.counted.sum(1).to(rows.logs) if self.per_token else torch.ones_like(rows.reference)
        return npo(rows.logs, rows.counted, rows.reference, beta=self.beta / length) / length
