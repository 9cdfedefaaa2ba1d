"""Gates learned by descent, one mask a passage, all passages in one run on the same frozen weights.

Every row has gates of its own, so the masks of a batch are trained by one forward and one backward a step and yet know
nothing of each other: the losses add up, Adam works entry by entry, random numbers are the passage's own, and a passage
that is done leaves the batch with its gates as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from memloc.ablations.gates import gate_count, gate_sites, gated
from memloc.batches import Batch
from memloc.costs import Cost, block_tokens, pass_bytes, widest
from memloc.errors import InputError
from memloc.objectives import suffix_nll
from memloc.passages import Passages
from memloc.progress import tell
from memloc.provenance import digest_json
from memloc.view import ModelView


@dataclass(frozen=True)
class Rule:
    """What a gate is.

    Attributes:
        start: every parameter's first value.
        gates: parameters `[n, l, u]` and uniform random numbers of that shape to gates in [0, 1]; differentiable.
        openness: parameters to how far each gate is open, in [0, 1]: its mean is what the penalty falls on.
        low: parameters are kept from falling below, and
        high: from rising above this after every step.
        random: whether `gates` uses the random numbers.
    """

    start: float
    gates: Callable[[Tensor, Tensor], Tensor]
    openness: Callable[[Tensor], Tensor]
    low: float | None = None
    high: float | None = None
    random: bool = False


@dataclass(frozen=True)
class Plan:
    """How long and how hard.

    Attributes:
        penalty: weight of the mean openness beside the NLL in nats per token.
        learning_rate: Adam's.
        steps: at most.
        stop: a passage is done when its mean openness is below this.
        every: steps between such looks.
        seed: of the random numbers, with the passage's tokens.
        batch_size: passages trained together.
    """

    penalty: float
    learning_rate: float
    steps: int
    stop: float
    every: int
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        if min(self.steps, self.every, self.batch_size) < 1:
            found = f"steps {self.steps}, every {self.every}, batch_size {self.batch_size}"
            raise InputError(f"{found}: expected at least 1 each")
        if not (self.penalty > 0 and self.learning_rate > 0 and 0 <= self.stop < 1):
            found = f"penalty {self.penalty}, learning_rate {self.learning_rate}, stop {self.stop}"
            raise InputError(f"{found}: expected above 0, above 0, and a share below 1")


@dataclass(frozen=True)
class Trained:
    """Masks of n passages.

    Attributes:
        parameters: [n, l, u].
        pull: [n, l, u], mean over the run of minus the loss's slope by each parameter: how hard it was held open.
        steps: of each passage, until it was done.
        openness: of each passage, the mean at the end.
        loss: of each passage, the NLL in nats per token under the last mask.
    """

    parameters: Tensor
    pull: Tensor
    steps: tuple[int, ...]
    openness: tuple[float, ...]
    loss: tuple[float, ...]

    def notes(self) -> dict[str, Any]:
        """For the localization."""
        return {"steps": list(self.steps), "openness": list(self.openness), "loss": list(self.loss)}


def learn(view: ModelView, passages: Passages, rule: Rule, plan: Plan, *, grain: Literal["neuron", "head"]) -> Trained:
    """Train a mask for every passage. Cost: see `training_cost`."""
    shape = (len(passages), view.layers, gate_count(view, grain))
    parameters, pull = torch.zeros(shape), torch.zeros(shape)
    steps, openness, loss = [0] * len(passages), [0.0] * len(passages), [0.0] * len(passages)
    found = list(view.batches(passages, size=plan.batch_size))
    with view.frozen():
        for done, batch in enumerate(found):
            run = _Run.start(view, batch, rule, plan, grain)
            while len(run.batch):
                spent = run.step()
                tell("learned masks", done * plan.steps + run.taken, len(found) * plan.steps, f"{len(run.batch)} left")
                ends = run.ends()
                for place in ends.nonzero()[:, 0].tolist():
                    row = run.batch.rows[place]
                    parameters[row], pull[row] = run.parameters[place].cpu(), -run.slope[place].cpu() / run.taken
                    steps[row], openness[row], loss[row] = run.taken, float(run.open()[place]), float(spent[place])
                run = run.those(~ends)
    return Trained(parameters, pull, tuple(steps), tuple(openness), tuple(loss))


def training_cost(view: ModelView, passages: Passages, plan: Plan, *, grain: Literal["neuron", "head"]) -> Cost:
    """At most: every passage takes all its steps."""
    once = block_tokens(view, passages, size=plan.batch_size)
    rows, tokens = widest(passages, size=plan.batch_size)
    suffix = max(len(item.suffix) for item in passages)
    count = gate_count(view, grain)
    memory = pass_bytes(view, rows * tokens, context=tokens, grad=True, unembedded=rows * suffix)
    masks = 16 * rows * view.layers * count * 8 + 16 * len(passages) * view.layers * count
    return Cost(plan.steps * once, plan.steps * once, memory + masks, "at most")


@dataclass
class _Run:
    """A batch under training; only passages that are not done are in it."""

    view: ModelView
    batch: Batch
    rule: Rule
    plan: Plan
    grain: Literal["neuron", "head"]
    parameters: Tensor
    first: Tensor
    second: Tensor
    slope: Tensor
    generators: Sequence[torch.Generator]
    taken: int = 0

    @classmethod
    def start(cls, view: ModelView, batch: Batch, rule: Rule, plan: Plan, grain: Literal["neuron", "head"]) -> _Run:
        kind = torch.float64 if view.dtype == torch.float64 else torch.float32
        none = torch.zeros(len(batch), view.layers, gate_count(view, grain), dtype=kind, device=view.device)
        generators = [torch.Generator().manual_seed(seed) for seed in _seeds(batch, plan.seed)]
        return cls(view, batch, rule, plan, grain, none + rule.start, none, none, none, generators)

    def step(self) -> Tensor:
        """One step of Adam on every mask; the NLL of each row before it, [n]."""
        with torch.enable_grad():
            parameters = self.parameters.detach().requires_grad_()
            gates = self.rule.gates(parameters, self._draws())
            sites = gate_sites(self.view, self.grain)
            with gated(self.view, dict(zip(sites, gates.unbind(1), strict=True))):
                spent = suffix_nll(self.view, self.batch)
            (slope,) = torch.autograd.grad(spent.sum(), parameters)
            penalty = self.plan.penalty * self.rule.openness(parameters).mean((1, 2))
            (push,) = torch.autograd.grad(penalty.sum(), parameters)
        self.taken += 1
        # Kept apart: beside a large penalty the pull's last digits, and with them the order of ties, would be lost.
        self.slope = self.slope + slope
        slope = slope + push
        self.first = 0.9 * self.first + 0.1 * slope
        self.second = 0.999 * self.second + 0.001 * slope.square()
        size = (self.second / (1 - 0.999**self.taken)).sqrt() + 1e-8
        moved = self.parameters - self.plan.learning_rate * self.first / (1 - 0.9**self.taken) / size
        self.parameters = moved.clamp(self.rule.low, self.rule.high) if self.rule.low is not None else moved
        return spent.detach()

    def ends(self) -> Tensor:
        """Which rows are done, [n]."""
        if self.taken == self.plan.steps:
            return torch.ones(len(self.batch), dtype=torch.bool)
        if self.taken % self.plan.every:
            return torch.zeros(len(self.batch), dtype=torch.bool)
        return (self.open() < self.plan.stop).cpu()

    def open(self) -> Tensor:
        """Mean openness of each row, [n]."""
        return self.rule.openness(self.parameters).mean((1, 2))

    def those(self, keep: Tensor) -> _Run:
        """The rows that go on; padded as before, so that nothing else changes for them."""
        if bool(keep.all()):
            return self
        rows = [index for index, stays in enumerate(keep.tolist()) if stays]
        return replace(
            self,
            batch=self.batch.part(rows),
            parameters=self.parameters[rows],
            first=self.first[rows],
            second=self.second[rows],
            slope=self.slope[rows],
            generators=[self.generators[row] for row in rows],
        )

    def _draws(self) -> Tensor:
        """Uniform random numbers like the parameters, each row's from its own generator; zeros where none are used."""
        like = self.parameters
        if not self.rule.random:
            return torch.zeros_like(like)
        drawn = [torch.rand(like.shape[1:], generator=own, dtype=like.dtype) for own in self.generators]
        return torch.stack(drawn).to(like.device)


def _seeds(batch: Batch, seed: int) -> list[int]:
    """One of each row's own, from its tokens: whatever its company."""
    found = []
    tokens = batch.ids if batch.truth is None else batch.truth
    for ids, length, prefix in zip(tokens.tolist(), batch.length.tolist(), batch.prefix.tolist(), strict=True):
        found.append(int(digest_json([seed, ids[:length], prefix])[:12], 16))
    return found
