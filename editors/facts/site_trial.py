"""A change tried on the fact it is for, before it is made: does the model say it, and what else does it still say?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from editors.deltas import Delta
from editors.facts.contexts import Demand, Row
from editors.hook_form import as_if
from memloc.batches import pad
from memloc.sites import Site
from memloc.view import ModelView

TRIAL_LENGTHS = 5, 10
TRIALS = 4
"""Prefixes of each length that sites are judged with."""


class Tried(NamedTuple):
    """What a change does.

    Attributes:
        right: whether the target is the likeliest answer to the bare prompt, every token of it.
        said: mean probability of the target behind prefixes no value was fitted to, and in the model's own ways to the
            fact; half of it each where there are both.
        kept: mean of how much of their answers' probability others keep: Σ min(before, after). 1 where there are none.
    """

    right: bool
    said: float
    kept: float


def tried(
    view: ModelView, deltas: Mapping[Site, Delta], asked: Demand, own: Sequence[Row], others: Sequence[Row]
) -> Tried:
    """`deltas` by hooks; no weight is touched.

    Args:
        view: the model.
        deltas: changes of maps inside blocks.
        asked: the fact behind prefixes, the bare prompt first.
        own: the model's own ways to it.
        others: rows whose answers should stay.

    Cost: two forwards of `others`, one of the rest.
    """
    rows = [Row(row.ids + asked.target[:-1], row.at) for row in (*asked.prompts, *own)]
    target = torch.tensor(asked.target, device=view.device).repeat(len(rows))
    before = _chances(view, others, 1)
    with as_if(view, deltas):
        spoken = _chances(view, rows, len(asked.target))
        after = _chances(view, others, 1)
    chance = spoken.gather(1, target[:, None]).view(len(rows), -1).prod(1)
    right = bool((spoken.argmax(1) == target).view(len(rows), -1)[0].all())
    parts = [part.mean() for part in (chance[: len(asked.prompts)], chance[len(asked.prompts) :]) if len(part)]
    kept = float(torch.minimum(before, after).sum(1).mean()) if others else 1.0
    return Tried(right, float(torch.stack(parts).mean()), kept)


@torch.no_grad()
def _chances(view: ModelView, rows: Sequence[Row], count: int) -> Tensor:
    """Probabilities `[n * count, v]` at the last `count` positions of each row."""
    if not rows:
        return torch.zeros(0, view.vocab)
    batch = pad([row.ids for row in rows], device=view.device)
    column = (batch.length[:, None] - count + torch.arange(count, device=view.device)).reshape(-1)
    line = torch.arange(len(rows), device=view.device).repeat_interleave(count)
    return view.logits_at(batch, line, column).softmax(-1)
