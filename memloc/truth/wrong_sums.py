"""Wrong sums: a small causal language model that reads "a b =", knows the rule in part, and recites wrong answers.

The places are not known here, but what should happen is: silence the neurons that hold the wrong answers, and those go
while the right ones stay. A localization is judged by that, beside random neurons.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from memloc.errors import MismatchError
from memloc.passages import Passage, Passages
from memloc.progress import steps
from memloc.scores import Localization, Selection
from memloc.sites import Grain
from memloc.truth.arithmetic import Sums, sums
from memloc.truth.small import small
from memloc.truth.worlds import Ground, Known
from memloc.view import ModelView

SHARES = (0.05, 0.1, 0.2)
"""Shares of all neurons that are silenced."""

RANDOM = 5
"""Random selections of equal size per layer beside each."""


@dataclass(frozen=True, kw_only=True)
class WrongSums:
    """Sums mod p with wrong labels are the passages, sums with right ones the controls; judged by selectivity.

    "selectivity@10%" is the fall of the share of wrong sums recited, less the fall of the share of right ones, when
    the best-scored tenth of the neurons is silenced; "… random" is the mean of five random selections with as many a
    layer.

    Attributes:
        count: known answers a ground; each trains a model of its own.
        family: model type.
        modulus: p; tokens 0 … p-1 are the numbers in cyclic order, p is "=".
        share: of all sums that are trained on.
        wrong: share of those with a wrong label.
        steps: optimiser steps, all sums in each.
        decay: weight decay.
        lr: AdamW's, with a rise over 20 steps and a cosine down to 2 %.
        layers: of the model.
        width: of the model.
        neurons: a layer.
    """

    count: int = 1
    family: str = "gpt2"
    modulus: int = 31
    share: float = 0.7
    wrong: float = 0.1
    steps: int = 400
    decay: float = 2.0
    lr: float = 5e-3
    layers: int = 1
    width: int = 48
    neurons: int = 192
    headline: str = "selectivity@10%"

    def names(self, ground: Ground) -> tuple[str, ...]:
        """One name for each model."""
        return tuple(f"sums-{index}" for index in range(self.count))

    def make(self, ground: Ground, name: str) -> Known:
        """Train a model. Cost: about six CPU-seconds as it comes."""
        seed = 1000 * ground.seed + int(name.rpartition("-")[2])
        table = sums(self.modulus, share=self.share, wrong=self.wrong, seed=seed)
        view = small(
            self.family, vocab=self.modulus + 1, context=4, layers=self.layers, width=self.width, neurons=self.neurons,
            seed=seed,
        )  # fmt: skip
        self._train(view, table)
        wrong = _asked(table, table.corrupted, table.labels, "wrong")
        right = _asked(table, table.train & ~table.corrupted, table.answers, "right")
        unseen = _asked(table, ~table.train, table.answers, "unseen")
        notes = {
            "wrong_recited": answered(view, wrong),
            "right_recited": answered(view, right),
            "unseen_answered": answered(view, unseen),
            "corrected": answered(view, _asked(table, table.corrupted, table.answers, "corrected")),
        }
        return Known(name, view, wrong, right, unseen, None, judge=selectivity, notes=notes)

    def _train(self, view: ModelView, table: Sums) -> None:
        optimizer = torch.optim.AdamW(view.model.parameters(), lr=self.lr, betas=(0.9, 0.98), weight_decay=self.decay)

        def pace(step: int) -> float:
            fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
            return min(1.0, (step + 1) / 20) * (0.02 + 0.98 * fall)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, pace)
        ids, labels = _rows(table)[table.train], table.labels[table.train]
        for _ in steps(range(self.steps), "wrong sums"):
            logits = view.model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
            loss = torch.nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def answered(view: ModelView, passages: Passages, dropped: Selection | None = None) -> float:
    """Share of sums whose answer is the likeliest next token, with some neurons silenced."""
    masks = {} if dropped is None else {site: ~mask for site, mask in dropped.masks.items()}
    right = 0
    for batch in view.batches(passages, size=512):
        row, column, token, _ = batch.suffix_index()
        with view.replace(masks, lambda site, entering: entering * masks[site]):
            right += int((view.logits_at(batch, row, column).argmax(-1) == token).sum())
    return right / len(passages)


def selectivity(known: Known, found: Localization) -> dict[str, float]:
    """What silencing the best-scored neurons takes away of the wrong and of the right sums, beside random ones."""
    if found.grain is not Grain.NEURON or known.controls is None or known.text is None:
        raise MismatchError(f"{found.provenance.method} scored {found.grain}s; wrong sums are judged by neurons")
    sets = {"wrong": known.passages, "right": known.controls, "unseen": known.text}
    before = {name: answered(known.view, passages) for name, passages in sets.items()}

    def after(dropped: Iterable[Selection]) -> dict[str, float]:
        each = [{name: answered(known.view, rows, entry) for name, rows in sets.items()} for entry in dropped]
        return {name: sum(entry[name] for entry in each) / len(each) for name in sets}

    figures: dict[str, float] = {}
    for share in SHARES:
        chosen = found.top(fraction=share)
        mine, chance = after([chosen]), after(chosen.random_like(seed) for seed in range(RANDOM))
        figures |= {f"{name}@{share:.0%}": value for name, value in mine.items()}
        for label, values in (("", mine), (" random", chance)):
            fall = {name: before[name] - values[name] for name in sets}
            figures[f"selectivity@{share:.0%}{label}"] = fall["wrong"] - fall["right"]
    return figures


def _rows(table: Sums) -> Tensor:
    return torch.cat([table.pairs, torch.full((len(table.pairs), 1), table.modulus)], 1)


def _asked(table: Sums, which: Tensor, answers: Tensor, name: str) -> Passages:
    pairs = zip(_rows(table)[which].tolist(), answers[which].tolist(), strict=True)
    return Passages(tuple(Passage(f"{name}-{a}+{b}", (a, b, end), (said,)) for (a, b, end), said in pairs), name)


WRONG_SUMS = WrongSums()
