"""Masks over weights found by descent: weights switched on and off in a copy of a model, and gradients there.

Only the copy's weights are written. Scores s are trained by the straight-through rule: the forward pass sees W ⊙ m,
with m zero at the smallest |s| of each matrix, and the backward pass takes dm/d|s| for one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from editors.masks import Masks
from editors.pruning.prunings import highest
from editors.tuning.descent import working_copy
from memloc import progress
from memloc.batches import Batch
from memloc.errors import InputError, ModelError
from memloc.gradients.map_gradients import Gathered, Gradients
from memloc.objectives import suffix_nll
from memloc.passages import Passage, Passages
from memloc.sites import Site
from memloc.view import ModelView

Mixing = Literal["drawn", "both"]


class Switched:
    """A working copy whose weights can be switched off and on.

    Attributes:
        view: the copy, in float32 (float64 stays).
        original: site to the weights as they were, `[out, in]`.
    """

    def __init__(self, view: ModelView, where: Masks) -> None:
        self.view = working_copy(view)
        self.original = {site: self.view.weight(site).detach().clone() for site in where}

    def switch_off(self, masks: Masks) -> None:
        """Write the original weights, with zeros at `masks`; every site of the object is written."""
        with torch.no_grad():
            for site, weight in self.original.items():
                off = masks.get(site)
                now = weight if off is None else weight.masked_fill(off.to(weight.device), 0.0)
                self.view.place(site).write(self.view.parameter(site), now)

    def gradients(self, batch: Batch, weights: Tensor) -> Gradients:
        """Gradient by the weights as they now are of Σ weight · mean suffix NLL of a row: site to `[out, in]`."""
        gathered = Gathered(self.view, list(self.original))
        total = gathered.add(batch, lambda view, rows: weights.to(view.device) * suffix_nll(view, rows))
        if not math.isfinite(total):
            raise ModelError("the loss is no longer finite; take a lower learning rate or a smaller share")
        return {site: found.cpu() for site, found in gathered.by_site().items()}


@torch.no_grad()
def mean_nll(view: ModelView, passages: Passages, *, size: int = 32) -> float:
    """Mean over passages of the suffix's mean NLL, nats per token."""
    return sum(float(suffix_nll(view, batch).sum()) for batch in view.batches(passages, size=size)) / len(passages)


def row_weights(forgotten: Tensor, keep_weight: float) -> Tensor:
    """What each row of a mixed batch counts: -(1 - w) / n_f to forget, w / n_r to keep; a missing side counts nothing.

    Args:
        forgotten: [n] bool.
        keep_weight: w, in [0, 1].
    """
    # A side without a row divides by none, but no row takes that value.
    return torch.where(forgotten, -(1.0 - keep_weight) / forgotten.sum(), keep_weight / (~forgotten).sum())


def mixed_batches(
    view: ModelView, forget: Passages, keep: Passages | None, *, size: int, mixing: Mixing, seed: int
) -> Iterator[list[tuple[Batch, Tensor]]]:
    """Epochs for ever, each a list of batches with [n] bool, which rows are to forget.

    "drawn": all rows of both sets once an epoch, shuffled together, so that a batch may lack a side. "both": half of
    every batch to forget and half to keep, as far as there are so many; an epoch shows every row to forget once.
    """
    generator = torch.Generator().manual_seed(seed)
    every = (*forget, *(keep or ()))
    cut, total = len(forget), len(every)
    queue: list[int] = []
    while True:
        if mixing == "drawn" or cut == total:
            order = torch.randperm(total, generator=generator).tolist()
            chunks = [order[start : start + size] for start in range(0, total, size)]
        else:
            chunks, half = [], max(1, min(size // 2, cut))
            shown = torch.randperm(cut, generator=generator).tolist()
            for start in range(0, cut, half):
                wanted = min(size - half, total - cut)
                while len(queue) < wanted:
                    queue += [cut + row for row in torch.randperm(total - cut, generator=generator).tolist()]
                chunks.append(shown[start : start + half] + queue[:wanted])
                queue = queue[wanted:]
        yield [_batch(view, every, chunk, cut) for chunk in chunks]


@dataclass(frozen=True)
class Learning:
    """How scores are trained.

    Attributes:
        share: of each matrix's allowed weights that is dropped, always.
        epochs: passes over the rows.
        lr: of SGD on the scores.
        momentum: of SGD.
        decay: weight decay of the scores.
        batch_size: rows a step.
        keep_weight: w of the loss -(1 - w) · NLL(forget) + w · NLL(keep).
        mixing: see `mixed_batches`.
    """

    share: float
    epochs: int
    lr: float
    momentum: float
    decay: float
    batch_size: int
    keep_weight: float = 0.0
    mixing: Mixing = "drawn"

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1 or self.lr <= 0:
            found = f"epochs {self.epochs}, batch_size {self.batch_size}, lr {self.lr}"
            raise InputError(f"{found}: expected at least 0, at least 1, and above 0")
        if not (0 <= self.momentum < 1 and self.decay >= 0 and 0 <= self.keep_weight <= 1):
            found = f"momentum {self.momentum}, decay {self.decay}, keep_weight {self.keep_weight}"
            raise InputError(f"{found}: expected below 1, at least 0, and a share")


def learn_masks(
    view: ModelView, where: Masks, forget: Passages, keep: Passages | None, learning: Learning, seed: int
) -> tuple[dict[Site, Tensor], dict[str, Any]]:
    """Which weights are dropped at the end, and what happened.

    Returns:
        Site to bool `[out, in]`, exactly ⌊share · n⌋ of the n allowed entries of every matrix; and notes: the mean NLL
        of both sets before anything is dropped, under the untrained mask (which drops weights at random), and at the
        end; and how many of the dropped weights training chose anew.
    """
    switched = Switched(view, where)
    notes: dict[str, Any] = {"before": _losses(switched.view, forget, keep)}
    scores = initial_scores(where, seed)
    first = dropped = _lowest(scores, where, learning.share)
    switched.switch_off(dropped)
    notes["untrained mask"] = _losses(switched.view, forget, keep)
    speed = {site: torch.zeros_like(found) for site, found in scores.items()}
    how: dict[str, Any] = {"size": learning.batch_size, "mixing": learning.mixing, "seed": seed}
    epochs = mixed_batches(switched.view, forget, keep, **how)
    lacking = taken = 0
    for _ in progress.steps(range(learning.epochs), "masks"):
        for batch, forgotten in next(epochs):
            taken, lacking = taken + 1, lacking + (keep is not None and bool(forgotten.all() | (~forgotten).all()))
            slopes = switched.gradients(batch, row_weights(forgotten, learning.keep_weight))
            for site, slope in slopes.items():
                pull = slope * switched.original[site].cpu() * scores[site].sign()
                speed[site].mul_(learning.momentum).add_(pull + learning.decay * scores[site])
                scores[site].add_(speed[site], alpha=-learning.lr)
            dropped = _lowest(scores, where, learning.share)
            switched.switch_off(dropped)
    notes |= {"trained mask": _losses(switched.view, forget, keep), "steps": taken, "batches of one side": lacking}
    both = sum(int((dropped[site] & first[site]).sum()) for site in dropped if site in first)
    notes["chosen by training"] = sum(int(mask.sum()) for mask in dropped.values()) - both
    return dropped, notes


def initial_scores(where: Masks, seed: int) -> dict[Site, Tensor]:
    """Even in ±1/√in: what the published code's initialisation (Kaiming, a = √5) is."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site: (2 * torch.rand(mask.shape, generator=generator) - 1) / math.sqrt(mask.shape[1])
        for site, mask in sorted(where.items())
    }


def unspent(where: Masks, spent: Masks) -> dict[Site, Tensor]:
    """What of `where` is not in `spent`."""
    return {site: mask & ~spent[site] if site in spent else mask for site, mask in where.items()}


def _lowest(scores: Mapping[Site, Tensor], where: Masks, part: float) -> dict[Site, Tensor]:
    return highest({site: -found.abs() for site, found in scores.items()}, where, part, "matrix")


def _losses(view: ModelView, forget: Passages, keep: Passages | None) -> dict[str, float]:
    found = {"forget": mean_nll(view, forget)}
    return found if keep is None else {**found, "keep": mean_nll(view, keep)}


def _batch(view: ModelView, every: Sequence[Passage], rows: list[int], cut: int) -> tuple[Batch, Tensor]:
    # By place: where one round of the rows to keep ends and the next begins, a row may be there twice.
    shown = Passages(tuple(replace(every[row], id=str(place)) for place, row in enumerate(rows)))
    batch = next(view.batches(shown, size=len(rows)))
    return batch, torch.tensor([rows[place] < cut for place in batch.rows])
