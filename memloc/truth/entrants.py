"""Who is judged on known answers: every registered localizer that scores the grain asked for, and plain baselines."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from memloc.errors import InputError
from memloc.methods import LOCALIZERS
from memloc.passages import Passages
from memloc.provenance import Provenance, digest_bytes, settings_of
from memloc.registry import Registry
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView

BASELINES = Registry(
    "baseline",
    {
        "value-norm": "memloc.truth.entrants:ValueNorm",
        "key-norm": "memloc.truth.entrants:KeyNorm",
    },
)
"""What a localizer must beat: scores that have not looked at the passages."""

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "logit-lens": {"mode": "attribution"},
}
"""How a method is run here where its own defaults are meant for something else; the grain is set by itself."""

CONTRAST: Mapping[str, Literal["text", "controls"]] = {
    "outlier-set": "text",
    "curvature": "text",
}
"""Methods that need a second data set, and which of the known answer's they get."""


@dataclass(frozen=True, kw_only=True)
class ValueNorm:
    """Score of a neuron or head = size of what it can write: ‖v‖ of its columns of the output projection.

    Free training makes trained rows larger, and this then finds them without having read a passage.
    """

    grain: Literal["neuron", "head"] = "neuron"

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score places by their weights alone."""
        scores = {}
        for site in view.sites(Kind.MLP_OUT if self.grain == "neuron" else Kind.ATTN_OUT):
            norms = torch.linalg.vector_norm(view.weight(site).detach().float(), dim=0)
            scores[site] = norms if self.grain == "neuron" else norms.view(view.heads, -1).norm(dim=1)
        return Localization(Grain(self.grain), scores, Provenance("value-norm", settings_of(self)))


@dataclass(frozen=True, kw_only=True)
class KeyNorm:
    """Score of a neuron = size of what it reads with: the norm of its rows of the input maps (gate and up together)."""

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score neurons by their weights alone."""
        scores = {}
        for site in view.sites(Kind.MLP_OUT):
            rows = [view.weight(Site(site.layer, kind)).detach().float() for kind in (Kind.MLP_GATE, Kind.MLP_IN)
                    if view.has(Site(site.layer, kind))]  # fmt: skip
            scores[site] = torch.linalg.vector_norm(torch.cat(rows, 1), dim=1)
        return Localization(Grain.NEURON, scores, Provenance("key-norm"))


def every_name() -> tuple[str, ...]:
    """Baselines, then every registered localizer."""
    return (*BASELINES, *sorted(LOCALIZERS))


def entrant(name: str, grain: Grain, changes: Mapping[str, Any]) -> Any:
    """The method called `name`, set to score places of `grain`.

    Args:
        name: of a localizer or a baseline.
        grain: what should be scored.
        changes: further settings of the method.

    Raises:
        UnknownName: no such method.
        InputError: it does not score that grain, or has no such setting.
    """
    method = _class(name)
    fields = {item.name for item in dataclasses.fields(method)}
    settings = dict(SETTINGS.get(name, {}))
    if "grain" in fields:
        known = typing.get_args(typing.get_type_hints(method)["grain"])
        if str(grain) not in known:
            raise InputError(f"{name} scores places of {', '.join(known)}, and no {grain}s")
        settings["grain"] = str(grain)
    for key in changes:
        if key not in fields:
            raise InputError(f"{name} has no setting {key!r}; it has {', '.join(sorted(fields)) or 'none'}")
    try:
        return method(**{**settings, **changes})
    except TypeError as error:
        raise InputError(f"{name} cannot be made with {dict(changes)}: {error}") from error


def source_digest(name: str) -> str:
    """Digest of the file a method is written in: results of another version of it are not reused."""
    table = BASELINES if name in BASELINES else LOCALIZERS
    return digest_bytes(table.source(name).read_bytes())


def _class(name: str) -> Any:
    return BASELINES[name] if name in BASELINES else LOCALIZERS[name]
