"""Gradient ascent: the targets' likelihood goes down, and nothing says what should stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from editors.base import Request
from editors.edit import Edit
from editors.tuning.unlearning import Descending, unlearn
from editors.tuning.unlearning_losses import ascent
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class GradientAscent(Descending):
    """Unlearn by gradient ascent: loss = mean over targets of the suffix's mean log p per token, with nothing kept.

    The loss has no bottom. With `stop` "steps", as published, it is followed wherever it leads, and ordinary text goes
    with the targets; "band" lets each target go once it is as unlikely as unseen text. It is the baseline that every
    other objective should beat, rather than a way to unlearn.

    Without a selection every map of every block is trained, as published (but embeddings and norms, which are left).

    Attributes:
        steps: at most that many.
        lr: step size, in units of a weight.
        patience: steps in a row for which all must be well; one, for after it only momentum is left.

    The other settings are those of `Descending`.

    Raises:
        InputError: no targets, or targets that are forgotten already.

    Cost: a step is one forward and one backward over `target_rows` rows; Adam's state is three floats a trained weight.

    Source: Jang et al. 2023, arXiv:2210.01504; as a baseline in Maini et al. 2024, arXiv:2401.06121. The band is ours.
    """

    steps: int = 50
    lr: float = 1e-4
    patience: int = 1

    def __post_init__(self) -> None:
        self.check_descending()

    @classmethod
    def published(cls, **settings: Any) -> GradientAscent:
        """Lr 1e-5, rows of 32, all steps taken: ten rounds of a set of 320 targets are 100 steps."""
        return cls(**{"lr": 1e-5, "target_rows": 32, "steps": 100, "stop": "steps", **settings})

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched."""
        return unlearn(self, "gradient-ascent", view, request, lambda rows: ascent(rows.logs, rows.counted))
