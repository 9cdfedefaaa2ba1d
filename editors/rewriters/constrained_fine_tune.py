"""Constrained fine-tuning: new answers within a small ball around the old weights, in one component."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from editors.base import Request
from editors.edit import Edit
from editors.masks import Masks
from editors.tuning.ball import Ball, steps_within
from editors.tuning.descent import MaskedAdam, working_copy
from editors.tuning.teaching import Teaching, teach
from editors.tuning.unlearning import chosen_masks, edit_of, whole_masks
from memloc.errors import InputError
from memloc.sites import Kind, Site
from memloc.view import ModelView

PUBLISHED: dict[str, float] = {"gpt2-medium": 2e-3, "gpt2-large": 1e-3, "gpt2-xl": 5e-4, "gpt-j": 5e-5}
"""Half-widths of the ball in units of a weight, all for the first block's MLP."""


@dataclass(frozen=True, kw_only=True)
class ConstrainedFineTune(Teaching):
    """Teach new answers while no weight of one component moves by more than ε.

    Minimise the NLL per token of what should be said, by Adam, with a projection onto the ball after every step. For
    norm "inf" the ball is |W - W₀| ≤ ε for every entry, and its ends are numbers of the stored dtype, so that the
    bound holds for the weights as they are stored, however they round. For norm "l2" it is ‖W - W₀‖ ≤ ε over all
    trained entries together, and storing them adds its rounding. What is taught is as in `fine-tune`.

    Without a selection one component is trained: the map `kind` of block `layer`, with its bias.

    Attributes:
        epsilon: half-width of the ball, in `units`.
        units: "weight", or "rms": times the root mean square of the trained entries as they were (for "l2" of all of
            them, so that ε is the relative change), which has a meaning in every model.
        norm: "inf" or "l2".
        layer: of the component; by default the first (the first and the last block served best in Zhu et al.).
        kind: of the component.
        steps: at most that many.
        lr: step size, in units of a weight.

    The other settings are those of `Teaching` and `Keeping`.

    Raises:
        InputError: neither facts nor passages, all of them said already, no such component, or a ball so small that
            no weight can move in the stored dtype.

    Cost: as fine-tuning, and two numbers more a trained weight.

    Source: Zhu et al. 2020, arXiv:2012.00363; as "FT+L" in Meng et al. 2022, arXiv:2202.05262. Relative units and the
    ball in the stored dtype are ours.
    """

    epsilon: float = 0.1
    units: Literal["rms", "weight"] = "rms"
    norm: Literal["inf", "l2"] = "inf"
    layer: int = 0
    kind: Kind = Kind.MLP_OUT

    def __post_init__(self) -> None:
        self.check_teaching()
        if self.epsilon <= 0:
            raise InputError(f"epsilon {self.epsilon}: expected above 0")

    @classmethod
    def published(cls, size: str = "gpt2-xl", **settings: Any) -> ConstrainedFineTune:
        """The ball that was used for GPT-2 of that size or GPT-J; lr 5e-4, 25 steps, targets read off one position.

        Raises:
            InputError: no ball was published for `size`.
        """
        if size not in PUBLISHED:
            raise InputError(f"no ball was published for {size!r}; known: {', '.join(PUBLISHED)}")
        how: dict[str, Any] = {"epsilon": PUBLISHED[size], "units": "weight", "lr": 5e-4, "steps": 25}
        return cls(**{**how, "convention": "one-position", **settings})

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched."""
        masks = chosen_masks(view, request, self.reach) if request.selection else self._component(view)
        work = working_copy(view)
        made: dict[str, Ball] = {}

        def project(optimiser: MaskedAdam) -> Callable[[Tensor], Tensor]:
            made["ball"] = Ball.around(optimiser.origin, view.dtype, self._width(optimiser.origin), self.norm)
            return made["ball"]

        optimiser, notes = teach(self, "constrained-fine-tune", work, request, masks, project=project)
        ball = made["ball"]
        notes |= {"epsilon": ball.width, "norm": self.norm, "movable": steps_within(ball, view.dtype)}
        return edit_of(self, "constrained-fine-tune", view, request, optimiser, masks, notes)

    def _component(self, view: ModelView) -> Masks:
        site = Site(self.layer, self.kind)
        if not self.kind.in_block or not view.has(site):
            raise InputError(f"{site}: not in {view.row.family} with {view.layers} layers")
        return whole_masks(view, (site,))

    def _width(self, origin: Tensor) -> float:
        """ε in units of a weight."""
        if self.units == "weight":
            return self.epsilon
        norm = float(torch.linalg.vector_norm(origin.double()))
        return self.epsilon * (norm if self.norm == "l2" else norm / len(origin) ** 0.5)
