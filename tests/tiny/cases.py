"""Every registered localizer with the settings it is tested with: as it comes, or turned.

A method that is slow as it comes, or that needs something beside a model, has an entry in `DEFAULTS`; other settings
worth holding to the battery stand in `VARIANTS`, under the method's name and a few words. An entry is a localizer, or a
function that makes one from the view and an empty folder.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model

from memloc.localizers.activation import Activation
from memloc.localizers.activation_gradient import ActivationGradient
from memloc.localizers.activation_patching import ActivationPatching
from memloc.localizers.attention_bypass import AttentionBypass
from memloc.localizers.attribution_patching import AttributionPatching
from memloc.localizers.causal_trace import CausalTrace
from memloc.localizers.curvature import Curvature
from memloc.localizers.ffn_memory import FfnMemory
from memloc.localizers.grad_activation import GradActivation
from memloc.localizers.hard_concrete import HardConcrete
from memloc.localizers.integrated_gradients import IntegratedGradients
from memloc.localizers.knowledge_neurons import CONVENTIONS, KnowledgeNeurons
from memloc.localizers.layer_retrain import LayerRetrain
from memloc.localizers.layer_rewind import LayerRewind
from memloc.localizers.logit_lens import LogitLens
from memloc.localizers.outlier_set import OutlierSet
from memloc.localizers.participation_ratio import ParticipationRatio
from memloc.localizers.prefix_perturbation import PrefixPerturbation
from memloc.localizers.random import Random
from memloc.localizers.rare_token_heads import RareTokenHeads
from memloc.localizers.slimming import Slimming
from memloc.localizers.weight_gradient import WeightGradient
from memloc.localizers.zero_out import ZeroOut
from memloc.methods import LOCALIZERS
from memloc.view import ModelView

Entry = Any | Callable[[ModelView, Path], Any]


def before(view: ModelView, folder: Path) -> str:
    """A checkpoint folder of the same shape: the model with the maps of its blocks at half size.

    Whole or absent, so that several processes may ask for it at once.
    """
    found = folder / view.digest[:8] / "before"
    found.parent.mkdir(exist_ok=True)
    earlier = copy.deepcopy(view.model)
    with torch.no_grad():
        for site in view.sites(*view.kinds):
            earlier.get_parameter(view.place(site).parameter).copy_(view.parameter(site) / 2)
    part = Path(tempfile.mkdtemp(dir=folder))
    earlier.config.save_pretrained(part)
    save_model(earlier, str(part / "model.safetensors"))
    try:
        part.rename(found)
    except OSError:  # another process was first
        shutil.rmtree(part)
    return str(found)


def rewinding(**settings: Any) -> Callable[[ModelView, Path], Any]:
    """A rewinding to `before`."""
    return lambda view, folder: LayerRewind(earlier=before(view, folder), **settings)


def retraining(**settings: Any) -> Callable[[ModelView, Path], Any]:
    """A short retraining from `before`."""
    return lambda view, folder: LayerRetrain(earlier=before(view, folder), **{"steps": 3, "rows": 2, **settings})


DEFAULTS: Mapping[str, Entry] = {
    "activation-patching": ActivationPatching(alternatives=1),
    "causal-trace": CausalTrace(draws=2),
    "hard-concrete": HardConcrete(steps=4, every=2, learning_rate=0.2),
    "layer-retrain": retraining(),
    "layer-rewind": rewinding(),
    "slimming": Slimming(steps=4, every=2, learning_rate=0.05),
}

VARIANTS: Mapping[str, Entry] = {
    **{f"weight-gradient {grain}": WeightGradient(grain=grain) for grain in ("layer", "head", "neuron", "weight")},
    "weight-gradient per passage": WeightGradient(per_passage=True, reduce="norm"),
    "weight-gradient one by one": WeightGradient(per_passage=True, objective="contrast", grain="neuron"),
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
    "curvature output": Curvature(energy="output", correction=True, measure="share", kinds="attn.v,mlp.in"),
    **{f"curvature {grain}": Curvature(grain=grain, positions="all") for grain in ("neuron", "weight")},
    **{f"grad-activation {grain}": GradActivation(grain=grain) for grain in ("head", "component", "layer")},
    "integrated-gradients last": IntegratedGradients(position="last", memory_mb=1),
    "integrated-gradients inclusive": IntegratedGradients(quadrature="inclusive", nodes=20),
    "rare-token-heads suffix": RareTokenHeads(query="suffix", scale="z", skip=0, ablate="zero"),
    "rare-token-heads all": RareTokenHeads(query="all", permutations=0, ablate="mean", silenced=2),
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
    "layer-rewind component": rewinding(grain="component", window=2, kinds="attn.k,mlp.out"),
    "layer-rewind criticality": rewinding(score="criticality", kinds="attn.v,mlp.out", batch_size=2),
    "layer-retrain two layers": retraining(window=2, kinds="attn.v,mlp.in,mlp.out", batch_size=2),
    "participation-ratio full": ParticipationRatio(tokens="3-19", convention="full", centred=False),
    "ffn-memory all": FfnMemory(counts="all", triggers=3, promotes=7, positions=5, readings=2),
    "activation head": Activation(grain="head"),
    "activation signed": Activation(signed=True, values=False),
    "random weight": Random(grain="weight"),
    "slimming head": Slimming(grain="head", steps=8, learning_rate=0.1),
    "hard-concrete head": HardConcrete(grain="head", steps=8, stop=0.8, learning_rate=0.2),
    "outlier-set nll": OutlierSet(until="nll", growth=2),
    "zero-out head": ZeroOut(grain="head", memory_mb=1),
    "zero-out shortlist": ZeroOut(mode="shortlist", verify=15, audit=5),
    "activation-patching layer": ActivationPatching(grain="layer", corrupt="mean", direction="noise"),
    "activation-patching keys": ActivationPatching(grain="head", node="key", corrupt="noise", draws=2),
    "activation-patching position": ActivationPatching(grain="position", stream="mlp", corrupt="resample"),
    "attribution-patching verified": AttributionPatching(verify=3, audit=3),
    "attribution-patching graddrop": AttributionPatching(corrupt="perturbed", direction="denoise", graddrop=True),
    "attribution-patching queries": AttributionPatching(grain="head", node="query", corrupt="noise", draws=2),
    "attribution-patching position": AttributionPatching(
        grain="position", stream="mlp", corrupt="resample", verify=2, audit=2
    ),
    "causal-trace window": CausalTrace(stream="attn", window=2, corrupt="rare", draws=2),
    "causal-trace block": CausalTrace(stream="block", corrupt="perturbed", metric="nll"),
    "prefix-perturbation exact": PrefixPerturbation(score="exact", target="own", alternatives=3),
    "prefix-perturbation changed": PrefixPerturbation(score="changed", target="own", alternatives=1),
}

BLIND: Mapping[str, str] = {
    "activation head": "scores heads",
    "activation-gradient": "says where the loss is steep, not what is read there",
    "activation-gradient head values": "scores heads",
    "activation-gradient layer": "says where the loss is steep",
    "activation-gradient position": "says where the loss is steep",
    "activation-patching keys": "scores heads",
    "attention-bypass": "speaks of attention, which a planted neuron does without",
    "attention-bypass head": "speaks of attention",
    "attention-bypass quartile": "speaks of attention",
    "attention-bypass window": "speaks of attention",
    "attribution-patching queries": "scores heads",
    "causal-trace block": "scores tokens",
    "causal-trace window": "scores tokens",
    "curvature": "the loudest direction need not be the planted one",
    "curvature output": "the loudest direction need not be the planted one",
    "grad-activation head": "scores heads",
    "hard-concrete head": "scores heads",
    "layer-retrain two layers": "the layers at the ends share fewer windows",
    "logit-lens heads": "scores heads",
    "participation-ratio": "a spectrum, which asks no passage",
    "participation-ratio full": "a spectrum, which asks no passage",
    "prefix-perturbation": "scores tokens",
    "prefix-perturbation changed": "scores tokens",
    "prefix-perturbation exact": "scores tokens",
    "random": "a control",
    "random weight": "a control",
    "rare-token-heads": "scores heads",
    "rare-token-heads all": "scores heads",
    "rare-token-heads suffix": "scores heads",
    "slimming head": "scores heads",
    "weight-gradient contrast-kl": "an objective without a pull",
    "weight-gradient head": "scores heads",
    "zero-out head": "scores heads",
}
"""Those that need not find a planted neuron, and why."""

FINDERS = {*LOCALIZERS, *VARIANTS} - set(BLIND)


def made(name: str, view: ModelView, folder: Path) -> Any:
    """The localizer called `name`, for `view`."""
    entry = VARIANTS.get(name) or DEFAULTS.get(name) or LOCALIZERS[name]()
    return entry(view, folder) if not hasattr(entry, "__dataclass_fields__") else entry
