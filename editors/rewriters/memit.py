"""MEMIT: rewrite many facts at once, by least squares over several MLPs' output maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

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
class Memit(BatchEditor):
    """Make the model say many facts' targets at once: several MLPs bring a share each, by least squares.

    Δ = R Kᵀ (λC + K Kᵀ)⁻¹ at every layer, lowest first: K are the facts' keys, R the layer's share of what the residual
    stream above the last layer still lacks, C the mean k kᵀ of what should stay (ordinary text, other facts, namesakes,
    the model's own sentences). Solved in the number of keys.

    Attributes:
        weight: λ in shares of the number of the map's inputs: a key as unusual as an average token's is half met at 1,
            and wholly at 0 (which is EMMET). The others are those of `editors.facts.batch_settings.BatchEditor`.

    Raises:
        InputError: neither text nor moments, no facts, facts that contradict each other, a layer the model has not.

    Cost: one factor of C a layer (f³/3), then 2 f² a key; values: `steps` runs through the blocks above. From the
    second of the `passes` on, a forward of all that is protected besides, and another factor where much is held.

    Source: Meng et al. 2023, arXiv:2210.07229; spreading to first and last: Gu et al. 2025 (BLUE). Protected keys, the
    model's own ways to a fact and the price of values are ours.
    """

    weight: float = 0.1
    name: ClassVar[str] = "memit"
    refuses = staticmethod(left_to_right)

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit that makes all of the request's facts so; the model is as it was, to the bit.

        Uses `facts`, `text` (ordinary text, for the moments), `retain`, `keep_facts`, `past` and `seed`.
        """
        return edited(self, view, request)

    @classmethod
    def published(cls, model: str, **changes: Any) -> Memit:
        """The original's settings for a model of `facts.published.PRESETS`; give `moment` to reproduce a number."""
        found = preset(model)
        settings = {**plain(found), "layers": found.layers, "weight": found.weight / found.width, **changes}
        return cls(**settings)

    def metric(self, moment: Tensor) -> Factor:
        """C⁻¹, factored."""
        return Factor.of(moment, damping=self.damping)

    def slack_of(self, keys: Tensor) -> float:
        """λ."""
        if self.weight < 0:
            raise InputError(f"memit: weight is {self.weight}, expected 0 or more")
        return self.weight * keys.shape[1]
