"""Hard Concrete masks: gates that are mostly exactly 0 or 1, learned through noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from memloc.ablations.gates import gate_sites
from memloc.ablations.learned_masks import Plan, Rule, learn, training_cost
from memloc.costs import Cost
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.provenance import Provenance, settings_of
from memloc.scores import Localization
from memloc.sites import Grain
from memloc.view import ModelView

LOW, HIGH = -0.1, 1.1
"""How far a gate is stretched beyond [0, 1] before it is cut to it."""


@dataclass(frozen=True, kw_only=True)
class HardConcrete:
    """Score of a neuron or head = how likely its gate, learned for the passage, is to stay open: σ(φ), 0 to 1.

    Gates are random: with u uniform in (0, 1), new for every step, and φ [l, u] learned, weights frozen,

        s = σ((logit u + φ) / temperature),  gate = s stretched to [-.1, 1.1] and cut to [0, 1]
        minimise  E NLL(suffix) + penalty · mean σ(φ - temperature · ln(.1 / 1.1))  over φ, by Adam

    where the second term is the mean probability that a gate is not shut. In nats per token, one mask a passage, all
    passages in one run; the penalty is of the mean, so it means the same in models of any size. One axis of passages.

    Attributes:
        penalty: weight of the mean probability. Published: 100 to 2000; the default is, of those tried on the lab
            model, the one whose best 0.5 % and 1 % of neurons, silenced, raise the NLL of five passages most. So are
            `learning_rate` and `stop`.
        learning_rate: Adam's. Published: .001 to .01.
        steps: at most. Published: 200 to 700 for deletion, up to 4000 for injection.
        start: probability σ(φ) begins with, as (start + .1) / 1.2. Published: .2, .5, .9.
        temperature: of s. Published: .33, .67.
        stop: a passage is done when the mean probability is below this. Published: .1 to .6.
        every: steps between such looks.
        seed: of the noise, with the passage's tokens.
        grain: "neuron" or "head".
        batch_size: passages trained together; no effect on scores.

    Cost: at most `steps` forward and backward passes over the passages; those that are done take no more.

    Source: Louizos et al. 2018, arXiv:1712.01312; as used by Chang et al. 2024, arXiv:2311.09060. One run for all
    passages, noise of each passage's own and the stop of each are ours.
    """

    penalty: float = 500.0
    learning_rate: float = 0.05
    steps: int = 200
    start: float = 0.9
    temperature: float = 0.33
    stop: float = 0.5
    every: int = 5
    seed: int = 0
    grain: Literal["neuron", "head"] = "neuron"
    batch_size: int = 16
    in_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._plan()
        if not (0 < self.start < 1 and self.temperature > 0):
            found = f"start {self.start}, temperature {self.temperature}"
            raise InputError(f"hard-concrete: {found}; expected a share between 0 and 1, and above 0")

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Learn a mask for every passage; `contrast` is not used.

        Raises:
            InputError: no passages, or one the model cannot take (named).
        """
        if not passages:
            raise InputError("hard-concrete: no passages given")
        found = learn(view, passages, self._rule(), self._plan(), grain=self.grain)
        scores = found.parameters.sigmoid()
        inputs = {"model": view.digest, "passages": passages.digest}
        provenance = Provenance("hard-concrete", settings_of(self), seed=self.seed, inputs=inputs)
        places = {site: scores[:, index] for index, site in enumerate(gate_sites(view, self.grain))}
        return Localization(Grain(self.grain), places, provenance, passages.ids, found.notes())

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """At most all steps for every passage."""
        return training_cost(view, passages, self._plan(), grain=self.grain)

    def _plan(self) -> Plan:
        return Plan(self.penalty, self.learning_rate, self.steps, self.stop, self.every, self.seed, self.batch_size)

    def _rule(self) -> Rule:
        share = (self.start - LOW) / (HIGH - LOW)
        shut = self.temperature * math.log(-LOW / HIGH)

        def gates(parameters: Tensor, drawn: Tensor) -> Tensor:
            noise = torch.logit(1e-4 + (1 - 2e-4) * drawn)
            return (torch.sigmoid((noise + parameters) / self.temperature) * (HIGH - LOW) + LOW).clamp(0, 1)

        def openness(parameters: Tensor) -> Tensor:
            return torch.sigmoid(parameters - shut)

        return Rule(math.log(share / (1 - share)), gates, openness, random=True)
