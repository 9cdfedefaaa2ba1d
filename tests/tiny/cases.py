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
from memloc.localizers.activation_patching import ActivationPatching
from memloc.localizers.attribution_patching import AttributionPatching
from memloc.localizers.causal_trace import CausalTrace
from memloc.localizers.integrated_gradients import IntegratedGradients
from memloc.localizers.prefix_perturbation import PrefixPerturbation
from memloc.localizers.random import Random
from memloc.localizers.weight_gradient import WeightGradient
from memloc.methods import LOCALIZERS
from memloc.view import ModelView

Entry = Any | Callable[[ModelView, Path], Any]

DEFAULTS: Mapping[str, Entry] = {
    "activation-patching": ActivationPatching(alternatives=1),
    "causal-trace": CausalTrace(draws=2),
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

BLIND = {
    "random", "random weight", "weight-gradient head", "activation head", "weight-gradient contrast-kl",
    "activation-patching keys", "attribution-patching queries", "causal-trace window", "causal-trace block",
    "prefix-perturbation", "prefix-perturbation exact", "prefix-perturbation changed",
}  # fmt: skip
"""Those that need not find a planted neuron: controls, scores of other places, and objectives without a pull."""

FINDERS = {*LOCALIZERS, *VARIANTS} - BLIND


def made(name: str, view: ModelView, folder: Path) -> Any:
    """The localizer called `name`, for `view`."""
    entry = VARIANTS.get(name) or DEFAULTS.get(name) or LOCALIZERS[name]()
    return entry(view, folder) if not hasattr(entry, "__dataclass_fields__") else entry
