"""Fine-tuning: gradient descent on new answers, every target token behind those before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from editors.base import Request
from editors.edit import Edit
from editors.tuning.descent import working_copy
from editors.tuning.teaching import Teaching, teach
from editors.tuning.unlearning import chosen_masks, edit_of
from memloc.sites import Kind
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class FineTune(Teaching):
    """Teach facts their new answers, or passages another continuation, by fine-tuning with teacher forcing.

    Loss = mean over targets of the NLL per token of what should be said, by Adam without weight decay, + keep_weight
    · keep term (off by default, as published: it is the baseline for editors that keep). What is taught: the new
    answers of `facts`, or, without facts, the model's own alternative continuations of `forget`. There is no term
    for plain further training on text: `retain` and `text` are what stays.

    Without a selection the output maps of all MLPs are trained: facts are recalled there, and which layer a fact is
    best written in is not known beforehand (where it is found is a poor guide: Hase et al. 2023, arXiv:2301.04213).

    Attributes:
        steps: at most that many.
        lr: step size, in units of a weight.

    The other settings are those of `Teaching` and `Keeping`.

    Raises:
        InputError: neither facts nor passages, or all of them are said already.

    Cost: a step is one forward and one backward over `target_rows` + `keep_rows` rows; Adam's state is three floats a
    trained weight.

    Source: as "FT" in Meng et al. 2022, arXiv:2202.05262 (there with convention "one-position"); with teacher forcing
    in Zhang et al. 2024, arXiv:2401.01286.
    """

    def __post_init__(self) -> None:
        self.check_teaching()

    @classmethod
    def published(cls, **settings: Any) -> FineTune:
        """Lr 5e-4, 25 rounds of at most 64 rows, all target tokens read off the prompt's last token, nothing kept."""
        how: dict[str, Any] = {"lr": 5e-4, "steps": 25, "target_rows": 64, "convention": "one-position"}
        return cls(**{**how, "keep_weight": 0.0, **settings})

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched."""
        masks = chosen_masks(view, request, self.reach, (Kind.MLP_OUT,))
        optimiser, notes = teach(self, "fine-tune", working_copy(view), request, masks)
        return edit_of(self, "fine-tune", view, request, optimiser, masks, notes)
