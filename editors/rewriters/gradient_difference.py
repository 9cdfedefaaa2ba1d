"""Gradient difference: the targets' likelihood goes down while that of kept rows stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from editors.base import Request
from editors.edit import Edit
from editors.tuning.unlearning import PUBLISHED, Unlearning, unlearn
from editors.tuning.unlearning_losses import ascent
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class GradientDifference(Unlearning):
    """Unlearn by gradient ascent beside a keep term: forget_weight · mean log p of targets + keep_weight · keep term.

    log p is the suffix's mean per token. The keep term is the divergence from the original, or the rows' NLL as
    published, over `retain`, ordinary `text` and the model's own samples. The forget term has no bottom; "band" lets
    each target go once it is as unlikely as unseen text, and the keep term then mends what the way there broke.

    Without a selection every map of every block is trained, as published (but embeddings and norms, which are left).

    Attributes:
        steps: at most that many.
        lr: step size, in units of a weight.

    The other settings are those of `Unlearning`, `Descending` and `Keeping`.

    Raises:
        InputError: no targets, a passage both to forget and to retain, or targets that are forgotten already.

    Cost: a step is one forward and one backward over `target_rows` + `keep_rows` rows; Adam's state is three floats a
    trained weight; the samples one forward each.

    Source: Liu et al. 2022, arXiv:2203.12817; Maini et al. 2024, arXiv:2401.06121. Band and self-replay are ours.
    """

    steps: int = 150
    lr: float = 1e-3

    @classmethod
    def published(cls, **settings: Any) -> GradientDifference:
        """Both weights 1, the NLL of `retain`, lr 1e-5, rows of 32, all steps taken."""
        return cls(**{**PUBLISHED, **settings})

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched."""
        return unlearn(self, "gradient-difference", view, request, lambda rows: ascent(rows.logs, rows.counted))
