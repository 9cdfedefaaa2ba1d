"""Questions in text asked of a model: what it would say token by token, and what it writes by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch

from memloc.errors import InputError, MismatchError
from memloc.measurement import Figure, Measurement
from memloc.measures.continuation import continue_greedy
from memloc.measures.figures import figure
from memloc.measures.record import suffix_logits
from memloc.passages import Passage, Passages, decode, encode
from memloc.statistics import share_interval
from memloc.view import ModelView

Tokens = tuple[int, ...]


def predicted(view: ModelView, asked: Sequence[tuple[Tokens, Tokens]], *, batch_size: int) -> list[Tokens]:
    """The likeliest token at every place of each answer, with the answer's own tokens before it.

    Args:
        view: the model.
        asked: prompts and answers, in tokens; equal pairs are run once.
        batch_size: rows of a forward.

    Cost: one forward over every distinct pair.
    """
    view.need_causal("is asked for what follows a prompt; measure `facts`")
    if not asked:
        return []
    unique = list(dict.fromkeys(asked))
    items = Passages(tuple(Passage(str(index), *pair) for index, pair in enumerate(unique)), "questions")
    best = [torch.zeros(len(answer), dtype=torch.long) for _, answer in unique]
    for chunk in suffix_logits(view, items, size=batch_size, label="questions"):
        likeliest = chunk.logits.argmax(1).cpu().tolist()
        for row, step, token in zip(chunk.row.tolist(), chunk.step.tolist(), likeliest, strict=True):
            best[row][step] = token
    found = dict(zip(unique, (tuple(row.tolist()) for row in best), strict=True))
    return [found[pair] for pair in asked]


def token_share(said: Tokens, wanted: Tokens) -> float:
    """Share of places at which two rows of tokens agree."""
    return sum(mine == its for mine, its in zip(said, wanted, strict=True)) / len(wanted)


def pair(tokenizer: Any, prompt: str, answer: str) -> tuple[Tokens, Tokens]:
    """A prompt and its answer in tokens, tokenised jointly, a space between them where the answer brings none.

    Raises:
        InputError: no tokenizer, or no token of the answer is its own.
    """
    space = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
    record = {"id": "question", "prefix": prompt, "suffix": space + answer}
    item = Passages.from_records([("question", record)], tokenizer, path=prompt)[0]
    if not item.suffix:
        raise InputError(f"the answer {answer!r} to {prompt!r} has no token of its own")
    return item.prefix, item.suffix


def written(view: ModelView, prompts: Sequence[str], tokens: int, *, batch_size: int) -> list[str]:
    """What the model writes after each prompt, greedily; equal prompts are run once.

    Raises:
        InputError: no tokenizer, or a prompt and `tokens` more do not fit the context.
    """
    if not prompts:
        return []
    unique = list(dict.fromkeys(prompts))
    rows = [encode(view.tokenizer, prompt).ids for prompt in unique]
    items = Passages(tuple(Passage(str(index), ids, (0,)) for index, ids in enumerate(rows)), "questions")
    said = continue_greedy(view, items, tokens, batch_size=batch_size)
    found = {prompt: decode(view.tokenizer, ids) for prompt, ids in zip(unique, said, strict=True)}
    return [found[prompt] for prompt in prompts]


def mean_share(name: str, rows: Sequence[Mapping[str, Any]], better: str = "higher") -> dict[str, Figure]:
    """The mean of shares called `name` over the rows that have one, with its interval; nothing where none has."""
    shares = [float(row[name]) for row in rows if row.get(name) is not None]
    if not shares:
        return {}
    return {name: figure(name, sum(shares) / len(shares), len(shares), share_interval(shares), "share", better)}


def earlier(path: str | None, measure: str, ids: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Rows of the same measure on the unedited model, by id; none where no file is named.

    Raises:
        ArtifactError: not a measurement.
        MismatchError: another measure, or rows of other items.
    """
    if path is None:
        return {}
    found = Measurement.load(Path(path))
    rows = {str(row["id"]): row for row in found.rows}
    if found.measure != measure or not set(ids) <= set(rows):
        raise MismatchError(
            f"{path}: {found.measure} of {len(rows)} items; expected {measure} of the same {len(ids)} items, measured "
            "on the model before its edit"
        )
    return rows


def need_some(facts: Sized) -> None:
    """Refuse to measure nothing.

    Raises:
        InputError: there is no fact.
    """
    if not len(facts):
        raise InputError("facts: no passage to measure, for there is no fact")


def at_least_one(name: str, **settings: int) -> None:
    """Refuse counts below 1.

    Raises:
        InputError: names the setting.
    """
    for setting, value in settings.items():
        if value < 1:
            raise InputError(f"{name}: {setting} is {value}, expected at least 1")
