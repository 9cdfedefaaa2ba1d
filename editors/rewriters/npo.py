"""Negative preference optimisation: ascent that fades once a target is far less likely than it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from editors.base import Request
from editors.edit import Edit
from editors.unlearning import PUBLISHED, Rows, Unlearning, unlearn
from editors.unlearning_losses import npo
from memloc.errors import InputError
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Npo(Unlearning):
    """Unlearn by negative preference: forget term + keep_weight · keep term.

    Forget term: forget_weight · (2/β) · mean over targets of log(1 + (p / p_original)^β).

    p is the probability of the whole suffix given its prefix (log p summed over its tokens, not averaged), and that
    of the original is computed once, before training. The forget term is bounded below by 0 and its pull fades as p
    falls, so it cannot run away as ascent does.

    Without a selection every map of every block is trained, as published (but embeddings and norms, which are left).

    Attributes:
        beta: inverse temperature, per nat of the summed log-ratio; by default one over the suffix's length, so that the
            pull fades with the log-ratio per token. With the published 0.1 it is gone at -100 nats, which is two nats
            a token for a suffix of 50.

    The other settings are those of `Unlearning`, `Descending` and `Keeping`.

    Raises:
        InputError: no targets, a passage both to forget and to retain, or targets that are forgotten already.

    Cost: a step is one forward and one backward over `target_rows` + `keep_rows` rows; Adam's state is three floats a
    trained weight; the original is asked once about every target.

    Source: Zhang et al. 2024, arXiv:2404.05868. Band and self-replay are ours.
    """

    beta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta is not None and self.beta <= 0:
            raise InputError(f"beta {self.beta}: expected above 0")

    @classmethod
    def published(cls, **settings: Any) -> Npo:
        """β 0.1, both weights 1, the NLL of `retain`, lr 1e-5, rows of 32, all steps taken."""
        return cls(**{**PUBLISHED, "beta": 0.1, **settings})

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched."""
        return unlearn(self, "npo", view, request, self._objective)

    def _objective(self, rows: Rows) -> Tensor:
        beta = 1 / rows.counted.sum(1) if self.beta is None else self.beta
        return npo(rows.logs, rows.counted, rows.reference, beta=beta)
