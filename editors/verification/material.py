"""What an edit is verified on, and how hard: passages, controls, text, and the two budgets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from memloc.errors import InputError
from memloc.passages import Facts, Passage, Passages
from memloc.provenance import digest_json

Budget = Literal["quick", "full"]

FEWEST_TARGETS, FEWEST_CONTROLS = 3, 5
"""Below these no verdict can be given: with 3 targets and 5 controls the smallest p of a permutation is 1/56."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What an edit is verified on.

    Attributes:
        targets: passages that were to be forgotten.
        controls: text of the same kind that the model never saw: what nothing looks like.
        retain: passages the edit was told to keep.
        memorized: memorized passages that no set of the edit names.
        facts: facts to keep.
        text: held-out ordinary text.

    Raises:
        InputError: no targets, no controls, or a passage that is in both.
    """

    targets: Passages
    controls: Passages
    retain: Passages | None = None
    memorized: Passages | None = None
    facts: Facts | None = None
    text: Passages | None = None

    def __post_init__(self) -> None:
        if not self.targets or not self.controls:
            raise InputError("verification needs targets and never-seen controls; without text that was never seen "
                             "no figure says anything")  # fmt: skip
        known = {item.ids: item.id for item in self.targets}
        for item in self.controls:
            if item.ids in known:
                raise InputError(f"control {item.id!r} is target {known[item.ids]!r}; controls are never seen")

    @property
    def digest(self) -> str:
        """Digest of all of it."""
        return digest_json({name: None if part is None else part.digest for name, part in vars(self).items()})

    def fewer(self, targets: int, controls: int, seed: int) -> Material:
        """At most so many targets and controls, drawn by `seed`: what costly probes are asked with."""
        return replace(
            self, targets=_drawn(self.targets, targets, seed), controls=_drawn(self.controls, controls, seed + 1)
        )


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard the probes try.

    Attributes:
        targets: targets that costly probes are asked with, at most.
        controls: controls likewise.
        draws: random exchanges of prefix tokens.
        relearn_steps: optimiser steps of relearning.
        samples: continuations drawn of each passage.
        temperature: of those.
        soft_tokens: learned embeddings in front of the prefix.
        soft_steps: steps they are learned for.
        hard_tokens: tokens searched in front of the prefix.
        hard_rounds: rounds of that search.
        hard_tries: exchanges tried in a round.
        permutations: of the labels target and control.
    """

    targets: int = 16
    controls: int = 32
    draws: int = 3
    relearn_steps: int = 16
    samples: int = 8
    temperature: float = 1.0
    soft_tokens: int = 4
    soft_steps: int = 30
    hard_tokens: int = 4
    hard_rounds: int = 4
    hard_tries: int = 16
    permutations: int = 4000

    @classmethod
    def named(cls, budget: Budget) -> Effort:
        """By its budget: "quick" for a first look, "full" for a report that others should believe."""
        if budget == "quick":
            return cls()
        return cls(targets=64, controls=128, draws=8, relearn_steps=64, samples=64, soft_steps=150, hard_rounds=16,
                   hard_tries=48, permutations=20_000)  # fmt: skip


def folds(items: Passages, seed: int) -> tuple[Passages, Passages]:
    """Two halves, drawn by `seed`; the first is the smaller where they cannot be equal."""
    order = list(items.ids)
    random.Random(seed).shuffle(order)
    cut = len(order) // 2
    return items.named(order[:cut]), items.named(order[cut:])


def renewed(item: Passage, *, prefix: Sequence[int] | None = None, suffix: Sequence[int] | None = None) -> Passage:
    """The passage with another prefix, or another suffix."""
    given: dict[str, Any] = {"prefix": item.prefix if prefix is None else tuple(prefix)}
    given["suffix"] = item.suffix if suffix is None else tuple(suffix)
    return replace(item, **given)


def fitting(prefix: Sequence[int], suffix: Sequence[int], context: int | None) -> tuple[int, ...]:
    """A prefix cut on the left until it fits the context together with its suffix."""
    room = len(prefix) if context is None else max(1, context - len(suffix))
    return tuple(prefix[max(0, len(prefix) - room) :])


def _drawn(items: Passages, most: int, seed: int) -> Passages:
    if len(items) <= most:
        return items
    chosen = set(random.Random(seed).sample(range(len(items)), most))
    return Passages(tuple(item for at, item in enumerate(items) if at in chosen), items.origin)
