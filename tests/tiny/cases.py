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
from memloc.localizers.integrated_gradients import IntegratedGradients
from memloc.localizers.layer_retrain import LayerRetrain
from memloc.localizers.layer_rewind import LayerRewind
from memloc.localizers.participation_ratio import ParticipationRatio
from memloc.localizers.random import Random
from memloc.localizers.weight_gradient import WeightGradient
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
    "weight-gradient contrast": WeightGradient(objective="contrast", grain="neuron", reduce="sum"),
    "weight-gradient contrast-kl": WeightGradient(objective="contrast-kl", kl="sum", scale="raw"),
    "weight-gradient of two kinds": WeightGradient(kinds="attn.v,mlp.out", reduce="mean"),
    "integrated-gradients last": IntegratedGradients(position="last", memory_mb=1),
    "integrated-gradients inclusive": IntegratedGradients(quadrature="inclusive", nodes=20),
    "layer-rewind every window": rewinding(window=0),
    "layer-rewind component": rewinding(grain="component", window=2),
    "layer-rewind criticality": rewinding(score="criticality", kinds="attn.v,mlp.out", batch_size=2),
    "layer-retrain two layers": retraining(window=2, kinds="attn.v,mlp.in,mlp.out", batch_size=2),
    "participation-ratio full": ParticipationRatio(tokens="3-19", convention="full", centred=False),
    "activation head": Activation(grain="head"),
    "activation signed": Activation(signed=True, values=False),
    "random weight": Random(grain="weight"),
}

BLIND = {"random", "random weight", "weight-gradient head", "activation head", "weight-gradient contrast-kl",
         "layer-retrain two layers", "participation-ratio", "participation-ratio full"}  # fmt: skip
"""Those that need not find a planted neuron: controls, scores of other places, an objective without a pull, windows of
one width, of which the layers at the ends share fewer, and spectra, which ask no passage."""

FINDERS = {*LOCALIZERS, *VARIANTS} - BLIND


def made(name: str, view: ModelView, folder: Path) -> Any:
    """The localizer called `name`, for `view`."""
    entry = VARIANTS.get(name) or DEFAULTS.get(name) or LOCALIZERS[name]()
    return entry(view, folder) if not hasattr(entry, "__dataclass_fields__") else entry
