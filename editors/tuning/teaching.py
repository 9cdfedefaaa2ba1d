"""Teaching by gradient descent: new answers to facts, or other continuations of passages, on any mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from editors.base import Request
from editors.facts.contexts import demand, sample_prefixes
from editors.masks import Masks, Reach
from editors.tuning.alternative import own_alternative
from editors.tuning.descent import MaskedAdam
from editors.tuning.keeping import Keeping
from editors.tuning.training import Losses, Stop, counted_of, cycle, descend
from editors.tuning.unlearning_losses import row_mean
from memloc.batches import Batch
from memloc.errors import InputError
from memloc.objectives import suffix_logprobs
from memloc.passages import Facts, Passage, Passages
from memloc.view import ModelView

Convention = Literal["teacher-forced", "one-position"]


@dataclass(frozen=True, kw_only=True)
class Teaching(Keeping):
    """The settings of a descent that teaches.

    Attributes:
        steps: at most that many.
        lr: step size, in units of a weight.
        target_rows: targets in a step.
        enough: nats per token; a target whose mean NLL is below it leaves the loss, and the run ends once all have.
        close: of the keep term, mean over `patience` steps, for the run to end.
        patience: steps in a row for which all must be well (never fewer than a round of the targets).
        convention: "teacher-forced": each target token is read behind those before it; "one-position": all of them
            are read off the prompt's last token, as the code published with ROME does, which teaches their order to
            nobody.
        prefixes: sampled beginnings of the model's own that each fact is also taught behind; needs a tokenizer.
        reach: what a selected neuron or head lets change; see `weight_masks`.
    """

    keep_weight: float = 0.0
    steps: int = 50
    lr: float = 5e-4
    target_rows: int = 64
    enough: float = 1e-2
    close: float = 0.005
    patience: int = 1
    convention: Convention = "teacher-forced"
    prefixes: int = 0
    reach: Reach = "columns"

    def check_teaching(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            InputError: names the setting.
        """
        for name in ("steps", "target_rows", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.lr <= 0 or self.enough < 0 or self.close < 0 or self.prefixes < 0:
            raise InputError("expected lr above 0, and enough, close and prefixes of 0 or more")
        self.check_keeping()


def lessons(method: Teaching, view: ModelView, request: Request) -> tuple[Passages, Passages]:
    """What is taught, as prefixes with the suffixes that should follow, and what samples to keep must not recite.

    Facts are taught their new answers, behind `prefixes` too; passages to forget, without facts, the model's own
    alternative continuations.

    Raises:
        InputError: neither was given.
    """
    if request.facts:
        return _of_facts(method, view, request.facts, request.seed), request.facts.as_passages("true")
    if not request.forget:
        raise InputError("this editor needs facts to change, or passages to forget; none were given")
    return own_alternative(view, request.forget, seed=request.seed), request.forget


def teach(
    method: Teaching, label: str, view: ModelView, request: Request, masks: Masks, *,
    project: Callable[[MaskedAdam], Callable[[Tensor], Tensor]] | None = None,
) -> tuple[MaskedAdam, dict[str, Any]]:  # fmt: skip
    """Train `view`, a working copy, in place.

    Args:
        method: its settings.
        label: for progress.
        view: the working copy.
        request: what to teach and to keep.
        masks: what may change.
        project: from the optimiser to what is done to its entries after each step.

    Returns:
        The optimiser, and notes.

    Raises:
        InputError: nothing to teach, or all of it is known already.
    """
    targets, avoid = lessons(method, view, request)
    notes: dict[str, Any] = {"targets": len(targets)}
    with torch.no_grad():
        if all(bool((_nll(method, view, batch) < method.enough).all()) for batch in view.batches(targets, size=16)):
            raise InputError(f"nothing to do: every target is said already, at under {method.enough} nats per token")
    keep = method.kept(view, request, avoid, notes, steps=method.steps)
    optimiser = MaskedAdam(view, masks, lr=method.lr)
    optimiser.project = None if project is None else project(optimiser)
    batches: Iterator[Batch] = cycle(view, targets, method.target_rows, request.seed)

    def losses(step: int) -> Losses:
        found = _nll(method, view, next(batches))
        waiting = found.detach() >= method.enough
        loss = torch.where(waiting, found, found.new_zeros(())).sum() / len(found)
        return Losses(loss, None if keep is None else keep.divergence(view, step), not bool(waiting.any()))

    stop = Stop(max(method.patience, -(-len(targets) // method.target_rows)), method.close)
    done = descend(optimiser, losses, stop, steps=method.steps, keep_weight=method.keep_weight, label=label)
    return optimiser, {**notes, "weights": optimiser.count, **done}


def _nll(method: Teaching, view: ModelView, batch: Batch) -> Tensor:
    """Mean NLL per target token of each row, `[n]` nats, by the method's convention."""
    if method.convention == "one-position":
        return one_position_nll(view, batch)
    spoken = suffix_logprobs(view, batch)
    return -row_mean(spoken, counted_of(batch, spoken))


def one_position_nll(view: ModelView, batch: Batch) -> Tensor:
    """Mean over the suffix's tokens of their NLL, all read where its first is: `[n]` nats; differentiable."""
    everyone = torch.arange(len(batch), device=batch.ids.device)
    row, _, token, _ = batch.suffix_index()
    spoken = view.logits_at(batch, everyone, batch.first).log_softmax(-1)[row, token]
    return -spoken.new_zeros(len(batch)).index_add(0, row, spoken) / (batch.length - batch.prefix)


def _of_facts(method: Teaching, view: ModelView, facts: Facts, seed: int) -> Passages:
    plain = facts.as_passages("new")
    if not method.prefixes:
        return plain
    generator = torch.Generator().manual_seed(seed)
    heads = sample_prefixes(view, (10,), method.prefixes, generator)
    made: list[Passage] = []
    for fact, item in zip(facts, plain, strict=True):
        rows = demand(fact, view.tokenizer, heads, "prompt-last", essence=False).prompts
        made += [item, *(replace(item, id=f"{item.id}~{at}", prefix=row.ids) for at, row in enumerate(rows) if at)]
    return Passages(tuple(made), plain.origin)
