"""AlphaEdit: rewrite many facts at once, in the directions that what should stay hardly uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from editors.base import Request
from editors.edit import Edit
from editors.facts.batch_request import edited
from editors.facts.batch_settings import BatchEditor
from editors.facts.closed_forms import Metric, NullSpace
from editors.facts.published import plain, preset
from memloc.errors import InputError
from memloc.view import ModelView, left_to_right


@dataclass(frozen=True, kw_only=True)
class AlphaEdit(BatchEditor):
    """Make the model say many facts' targets at once, within the null space of what should stay.

    Δ = R (Kᵀ P K + S)⁻¹ Kᵀ P, P the projector onto those eigenvectors of C (mean k kᵀ of text, other facts, namesakes,
    own sentences) whose eigenvalue is below a threshold: the mean squared change over what should stay is at most
    threshold · ‖Δ‖². Keys of edits already made (`past`) stand among K with nothing missing, as strictly as new ones;
    so do, at their weights, those that a pass was seen to change (`passes`): here all weights are in shares of a new
    key's.

    Attributes:
        threshold: of the eigenvalues, in shares of their mean.
        ridge: S in shares of the keys' mean squared length.
        absolute: take both as they are instead, as the original does; they then depend on the model's scale. The others
            are those of `editors.facts.batch_settings.BatchEditor`.

    Raises:
        InputError: as `memit`; or no eigenvalue is below the threshold.

    Cost: one eigendecomposition of C a layer (about 10 f³); the rest as `memit`.

    Source: Fang et al. 2025, arXiv:2410.02355. Relative thresholds, other facts and own sentences in C are ours.
    """

    threshold: float = 0.4
    ridge: float = 0.05
    absolute: bool = False
    price: float = 3.0
    hold: float = 0.1
    hold_own: float = 0.05
    name: ClassVar[str] = "alphaedit"
    refuses = staticmethod(left_to_right)

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit that makes all of the request's facts so; the model is as it was, to the bit.

        Uses `facts`, `text` (ordinary text, for the moments), `retain`, `keep_facts`, `past` and `seed`.
        """
        return edited(self, view, request)

    @classmethod
    def published(cls, model: str, **changes: Any) -> AlphaEdit:
        """The original's settings for a model of `facts.published.PRESETS`; give `moment` to reproduce a number."""
        found = preset(model)
        own = {"layers": found.layers, "threshold": 0.02, "ridge": 10.0, "absolute": True}
        return cls(**{**plain(found), **own, **changes})

    def metric(self, moment: Tensor) -> Metric:
        """P."""
        return NullSpace.of(moment, self.threshold, relative=not self.absolute)

    def slack_of(self, keys: Tensor) -> float:
        """S."""
        if self.ridge < 0 or self.threshold <= 0:
            raise InputError(
                f"alphaedit: ridge {self.ridge}, threshold {self.threshold}; expected 0 or more and above 0"
            )
        return self.ridge if self.absolute else self.ridge * float(keys.pow(2).sum(1).mean())
