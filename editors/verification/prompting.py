"""Prompts found by search: learned embeddings that carry over to other targets, and tokens searched passage by passage.

Either can make a model say anything if it is long enough, so the same search is made for texts never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from editors.verification.material import Effort, Material, fitting, folds, renewed
from editors.verification.scores import Heard, Scores, heard, joined
from memloc.objectives import suffix_nll
from memloc.passages import Passages
from memloc.progress import steps
from memloc.sites import OUTSIDE, Kind, Site
from memloc.view import ModelView

EMBED = Site(OUTSIDE, Kind.EMBED)

HASTE = 0.1
"""Step size of learned embeddings over the root mean square of the vocabulary's."""

ROWS = 64
"""Rows run together."""


def soft(view: ModelView, data: Material, effort: Effort, seed: int) -> Scores:
    """A few learned embeddings in front of the prefix: learned on one half of the targets, asked with the other.

    Cost: two prompts learned, `soft_steps` forwards and backwards each over at most 16 targets.
    """
    many = data.fewer(effort.targets, effort.controls, seed)
    mine, never = folds(many.targets, seed), folds(many.controls, seed)
    found: list[list[Heard]] = [[], []]
    for side in (0, 1):
        if not mine[side]:
            continue
        prompt = _learned(view, _room(view, mine[side], effort.soft_tokens), effort, seed)
        for place, part in enumerate((mine[1 - side], never[1 - side])):
            if part:
                with view.replace([EMBED], _put(prompt), side="output"):
                    found[place].append(heard(view, [_room(view, part, effort.soft_tokens)], part.ids))
    parts = [joined(part, [name for piece in part for name in piece.ids]) for part in found]
    settings = {"tokens": effort.soft_tokens, "steps": effort.soft_steps, "seed": seed}
    return Scores.of((f"{effort.soft_tokens} learned embeddings",), parts, settings)


def hard(view: ModelView, data: Material, effort: Effort, seed: int) -> Scores:
    """A few tokens in front of the prefix, searched for each passage by itself by greedy coordinate descent.

    Cost: each round one forward and backward over every passage, and `hard_tries` forwards.

    Source: the search of Zou et al. 2023, arXiv:2307.15043, with one place a round.
    """
    many = data.fewer(effort.targets, effort.controls, seed)
    found = [_searched(view, part, effort, seed) for part in (many.targets, many.controls)]
    settings = {"tokens": effort.hard_tokens, "rounds": effort.hard_rounds, "tries": effort.hard_tries, "seed": seed}
    return Scores.of((f"{effort.hard_tokens} searched tokens",), found, settings)


def _room(view: ModelView, part: Passages, count: int, tokens: Sequence[Sequence[int]] | None = None) -> Passages:
    """Passages with `count` places in front; where the context is full, the prefix's beginning makes room."""
    context = None if view.context is None else view.context - count
    items = []
    for at, item in enumerate(part):
        head = (0,) * count if tokens is None else tuple(tokens[at])
        items.append(renewed(item, prefix=(*head, *fitting(item.prefix, item.suffix, context))))
    return Passages(tuple(items), part.origin)


def _put(prompt: Tensor) -> Any:
    """A change of the embeddings: the first places hold the prompt."""

    def change(_: Site, embedded: Tensor) -> Tensor:
        head = prompt.to(embedded.dtype).expand(len(embedded), -1, -1)
        return torch.cat([head, embedded[:, prompt.shape[0] :]], 1)

    return change


def _learned(view: ModelView, part: Passages, effort: Effort, seed: int) -> Tensor:
    """The prompt [k, d] under which the suffixes of `part` are likeliest."""
    table = view.parameter(EMBED).detach()
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, view.vocab, (effort.soft_tokens,), generator=generator).to(table.device)
    prompt = table[first].float().clone().requires_grad_()
    optimiser = torch.optim.Adam([prompt], lr=HASTE * float(table.float().square().mean().sqrt()))
    shown = list(view.batches(part, size=16))
    with view.frozen():
        for step in steps(range(effort.soft_steps), "verify: soft prompt"):
            optimiser.zero_grad()
            with view.replace([EMBED], _put(prompt), side="output"):
                suffix_nll(view, shown[step % len(shown)]).mean().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return prompt.detach()


def _searched(view: ModelView, part: Passages, effort: Effort, seed: int) -> Heard:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, view.vocab, (len(part), effort.hard_tokens), generator=generator)
    best = _losses(view, _room(view, part, effort.hard_tokens, tokens.tolist()))
    for _ in steps(range(effort.hard_rounds), "verify: prompt search"):
        promising = _promising(view, _room(view, part, effort.hard_tokens, tokens.tolist()), effort)
        tried = _candidates(tokens, promising, effort.hard_tries, generator)
        for row in tried.unbind(1):
            loss = _losses(view, _room(view, part, effort.hard_tokens, row.tolist()))
            better = loss < best
            tokens[better], best = row[better], torch.where(better, loss, best)
    return heard(view, [_room(view, part, effort.hard_tokens, tokens.tolist())], part.ids)


def _promising(view: ModelView, part: Passages, effort: Effort) -> Tensor:
    """The tokens of the vocabulary that would lower the loss most in each place, to first order: [n, k, c]."""
    table = view.parameter(EMBED).detach().float()[: view.vocab]
    found = torch.zeros(len(part), effort.hard_tokens, min(view.vocab, 4 * effort.hard_tries), dtype=torch.long)
    with view.frozen():
        for batch in view.batches(part, size=ROWS):
            kept: list[Tensor] = []

            def change(_: Site, embedded: Tensor, kept: list[Tensor] = kept) -> Tensor:
                kept.append(embedded.detach().clone().requires_grad_())
                return kept[-1]

            with torch.enable_grad(), view.replace([EMBED], change, side="output"):
                suffix_nll(view, batch).sum().backward()  # type: ignore[no-untyped-call]
            slope = kept[0].grad
            if slope is not None:
                rise = slope[:, : effort.hard_tokens].float() @ table.T
                found[list(batch.rows)] = (-rise).topk(found.shape[-1], dim=-1).indices.cpu()
    return found


def _candidates(tokens: Tensor, promising: Tensor, tries: int, generator: torch.Generator) -> Tensor:
    """[n, tries, k]: the rows with one place exchanged for one of the tokens that promise most there."""
    n, k = tokens.shape
    where = torch.randint(0, k, (n, tries), generator=generator)
    which = torch.randint(0, promising.shape[-1], (n, tries), generator=generator)
    found = tokens[:, None].repeat(1, tries, 1)
    row, column = torch.arange(n)[:, None], torch.arange(tries)[None]
    found[row, column, where] = promising[row, where, which]
    return found


@torch.no_grad()
def _losses(view: ModelView, part: Passages) -> Tensor:
    found = torch.zeros(len(part), dtype=torch.float64)
    for batch in view.batches(part, size=ROWS):
        found[list(batch.rows)] = suffix_nll(view, batch).double().cpu()
    return found
