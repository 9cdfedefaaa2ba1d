"""Self-replay: the model's own samples as something to keep.

An edit that is only told what to forget and what ordinary text looks like destroys other memories, because nobody
names them. The model can: what it recites by itself is what it remembers. Samples that touch a target are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from memloc import progress
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.running.decoding import Continuation, continuation
from memloc.view import ModelView


@dataclass(frozen=True)
class Replay(Continuation):
    """The model's own samples, those that touch a target left out.

    Attributes:
        filtered: how many were left out.
    """

    filtered: int


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
    size: int = 256,
) -> Replay:
    """Samples of the model, to be kept as they are: what it is sure of, and what it says besides.

    Few samples recite a memory, and those that will are sure of themselves early. So `count` samples are begun, a
    quarter of `length` long; an eighth of them is finished because it is the likeliest (of those that say the same,
    one), and another eighth is taken from the rest by lot.

    Args:
        view: the model.
        count: how many to begin.
        length: tokens of each that is finished.
        starts: first tokens to draw from, with repetition (all tokens of ordinary text: its unigrams); half of the
            samples start so, the other half with any token of the vocabulary. Without `starts`, all begin with the
            model's start token, or, where it has none, with any token.
        avoid: token rows that must not be recited; a sample that shares `ngram` tokens in a row with one is left out
            (or all its tokens in a row, where it is shorter).
        temperature: of the samples.
        ngram: how many tokens in a row make a match.
        seed: of the samples.
        size: rows sampled at once.

    Raises:
        InputError: no sample is left.

    Cost: `count * length / 2` tokens of forward; the hidden states kept, d floats a token, spare a teacher's forward
    when the samples are used.
    """
    view.need_causal("writes nothing that could be replayed; set replay to 0")
    generator = torch.Generator(view.device).manual_seed(seed)
    opening = max(2, length // 4)
    first = _starts(view, count, starts, generator)
    begun, sure = [], []
    for rows in progress.steps(_parts(first, size), "self-replay: openings"):
        made = continuation(view, rows, opening - 1, temperature=temperature, generator=generator)
        begun.append(made.ids)
        sure.append(_confidence(view, made))
    openings = torch.cat(begun)
    chosen = _parts(openings[_chosen(openings, torch.cat(sure), max(1, count // 8), generator)], size)
    grams, ids, hidden, filtered = _grams(avoid, ngram), [], [], 0
    for rows in progress.steps(chosen, "self-replay"):
        made = continuation(view, rows, length - opening, temperature=temperature, generator=generator)
        clean = torch.tensor([not recites(row, grams) for row in made.ids.tolist()], device=made.ids.device)
        ids.append(made.ids[clean])
        hidden.append(made.hidden[clean])
        filtered += int((~clean).sum())
    if not filtered < sum(len(rows) for rows in chosen):
        raise InputError(f"all {filtered} samples recite a target; draw more of them, or set replay=0")
    return Replay(torch.cat(ids), torch.cat(hidden), filtered)


@torch.no_grad()
def _confidence(view: ModelView, made: Continuation, size: int = 32) -> Tensor:
    """Mean log-probability of what was drawn, `[n]` nats per token, each row's second token not counted."""
    found = []
    for ids, hidden in zip(_parts(made.ids, size), _parts(made.hidden, size), strict=True):
        spoken = view.unembed(hidden).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        found.append((spoken[:, 1:] if spoken.shape[1] > 1 else spoken).mean(1))
    return torch.cat(found)


def _parts(tensor: Tensor, size: int) -> list[Tensor]:
    return [tensor[at : at + size] for at in range(0, len(tensor), size)]


def _chosen(openings: Tensor, sure: Tensor, many: int, generator: torch.Generator) -> Tensor:
    """Row numbers: the `many` likeliest that end differently, and as many of the others by lot."""
    seen: set[tuple[int, ...]] = set()
    best: list[int] = []
    ends = openings[:, openings.shape[1] // 2 :].tolist()
    for row in sure.argsort(descending=True, stable=True).tolist():
        if len(best) == many:
            break
        if tuple(ends[row]) not in seen:
            seen.add(tuple(ends[row]))
            best.append(row)
    rest = torch.ones(len(openings), dtype=torch.bool, device=openings.device)
    rest[best] = False
    others = rest.nonzero().reshape(-1)
    lot = torch.randperm(len(others), generator=generator, device=openings.device)[:many]
    return torch.cat([torch.tensor(best, device=openings.device), others[lot]])


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
    start = getattr(view.config, "bos_token_id", None)
    if not pool and start is not None:
        return torch.full((count, 1), int(start), device=view.device)
    how: dict[str, Any] = {"generator": generator, "device": view.device}
    first = torch.randint(view.vocab, (count, 1), **how)
    if pool:
        table = torch.tensor(pool, device=view.device)
        first[::2] = table[torch.randint(len(table), first[::2].shape, **how)]
    return first


def token_pool(*sets: Passages | None) -> tuple[int, ...]:
    """All tokens of the passages given, in order: drawn from, they are the text's unigrams."""
    return tuple(token for passages in sets if passages is not None for item in passages for token in item.ids)


class Sampling(Protocol):
    """The settings that editors call alike: how many samples to begin, of what length, and what is left out."""

    @property
    def replay(self) -> int:
        """How many samples are begun."""
        ...

    @property
    def replay_length(self) -> int | None:
        """Tokens of each that is finished; None for as many as the longest target has."""
        ...

    @property
    def replay_temperature(self) -> float:
        """Of the samples."""
        ...

    @property
    def replay_ngram(self) -> int:
        """How many tokens in a row make a match."""
        ...


def own_samples(how: Sampling, view: ModelView, avoid: Passages, *sets: Passages | None, seed: int) -> Replay:
    """`self_replay` by an editor's settings: as long as the longest of `avoid`, begun with the tokens of `sets`."""
    length = how.replay_length or max(2, *(len(item.ids) for item in avoid))
    return self_replay(
        view,
        how.replay,
        length=min(length, view.context or length),
        starts=token_pool(*sets),
        avoid=[item.ids for item in avoid],
        temperature=how.replay_temperature,
        ngram=how.replay_ngram,
        seed=seed,
    )
