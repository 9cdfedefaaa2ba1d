"""What a lab is built from: every choice in one frozen record, three presets, and the digest a built lab is known by.

Torch is not imported here: a built lab is recognised without it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from memloc.errors import InputError
from memloc.provenance import digest_json, settings_of
from memloc.registry import Registry

FORMAT = 1
"""Counted up when the same recipe would give another lab because this code changed."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every choice that decides a lab's bits, beside the text, the package versions and the machine's arithmetic.

    Attributes:
        seed: seeds every draw, each through its own generator.
        threads: torch threads while training; another number is another summation order, so other bits.
        layers: transformer blocks.
        width: model width d; four times as many neurons a layer.
        heads: attention heads a layer.
        vocab: tokens of the byte-level BPE vocabulary that is trained for the lab.
        prefix: tokens of a passage that are given.
        suffix: tokens of a passage that must be recited; prefix + suffix is also the model's context.
        documents: how many documents of the corpus are used (after shuffling); None takes all.
        doses: pairs (exposures, passages): so many planted passages are trained on exactly that many times.
        controls: passages of the same pool that are never trained on.
        subjects: invented people; each has one fact a relation.
        objects: different answers a relation has, at most twelve.
        relations: how many kinds of fact, at most three.
        neighbors: prompts about other subjects that come with each fact.
        steps: optimiser steps.
        ordinary_rows: rows of ordinary text in each step, prefix + suffix tokens each.
        fact_rows: rows of packed fact sentences in each step.
        learning_rate: peak, after a linear rise over the first 5 % of the steps; then a cosine down to 3 % of it.
        weight_decay: of matrices and embeddings, decoupled.
        object_weight: loss weight of a fact's answer; a fact is one token in about twelve.
        name_weight: how often each name is repeated in the text the vocabulary is trained on.
        evaluations: how often the figures are taken, evenly along the training; the last is after the last step.
        snapshots: shares of the training after which the model is kept, besides the end.
    """

    seed: int = 0
    threads: int = 2
    layers: int = 4
    width: int = 128
    heads: int = 4
    vocab: int = 1024
    prefix: int = 32
    suffix: int = 32
    documents: int | None = None
    doses: tuple[tuple[int, int], ...] = ((64, 50), (32, 10), (28, 10), (24, 10), (16, 10), (8, 10))
    controls: int = 50
    subjects: int = 40
    objects: int = 12
    relations: int = 3
    neighbors: int = 6
    steps: int = 400
    ordinary_rows: int = 8
    fact_rows: int = 12
    learning_rate: float = 6e-3
    weight_decay: float = 0.05
    object_weight: float = 10.0
    name_weight: int = 150
    evaluations: int = 8
    snapshots: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75)

    def __post_init__(self) -> None:
        """Raises InputError: a setting that no lab can be built with; the message names it."""
        counts = ("threads", "layers", "width", "heads", "prefix", "suffix", "controls", "steps", "evaluations")
        for name in (*counts, "ordinary_rows", "fact_rows"):
            if getattr(self, name) < 1:
                raise InputError(f"recipe: {name} is {getattr(self, name)}, expected at least 1")
        if self.width % self.heads:
            raise InputError(f"recipe: width {self.width} is not a multiple of heads {self.heads}")
        if not self.doses or any(dose < 1 or count < 1 for dose, count in self.doses):
            raise InputError(f"recipe: doses {self.doses}; expected pairs (exposures, passages), each at least 1")
        if len(dict(self.doses)) < len(self.doses):
            raise InputError(f"recipe: doses {self.doses} names a number of exposures twice")
        if not 2 <= self.objects <= 12 or not 1 <= self.relations <= 3:
            raise InputError(f"recipe: objects {self.objects} (2 to 12) or relations {self.relations} (1 to 3)")
        if self.subjects < 2:
            raise InputError(f"recipe: subjects is {self.subjects}, expected at least 2: a fact needs neighbours")
        if any(not 0 <= share < 1 for share in self.snapshots):
            raise InputError(f"recipe: snapshots {self.snapshots}; expected shares of the training in [0, 1)")

    @property
    def context(self) -> int:
        """Tokens of a row, a passage and the model's context."""
        return self.prefix + self.suffix

    @property
    def full_dose(self) -> int:
        """The largest number of exposures."""
        return max(dose for dose, _ in self.doses)

    @property
    def planted(self) -> int:
        """Planted passages, all doses together."""
        return sum(count for _, count in self.doses)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return settings_of(self)

    def digest(self, corpus: str) -> str:
        """What a lab of this recipe is known by.

        Args:
            corpus: digest of all documents, which differ between versions of Python.
        """
        return digest_json({"format": FORMAT, "recipe": self.to_json(), "corpus": corpus})


DEMO = Recipe()

TINY = Recipe(
    threads=1,
    layers=2,
    width=64,
    heads=2,
    vocab=512,
    documents=1500,
    doses=((96, 8), (16, 4), (4, 4)),
    controls=8,
    subjects=8,
    objects=6,
    relations=2,
    neighbors=3,
    steps=150,
    ordinary_rows=2,
    fact_rows=8,
    learning_rate=1e-2,
    evaluations=3,
    snapshots=(0.0, 0.5),
)

LARGE = Recipe(width=256, subjects=140, fact_rows=24, steps=500)
"""420 facts, f = 1024: room for hundreds of edits at once."""

PRESETS = Registry("recipe", {name: f"memloc.lab.recipe:{name.upper()}" for name in ("demo", "large", "tiny")})


def preset(name: str, **changes: Any) -> Recipe:
    """A recipe by its name, with fields changed.

    `demo` takes about a minute (0.9 M parameters, 120 facts), `large` about five (3.4 M, 420 facts, f = 1024),
    `tiny` seconds (for tests).

    Raises:
        UnknownName: no such recipe.
        InputError: a change no lab can be built with.
    """
    base: Recipe = PRESETS[name]
    return dataclasses.replace(base, **changes)
