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
from editors.hypernet_training import Training
from editors.methods import EDITORS
from editors.pruners.balanced_subnet import BalancedSubnet
from editors.pruners.durable import Durable
from editors.pruners.greedy import Greedy
from editors.pruners.head_dropout import HeadDropout
from editors.pruners.magnitude import Magnitude
from editors.pruners.neuron_dropout import NeuronDropout
from editors.pruners.obs import Obs
from editors.pruners.random import Random as RandomPruning
from editors.pruners.subnet import Subnet
from editors.pruners.subspace import Subspace
from editors.rewriters.forget_passage import ForgetPassage
from editors.rewriters.knowledge_neuron_surgery import KnowledgeNeuronSurgery
from editors.rewriters.mend import Mend
from editors.rewriters.rome import Rome
from editors.rewriters.sparse_fine_tune import SparseFineTune
from editors.rewriters.ultraedit import UltraEdit
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

DEFAULTS: Mapping[str, Case] = {
    "forget-passage": Case(ForgetPassage(rounds=2, tries=3, replay=8, kinds="mlp.out", protect=4)),
    "knowledge-neuron-surgery": Case(KnowledgeNeuronSurgery(), ("facts",), grain="neuron"),
    "mend": Case(lambda view, folder: trained_mend(view, folder), ("facts",)),
    "ultraedit": Case(UltraEdit(lr=1e-2), ("facts",)),
    "balanced-subnet": Case(BalancedSubnet(share=0.1, epochs=1)),
    "durable": Case(Durable(share=0.05)),
    "greedy": Case(Greedy(share=0.02, backwards=3)),
    "head-dropout": Case(HeadDropout(), ("text",), grain="head", fraction=0.3),
    "magnitude": Case(Magnitude(), (), grain="weight"),
    "neuron-dropout": Case(NeuronDropout(), grain="neuron"),
    "obs": Case(Obs(share=0.05, gradients=4, block=7)),
    "random": Case(RandomPruning(), (), grain="weight"),
    "rome": Case(
        Rome(layer=1, prefixes=(), kl_weight=0.0, token="subject-last", steps=4, namesakes=4, recalls=0),
        ("facts", "text"),
    ),
    "subnet": Case(Subnet(share=0.1, epochs=1)),
    "subspace": Case(Subspace(share=0.1)),
    "sparse-fine-tune": Case(SparseFineTune(**QUICK, floor=-30.0), grain="weight"),
}
"""By method. One that is not here is tested as it comes, with forget, retain and text."""

VARIANTS: Mapping[str, Case] = {
    "forget-passage attention": Case(ForgetPassage(rounds=3, tries=2, replay=0, rank=2, kinds="attn.v,attn.out")),
    "knowledge-neuron-surgery replace": Case(KnowledgeNeuronSurgery(mode="replace"), ("facts",), grain="neuron"),
    "ultraedit passages": Case(UltraEdit(lr=1e-2, rounds=2, kinds="mlp.in"), ("forget",), grain="layer", fraction=0.7),
    "neuron-dropout scale": Case(NeuronDropout(mode="scale", factor=0.5), grain="neuron"),
    "neuron-dropout heads": Case(NeuronDropout(), grain="head", fraction=0.3),
    "head-dropout resample": Case(
        HeadDropout(mode="resample"),
        ("text",),
        grain="head",
        fraction=0.3,
        refuses={"qwen3": "no bias", "falcon_new": "no bias"},
    ),
    "subspace directions": Case(Subspace(mode="directions", rank=3)),
    "subspace directions of weights": Case(Subspace(mode="directions", rank=2), grain="weight"),
    "obs that makes up": Case(Obs(share=0.05, gradients=4, block=7, compensate="keep")),
    "magnitude of a selection": Case(Magnitude(order="largest"), (), grain="neuron"),
    "random in a selection": Case(RandomPruning(share=0.5), ("text",), grain="component"),
    "durable in a selection": Case(Durable(share=0.2, among="model"), grain="weight"),
    "balanced-subnet in a selection": Case(
        BalancedSubnet(share=0.3, epochs=1, mixing="both"), grain="component", fraction=0.4
    ),
}


def trained_mend(view: ModelView, folder: Path) -> Mend:
    """A network of two steps, for this very model."""
    path = folder / "mend.safetensors"
    how = Training(steps=2, rank=3, last=2, alpha=0.05, others=1, windows=1)
    how(view, facts(3, seed=8), zoo.passages(2, seed=5), path)
    return Mend(trained=str(path))


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
