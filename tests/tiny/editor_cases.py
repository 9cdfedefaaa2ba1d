"""Every registered editor with the settings and the request it is tested with.

A method that is slow as it comes, or that needs something beside a model, has an entry in `DEFAULTS`; other settings
worth holding to the battery stand in `VARIANTS`, under the method's name and a few words.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zoo

from editors.base import Request
from editors.methods import EDITORS
from editors.pruners.balanced_subnet import BalancedSubnet
from editors.pruners.curvature import Curvature
from editors.pruners.durable import Durable
from editors.pruners.greedy import Greedy
from editors.pruners.head_dropout import HeadDropout
from editors.pruners.layer_rewind import LayerRewind
from editors.pruners.layernorm_removal import LayernormRemoval
from editors.pruners.magnitude import Magnitude
from editors.pruners.neuron_dropout import NeuronDropout
from editors.pruners.obs import Obs
from editors.pruners.random import Random as RandomPruning
from editors.pruners.subnet import Subnet
from editors.pruners.subspace import Subspace
from editors.pruners.svd import Svd
from editors.rewriters.alphaedit import AlphaEdit
from editors.rewriters.constrained_fine_tune import ConstrainedFineTune
from editors.rewriters.emmet import Emmet
from editors.rewriters.fine_tune import FineTune
from editors.rewriters.forget_passage import ForgetPassage
from editors.rewriters.fuse import Fuse
from editors.rewriters.gradient_ascent import GradientAscent
from editors.rewriters.gradient_difference import GradientDifference
from editors.rewriters.knowledge_neuron_surgery import KnowledgeNeuronSurgery
from editors.rewriters.memit import Memit
from editors.rewriters.mend import Mend
from editors.rewriters.npo import Npo
from editors.rewriters.pmet import Pmet
from editors.rewriters.rmu import Rmu
from editors.rewriters.rome import Rome
from editors.rewriters.simnpo import Simnpo
from editors.rewriters.sparse_fine_tune import SparseFineTune
from editors.rewriters.task_vector import TaskVector
from editors.rewriters.ultraedit import UltraEdit
from editors.tuning.hypernet_training import Training
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
    "pmet": Case(Pmet(**{**BATCH, "layers": (0, 1)}, token="subject-last"), ("facts", "text")),
    "constrained-fine-tune": Case(ConstrainedFineTune(steps=3, epsilon=0.2, lr=1e-2), ("facts",)),
    "fine-tune": Case(FineTune(steps=3, lr=1e-2), ("facts",)),
    "gradient-ascent": Case(GradientAscent(steps=3, lr=1e-2, floor=-30.0), ("forget", "text"), grain="weight"),
    "gradient-difference": Case(GradientDifference(**QUICK, floor=-30.0), grain="weight"),
    "neuron-dropout": Case(NeuronDropout(), grain="neuron"),
    "npo": Case(Npo(**QUICK, floor=-30.0), grain="head", fraction=0.4),
    "rmu": Case(Rmu(**QUICK, floor=-30.0, layer=1)),
    "curvature": Case(Curvature(keep=0.8), ("text",)),
    "fuse": Case(lambda view, folder: Fuse(others=(other(view, folder),)), (), hooks=False),
    "layer-rewind": Case(lambda view, folder: LayerRewind(earlier=other(view, folder)), (), hooks=False),
    "layernorm-removal": Case(LayernormRemoval(), (), hooks=False, refuses={"olmo": "no gains or biases"}),
    "forget-passage": Case(ForgetPassage(rounds=2, tries=3, replay=8, kinds="mlp.out", protect=4)),
    "knowledge-neuron-surgery": Case(KnowledgeNeuronSurgery(), ("facts",), grain="neuron"),
    "mend": Case(
        lambda view, folder: trained_mend(view, folder),
        ("facts",),
        refuses=dict.fromkeys(zoo.MIXTURES, "mixture's experts"),
    ),
    "ultraedit": Case(UltraEdit(lr=1e-2), ("facts",)),
    "balanced-subnet": Case(BalancedSubnet(share=0.1, epochs=1)),
    "durable": Case(Durable(share=0.05)),
    "greedy": Case(Greedy(share=0.02, backwards=3)),
    "head-dropout": Case(HeadDropout(), ("text",), grain="head", fraction=0.3),
    "magnitude": Case(Magnitude(), (), grain="weight"),
    "obs": Case(Obs(share=0.05, gradients=4, block=7)),
    "random": Case(RandomPruning(), (), grain="weight"),
    "rome": Case(
        Rome(layer=1, prefixes=(), kl_weight=0.0, token="subject-last", steps=4, namesakes=4, recalls=0),
        ("facts", "text"),
    ),
    "simnpo": Case(Simnpo(**QUICK, floor=-30.0), grain="neuron"),
    "subnet": Case(Subnet(share=0.1, epochs=1)),
    "subspace": Case(Subspace(share=0.1)),
    "sparse-fine-tune": Case(SparseFineTune(**QUICK, floor=-30.0), grain="weight"),
    "svd": Case(Svd(energy=0.8), ()),
    "task-vector": Case(lambda view, folder: TaskVector(finetuned=other(view, folder), scale=-0.5), (), hooks=False),
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
    "memit measured": Case(
        Memit(**{**BATCH, "layers": (), "steps": 2}, token="measured", measured=True, trials=1), ("facts", "text")
    ),
    "gradient-difference whole": Case(
        GradientDifference(steps=2, lr=1e-3, floor=-30.0, replay=0, keep="nll", keep_rows=2), ("forget", "retain")
    ),
    "constrained-fine-tune l2": Case(
        ConstrainedFineTune(steps=2, lr=1e-2, norm="l2", epsilon=0.2), ("facts",), grain="weight"
    ),
    "fuse geometric": Case(
        lambda view, folder: Fuse(others=(other(view, folder),), weights=(0.75, 0.25), mean="geometric"),
        (),
        grain="component",
        fraction=0.5,
    ),
    "layer-rewind of weights": Case(
        lambda view, folder: LayerRewind(earlier=other(view, folder)),
        (),
        grain="weight",
        fraction=0.2,
    ),
    "layer-rewind of heads": Case(
        lambda view, folder: LayerRewind(earlier=other(view, folder), reach="unit"),
        (),
        grain="head",
        fraction=0.3,
    ),
    "layernorm-removal of a layer": Case(
        LayernormRemoval(layers=(1,), kinds="attn.norm,norm", biases=False), (), hooks=False
    ),
    "task-vector from a base": Case(
        lambda view, folder: TaskVector(base=other(view, folder), scale=0.5),
        (),
        grain="neuron",
        fraction=0.3,
    ),
    "curvature forget": Case(
        Curvature(keep=0.9, aim="forget", price="loss", kinds="attn.v,mlp.out"), ("forget", "text")
    ),
    "curvature corrected": Case(
        Curvature(correction=True, labels="true", layers=(1,)), ("text",), grain="head", fraction=0.5
    ),
    "svd of neurons": Case(Svd(energy=0.5), (), grain="neuron", fraction=0.3),
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


def other(view: ModelView, folder: Path) -> str:
    """A checkpoint folder of the same shape in which every parameter is another."""
    found = folder / "other"
    if not found.is_dir():
        made, generator = copy.deepcopy(view.model), torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in made.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.mul_((1.1 + 0.5 * noise).to(parameter.dtype))
        made.save_pretrained(found)
    return str(found)


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
