"""Every registered editor with the settings and the request it is tested with.

A method that is slow as it comes, or that needs something beside a model, has an entry in `DEFAULTS`; other settings
worth holding to the battery stand in `VARIANTS`, under the method's name and a few words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zoo

from editors.base import Request
from editors.methods import EDITORS
from editors.pruners.neuron_dropout import NeuronDropout
from editors.rewriters.alphaedit import AlphaEdit
from editors.rewriters.emmet import Emmet
from editors.rewriters.memit import Memit
from editors.rewriters.rome import Rome
from editors.rewriters.sparse_fine_tune import SparseFineTune
from memloc.localizers.random import Random
from memloc.passages import Fact, Facts, Prompt
from memloc.view import ModelView

Maker = Callable[[ModelView, Path], Any]


@dataclass(frozen=True)
class Case:
    """One editor as it is tested.

    Attributes:
        editor: the editor, or a function that makes one from the view and an empty folder.
        asks: which parts of a request it is given: of forget, retain, text, facts, keep_facts.
        grain: of a random selection it is given; None for none.
        fraction: of the selection.
        hooks: whether the edit is one that hooks can stand for (maps inside blocks only).
        refuses: families that it has to refuse, with words of the reason.
    """

    editor: Any | Maker
    asks: tuple[str, ...] = ("forget", "retain", "text")
    grain: str | None = None
    fraction: float = 0.1
    hooks: bool = True
    refuses: Mapping[str, str] = field(default_factory=dict)


QUICK = {"steps": 3, "lr": 1e-2, "replay": 8, "keep_rows": 2}

BATCH: dict[str, Any] = {
    "layers": (1, 2), "prefixes": (), "kl_weight": 0.0, "steps": 3, "namesakes": 1, "sentences": 6, "recalls": 0,
    "sentence_length": 5,
}  # fmt: skip
"""Small settings of the editors of many facts."""

DEFAULTS: Mapping[str, Case] = {
    "alphaedit": Case(AlphaEdit(**BATCH, threshold=1.0), ("facts", "text", "keep_facts")),
    "emmet": Case(Emmet(**BATCH, slack=0.1), ("facts", "text", "retain")),
    "memit": Case(Memit(**BATCH), ("facts", "text")),
    "neuron-dropout": Case(NeuronDropout(), grain="neuron"),
    "rome": Case(
        Rome(layer=1, prefixes=(), kl_weight=0.0, token="subject-last", steps=4, namesakes=4, recalls=0),
        ("facts", "text"),
    ),
    "sparse-fine-tune": Case(SparseFineTune(**QUICK, floor=-30.0), grain="weight"),
}
"""By method. One that is not here is tested as it comes, with forget, retain and text."""

VARIANTS: Mapping[str, Case] = {
    "memit one by one": Case(
        Memit(
            **{**BATCH, "layers": (0, 1), "price": 0.0, "token": "subject-last", "ways": "mean", "spread": "sqrt"},
            rounds=2,
        ),
        ("facts", "text"),
    ),
    "neuron-dropout scale": Case(NeuronDropout(mode="scale", factor=0.5), grain="neuron"),
    "neuron-dropout heads": Case(NeuronDropout(), grain="head", fraction=0.3),
}


def case(name: str) -> Case:
    """The case called `name`."""
    return VARIANTS.get(name) or DEFAULTS.get(name) or Case(EDITORS[name]())


def made(name: str, view: ModelView, folder: Path) -> Any:
    """The editor called `name`, for `view`."""
    entry = case(name).editor
    return entry if hasattr(entry, "__dataclass_fields__") else entry(view, folder)


def request(name: str, view: ModelView, seed: int = 0) -> Request:
    """What the editor called `name` is asked."""
    asked = case(name)
    data: dict[str, Any] = {
        "forget": zoo.passages(3),
        "retain": zoo.passages(2, seed=4),
        "text": zoo.passages(12, seed=5, prefix=14),
        "facts": facts(2, seed=6),
        "keep_facts": facts(2, seed=7),
    }
    chosen = None
    if asked.grain is not None:
        chosen = Random(grain=asked.grain)(view, data["forget"]).top(fraction=asked.fraction)  # type: ignore[arg-type]
    return Request(**{part: data[part] for part in asked.asks}, selection=chosen, seed=seed)


def facts(count: int, seed: int) -> Facts:
    """Random facts: a prompt with its subject, a new answer of two tokens, an old one, a paraphrase."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, zoo.VOCAB, (length,), generator=generator).tolist())

    made = []
    for index in range(count):
        subject, before, after = ids(2), ids(1 + index), ids(2)
        prompt = Prompt(before + subject + after, (len(before), len(before) + 2), "")
        other = Prompt(ids(2) + subject + ids(1), (2, 4), "")
        made.append(Fact(f"f{index}", "{}", "", prompt, ids(2), ids(1), "", "", paraphrases=(other,)))
    return Facts(tuple(made), "random")
