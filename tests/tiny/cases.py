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
from memloc.localizers.attention_bypass import AttentionBypass
from memloc.localizers.ffn_memory import FfnMemory
from memloc.localizers.integrated_gradients import IntegratedGradients
from memloc.localizers.random import Random
from memloc.localizers.rare_token_heads import RareTokenHeads
from memloc.localizers.weight_gradient import WeightGradient
from memloc.methods import LOCALIZERS
from memloc.view import ModelView

Entry = Any | Callable[[ModelView, Path], Any]

DEFAULTS: Mapping[str, Entry] = {}

VARIANTS: Mapping[str, Entry] = {
    **{f"weight-gradient {grain}": WeightGradient(grain=grain) for grain in ("layer", "head", "neuron", "weight")},
    "weight-gradient per passage": WeightGradient(per_passage=True, reduce="norm"),
    "weight-gradient contrast": WeightGradient(objective="contrast", grain="neuron", reduce="sum"),
    "weight-gradient contrast-kl": WeightGradient(objective="contrast-kl", kl="sum", scale="raw"),
    "weight-gradient of two kinds": WeightGradient(kinds="attn.v,mlp.out", reduce="mean"),
    "integrated-gradients last": IntegratedGradients(position="last", memory_mb=1),
    "integrated-gradients inclusive": IntegratedGradients(quadrature="inclusive", nodes=20),
    "rare-token-heads suffix": RareTokenHeads(query="suffix", scale="z", skip=0, ablate="zero"),
    "rare-token-heads all": RareTokenHeads(query="all", permutations=0, ablate="mean", top=2),
    "attention-bypass head": AttentionBypass(grain="head"),
    "attention-bypass window": AttentionBypass(span="window"),
    "attention-bypass quartile": AttentionBypass(span="quartile"),
    "ffn-memory all": FfnMemory(counts="all", triggers=3, promotes=7, positions=5, readings=2),
    "activation head": Activation(grain="head"),
    "activation signed": Activation(signed=True, values=False),
    "random weight": Random(grain="weight"),
}

OF_ATTENTION = {name for name in (*LOCALIZERS, *VARIANTS) if name.startswith(("rare-token-heads", "attention-bypass"))}
"""They speak of attention, and a planted neuron needs none."""

OTHER_PLACES = {"weight-gradient head", "activation head"}
BLIND = {*OF_ATTENTION, *OTHER_PLACES, "random", "random weight", "weight-gradient contrast-kl"}
"""Those that need not find a planted neuron: controls, scores of other places, and an objective without a pull."""

FINDERS = {*LOCALIZERS, *VARIANTS} - BLIND


def made(name: str, view: ModelView, folder: Path) -> Any:
    """The localizer called `name`, for `view`."""
    entry = VARIANTS.get(name) or DEFAULTS.get(name) or LOCALIZERS[name]()
    return entry(view, folder) if not hasattr(entry, "__dataclass_fields__") else entry
