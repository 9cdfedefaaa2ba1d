"""EMMET: rewrite many facts at once, each met exactly; ROME for a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from editors.base import Request
from editors.edit import Edit
from editors.facts.batch_request import edited
from editors.facts.batch_settings import BatchEditor
from editors.facts.closed_forms import Factor
from editors.facts.published import plain, preset
from memloc.errors import InputError
from memloc.view import ModelView, left_to_right


@dataclass(frozen=True, kw_only=True)
class Emmet(BatchEditor):
    """Make the model say many facts' targets at once, every demand met, moving least what should stay.

    Δ = R (Kᵀ C⁻¹ K + S)⁻¹ Kᵀ C⁻¹: the least trace(Δ C Δᵀ) of all Δ with Δ K = R (S = 0). With one fact and one key it
    is ROME. Names as in `memit`. A key for each way to a fact would be more demands than can all be met exactly: by
    default they are averaged.

    Attributes:
        slack: S in shares of the number of the map's inputs, what a miss may cost. 0 meets every demand; the original
            has a little where there are several facts. The others are those of
            `editors.facts.batch_settings.BatchEditor`.

    Raises:
        InputError: neither text nor moments, no facts, facts that contradict each other, a layer the model has not, or
            more keys than the map can tell apart.

    Cost: as `memit`.

    Source: Gupta et al. 2024, arXiv:2403.14236. Protected keys, the model's own ways to a fact and the price of values
    are ours.
    """

    slack: float = 0.0
    ways: Literal["each", "mean"] = "mean"
    name: ClassVar[str] = "emmet"
    refuses = staticmethod(left_to_right)

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit that makes all of the request's facts so; the model is as it was, to the bit.

        Uses `facts`, `text` (ordinary text, for the moments), `retain`, `keep_facts`, `past` and `seed`.
        """
        return edited(self, view, request)

    @classmethod
    def published(cls, model: str, *, several: bool = True, **changes: Any) -> Emmet:
        """The original's settings for a model of `facts.published.PRESETS`; its slack only for `several` facts."""
        found = preset(model)
        slack = 0.1 * found.equality / found.width if several else 0.0
        return cls(**{**plain(found), "layers": (found.single,), "slack": slack, **changes})

    def metric(self, moment: Tensor) -> Factor:
        """C⁻¹, factored."""
        return Factor.of(moment, damping=self.damping)

    def slack_of(self, keys: Tensor) -> float:
        """S."""
        if self.slack < 0:
            raise InputError(f"emmet: slack is {self.slack}, expected 0 or more")
        return self.slack * keys.shape[1]
