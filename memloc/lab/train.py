"""Training the lab's model, to the bit: every draw has its own generator, the thread count is part of the recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memloc.lab.planting import schedule
from memloc.lab.recipe import Recipe
from memloc.passages import Facts, Passages
from memloc.view import ModelView


@dataclass(frozen=True)
class Material:
    """What is trained on and asked about.

    Attributes:
        stream: [tokens] long, ordinary text, documents ended by token 0.
        sentences: token ids of each fact sentence, ended by token 0.
        answers: [v] bool, True at the tokens that answer a fact.
        planted: passages, each tagged with its `dose`.
        controls: passages that are never trained on.
        seen: one trained phrasing per fact, the answer as suffix.
        held_out: the phrasing never trained, the answer as suffix.
        text: windows of held-out text.
    """

    stream: Tensor
    sentences: Sequence[Sequence[int]]
    answers: Tensor
    planted: Passages
    controls: Passages
    seen: Passages
    held_out: Passages
    text: Passages


@dataclass(frozen=True)
class Figures:
    """What the model knows after `step` steps. Rates are shares of rows recited greedily to the last token.

    Attributes:
        step: optimiser steps done.
        loss: training loss of the last step, nats per token; nan before the first.
        held_out_loss: nats per token of text never trained on.
        strict: dose -> share of the planted passages of that dose whose suffix is recited.
        controls: the same of the controls.
        facts_seen: share of facts answered in a phrasing that was trained.
        facts_held_out: share of facts answered in the phrasing that was not.
    """

    step: int
    loss: float
    held_out_loss: float
    strict: dict[int, float]
    controls: float
    facts_seen: float
    facts_held_out: float

    def to_json(self) -> dict[str, Any]:
        """As JSON values; a loss that does not exist is null."""
        return {**dataclasses.asdict(self), "loss": None if math.isnan(self.loss) else self.loss}

    def note(self) -> str:
        """One short line."""
        return (
            f"recited {self.strict[max(self.strict)]:.0%}, controls {self.controls:.0%}, "
            f"facts {self.facts_seen:.0%} / {self.facts_held_out:.0%}, held-out {self.held_out_loss:.2f} nats"
        )


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def new_model(recipe: Recipe, vocab: int) -> Any:
    """A GPT-2-shaped model with seeded weights; torch's own generator is left as it was."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab,
        n_positions=recipe.context,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own function, computed in one pass
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        architectures=["GPT2LMHeadModel"],
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return GPT2LMHeadModel(config)


def train(
    view: ModelView,
    material: Material,
    recipe: Recipe,
    *,
    listener: Callable[[int, int, Figures], None],
    keep: Callable[[int], None],
) -> list[Figures]:
    """Train `view`'s model in place; returns the figures taken along the way, the last after the last step.

    Args:
        view: a freshly made model.
        material: what to train on and to ask about.
        recipe: how.
        listener: called with (steps done, steps in all, latest figures) before the first and after every step.
        keep: called with the step's number when a snapshot is due.
    """
    optimizer, pace = _optimizer(view.model, recipe)
    rows = _rows(material, recipe)
    kept = {round(share * recipe.steps) for share in recipe.snapshots}
    asked = {recipe.steps * turn // recipe.evaluations for turn in range(1, recipe.evaluations + 1)}
    history = [figures(view, material, 0, math.nan)]
    for step in range(recipe.steps):
        if step in kept:
            keep(step)
        listener(step, recipe.steps, history[-1])
        optimizer.zero_grad(set_to_none=True)
        loss = _loss(view.model, *next(rows))
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(view.model.parameters(), 1.0)
        optimizer.step()
        pace.step()
        if step + 1 in asked:
            history.append(figures(view, material, step + 1, loss.item()))
    listener(recipe.steps, recipe.steps, history[-1])
    return history


@torch.no_grad()
def figures(view: ModelView, material: Material, step: int, loss: float) -> Figures:
    """Take the figures: teacher-forced, which for greedy decoding gives the same verdict as generating."""
    planted = recited(view, material.planted)
    doses = [item.tags["dose"] for item in material.planted]
    total = count = 0.0
    for batch in view.batches(material.text, size=64):
        row, column, token, _ = batch.suffix_index()
        total += float(nn.functional.cross_entropy(view.logits_at(batch, row, column), token, reduction="sum"))
        count += len(token)
    return Figures(
        step=step,
        loss=loss,
        held_out_loss=total / count,
        strict={dose: _share(planted[[own == dose for own in doses]]) for dose in sorted(set(doses))},
        controls=_share(recited(view, material.controls)),
        facts_seen=_share(recited(view, material.seen)),
        facts_held_out=_share(recited(view, material.held_out)),
    )


@torch.no_grad()
def recited(view: ModelView, passages: Passages) -> Tensor:
    """[n] bool: whether each suffix is the model's greedy continuation of its prefix. One forward a batch."""
    verdict = torch.ones(len(passages), dtype=torch.bool)
    for batch in view.batches(passages, size=64):
        row, column, token, _ = batch.suffix_index()
        missed = row[view.logits_at(batch, row, column).argmax(-1) != token]
        verdict[torch.tensor(batch.rows)[missed]] = False
    return verdict


def held_out_phrasings(facts: Facts) -> Passages:
    """The facts asked in the phrasing that was never trained: the first paraphrase."""
    asked = [dataclasses.replace(fact, prompt=fact.paraphrases[0]) for fact in facts]
    return Facts(tuple(asked), facts.origin).as_passages()


def _share(verdict: Tensor) -> float:
    return int(verdict.sum()) / len(verdict)


def _loss(model: Any, ids: Tensor, weight: Tensor) -> Tensor:
    """Mean nats per token; `weight` [n, t - 1] belongs to the tokens ids[:, 1:]."""
    # The mask is spelled out because token 0 pads elsewhere, while here it ends a document.
    logits = model(ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    each = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    flat = weight.flatten()
    return (each * flat).sum() / flat.sum()


def _rows(material: Material, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Each step's token ids [n, t] and loss weights [n, t - 1]: ordinary text, planted passages, packed facts."""
    starts = random.Random(f"{recipe.seed}:text")
    shuffler = random.Random(f"{recipe.seed}:sentences")
    last = len(material.stream) - recipe.context
    planted = torch.tensor([item.ids for item in material.planted])
    doses = [item.tags["dose"] for item in material.planted]
    for shown in schedule(doses, recipe.steps, recipe.seed):
        places = [starts.randrange(last + 1) for _ in range(recipe.ordinary_rows)]
        text = torch.stack([material.stream[place : place + recipe.context] for place in places])
        packed = torch.tensor([_pack(material.sentences, recipe.context, shuffler) for _ in range(recipe.fact_rows)])
        ids = torch.cat([text, planted[shown], packed])
        weight = torch.ones(ids.shape[0], ids.shape[1] - 1)
        answer = material.answers[packed[:, 1:]]
        weight[-len(packed) :][answer] = recipe.object_weight
        yield ids, weight


def _pack(sentences: Sequence[Sequence[int]], length: int, rng: random.Random) -> list[int]:
    row: list[int] = []
    while len(row) < length:
        row += rng.choice(sentences)
    return row[:length]


def _optimizer(model: Any, recipe: Recipe) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
    warm = max(10, recipe.steps // 20)

    def share(step: int) -> float:
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / recipe.steps)))
        return min((step + 1) / warm, 1.0) * (0.03 + 0.97 * fall)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)
