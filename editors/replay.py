"""Self-replay: the model's own samples as something to keep.

An edit that is only told what to forget and what ordinary text looks like destroys other memories, because nobody
names them. The model can: what it recites by itself is what it remembers. Samples that touch a target are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memloc import progress
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.view import ModelView


@dataclass(frozen=True)
class Continuation:
    """What a model wrote.

    Attributes:
        ids: [n, t] the given tokens and what followed.
        hidden: [n, t - 1, d] after the final norm, at every position but the last: what `view.unembed` turns into
            the distribution the next token was drawn from.
    """

    ids: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Replay(Continuation):
    """The model's own samples, those that touch a target left out.

    Attributes:
        filtered: how many were left out.
    """

    filtered: int


@torch.no_grad()
def continuation(
    view: ModelView, ids: Tensor, length: int, *, temperature: float = 0.0, generator: torch.Generator | None = None
) -> Continuation:
    """Let the model continue rows of equal length.

    Args:
        view: the model.
        ids: [n, s] long.
        length: how many tokens to add.
        temperature: 0 is greedy (lowest id among equals).
        generator: on the model's device; needed where the temperature is not 0.

    Cost: one forward over s tokens, then one a token, with cached keys and values.
    """
    base: Any = getattr(view.model, view.model.base_model_prefix)
    written, hidden, cache = [ids], [], None
    for _ in range(length):
        out = base(input_ids=written[-1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        hidden.append(out.last_hidden_state)
        logits = view.unembed(out.last_hidden_state[:, -1])
        if temperature > 0:
            written.append(_draw(logits / temperature, generator))
        else:
            written.append(logits.argmax(-1, keepdim=True))
    return Continuation(torch.cat(written, 1), torch.cat(hidden, 1))


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token a row, `[n, 1]`, by inverting the cumulative distribution: one random number a row, not one a token."""
    total = logits.double().softmax(-1).cumsum(-1)
    height = torch.rand(len(logits), 1, generator=generator, device=logits.device, dtype=torch.float64) * total[:, -1:]
    return torch.searchsorted(total, height, right=True).clamp_(max=logits.shape[-1] - 1)


def self_replay(
    view: ModelView,
    count: int,
    *,
    length: int,
    starts: Sequence[int] = (),
    avoid: Iterable[Sequence[int]] = (),
    temperature: float = 0.7,
    ngram: int = 8,
    seed: int = 0,
    size: int = 128,
) -> Replay:
    """Samples of the model, to be kept as they are.

    Args:
        view: the model.
        count: how many to draw, before filtering.
        length: tokens of each.
        starts: first tokens to draw from, with repetition (all tokens of ordinary text: its unigrams). Without any, a
            row starts with the model's start token, or, where it has none, with any token of its vocabulary.
        avoid: token rows that must not be recited; a sample that shares `ngram` tokens in a row with one is left out
            (or all its tokens in a row, where it is shorter).
        temperature: of the samples.
        ngram: how many tokens in a row make a match.
        seed: of the samples.
        size: rows sampled at once.

    Raises:
        InputError: no sample is left.

    Cost: `count * length` tokens of forward; memory `count * length * d` for the hidden states, which spare the
    teacher's forward when the samples are used.
    """
    generator = torch.Generator(view.device).manual_seed(seed)
    first = _starts(view, count, starts, generator)
    grams = _grams(avoid, ngram)
    ids, hidden = [], []
    for at in progress.steps(range(0, count, size), "self-replay"):
        made = continuation(view, first[at : at + size], length - 1, temperature=temperature, generator=generator)
        clean = torch.tensor([not recites(row, grams) for row in made.ids.tolist()], device=made.ids.device)
        ids.append(made.ids[clean])
        hidden.append(made.hidden[clean])
    kept = torch.cat(ids)
    if not len(kept):
        raise InputError(f"all {count} samples recite a target; lower the temperature or give text, or set replay=0")
    return Replay(kept, torch.cat(hidden), count - len(kept))


Grams = dict[int, set[tuple[int, ...]]]
"""n to the n-grams of that length that must not occur."""


def _grams(rows: Iterable[Sequence[int]], ngram: int) -> Grams:
    found: Grams = {}
    for row in rows:
        n = min(ngram, len(row))
        found.setdefault(n, set()).update(tuple(row[at : at + n]) for at in range(len(row) - n + 1))
    return found


def recites(row: Sequence[int], grams: Grams) -> bool:
    """Whether `row` holds one of the n-grams."""
    return any(tuple(row[at : at + n]) in known for n, known in grams.items() for at in range(len(row) - n + 1))


def _starts(view: ModelView, count: int, pool: Sequence[int], generator: torch.Generator) -> Tensor:
    if not pool:
        start = getattr(view.config, "bos_token_id", None)
        pool = range(view.vocab) if start is None else [int(start)]
    table = torch.tensor(pool, device=view.device)
    return table[torch.randint(len(table), (count, 1), generator=generator, device=view.device)]


def token_pool(*sets: Passages | None) -> tuple[int, ...]:
    """All tokens of the passages given, in order: drawn from, they are the text's unigrams."""
    return tuple(token for passages in sets if passages is not None for item in passages for token in item.ids)
