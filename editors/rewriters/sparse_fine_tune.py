"""Sparse fine-tuning: gradient descent on the selected weights and on no other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from editors.alternative import own_alternative
from editors.base import Request
from editors.descent import MaskedAdam, working_copy
from editors.edit import Edit
from editors.keep import Keep, Source
from editors.masks import Masks, digest, weight_masks
from editors.replay import Replay, self_replay, token_pool
from memloc import progress
from memloc.batches import Batch
from memloc.errors import InputError
from memloc.objectives import suffix_logprobs
from memloc.passages import Passages
from memloc.provenance import Provenance, settings_of
from memloc.view import ModelView

REPLAY_SHARE = 2
"""Rows of the model's own samples to one row of each other keep set."""

OVERSHOOT = 0.8
"""Share of the text's mean that is the default floor, because tokens end below the floor they are pushed to: on three
labs (scripts/claims/unlearning_on_lab.py) the targets ended inside the controls' range, below its median."""


@dataclass(frozen=True, kw_only=True)
class SparseFineTune:
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
        keep_weight: of the keep term.
        floor: nats per token a forgotten token should fall to; by default four fifths of
            the model's own mean on `text`, or -4 without text.
        ceiling: nats per token a taught token should rise to.
        target_rows: targets in a step.
        keep_rows: rows to keep in a step.
        keep_retain: draw from `retain`, if given.
        keep_text: draw from `text`, if given.
        replay: how many samples of the model to draw, before filtering; 0 for none.
        replay_length: tokens of each; by default as long as the longest target, within the context.
        replay_temperature: of the samples.
        replay_ngram: a sample that shares that many tokens in a row with a target is left out.
        reach: what a selected neuron or head lets change; see `weight_masks`.
        close: nats per token, mean over `patience` steps.
        patience: steps in a row.

    Cost: a step is one forward and one backward over `target_rows` + `keep_rows` rows; the samples one forward each.

    Source: Stoehr et al. 2024, arXiv:2403.19851, with the sparsity kept (there weight decay moves every weight); the
    bounds, self-replay and the stop rule are ours.
    """

    objective: Literal["unlearn", "edit-to-target"] = "unlearn"
    steps: int = 150
    lr: float = 1e-3
    keep_weight: float = 5.0
    floor: float | None = None
    ceiling: float = -0.1
    target_rows: int = 16
    keep_rows: int = 20
    keep_retain: bool = True
    keep_text: bool = True
    replay: int = 2400
    replay_length: int | None = None
    replay_temperature: float = 0.7
    replay_ngram: int = 8
    reach: Literal["columns", "unit"] = "columns"
    close: float = 0.005
    patience: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "target_rows", "keep_rows", "replay_ngram", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: expected at least 1")
        for name in ("lr", "replay_temperature"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} {getattr(self, name)}: expected above 0")
        if self.replay < 0 or self.keep_weight < 0 or self.ceiling > 0 or (self.floor or -1.0) >= 0:
            raise InputError("expected replay and keep_weight of 0 or more, ceiling and floor in nats below 0")

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
        keep = self._keep(work, request, avoid, notes)
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
        if self.floor is not None or not request.text:
            return Term(-4.0 if self.floor is None else self.floor, above=False)
        return Term(OVERSHOOT * _mean_logprob(view, request.text[:64]), above=False)

    def _descend(
        self, view: ModelView, optimiser: MaskedAdam, targets: Passages, term: Term, keep: Keep | None, seed: int
    ) -> dict[str, Any]:
        """Train `view` in place; what happened, for the notes."""
        batches, stop, history = _cycle(view, targets, self.target_rows, seed), Stop(self.patience, self.close), []
        with optimiser.training():
            for step in range(self.steps):
                loss, met = term(view, next(batches))
                kept = None if keep is None else keep.divergence(view, step)
                (loss if kept is None else loss + self.keep_weight * kept).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                far = 0.0 if kept is None else float(kept.detach())
                history.append([float(loss.detach()), far])
                progress.tell("sparse-fine-tune", step + 1, self.steps, f"target {history[-1][0]:.3f} keep {far:.4f}")
                if stop(met, far):
                    break
        thinned = [[step + 1, *row] for step, row in enumerate(history) if step % 10 == 9 or step + 1 == len(history)]
        return {"steps": len(history), "stopped": len(history) < self.steps, "history": thinned}

    # -- what to keep -------------------------------------------------------------------------------------------

    def _keep(self, view: ModelView, request: Request, avoid: Passages, notes: dict[str, Any]) -> Keep | None:
        named = _kept(request.retain, avoid, view) if self.keep_retain else None
        text = _kept(request.text, None, view) if self.keep_text else None
        sources = []
        if self.replay:
            made = self._replay(view, request, avoid)
            notes["replay"] = {"kept": len(made.ids), "filtered": made.filtered, "length": made.ids.shape[1]}
            sources.append(Source.of("replay", made.ids.tolist(), made.hidden))
        sources += [Source.of(name, rows) for name, rows in (("retain", named), ("text", text)) if rows]
        if not sources or not self.keep_weight:
            return None
        weights = [REPLAY_SHARE if source.name == "replay" else 1 for source in sources]
        shares = [max(1, round(self.keep_rows * weight / sum(weights))) for weight in weights]
        notes["keep_rows"] = {source.name: share for source, share in zip(sources, shares, strict=True)}
        return Keep(view, sources, shares, steps=self.steps, seed=request.seed)

    def _replay(self, view: ModelView, request: Request, avoid: Passages) -> Replay:
        length = self.replay_length or max(2, *(len(item.ids) for item in avoid))
        return self_replay(
            view,
            self.replay,
            length=min(length, view.context or length),
            starts=token_pool(request.text, request.retain),
            avoid=[item.ids for item in avoid],
            temperature=self.replay_temperature,
            ngram=self.replay_ngram,
            seed=request.seed,
        )


@dataclass(frozen=True)
class Term:
    """The bounded target term.

    Attributes:
        level: nats per token.
        above: tokens should rise above `level`, not fall below it.
    """

    level: float
    above: bool

    def __call__(self, view: ModelView, batch: Batch) -> tuple[Tensor, bool]:
        """Mean shortfall over target tokens (differentiable), and whether every row meets the level on average."""
        spoken = suffix_logprobs(view, batch)
        length = batch.length - batch.prefix
        counted = torch.arange(spoken.shape[1], device=spoken.device) < length[:, None]
        short = (self.level - spoken if self.above else spoken - self.level).clamp_min(0) * counted
        mean = spoken.detach().sum(1) / length
        met = mean >= self.level if self.above else mean <= self.level
        return short.sum() / counted.sum(), bool(met.all())


class Stop:
    """Stops once, for `patience` steps in a row, all targets have been met and the keep term was below `close`."""

    def __init__(self, patience: int, close: float) -> None:
        self.patience, self.close = patience, close
        self._met: deque[bool] = deque(maxlen=patience)
        self._far: deque[float] = deque(maxlen=patience)

    def __call__(self, met: bool, far: float) -> bool:
        """Whether to stop, after a step with these outcomes."""
        self._met.append(met)
        self._far.append(far)
        return len(self._met) == self.patience and all(self._met) and sum(self._far) <= self.close * self.patience


def _cycle(view: ModelView, targets: Passages, size: int, seed: int) -> Iterator[Batch]:
    """Batches of targets for ever, shuffled each round where they do not fit in one."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(targets), generator=generator).tolist() if len(targets) > size else None
        shown = targets if order is None else Passages(tuple(targets[row] for row in order), targets.origin)
        for start in range(0, len(shown), size):
            yield from view.batches(shown[start : start + size], size=size)


def _kept(given: Passages | None, avoid: Passages | None, view: ModelView) -> list[tuple[int, ...]] | None:
    """Token rows of a keep set, checked."""
    if given is None:
        return None
    given.check(view.vocab, view.context)
    targets = {item.ids for item in avoid or ()}
    for item in given:
        if item.ids in targets:
            raise InputError(f"passage {item.id!r} is both to change and to retain; take it out of one set")
    return [item.ids for item in given]


@torch.no_grad()
def _mean_logprob(view: ModelView, text: Passages) -> float:
    """Mean nats per token of ordinary text."""
    total = sum(float(suffix_logprobs(view, batch).sum()) for batch in view.batches(text, size=16))
    return total / sum(len(item.suffix) for item in text)


@torch.no_grad()
def _check_open(view: ModelView, targets: Passages, term: Callable[..., Any], size: int) -> None:
    """Refuse to run where every token of every target is where it should be already."""
    if not any(float(term(view, batch)[0]) > 0 for batch in view.batches(targets, size=size)):
        raise InputError("nothing to do: every token of every target is already where it should be")
