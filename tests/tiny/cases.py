"""Every registered localizer with the settings it is tested with: as it comes, or turned.

A method that is slow as it comes, or that needs something beside a model, has an entry in `DEFAULTS`; other settings
worth holding to the battery stand in `VARIANTS`, under the method's name and a few words. An entry is a localizer, or a
function that makes one from the view and an empty folder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model

from memloc.localizers.activation import Activation
from memloc.localizers.activation_gradient import ActivationGradient
from memloc.localizers.attention_bypass import AttentionBypass
from memloc.localizers.grad_activation import GradActivation
from memloc.localizers.integrated_gradients import IntegratedGradients
from memloc.localizers.knowledge_neurons import CONVENTIONS, KnowledgeNeurons
from memloc.localizers.layer_retrain import LayerRetrain
from memloc.localizers.layer_rewind import LayerRewind
from memloc.localizers.logit_lens import LogitLens
from memloc.localizers.participation_ratio import ParticipationRatio
from memloc.localizers.prefix_perturbation import PrefixPerturbation
from memloc.localizers.random import Random
from memloc.localizers.rare_token_heads import RareTokenHeads
from memloc.localizers.weight_gradient import WeightGradient
from memloc.localizers.zero_out import ZeroOut
from memloc.methods import LOCALIZERS
from memloc.view import ModelView

Entry = Any | Callable[[ModelView, Path], Any]


def before(view: ModelView, folder: Path) -> str:
    """A checkpoint folder of the same shape: the model with the maps of its blocks at half size."""
    earlier = copy.deepcopy(view.model)
    with torch.no_grad():
        for site in view.sites(*view.kinds):
            earlier.get_parameter(view.place(site).parameter).copy_(view.parameter(site) / 2)
    (folder / "before").mkdir(exist_ok=True)
    earlier.config.save_pretrained(folder / "before")
    save_model(earlier, str(folder / "before" / "model.safetensors"))
    return str(folder / "before")


def rewinding(**settings: Any) -> Callable[[ModelView, Path], Any]:
    """A rewinding to `before`."""
    return lambda view, folder: LayerRewind(earlier=before(view, folder), **settings)


def retraining(**settings: Any) -> Callable[[ModelView, Path], Any]:
    """A short retraining from `before`."""
    return lambda view, folder: LayerRetrain(earlier=before(view, folder), **{"steps": 3, "rows": 2, **settings})


DEFAULTS: Mapping[str, Entry] = {"layer-rewind": rewinding(), "layer-retrain": retraining()}

VARIANTS: Mapping[str, Entry] = {
    **{f"weight-gradient {grain}": WeightGradient(grain=grain) for grain in ("layer", "head", "neuron", "weight")},
    "weight-gradient per passage": WeightGradient(per_passage=True, reduce="norm"),
    "weight-gradient folded": WeightGradient(convention="folded"),
    "weight-gradient folded norms": WeightGradient(
        convention="folded", per_passage=True, reduce="norm", grain="neuron"
    ),
    "weight-gradient contrast": WeightGradient(objective="contrast", grain="neuron", reduce="sum"),
    "weight-gradient contrast-kl": WeightGradient(objective="contrast-kl", kl="sum", scale="raw"),
    "weight-gradient of two kinds": WeightGradient(kinds="attn.v,mlp.out", reduce="mean"),
    **{f"activation-gradient {grain}": ActivationGradient(grain=grain) for grain in ("layer", "neuron", "position")},
    "activation-gradient head values": ActivationGradient(grain="head", parts="v", reduce="top-10%"),
    "activation-gradient inside": ActivationGradient(parts="z,post", positions="predicting", scale="raw"),
    **{f"grad-activation {grain}": GradActivation(grain=grain) for grain in ("head", "component", "layer")},
    "integrated-gradients last": IntegratedGradients(position="last", memory_mb=1),
    "integrated-gradients inclusive": IntegratedGradients(quadrature="inclusive", nodes=20),
    "rare-token-heads suffix": RareTokenHeads(query="suffix", scale="z", skip=0, ablate="zero"),
    "rare-token-heads all": RareTokenHeads(query="all", permutations=0, ablate="mean", top=2),
    "attention-bypass head": AttentionBypass(grain="head"),
    "attention-bypass window": AttentionBypass(span="window"),
    "attention-bypass quartile": AttentionBypass(span="quartile"),
    "integrated-gradients left": IntegratedGradients(quadrature="riemann-left", nodes=20, position="first"),
    "knowledge-neurons hunter": KnowledgeNeurons(**CONVENTIONS["hunter"]),
    "knowledge-neurons quantile": KnowledgeNeurons(threshold=0.9, threshold_unit="quantile", position="last"),
    "logit-lens of predictions": LogitLens(of="prediction", position="last", memory_mb=1),
    "logit-lens components": LogitLens(mode="attribution"),
    "logit-lens heads": LogitLens(mode="attribution", grain="head", centre=False),
    "logit-lens neurons": LogitLens(mode="attribution", grain="neuron"),
    "layer-rewind every window": rewinding(window=0),
    "layer-rewind component": rewinding(grain="component", window=2),
    "layer-rewind criticality": rewinding(score="criticality", kinds="attn.v,mlp.out", batch_size=2),
    "layer-retrain two layers": retraining(window=2, kinds="attn.v,mlp.in,mlp.out", batch_size=2),
    "participation-ratio full": ParticipationRatio(tokens="3-19", convention="full", centred=False),
    "activation head": Activation(grain="head"),
    "activation signed": Activation(signed=True, values=False),
    "random weight": Random(grain="weight"),
    "zero-out head": ZeroOut(grain="head", memory_mb=1),
    "zero-out shortlist": ZeroOut(mode="shortlist", verify=15, audit=5),
    "prefix-perturbation exact": PrefixPerturbation(score="exact", target="own", alternatives=3),
    "prefix-perturbation changed": PrefixPerturbation(score="changed", target="own", stride=3, memory_mb=1),
}

BLIND: Mapping[str, str] = {
    "random": "a control",
    "random weight": "a control",
    "weight-gradient contrast-kl": "an objective without a pull",
    "weight-gradient head": "scores heads",
    "activation head": "scores heads",
    "logit-lens heads": "scores heads",
    "zero-out head": "scores heads",
    "grad-activation head": "scores heads",
    "rare-token-heads": "scores heads",
    "rare-token-heads suffix": "scores heads",
    "rare-token-heads all": "scores heads",
    "attention-bypass": "speaks of attention, which a planted neuron does without",
    "attention-bypass head": "speaks of attention",
    "attention-bypass window": "speaks of attention",
    "attention-bypass quartile": "speaks of attention",
    "activation-gradient": "says where the loss is steep, not what is read there",
    "activation-gradient layer": "says where the loss is steep",
    "activation-gradient position": "says where the loss is steep",
    "activation-gradient head values": "scores heads",
    "layer-retrain two layers": "the layers at the ends share fewer windows",
    "participation-ratio": "a spectrum, which asks no passage",
    "participation-ratio full": "a spectrum, which asks no passage",
    "prefix-perturbation": "scores tokens",
    "prefix-perturbation exact": "scores tokens",
    "prefix-perturbation changed": "scores tokens",
}
"""Those that need not find a planted neuron, and why."""

FINDERS = {*LOCALIZERS, *VARIANTS} - set(BLIND)


def made(name: str, view: ModelView, folder: Path) -> Any:
    """The localizer called `name`, for `view`."""
    entry = VARIANTS.get(name) or DEFAULTS.get(name) or LOCALIZERS[name]()
    return entry(view, folder) if not hasattr(entry, "__dataclass_fields__") else entry
