"""Does localization predict editability? Layer scores of a localization beside what edits at these layers achieve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from editors.facts.layer_choice import Sweep
from memloc.errors import InputError, MismatchError
from memloc.results.agreement import by_layer
from memloc.scores import Localization
from memloc.sites import OUTSIDE, Grain, Kind, Site
from memloc.statistics import bootstrap_interval

Table = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """How much a localization says about which edit succeeds.

    Attributes:
        name: of the localization.
        facts, layers: how many of each.
        within: mean over facts of the correlation over layers; None where no fact varies.
        within_interval: 95 %, facts resampled.
        within_by_fact: one a fact, None where score or edit does not vary.
        by_layer: at each layer the correlation over facts, None where one does not vary.
        pooled: over all facts and layers.
        pooled_interval: 95 %, facts resampled.
        layer: share of the edits' variance that the choice of layer alone explains.
        both: share that layer and score explain together.
        alone: share that the score alone explains.
        gain_interval: 95 % of both - layer, facts resampled; never below 0, for it is a fit.
        chance: mean of both - layer when facts swap their scores at random.
        p: share of such swaps that explain as much.
        best: share of facts whose best-scored layer is as good for the edit as the best layer.
        best_chance: the same for a layer at random.
    """

    name: str
    facts: int
    layers: int
    within: float | None
    within_interval: tuple[float, float]
    within_by_fact: tuple[float | None, ...]
    by_layer: tuple[float | None, ...]
    pooled: float | None
    pooled_interval: tuple[float, float]
    layer: float
    both: float
    alone: float
    gain_interval: tuple[float, float]
    chance: float
    p: float
    best: float
    best_chance: float

    @property
    def gain(self) -> float:
        """What the score explains beyond the layer."""
        return self.both - self.layer

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "gain": self.gain}


def layer_scores(localization: Localization, facts: tuple[str, ...], layers: tuple[int, ...]) -> Table:
    """Scores [facts, layers]: of layers and components their sum, of positions the best token's, else absolute sums.

    Raises:
        InputError: no score per fact, or none of a layer.
        MismatchError: a fact is not in it.
    """
    if localization.passages is None:
        raise InputError(
            f"{localization.provenance.method}: one score for all facts; localize with a score per passage"
        )
    missing = [name for name in facts if name not in localization.passages]
    if missing:
        raise MismatchError(f"{localization.provenance.method} holds no fact {missing[0]!r}; localize with these facts")
    found = _layers(localization)
    rows = [localization.passages.index(name) for name in facts]
    columns = []
    for layer in layers:
        place = Site(layer, Kind.MLP_OUT)
        if place not in found:
            raise InputError(f"{localization.provenance.method} scores nothing in layer {layer}")
        columns.append(found[place][rows].double())
    return torch.stack(columns, 1).numpy()


def _layers(localization: Localization) -> Mapping[Site, torch.Tensor]:
    """A score a fact and layer, at its MLP's output map."""
    if localization.grain not in (Grain.POSITION, Grain.LAYER, Grain.COMPONENT):
        return by_layer(localization).scores
    positions = localization.grain == Grain.POSITION
    found: dict[Site, torch.Tensor] = {}
    for site, scores in localization.scores.items():
        if site.layer == OUTSIDE:
            continue
        place, here = Site(site.layer, Kind.MLP_OUT), scores.amax(1) if positions else scores
        if place in found:
            here = torch.maximum(found[place], here) if positions else found[place] + here
        found[place] = here
    return found


def predict(
    sweep: Sweep,
    localization: Localization,
    *,
    name: str = "",
    figure: str = "rewrite",
    seed: int = 0,
    draws: int = 2000,
) -> Prediction:
    """Set a localization's layer scores beside a sweep's edits.

    Args:
        sweep: edits of facts at layers.
        localization: with a score per fact; a passage a fact, of the same ids.
        name: what to call it; by default its method.
        figure: of the sweep: what counts as success.
        seed: of resampling and swapping.
        draws: of each.

    Raises:
        InputError: fewer than two facts or layers, or scores that are not per fact.
        MismatchError: the localization is of other facts.

    Source: Hase et al. 2023, arXiv:2301.04213 (variance explained by layer, and by layer and tracing effect). Swapping
    scores among facts, as the control, is ours.
    """
    if len(sweep.facts) < 2 or len(sweep.layers) < 2:
        raise InputError(
            f"{len(sweep.facts)} facts at {len(sweep.layers)} layers correlate with nothing; give two of each"
        )
    edits = np.asarray(sweep.table(figure), dtype=np.float64)
    scores = layer_scores(localization, sweep.facts, sweep.layers)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(edits), (draws, len(edits)))
    within = tuple(correlation(one, other) for one, other in zip(scores, edits, strict=True))
    known = [entry for entry in within if entry is not None]
    layer, both = explained(scores, edits)
    gains = [_gain(scores[rows], edits[rows]) for rows in picks]
    pooled = [correlation(scores[rows].ravel(), edits[rows].ravel()) for rows in picks]
    swapped = [_gain(scores[rng.permutation(len(edits))], edits) for _ in range(draws)]
    alone = correlation(scores.ravel(), edits.ravel())
    hits = edits[np.arange(len(edits)), scores.argmax(1)] >= edits.max(1) - 1e-9
    return Prediction(
        name=name or localization.provenance.method,
        facts=len(edits),
        layers=edits.shape[1],
        within=float(np.mean(known)) if known else None,
        within_interval=bootstrap_interval(known, seed=seed),
        within_by_fact=within,
        by_layer=tuple(correlation(one, other) for one, other in zip(scores.T, edits.T, strict=True)),
        pooled=alone,
        pooled_interval=_interval([entry for entry in pooled if entry is not None]),
        layer=layer,
        both=both,
        alone=0.0 if alone is None else alone**2,
        gain_interval=_interval(gains),
        chance=float(np.mean(swapped)),
        p=(1 + sum(entry >= both - layer - 1e-12 for entry in swapped)) / (1 + draws),
        best=float(hits.mean()),
        best_chance=float((edits >= edits.max(1, keepdims=True) - 1e-9).mean()),
    )


def correlation(one: Table, other: Table) -> float | None:
    """Pearson's; None where a side does not vary."""
    first, second = one - one.mean(), other - other.mean()
    size = float(np.sqrt((first**2).sum() * (second**2).sum()))
    tiny = 1e-12 * float(np.abs(one).max() * np.abs(other).max()) * len(one)
    return None if size <= tiny else float((first * second).sum() / size)


def explained(scores: Table, edits: Table) -> tuple[float, float]:
    """Shares of the variance of `edits` that layers explain, and layers and scores together, by least squares.

    Both are 1 where nothing varies: there is nothing left to explain.
    """
    total = float(((edits - edits.mean()) ** 2).sum())
    if total <= 1e-24 * edits.size * float(np.abs(edits).max()) ** 2 or total == 0:
        return 1.0, 1.0
    rest = edits - edits.mean(0)  # a constant a layer explains the means of layers
    left = float((rest**2).sum())
    # The score adds what it explains of the rest once layers are taken out of it too (Frisch-Waugh).
    free = scores - scores.mean(0)
    size = float((free**2).sum())
    gained = float((free * rest).sum()) ** 2 / size if size > 1e-24 * float((scores**2).sum()) else 0.0
    return 1 - left / total, 1 - (left - gained) / total


def _gain(scores: Table, edits: Table) -> float:
    layer, both = explained(scores, edits)
    return both - layer


def _interval(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return -np.inf, np.inf
    low, high = np.quantile(np.asarray(values), [0.025, 0.975], method="nearest")
    return float(low), float(high)
