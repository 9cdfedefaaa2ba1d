"""Slimming: gates between 0 and 1 that close wherever the suffix does not hold them open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from memloc.ablations.gates import gate_sites
from memloc.ablations.learned_masks import Plan, Rule, Trained, learn, training_cost
from memloc.costs import Cost
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.provenance import Provenance, settings_of
from memloc.scores import Localization
from memloc.sites import Grain
from memloc.view import ModelView

TIE = 1e-4
"""How much of a score the pull on a gate may make: it orders gates that ended equal, and no others to speak of."""


@dataclass(frozen=True, kw_only=True)
class Slimming:
    """Score of a neuron or head = how far its gate, learned for the passage, stayed open: 0 (shut) to 1.

    With m [l, u] gates by which what the units say is multiplied at every position, all 1 at first, weights frozen:

        minimise  NLL(suffix) + penalty · mean(m)  over m in [0, 1], by Adam

    in nats per token, one mask a passage, all passages in one run. The penalty is of the mean, so it means the same in
    models of any size: of one gate it is penalty / (l·u). Gates that end equal (many end at 0 or 1) are ordered by the
    mean pull of the loss on them during the run, which adds up to 0.0001. One axis of passages.

    Attributes:
        penalty: weight of the mean gate. Published: 10000 to 80000 for 12 to 48 layers, a gate's share of which is
            .1 to .4; the default is such a share of the lab model, and there, of those tried, the one whose best 0.5 %
            and 1 % of neurons, silenced, raise the NLL of five passages most. So are `learning_rate` and `stop`.
        learning_rate: Adam's. Published: .001 to .01.
        steps: at most. Published: 55 to 60 for deletion.
        stop: a passage is done when its mean gate is below this.
        every: steps between such looks.
        grain: "neuron" or "head".
        batch_size: passages trained together; no effect on scores.

    Cost: at most `steps` forward and backward passes over the passages; those that are done take no more.

    Source: Chang et al. 2024, arXiv:2311.09060, section "Slimming", after Liu et al. 2017. One run for all passages,
    the stop of each, and the order of ties are ours.
    """

    penalty: float = 800.0
    learning_rate: float = 0.01
    steps: int = 100
    stop: float = 0.5
    every: int = 5
    grain: Literal["neuron", "head"] = "neuron"
    batch_size: int = 16
    in_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._plan()

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Learn a mask for every passage; `contrast` is not used.

        Raises:
            InputError: no passages, or one the model cannot take (named).
        """
        if not passages:
            raise InputError("slimming: no passages given")
        rule = Rule(1.0, lambda parameters, _: parameters, lambda parameters: parameters, 0.0, 1.0)
        found = learn(view, passages, rule, self._plan(), grain=self.grain)
        scores = found.parameters + TIE * _order(found)
        inputs = {"model": view.digest, "passages": passages.digest}
        provenance = Provenance("slimming", settings_of(self), inputs=inputs)
        places = {site: scores[:, index] for index, site in enumerate(gate_sites(view, self.grain))}
        return Localization(Grain(self.grain), places, provenance, passages.ids, found.notes())

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """At most all steps for every passage."""
        return training_cost(view, passages, self._plan(), grain=self.grain)

    def _plan(self) -> Plan:
        return Plan(self.penalty, self.learning_rate, self.steps, self.stop, self.every, 0, self.batch_size)


def _order(found: Trained) -> Tensor:
    """The pull on each gate as a share of its passage's range, in [0, 1]."""
    flat = found.pull.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    share = (flat - low) / (high - low).clamp_min(torch.finfo(flat.dtype).tiny)
    return share.view_as(found.pull)
