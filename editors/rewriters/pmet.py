"""PMET: rewrite many facts at once; the values are found beside a decoy in the attention, which is not written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from editors.base import Request
from editors.edit import Edit
from editors.facts.batch_request import edited
from editors.facts.batch_settings import BatchEditor, Spread
from editors.facts.closed_forms import Factor
from editors.facts.contexts import Demand
from editors.facts.keys_values import Values
from editors.facts.paired_values import PairedDescent, optimise_pairs
from editors.facts.published import PMET_PRESETS, PmetPreset, plain
from memloc.errors import InputError
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Pmet(BatchEditor):
    """Make the model say many facts' targets at once, by values found for MLP and attention together, the MLP's kept.

    At the highest layer two changes are searched for, of what the MLP and of what the attention puts out; the latter is
    a decoy, so that the former need not stand in for it. Then as `memit`: Δ = R Kᵀ (λC + K Kᵀ)⁻¹ at every layer, each
    bringing 1/√(layers left) of what is missing. Names as there.

    Attributes:
        weight: λ in shares of the number of the map's inputs, as in `memit`.
        relief: factor of a target's loss once it is the likeliest answer to all of its prompts.
        calm: a fact's search ends when that is so and the answer to "{subject} is a" has moved by no more, in nats;
            at prompt-last, where that answer is not asked for, `stop_below` ends it.
        price: has to be 0. The others are those of `editors.facts.batch_settings.BatchEditor`.

    Raises:
        InputError: as `memit`; or a price.

    Cost: as `memit`; a step of the search goes through one block more.

    Source: Li et al. 2024, arXiv:2308.08742. What is missing is measured in the stream above the highest layer, as
    MEMIT does. Protected keys and the model's own ways to a fact are ours.
    """

    weight: float = 0.02
    relief: float = 0.1
    calm: float = 0.01
    spread: Spread = "sqrt"
    steps: int = 30
    pace: float = 0.1
    kl_weight: float = 1.0
    price: float = 0.0
    name: ClassVar[str] = "pmet"

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit that makes all of the request's facts so; the model is as it was, to the bit.

        Uses `facts`, `text` (ordinary text, for the moments), `retain`, `keep_facts`, `past` and `seed`.
        """
        return edited(self, view, request)

    @classmethod
    def published(cls, model: str, **changes: Any) -> Pmet:
        """The original's settings for a model of `facts.published.PMET_PRESETS`; give `moment` to reproduce a number.

        Raises:
            InputError: there are none.
        """
        if model not in PMET_PRESETS:
            raise InputError(f"no published settings for {model!r}; there are those for {', '.join(PMET_PRESETS)}")
        found: PmetPreset = PMET_PRESETS[model]
        own = {"layers": found.layers, "weight": found.weight / found.width, "kl_weight": found.kl_weight}
        search = {"steps": found.steps, "lr": 0.2, "clamp": found.clamp, "weight_decay": 0.5}
        return cls(**{**plain(), **own, **search, **changes})

    def check(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            InputError: names the setting, what it is and what is expected.
        """
        super().check()
        if self.price:
            raise InputError(f"pmet: price is {self.price}, expected 0; its values are searched for without one")
        for name in ("weight", "relief", "calm"):
            if getattr(self, name) < 0:
                raise InputError(f"pmet: {name} is {getattr(self, name)}, expected 0 or more")

    def search(self, view: ModelView, layer: int, demands: Sequence[Demand], scale: Tensor) -> Values:
        """The MLP's part."""
        how = PairedDescent(search=self.descent, relief=self.relief, calm=self.calm)
        return optimise_pairs(view, layer, demands, scale, how)

    def metric(self, moment: Tensor) -> Factor:
        """C⁻¹, factored."""
        return Factor.of(moment, damping=self.damping)

    def slack_of(self, keys: Tensor) -> float:
        """λ."""
        return self.weight * keys.shape[1]
