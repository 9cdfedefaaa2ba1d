"""Corrupted modular arithmetic: a two-layer network that learns a rule and memorizes wrong labels, apart.

f(a, b) = W (U e_a + V e_b)², squared entry by entry, for (a + b) mod p, with a share of the training labels wrong. Its
rule is made of waves over the numbers and its memory is not, so neurons with a low inverse participation ratio are the
known answer, and pruning them is the test.

Source: Doshi et al. 2023, arXiv:2310.13061.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memloc.errors import InputError
from memloc.progress import tell
from memloc.reading.fourier import Convention, one_wave, participation, power


@dataclass(frozen=True)
class Sums:
    """All sums mod p, and what is trained on.

    Attributes:
        modulus: p.
        pairs: [p², 2], a and b.
        answers: [p²], (a + b) mod p.
        labels: [p²], what is trained on; another number where corrupted.
        train: [p²] bool, whether the pair is trained on.
        corrupted: [p²] bool, whether it is trained on with a wrong label.
    """

    modulus: int
    pairs: Tensor
    answers: Tensor
    labels: Tensor
    train: Tensor
    corrupted: Tensor


def sums(modulus: int, *, share: float = 0.5, wrong: float = 0.2, seed: int = 0) -> Sums:
    """The table mod `modulus`, a `share` of it trained on, of which a share `wrong` with a label drawn from the others.

    Raises:
        InputError: a modulus below 5, or a share outside [0, 1].
    """
    if modulus < 5 or not 0 < share <= 1 or not 0 <= wrong <= 1:
        raise InputError(f"modular sums: modulus {modulus}, share {share}, wrong {wrong}; expected at least 5, and "
                         "shares between 0 and 1")  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.arange(modulus)
    pairs = torch.cartesian_prod(numbers, numbers)
    answers = pairs.sum(1) % modulus
    order = torch.randperm(len(pairs), generator=generator)
    count = round(share * len(pairs))
    train, corrupted = torch.zeros(len(pairs), dtype=torch.bool), torch.zeros(len(pairs), dtype=torch.bool)
    train[order[:count]] = True
    corrupted[order[: round(wrong * count)]] = True
    shift = torch.randint(1, modulus, (len(pairs),), generator=generator)
    labels = torch.where(corrupted, (answers + shift) % modulus, answers)
    return Sums(modulus, pairs, answers, labels, train, corrupted)


@dataclass(frozen=True)
class Quadratic:
    """The network.

    Attributes:
        first: U, [neurons, p].
        second: V, [neurons, p].
        out: W, [p, neurons].
    """

    first: Tensor
    second: Tensor
    out: Tensor

    def logits(self, pairs: Tensor, keep: Tensor | None = None) -> Tensor:
        """[n, p], with each neuron's square times `keep` (as [neurons] or [n, neurons])."""
        square = (self.first.T[pairs[:, 0]] + self.second.T[pairs[:, 1]]).square()
        return (square if keep is None else square * keep) @ self.out.T

    def ratios(self, convention: Convention = "half") -> Tensor:
        """[neurons], mean inverse participation ratio of a neuron's row of U, row of V and column of W."""
        parts = (self.first, self.second, self.out.T)
        return torch.stack([participation(part, convention) for part in parts]).mean(0)

    def one_wave(self) -> Quadratic:
        """The network with one frequency a neuron: where its powers in U, V and W have the largest product.

        The rule survives where it was there. An untrained network, or one trained on random labels, gains nothing.
        """
        product = power(self.first) * power(self.second) * power(self.out.T)
        frequency = product[:, 1:].argmax(1) + 1
        return Quadratic(
            one_wave(self.first, frequency), one_wave(self.second, frequency), one_wave(self.out.T, frequency).T
        )


@dataclass(frozen=True)
class Figures:
    """Shares of pairs answered so. Trained pairs: with the label; corrupted ones also with the truth.

    Attributes:
        train: trained pairs answered with their label.
        clean: uncorrupted trained pairs answered with their label, which is true.
        corrupted: corrupted pairs answered with their wrong label.
        restored: corrupted pairs answered with the truth.
        test: pairs never trained on answered with the truth.
    """

    train: float
    clean: float
    corrupted: float
    restored: float
    test: float

    @classmethod
    @torch.no_grad()
    def of(cls, net: Quadratic, table: Sums, keep: Tensor | None = None) -> Figures:
        """Of the network, or of its neurons that `keep` [neurons] leaves."""
        said = net.logits(table.pairs, keep).argmax(1)
        labelled, true = said == table.labels, said == table.answers
        clean = table.train & ~table.corrupted
        return cls(
            _share(labelled, table.train), _share(labelled, clean), _share(labelled, table.corrupted),
            _share(true, table.corrupted), _share(true, ~table.train),
        )  # fmt: skip


@dataclass(frozen=True)
class Training:
    """A trained network and how it came to be.

    Attributes:
        net: the network.
        history: (step, figures) along the way, the last after the last step.
    """

    net: Quadratic
    history: tuple[tuple[int, Figures], ...]


def untrained(modulus: int, neurons: int, *, seed: int = 0) -> Quadratic:
    """A network at its initialisation: normal, of variance (16·neurons)^(-2/3)."""
    generator = torch.Generator().manual_seed(seed)
    spread = (16 * neurons) ** (-1 / 3)
    shapes = ((neurons, modulus), (neurons, modulus), (modulus, neurons))
    return Quadratic(*(spread * torch.randn(*shape, generator=generator) for shape in shapes))


def train(
    table: Sums,
    *,
    neurons: int = 400,
    steps: int = 1000,
    decay: float = 2.0,
    lr: float = 0.01,
    dropout: float = 0.0,
    seed: int = 0,
    every: int = 0,
) -> Training:
    """Train on the whole table at once: AdamW(lr, β .9 .98, decoupled decay), squared error to the label's one-hot.

    Args:
        table: what to train on.
        neurons: N.
        steps: optimiser steps.
        decay: weight decay; none memorizes, a little lets rule and memory coexist, much leaves the rule alone.
        lr: learning rate.
        dropout: share of neurons silenced in each step, pair by pair.
        seed: of the initialisation and of dropout.
        every: figures are taken every so many steps, and at the end; 0 only at the end.

    Cost: about 14 CPU-seconds for p = 59, 400 neurons, 1000 steps on one thread.
    """
    start = untrained(table.modulus, neurons, seed=seed)
    parts = [part.clone().requires_grad_(True) for part in (start.first, start.second, start.out)]
    optimizer = torch.optim.AdamW(parts, lr=lr, betas=(0.9, 0.98), weight_decay=decay)
    pairs = table.pairs[table.train]
    wanted = torch.nn.functional.one_hot(table.labels[table.train], table.modulus).float()
    generator = torch.Generator().manual_seed(seed + 1)
    history = []
    for step in range(1, steps + 1):
        keep = None
        if dropout:
            keep = (torch.rand(len(pairs), neurons, generator=generator) >= dropout) / (1 - dropout)
        loss = (Quadratic(*parts).logits(pairs, keep) - wanted).square().mean()
        for part, gradient in zip(parts, torch.autograd.grad(loss, parts), strict=True):
            part.grad = gradient
        optimizer.step()
        if step == steps or (every and step % every == 0):
            history.append((step, Figures.of(Quadratic(*parts), table)))
        tell("arithmetic", step, steps)
    return Training(Quadratic(*(part.detach() for part in parts)), tuple(history))


Order = Literal["lowest", "highest", "random"]


def prune_curve(
    net: Quadratic, table: Sums, order: Order, shares: Sequence[float], *, seed: int = 0
) -> list[tuple[float, Figures]]:
    """Figures as neurons are silenced in the order of their participation ratio, or at random, the control.

    Args:
        net: a trained network.
        table: what it was trained on.
        order: "lowest" ratio first (memory), "highest" first (rule), or "random".
        shares: of the neurons that are silenced.
        seed: of the random order.
    """
    ratios = net.ratios()
    ranked = {
        "lowest": ratios.argsort(),
        "highest": ratios.argsort(descending=True),
        "random": torch.randperm(len(ratios), generator=torch.Generator().manual_seed(seed)),
    }[order]
    found = []
    for share in shares:
        keep = torch.ones(len(ratios))
        keep[ranked[: round(share * len(ratios))]] = 0
        found.append((share, Figures.of(net, table, keep)))
    return found


def _share(verdict: Tensor, where: Tensor) -> float:
    return float(verdict[where].float().mean()) if bool(where.any()) else float("nan")
