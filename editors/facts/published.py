"""Settings that papers and their code give for a model, by the model's name: for reproducing a number, on request only.

Nothing here looks at a model. What is ours (protected keys, namesakes, the price of values) is off in all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from memloc.errors import InputError


class Preset(NamedTuple):
    """One model's settings.

    Attributes:
        layers: of MEMIT and AlphaEdit.
        single: of ROME and EMMET.
        width: inputs of the MLP's last map.
        weight: λ of MEMIT.
        steps: of the search for values.
        lr: of it.
        weight_decay: of it.
        clamp: of it.
        equality: weight of C in EMMET.
    """

    layers: tuple[int, ...]
    single: int
    width: int
    weight: float
    steps: int
    lr: float
    weight_decay: float
    clamp: float
    equality: float


PRESETS = {
    "gpt2-xl": Preset(tuple(range(13, 18)), 17, 6400, 20000, 20, 0.5, 0.5, 0.75, 1000),
    "gpt-j-6b": Preset(tuple(range(3, 9)), 5, 16384, 15000, 25, 0.5, 0.5, 0.75, 1),
    "llama2-7b": Preset(tuple(range(4, 9)), 5, 11008, 15000, 25, 0.5, 1e-3, 4.0, 1),
    "llama3-8b": Preset(tuple(range(4, 9)), 5, 14336, 15000, 25, 0.1, 0.5, 0.75, 1),
    "mistral-7b": Preset(tuple(range(4, 9)), 5, 14336, 15000, 25, 0.5, 1e-3, 4.0, 1),
}
"""Of the authors' repositories and, for Llama 2 and Mistral, EasyEdit."""


class PmetPreset(NamedTuple):
    """One model's settings of PMET, named as those of `Preset`."""

    layers: tuple[int, ...]
    width: int
    weight: float
    steps: int
    clamp: float
    kl_weight: float


PMET_PRESETS = {
    "gpt-j-6b": PmetPreset(tuple(range(3, 9)), 16384, 6000, 30, 0.75, 1.0),
    "gpt-neox-20b": PmetPreset(tuple(range(6, 11)), 24576, 15000, 30, 0.8, 0.8),
    "llama2-7b": PmetPreset(tuple(range(4, 9)), 11008, 15000, 20, 1.0, 0.0625),
}
"""Of the authors' repository and, for Llama 2, EasyEdit."""

PLAIN: dict[str, Any] = {
    "token": "subject-last", "ways": "mean", "price": 0.0, "damping": 0.0, "samples": 5, "lengths": (10,), "recalls": 0,
    "protect": 0.0, "namesakes": 0, "replay": 0.0, "sentences": 0, "past_weight": 1.0, "passes": 1, "kl_weight": 0.0625,
    "stop_below": 0.05,
}  # fmt: skip
"""What all methods of the family have in common as published."""


def preset(name: str) -> Preset:
    """The settings for the model called `name`.

    Raises:
        InputError: there are none.
    """
    if name not in PRESETS:
        raise InputError(f"no published settings for {name!r}; there are those for {', '.join(PRESETS)}")
    return PRESETS[name]


def plain(found: Preset | None = None) -> dict[str, Any]:
    """What all methods share, for one model where it is given, as settings of an editor."""
    if found is None:
        return dict(PLAIN)
    search = {"steps": found.steps, "lr": found.lr, "weight_decay": found.weight_decay, "clamp": found.clamp}
    return {**PLAIN, **search}
