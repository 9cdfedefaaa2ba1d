"""What a change of facts should leave alone: keys of other facts, of retained passages, of edits already made.

Nobody has to name any. The model knows whom it would put in a subject's place (`namesakes`) and what it says of them by
itself (`own_sentences`); both stand in for the facts nobody lists. Ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from editors.edit import Edit
from editors.facts.contexts import Row, Token, row_of, sample
from editors.facts.own_words import kin, namesakes
from memloc.batches import pad
from memloc.passages import Fact, Facts, Passages
from memloc.sites import Site
from memloc.view import ModelView

NOTE = "keys"
"""Name of the note in which an edit says at which rows and tokens it wrote: enough to protect it later."""


@dataclass(frozen=True)
class Protected:
    """Rows of tokens and the places in them whose outputs should stay.

    Attributes:
        named: other facts and retained passages; the model's own namesakes.
        said: what the model says by itself, every token of it.
        past: where edits already made were written.
    """

    named: tuple[Row, ...] = ()
    said: tuple[Row, ...] = ()
    past: tuple[Row, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)


@torch.no_grad()
def second_moment_at(
    view: ModelView, sites: Sequence[Site], rows: Sequence[Row], *, size: int = 256
) -> dict[Site, Tensor]:
    """Mean of k kᵀ over `rows`, each at its token: site to `[f, f]` float64. Rows of the same ids share a forward."""
    places: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        places.setdefault(row.ids, []).append(row.at)
    found = {
        site: torch.zeros(view.weight(site).shape[1], view.weight(site).shape[1], dtype=torch.float64) for site in sites
    }
    texts = sorted(places, key=len)
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        batch = pad(part, device=view.device)
        line = torch.tensor([index for index, ids in enumerate(part) for _ in places[ids]], device=view.device)
        at = torch.tensor([place for ids in part for place in places[ids]], device=view.device)
        with view.record(sites, stop=True) as seen:
            view.hidden(batch)
        for site in sites:
            keys = seen[site][line, at].to("cpu", torch.float64)
            found[site] += keys.T @ keys / len(rows)
    return found


def rows_of_facts(facts: Facts | None, token: Token) -> tuple[Row, ...]:
    """The prompts of facts, and their other phrasings, at the edited token (those that have it)."""
    prompts = [prompt for fact in facts or () for prompt in (fact.prompt, *fact.paraphrases)]
    return tuple(row_of(prompt, token) for prompt in prompts if token == "prompt-last" or prompt.subject is not None)


def rows_predicting(passages: Passages | None) -> tuple[Row, ...]:
    """Every position of `passages` that predicts a token of a suffix."""
    return tuple(
        Row(item.ids, len(item.prefix) - 1 + step) for item in passages or () for step in range(len(item.suffix))
    )


def rows_of_past(past: Iterable[Edit]) -> tuple[Row, ...]:
    """Where earlier edits were written, by their notes; edits without such notes (of passages, say) have none."""
    return tuple(
        Row(tuple(ids), at) for edit in past for ids, at in edit.notes.get(NOTE, {}).get("rows", ()) if len(ids) > at
    )


def note_of(rows: Sequence[Row], layers: Sequence[int]) -> dict[str, Any]:
    """What `rows_of_past` reads back from an edit."""
    return {"layers": list(layers), "rows": [[list(row.ids), row.at] for row in rows]}


@torch.no_grad()
def own_sentences(
    view: ModelView, facts: Facts, token: Token, count: int, length: int, generator: torch.Generator, *, top_k: int = 10
) -> tuple[Row, ...]:
    """Every token of `count` texts the model writes when it is started with first tokens like those of the subjects.

    Tokens that would pin down what is to change are left out: after an edited subject, those where the model is about
    to give the present answer; where the subject's own token is edited, all from there on.

    Cost: a forward of `count` rows for each of `length` tokens, and one more.
    """
    starts = sorted({token for fact in facts for token in kin(view, _subject(fact)[0])})
    length = min(length, view.context or length)
    if not count or not starts:
        return ()
    drawn = torch.randint(len(starts), (count,), generator=generator)
    texts = sample(view, [(starts[index],) for index in drawn.tolist()], length, generator, top_k=top_k)
    edited = [(_subject(fact), fact.target_true[0]) for fact in facts]
    found = []
    for first in range(0, len(texts), 256):
        part = texts[first : first + 256]
        best = _likeliest(view, part)
        for ids, says in zip(part, best, strict=True):
            found += [Row(ids, at) for at in range(1, length) if not _pins(ids, at, says, edited, token)]
    return tuple(found)


def protected_rows(
    view: ModelView,
    facts: Facts,
    token: Token,
    *,
    keep: Facts | None,
    retain: Passages | None,
    past: Iterable[Edit],
    others: int,
    sentences: int,
    length: int,
    generator: torch.Generator,
) -> Protected:
    """All of them; see the fields of `Protected`."""
    given = rows_of_facts(keep, token) + rows_predicting(retain)
    edited = [(_subject(fact), fact.target_true[0]) for fact in facts]
    made = []
    for fact in facts:
        if fact.prompt.subject is not None and others:
            made += [row_of(prompt, token) for prompt in namesakes(view, fact.prompt, others, generator)]
    best = [
        says
        for start in range(0, len(made), 256)
        for says in _likeliest(view, [row.ids for row in made[start : start + 256]])
    ]
    own = tuple(
        dict.fromkeys(
            row for row, says in zip(made, best, strict=True) if not _pins(row.ids, row.at, says, edited, token)
        )
    )
    said = own_sentences(view, facts, token, sentences, length, generator)
    counts = {"named": len(given), "namesakes": len(own), "said": len(said), "past": 0}
    return Protected(given + own, said, rows_of_past(past), counts)


def _subject(fact: Fact) -> tuple[int, ...]:
    if fact.prompt.subject is None:
        return fact.prompt.ids
    start, end = fact.prompt.subject
    return fact.prompt.ids[start:end]


@torch.no_grad()
def _likeliest(view: ModelView, texts: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """The likeliest next token behind every token of each text."""
    if not texts:
        return []
    batch = pad(list(texts), device=view.device)
    best = view.unembed(view.hidden(batch)).argmax(-1)
    return [row[: len(ids)] for row, ids in zip(best.tolist(), texts, strict=True)]


def _pins(
    ids: tuple[int, ...], at: int, says: Sequence[int], edited: Sequence[tuple[tuple[int, ...], int]], token: Token
) -> bool:
    """Whether keeping the output at `at` would keep an answer that is to change."""
    for subject, answer in edited:
        # The first token of a subject may be another one at the start of a text; what follows is the same.
        tail = subject[1:] or subject
        size = len(tail)
        there = any(ids[start : start + size] == tail for start in range(at + 2 - size))
        if there and (token == "subject-last" or says[at] == answer):
            return True
    return False
