"""Sparse fine-tuning: gradient descent on the selected weights and on no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from editors.base import Request
from editors.edit import Edit
from editors.masks import Masks, digest, weight_masks
from editors.tuning.alternative import own_alternative
from editors.tuning.descent import MaskedAdam, working_copy
from editors.tuning.keep import Keep
from editors.tuning.keeping import Keeping
from editors.tuning.training import Losses, Stop, Term, cycle, descend, floor_of
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.provenance import Provenance, settings_of
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class SparseFineTune(Keeping):
    """Fine-tune only the selected weights: unlearn passages, or teach other targets, and keep the rest as it was.

    Loss = target term + keep_weight · mean KL(original ‖ edited) per token, by Adam without weight decay. An entry
    off the mask is never written. The target term is bounded, so nothing is pushed further than asked:

    - unlearn: mean over suffix tokens of max(0, log p - floor), on `forget`;
    - edit-to-target: mean over target tokens of max(0, ceiling - log p), on the new answers of `facts`, or, without
      facts, on the model's own alternative continuations of `forget` (`own_alternative`).

    The keep term draws from up to three sets: `retain`, ordinary `text`, and the model's own samples. The last is
    what spares memories nobody named; samples that recite a target are left out.

    The run stops early once every target has been met on average, and the mean divergence was below `close`, for
    `patience` steps in a row.

    Attributes:
        objective: "unlearn" or "edit-to-target".
        steps: at most that many.
        lr: step size, in units of a weight.
        floor: nats per token a forgotten token should fall to; by default four fifths of
            the model's own mean on `text`, or -4 without text.
        ceiling: nats per token a taught token should rise to.
        target_rows: targets in a step.
        reach: what a selected neuron or head lets change; see `weight_masks`.
        close: nats per token, mean over `patience` steps.
        patience: steps in a row.

    The settings of the keep term are those of `Keeping`.

    Cost: a step is one forward and one backward over `target_rows` + `keep_rows` rows; the samples one forward each.

    Source: Stoehr et al. 2024, arXiv:2403.19851, with the sparsity kept (there weight decay moves every weight); the
    bounds, self-replay and the stop rule are ours.
    """

    objective: Literal["unlearn", "edit-to-target"] = "unlearn"
    steps: int = 150
    lr: float = 1e-3
    floor: float | None = None
    ceiling: float = -0.1
    target_rows: int = 16
    reach: Literal["columns", "unit"] = "columns"
    close: float = 0.005
    patience: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "target_rows", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.lr <= 0:
            raise InputError(f"lr {self.lr}: expected above 0")
        if self.ceiling > 0 or (self.floor or -1.0) >= 0:
            raise InputError("expected ceiling and floor in nats below 0")
        self.check_keeping()

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched.

        Raises:
            InputError: nothing to change, no selection, a passage both to forget and to retain, or targets that are
                already met.
        """
        masks = weight_masks(view, request.need_selection(), reach=self.reach)
        for site in masks:
            if not site.kind.in_block:
                raise InputError(f"{site}: only maps inside blocks can be fine-tuned sparsely")
        work = working_copy(view)
        targets, avoid = self._targets(work, request)
        term = self._term(work, request)
        _check_open(work, targets, term, self.target_rows)
        notes: dict[str, Any] = {"targets": len(targets), "level": term.level}
        keep = self.kept(work, request, avoid, notes, steps=self.steps)
        optimiser = MaskedAdam(work, masks, lr=self.lr)
        notes |= {"weights": optimiser.count, **self._descend(work, optimiser, targets, term, keep, request.seed)}
        return Edit.of(view, optimiser.deltas(view), self._provenance(view, request, masks), notes=notes)

    def _provenance(self, view: ModelView, request: Request, masks: Masks) -> Provenance:
        inputs = {**request.inputs(view), "masks": digest(masks)}
        return Provenance("sparse-fine-tune", settings_of(self), request.seed, inputs)

    # -- what to change -----------------------------------------------------------------------------------------

    def _targets(self, view: ModelView, request: Request) -> tuple[Passages, Passages]:
        """Prefixes with the suffixes the loss is about, and the passages that samples must not recite."""
        if self.objective == "unlearn":
            return request.need_forget(), request.need_forget()
        if request.facts:
            return request.facts.as_passages("new"), request.facts.as_passages("true")
        if not request.forget:
            raise InputError("edit-to-target needs facts, or passages to forget; none were given")
        return own_alternative(view, request.forget, seed=request.seed), request.forget

    def _term(self, view: ModelView, request: Request) -> Term:
        if self.objective == "edit-to-target":
            return Term(self.ceiling, above=True)
        return Term(floor_of(view, request.text, self.floor), above=False)

    def _descend(
        self, view: ModelView, optimiser: MaskedAdam, targets: Passages, term: Term, keep: Keep | None, seed: int
    ) -> dict[str, Any]:
        """Train `view` in place; what happened, for the notes."""
        batches = cycle(view, targets, self.target_rows, seed)

        def losses(step: int) -> Losses:
            loss, met = term(view, next(batches))
            return Losses(loss, None if keep is None else keep.divergence(view, step), met)

        stop = Stop(self.patience, self.close)
        return descend(
            optimiser, losses, stop, steps=self.steps, keep_weight=self.keep_weight, label="sparse-fine-tune"
        )


@torch.no_grad()
def _check_open(view: ModelView, targets: Passages, term: Callable[..., Any], size: int) -> None:
    """Refuse to run where every token of every target is where it should be already."""
    if not any(float(term(view, batch)[0]) > 0 for batch in view.batches(targets, size=size)):
        raise InputError("nothing to do: every token of every target is already where it should be")
