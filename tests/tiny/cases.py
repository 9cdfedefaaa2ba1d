"""Every registered localizer with the settings it is tested with: as it comes, or turned.

A method that is slow as it comes, or that needs something beside a model, has an entry in `DEFAULTS`; other settings
worth holding to the battery stand in `VARIANTS`, under the method's name and a few words. An entry is a localizer, or a
function that makes one from the view and an empty folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from memloc.localizers.activation import Activation
from memloc.localizers.hard_concrete import HardConcrete
from memloc.localizers.integrated_gradients import IntegratedGradients
from memloc.localizers.outlier_set import OutlierSet
from memloc.localizers.random import Random
from memloc.localizers.slimming import Slimming
from memloc.localizers.weight_gradient import WeightGradient
from memloc.localizers.zero_out import ZeroOut
from memloc.methods import LOCALIZERS
from memloc.view import ModelView

Entry = Any | Callable[[ModelView, Path], Any]

DEFAULTS: Mapping[str, Entry] = {
    "hard-concrete": HardConcrete(steps=4, every=2, learning_rate=0.2),
    "slimming": Slimming(steps=4, every=2, learning_rate=0.05),
}

VARIANTS: Mapping[str, Entry] = {
    **{f"weight-gradient {grain}": WeightGradient(grain=grain) for grain in ("layer", "head", "neuron", "weight")},
    "weight-gradient per passage": WeightGradient(per_passage=True, reduce="norm"),
    "weight-gradient contrast": WeightGradient(objective="contrast", grain="neuron", reduce="sum"),
    "weight-gradient contrast-kl": WeightGradient(objective="contrast-kl", kl="sum", scale="raw"),
    "weight-gradient of two kinds": WeightGradient(kinds="attn.v,mlp.out", reduce="mean"),
    "integrated-gradients last": IntegratedGradients(position="last", memory_mb=1),
    "integrated-gradients inclusive": IntegratedGradients(quadrature="inclusive", nodes=20),
    "activation head": Activation(grain="head"),
    "activation signed": Activation(signed=True, values=False),
    "random weight": Random(grain="weight"),
    "slimming head": Slimming(grain="head", steps=8, learning_rate=0.1),
    "hard-concrete head": HardConcrete(grain="head", steps=8, stop=0.8, learning_rate=0.2),
    "outlier-set nll": OutlierSet(until="nll", growth=2),
    "zero-out head": ZeroOut(grain="head", memory_mb=1),
    "zero-out shortlist": ZeroOut(mode="shortlist", verify=15, audit=5),
}

BLIND = {
    "random",
    "random weight",
    "weight-gradient head",
    "activation head",
    "weight-gradient contrast-kl",
    "zero-out head",
    "slimming head",
    "hard-concrete head",
}
"""Those that need not find a planted neuron: controls, scores of other places, and an objective without a pull."""

FINDERS = {*LOCALIZERS, *VARIANTS} - BLIND


def made(name: str, view: ModelView, folder: Path) -> Any:
    """The localizer called `name`, for `view`."""
    entry = VARIANTS.get(name) or DEFAULTS.get(name) or LOCALIZERS[name]()
    return entry(view, folder) if not hasattr(entry, "__dataclass_fields__") else entry
