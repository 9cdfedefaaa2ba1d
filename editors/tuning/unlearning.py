"""Unlearning by an objective, on any mask: what gradient ascent, gradient difference, NPO and SimNPO share.

They differ in what a row of the forget set adds to the loss. Which weights may move, what is kept, and when a target
has been forgotten enough are the same for all, and can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from editors.base import Request
from editors.edit import Edit
from editors.masks import Masks, Reach, digest, weight_masks
from editors.tuning.band import Band
from editors.tuning.descent import MaskedAdam, working_copy
from editors.tuning.keep import Keep
from editors.tuning.keeping import Keeping
from editors.tuning.training import Losses, Stop, counted_of, descend, numbered_cycle
from editors.tuning.unlearning_losses import row_mean, row_sum
from memloc.errors import InputError
from memloc.objectives import suffix_logprobs
from memloc.passages import Passages
from memloc.provenance import Provenance, settings_of
from memloc.sites import Kind, Site
from memloc.view import ModelView

PUBLISHED: dict[str, Any] = {
    "lr": 1e-5, "target_rows": 32, "steps": 100, "stop": "steps",
    "keep": "nll", "keep_weight": 1.0, "keep_rows": 32, "keep_text": False, "replay": 0,
}  # fmt: skip
"""What the objectives share as they are usually run: 100 steps are ten rounds of 320 targets. The weight decay of their
AdamW is left out, for it moves every weight whatever the loss says."""


SLACK = 0.05
"""How far into the band a target is taken before it leaves the loss, as a share of the band's upper end: what is kept
pulls it back a little, and it should not end outside."""


class Rows(NamedTuple):
    """A batch of targets as the edited model speaks them.

    Attributes:
        logs: `[n, s]` log-probabilities of suffix tokens, nats.
        counted: `[n, s]` bool, which of them are tokens.
        reference: `[n]` summed log-probability of the original model.
        level: nats per token; at or below it a target is forgotten.
    """

    logs: Tensor
    counted: Tensor
    reference: Tensor
    level: float


Objective = Callable[[Rows], Tensor]
"""From rows to what each adds to the loss, `[n]`."""


@dataclass(frozen=True, kw_only=True)
class Descending:
    """The settings of a descent that unlearns.

    Attributes:
        steps: at most that many.
        lr: step size, in units of a weight.
        target_rows: targets in a step.
        stop: "band": a target whose mean log p per token is well below the floor leaves the loss until back, and
            the run ends once all are at or below it and the kept rows are close; "steps": take all steps, as published.
        floor: nats per token; by default four fifths of the model's own mean on `text`, or -4 without text.
        close: of the keep term, mean over `patience` steps, for the run to end.
        patience: steps in a row for which all must be well (never fewer than a round of the targets).
        reach: what a selected neuron or head lets change; see `weight_masks`.
    """

    steps: int = 150
    lr: float = 1e-3
    target_rows: int = 16
    stop: Literal["band", "steps"] = "band"
    floor: float | None = None
    close: float = 0.005
    patience: int = 10
    reach: Reach = "columns"

    def check_descending(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            InputError: names the setting.
        """
        for name in ("steps", "target_rows", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.lr <= 0 or self.close < 0:
            raise InputError(f"expected lr above 0 and close of 0 or more, found {self.lr}, {self.close}")
        if self.floor is not None and self.floor >= 0:
            raise InputError(f"floor {self.floor}: expected nats below 0")

    def stopping(self, targets: int) -> Stop | None:
        """The stop rule for so many targets; None to take all steps."""
        if self.stop == "steps":
            return None
        return Stop(max(self.patience, -(-targets // self.target_rows)), self.close)


@dataclass(frozen=True, kw_only=True)
class Unlearning(Descending, Keeping):
    """The settings of a descent that unlearns and keeps.

    Attributes:
        keep: "kl": divergence of the edited model from the original on the kept rows, nats per token; "nll": the kept
            rows' own negative log-likelihood, counted from what it was.
        forget_weight: of the forget term.
    """

    keep: Literal["kl", "nll"] = "kl"
    forget_weight: float = 1.0

    def __post_init__(self) -> None:
        self.check_descending()
        self.check_keeping()
        if self.forget_weight <= 0:
            raise InputError(f"forget_weight {self.forget_weight}: expected above 0")


def chosen_masks(view: ModelView, request: Request, reach: Reach, default: tuple[Kind, ...] | None = None) -> Masks:
    """What may be trained: the selection, or, without one, every map of `default` (of all kinds) in every block.

    Embeddings, unembedding and norms are left alone, for the keep term remembers the original by what enters its
    unembedding.

    Raises:
        InputError: the selection names a map outside the blocks.
    """
    if request.selection is None:
        return whole_masks(view, view.sites(*(view.kinds if default is None else default)))
    masks = weight_masks(view, request.selection, reach=reach)
    for site in masks:
        if not site.kind.in_block:
            raise InputError(f"{site}: only maps inside blocks can be trained here")
    return masks


def whole_masks(view: ModelView, sites: tuple[Site, ...]) -> Masks:
    """All of the maps at `sites`, with their biases."""
    parts = [part for site in sites for part in (site, Site(site.layer, site.kind, bias=True)) if view.has(part)]
    return {part: torch.ones(view.weight(part).shape, dtype=torch.bool) for part in parts}


def unlearn(method: Descending, name: str, view: ModelView, request: Request, objective: Objective) -> Edit:
    """The edit that `objective` leads to; `view` is untouched.

    Args:
        method: the editor; its keep term is used where it has one.
        name: of the editor.
        view: the model.
        request: `forget` and, where the editor keeps, `retain` and `text`.
        objective: what each row adds to the loss.

    Raises:
        InputError: no targets, a passage both to forget and to retain, or targets that are in the band already.
    """
    targets = request.need_forget()
    masks = chosen_masks(view, request, method.reach)
    work = working_copy(view)
    band = Band.of(work, targets, request.text, method.floor)
    reference = reference_sums(work, targets)
    check_open(targets, reference, band.upper)
    notes: dict[str, Any] = {"targets": len(targets)}
    keep = method.kept(work, request, targets, notes, steps=method.steps) if isinstance(method, Keeping) else None
    optimiser = MaskedAdam(work, masks, lr=method.lr)
    step = Unlearn(method, work, objective, band, keep, reference)
    batches = numbered_cycle(work, targets, method.target_rows, request.seed)
    weight = method.keep_weight if isinstance(method, Keeping) else 0.0
    stop = method.stopping(len(targets))
    done = descend(optimiser, lambda at: step(at, *next(batches)), stop, steps=method.steps, keep_weight=weight,
                   label=name)  # fmt: skip
    notes |= {"weights": optimiser.count, **done, **band.report(work, targets)}
    return edit_of(method, name, view, request, optimiser, masks, notes)


def edit_of(
    method: Any, name: str, view: ModelView, request: Request, optimiser: MaskedAdam, masks: Masks, notes: Any
) -> Edit:
    """What training changed, as an edit of `view`; whole matrices as dense deltas, the rest as sparse ones."""
    provenance = Provenance(name, settings_of(method), request.seed, {**request.inputs(view), "masks": digest(masks)})
    return Edit.of(view, optimiser.deltas(view, dense=True), provenance, notes=notes)


class Unlearn:
    """One step's losses.

    Args:
        method: its settings.
        view: the working copy.
        objective: what each row adds.
        band: where targets should end.
        keep: what is kept, or None.
        reference: `[targets]` summed log-probabilities of the original.
    """

    def __init__(
        self, method: Descending, view: ModelView, objective: Objective, band: Band, keep: Keep | None,
        reference: Tensor,
    ) -> None:  # fmt: skip
        self.method, self.view, self.objective, self.band, self.keep = method, view, objective, band, keep
        self.reference = reference

    def __call__(self, step: int, batch: Any, rows: list[int]) -> Losses:
        """The forget term over the targets of `rows` that are still in the loss, and the keep term."""
        logs = suffix_logprobs(self.view, batch)
        counted = counted_of(batch, logs)
        mean, upper = row_mean(logs.detach(), counted), self.band.upper
        asked = mean > upper - SLACK * abs(upper) if self.method.stop == "band" else torch.ones_like(mean).bool()
        found = self.objective(Rows(logs, counted, self.reference[rows].to(logs), self.band.upper))
        # Where, not a product: a row that has left the loss may be infinite.
        loss = torch.where(asked, found, found.new_zeros(())).sum() / len(rows)
        weight = self.method.forget_weight if isinstance(self.method, Unlearning) else 1.0
        return Losses(weight * loss, self._kept(step), bool((mean <= upper).all()))

    def _kept(self, step: int) -> Tensor | None:
        if self.keep is None:
            return None
        by_nll = isinstance(self.method, Unlearning) and self.method.keep == "nll"
        return self.keep.rise(self.view, step) if by_nll else self.keep.divergence(self.view, step)


@torch.no_grad()
def reference_sums(view: ModelView, targets: Passages, size: int = 16) -> Tensor:
    """Summed log-probability of each target's suffix, `[n]` nats in the targets' order, computed once."""
    found = torch.zeros(len(targets), dtype=torch.float64)
    for batch in view.batches(targets, size=size):
        logs = suffix_logprobs(view, batch)
        found[list(batch.rows)] = row_sum(logs, counted_of(batch, logs)).double().cpu()
    return found


def check_open(targets: Passages, reference: Tensor, upper: float) -> None:
    """Refuse to run where every target is forgotten already.

    Raises:
        InputError: none is above `upper` on average.
    """
    length = torch.tensor([len(item.suffix) for item in targets])
    if not bool((reference / length > upper).any()):
        raise InputError(f"nothing to do: every target is at {upper:.2f} nats per token or below already")
