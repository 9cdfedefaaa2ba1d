"""SimNPO: negative preference without a reference model, by likelihood per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from editors.base import Request
from editors.edit import Edit
from editors.tuning.unlearning import PUBLISHED, Rows, Unlearning, unlearn
from editors.tuning.unlearning_losses import simnpo
from memloc.errors import InputError
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Simnpo(Unlearning):
    """Unlearn by a margin per token: forget_weight · -(2/β) · mean log σ(β · (NLL - δ)) + keep_weight · keep term.

    NLL is the suffix's mean per token, so long and short targets are pulled alike, and the pull fades once it is well
    above δ. No reference model is asked, so a target that was never known is pushed as hard as one that was.

    Without a selection every map of every block is trained, as published (but embeddings and norms, which are left).

    Attributes:
        beta: inverse temperature, per nat per token.
        delta: nats per token that the NLL should exceed; by default that of unseen text, where a target is forgotten
            (with the published 0 the pull is gone at about 2 nats).

    The other settings are those of `Unlearning`, `Descending` and `Keeping`.

    Raises:
        InputError: no targets, a passage both to forget and to retain, or targets that are forgotten already.

    Cost: a step is one forward and one backward over `target_rows` + `keep_rows` rows; Adam's state is three floats a
    trained weight.

    Source: Fan et al. 2024, arXiv:2410.07163. Band and self-replay are ours.
    """

    beta: float = 2.5
    delta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0 or (self.delta or 0.0) < 0:
            raise InputError(f"expected beta above 0 and delta of 0 or more, found {self.beta}, {self.delta}")

    @classmethod
    def published(cls, **settings: Any) -> Simnpo:
        """β 2.5, δ 0, forget weight 0.1375, the NLL of `retain` at 1, lr 1e-5, rows of 32, all steps taken."""
        return cls(**{**PUBLISHED, "beta": 2.5, "delta": 0.0, "forget_weight": 0.1375, **settings})

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched."""
        return unlearn(self, "simnpo", view, request, self._objective)

    def _objective(self, rows: Rows) -> Tensor:
        delta = -rows.level if self.delta is None else self.delta
        return simnpo(rows.logs, rows.counted, beta=self.beta, delta=delta)
