"""Noisy long-tail classification: a residual network, kept along its training, that learns clusters and wrong labels.

Ten classes of twelve clusters each, of sizes that fall as 1/rank, so that every class has a long tail; a tenth of the
training labels are wrong. What is memorized, and when, is known; where, is asked with `memloc.rewinding.groups`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memloc.progress import steps
from memloc.rewinding.groups import Kept


@dataclass(frozen=True)
class Labelled:
    """Items with their labels.

    Attributes:
        inputs: [n, 32].
        answers: [n], the class.
        labels: [n], what is trained on.
        cluster: [n], the rank of the item's cluster in its class; high ranks are rare.
    """

    inputs: Tensor
    answers: Tensor
    labels: Tensor
    cluster: Tensor

    @property
    def noisy(self) -> Tensor:
        """[n] bool, whether the label is wrong."""
        return self.labels != self.answers

    @property
    def tail(self) -> Tensor:
        """[n] bool, whether the item is of the rarer half of its class's clusters."""
        return self.cluster >= CLUSTERS // 2


CLASSES, CLUSTERS, WIDTH = 10, 12, 32


def long_tail(
    *, items: int = 4000, tests: int = 2000, wrong: float = 0.1, spread: float = 0.5, seed: int = 0
) -> tuple[Labelled, Labelled]:
    """Training and test items.

    Args:
        items: to train on.
        tests: to test on; their labels are all right.
        wrong: share of the training labels that are another class, drawn evenly.
        spread: standard deviation of a cluster, where centres have 1.
        seed: of every draw.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, CLUSTERS, WIDTH, generator=generator)
    shares = 1 / torch.arange(1, CLUSTERS + 1)

    def draw(count: int, wrong: float) -> Labelled:
        answers = torch.randint(CLASSES, (count,), generator=generator)
        cluster = torch.multinomial(shares, count, replacement=True, generator=generator)
        noise = spread * torch.randn(count, WIDTH, generator=generator)
        shift = torch.randint(1, CLASSES, (count,), generator=generator)
        flipped = torch.rand(count, generator=generator) < wrong
        labels = torch.where(flipped, (answers + shift) % CLASSES, answers)
        return Labelled(centres[answers, cluster] + noise, answers, labels, cluster)

    return draw(items, wrong), draw(tests, 0.0)


class ResidualMLP(nn.Module):
    """Input map, blocks x + W₂ relu(W₁ norm(x)), output map."""

    def __init__(self, *, blocks: int = 6, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.hidden = hidden
        self.input = nn.Linear(WIDTH, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.up = nn.ModuleList(nn.Linear(width, hidden) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(hidden, width) for _ in range(blocks))
        self.output = nn.Linear(width, CLASSES)

    def forward(self, inputs: Tensor, gates: Tensor | None = None) -> Tensor:
        """Logits [n, classes]; `gates` [blocks, hidden] multiply the hidden units."""
        stream = self.input(inputs)
        for index, (norm, up, down) in enumerate(zip(self.norms, self.up, self.down, strict=True)):
            units = torch.relu(up(norm(stream)))
            stream = stream + down(units if gates is None else units * gates[index])
        logits: Tensor = self.output(stream)
        return logits

    @property
    def groups(self) -> dict[str, list[str]]:
        """Parameters by layer: "input", "block 0" …, "output"."""
        found: dict[str, list[str]] = {"input": ["input.weight", "input.bias"]}
        for index in range(len(self.up)):
            parts = [f"{kind}.{index}.{name}" for kind in ("norms", "up", "down") for name in ("weight", "bias")]
            found[f"block {index}"] = parts
        return found | {"output": ["output.weight", "output.bias"]}


@dataclass(frozen=True)
class Trained:
    """A trained network and its way there.

    Attributes:
        model: after the last epoch.
        kept: values after every epoch, the first before any.
        history: figures at the same times.
    """

    model: ResidualMLP
    kept: tuple[Kept, ...]
    history: tuple[Mapping[str, float], ...]

    @property
    def best(self) -> int:
        """The epoch of the highest test accuracy."""
        return max(range(len(self.history)), key=lambda epoch: self.history[epoch]["test"])


def train(given: Labelled, tests: Labelled, *, epochs: int = 40, batch: int = 128, seed: int = 0) -> Trained:
    """Train by Adam (10⁻³), every epoch kept. Cost: some seconds as it comes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResidualMLP()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    kept, history = [Kept.of(model, "epoch 0")], [figures(model, given, tests)]
    for epoch in steps(range(1, epochs + 1), "classifier"):
        for rows in torch.split(torch.randperm(len(given.labels), generator=generator), batch):
            loss = nn.functional.cross_entropy(model(given.inputs[rows]), given.labels[rows])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
        kept.append(Kept.of(model, f"epoch {epoch}"))
        history.append(figures(model, given, tests))
    optimizer.zero_grad(set_to_none=True)
    return Trained(model, tuple(kept), tuple(history))


@torch.no_grad()
def figures(model: nn.Module, given: Labelled, tests: Labelled, gates: Tensor | None = None) -> dict[str, float]:
    """Shares of items answered so.

    Returns:
        "noisy": wrongly labelled training items, with their label; "restored": the same with their class; "clean":
        the other training items; "test" and, of the rare clusters, "tail": test items.
    """
    said, tested = model(given.inputs, gates).argmax(1), model(tests.inputs, gates).argmax(1)
    wrong, right = given.noisy, tested == tests.answers
    return {
        "noisy": _share(said == given.labels, wrong),
        "restored": _share(said == given.answers, wrong),
        "clean": _share(said == given.labels, ~wrong),
        "test": _share(right, torch.ones_like(right)),
        "tail": _share(right, tests.tail),
    }


def units_to_flip(model: ResidualMLP, given: Labelled, item: int, others: Tensor, *, most: int = 60) -> list[int]:
    """Hidden units silenced one after another, greedily, until the prediction of one item changes.

    Each time the unit is taken whose silencing, to first order (gradient × activation), raises the item's loss most,
    less what it raises the mean loss of the others.

    Args:
        model: a trained network.
        given: training items.
        item: which is to flip.
        others: rows that should hold.
        most: units after which it is given up; then that many are returned.

    Returns:
        Flat indices of units, in the order they were taken.

    Source: Maini et al. 2023, arXiv:2307.09542; the first-order form is ours.
    """
    gates = torch.ones(len(model.up), model.hidden)
    said = model(given.inputs[item : item + 1]).argmax(1)
    taken: list[int] = []
    while len(taken) < most:
        open_gates = gates.clone().requires_grad_(True)
        mine = nn.functional.cross_entropy(model(given.inputs[item : item + 1], open_gates), said)
        rest = nn.functional.cross_entropy(model(given.inputs[others], open_gates), given.labels[others])
        (slope,) = torch.autograd.grad(mine - rest, open_gates)
        gain = (-slope * gates).flatten()
        gain[taken] = -torch.inf
        taken.append(int(gain.argmax()))
        gates.view(-1)[taken[-1]] = 0
        with torch.no_grad():
            if int(model(given.inputs[item : item + 1], gates).argmax(1)) != int(said):
                break
    return taken


def _share(verdict: Tensor, where: Tensor) -> float:
    return float(verdict[where].float().mean()) if bool(where.any()) else float("nan")
