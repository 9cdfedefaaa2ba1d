"""Which passages are planted, which are their controls, and when each planted one is shown."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

from memloc.errors import InputError
from memloc.lab.corpus import Seen, runs
from memloc.lab.recipe import Recipe
from memloc.lab.vocabulary import encode_all
from memloc.passages import Passage

PROSE = 0.9
"""Least share of letters and spaces: tables and code examples are left out."""


def choose(tokenizer: Any, pool: Iterable[str], seen: Seen, recipe: Recipe) -> tuple[list[Passage], list[Passage]]:
    """Planted passages with their dose, and controls with dose 0, drawn from one pool in one draw.

    Each is the start of a document, cut where prefix + suffix tokens are full. No two share a run of tokens with each
    other or with `seen`, and each one's text gives exactly its tokens again.

    Raises:
        InputError: the pool holds too few.
    """
    length, wanted = recipe.context, recipe.planted + recipe.controls
    windows = [ids[:length] for ids in encode_all(tokenizer, pool) if len(ids) >= length]
    random.Random(f"{recipe.seed}:passages").shuffle(windows)
    chosen: list[list[int]] = []
    taken: set[int] = set()
    for ids in windows:
        own = set(runs(ids).tolist())
        if len(chosen) < wanted and taken.isdisjoint(own) and _plain(tokenizer, ids) and not seen.shares(ids):
            chosen.append(ids)
            taken |= own
    if len(chosen) < wanted:
        raise InputError(
            f"recipe: {wanted} passages wanted, the pool gives {len(chosen)}; plant fewer or use more text"
        )
    doses = [dose for dose, count in recipe.doses for _ in range(count)]
    planted = [
        _passage(f"planted-{i:03d}", ids, dose, recipe)
        for i, (ids, dose) in enumerate(zip(chosen, doses, strict=False))
    ]
    controls = [_passage(f"control-{i:03d}", ids, 0, recipe) for i, ids in enumerate(chosen[len(doses) :])]
    return planted, controls


def schedule(doses: Sequence[int], steps: int, seed: int) -> list[list[int]]:
    """Which passages are shown in each step: each exactly its dose, spread over the whole training.

    A passage of dose k is shown once in each k-th of the training, at a random moment of it; the steps take an equal
    share of all exposures, give or take one.
    """
    rng = random.Random(f"{seed}:schedule")
    moments = sorted(((turn + rng.random()) / dose, row) for row, dose in enumerate(doses) for turn in range(dose))
    cuts = [len(moments) * step // steps for step in range(steps + 1)]
    return [[row for _, row in moments[start:end]] for start, end in itertools.pairwise(cuts)]


def _plain(tokenizer: Any, ids: list[int]) -> bool:
    text = tokenizer.decode(ids)
    letters = sum(sign.isalpha() or sign == " " for sign in text)
    return letters >= PROSE * len(text) and encode_all(tokenizer, [text])[0] == ids


def _passage(name: str, ids: list[int], dose: int, recipe: Recipe) -> Passage:
    return Passage(name, tuple(ids[: recipe.prefix]), tuple(ids[recipe.prefix :]), {"dose": dose})
