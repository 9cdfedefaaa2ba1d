"""Joint selection: the best few are silenced, the rest is scored again, and so on; single scores miss joint effects.

Two units that say the same cover for each other: silenced alone, neither is missed. Scored again without the first, the
second is. It works with any localizer that scores neurons or heads, and writes no weight: the localizer simply looks at
a model some of whose gates are shut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memloc.ablations.gates import gate_sites, silenced
from memloc.errors import InputError
from memloc.objectives import suffix_nll
from memloc.passages import Passages
from memloc.progress import steps
from memloc.provenance import settings_of
from memloc.scores import Localization, Selection
from memloc.sites import Site
from memloc.view import ModelView

Order = tuple[tuple[Site, int], ...]
"""Units, the first to be silenced first."""


@dataclass(frozen=True)
class Curve:
    """What silencing the first so many units of an order does.

    Attributes:
        name: "joint", "single" or "random".
        removed: how many units are silent.
        nll: mean suffix NLL then, nats per token, mean over passages.
        rows: of each passage, `[points, n]` as lists.
    """

    name: str
    removed: tuple[int, ...]
    nll: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Joint:
    """A greedy selection with re-scoring.

    Attributes:
        localization: order-coded: the unit silenced k-th of K scores 1 + (K - k) / K, all others the rank of their last
            score in [0, 1). So `top(k)` is the first k.
        order: the units silenced, in order.
        single: as many units, in the order of the scores of the untouched model.
    """

    localization: Localization
    order: Order
    single: Order

    @property
    def selection(self) -> Selection:
        """The units silenced."""
        return self.localization.top(len(self.order))


def joint_selection(
    localizer: Any,
    view: ModelView,
    passages: Passages,
    *,
    count: int,
    step: int,
    contrast: Passages | None = None,
) -> Joint:
    """Select `count` units, `step` at a time, scoring again after each step.

    Scores are means over passages; for a selection of one passage's own, give that passage alone.

    Args:
        localizer: any that scores neurons or heads.
        view: the model; never written.
        passages: what is localized.
        count: units to select.
        step: units silenced between two scorings. `count` at once is the plain order of scores.
        contrast: handed to the localizer.

    Cost: one run of the localizer for every step, and no less.

    Raises:
        InputError: scores of something else than neurons or heads, or counts outside what is there.
    """
    if not 1 <= step <= count:
        raise InputError(f"joint selection: step {step}, count {count}; expected 1 ≤ step ≤ count")
    first = found = localizer(view, passages, contrast=contrast).mean()
    gate_sites(view, found.grain)
    if count > found.count:
        raise InputError(f"joint selection: count {count}, but {found.count} {found.grain}s are scored")
    order: Order = ()
    for taken in steps(range(0, count, step), "joint selection"):
        if taken:
            with silenced(view, selection_of(found, order)):
                found = localizer(view, passages, contrast=contrast).mean()
        order += _ranked(found, min(step, count - taken), without=order)
    settings = {"of": found.provenance.method, **settings_of(localizer), "count": count, "step": step}
    provenance = replace(first.provenance, method="joint", settings=settings)
    coded = Localization(found.grain, _coded(found, order), provenance)
    return Joint(coded, order, _ranked(first, count))


def removal_curves(
    joint: Joint, view: ModelView, passages: Passages, *, points: Sequence[int], seed: int = 0, draws: int = 5
) -> tuple[Curve, ...]:
    """What silencing does along the joint order, the order of single scores, and at random, side by side.

    Args:
        joint: the selection.
        view: the model it was made on.
        passages: whose suffixes are measured.
        points: how many units to silence; 0 is the model as it is.
        seed: of the random orders.
        draws: random orders; their mean is the third curve.

    Cost: one forward a point for the first two curves and for each draw.
    """
    orders = {"joint": [joint.order], "single": [joint.single]}
    generator = torch.Generator().manual_seed(seed)
    every = _ranked(joint.localization, joint.localization.count)
    shuffled = [torch.randperm(len(every), generator=generator).tolist() for _ in range(draws)]
    orders["random"] = [tuple(every[place] for place in places) for places in shuffled]
    found = []
    for name, entries in orders.items():
        rows = torch.stack([_spent(joint.localization, order, view, passages, points) for order in entries]).mean(0)
        found.append(Curve(name, tuple(points), tuple(rows.mean(1).tolist()), tuple(map(tuple, rows.tolist()))))
    return tuple(found)


def selection_of(localization: Localization, units: Order) -> Selection:
    """Units as a selection among the places of a localization."""
    masks = {site: torch.zeros_like(scores, dtype=torch.bool) for site, scores in localization.mean().scores.items()}
    for site, unit in units:
        masks[site][unit] = True
    return Selection(localization.grain, masks, localization.provenance)


@torch.no_grad()
def _spent(
    localization: Localization, order: Order, view: ModelView, passages: Passages, points: Sequence[int]
) -> Tensor:
    """NLL of every passage with the first so many units silent, [points, n]."""
    found = torch.zeros(len(points), len(passages))
    for index, point in enumerate(points):
        if point > len(order):
            raise InputError(f"removal curve: point {point}, but the order has {len(order)} units")
        with silenced(view, selection_of(localization, order[:point])):
            for batch in view.batches(passages):
                found[index, list(batch.rows)] = suffix_nll(view, batch).cpu().float()
    return found


def _ranked(localization: Localization, count: int, *, without: Order = ()) -> Order:
    """The best-scored units, best first; among equals by site, then index."""
    scores = dict(sorted(localization.scores.items()))
    gone = set(without)
    places = [(site, unit) for site, entry in scores.items() for unit in range(len(entry))]
    flat = torch.cat(list(scores.values()))
    best = flat.argsort(descending=True, stable=True).tolist()
    return tuple([places[index] for index in best if places[index] not in gone][:count])


def _coded(localization: Localization, order: Order) -> dict[Site, Tensor]:
    """See `Joint.localization`."""
    rest = _ranked(localization, localization.count, without=order)
    coded = {site: torch.zeros_like(scores) for site, scores in localization.scores.items()}
    for place, (site, unit) in enumerate(order):
        coded[site][unit] = 1 + (len(order) - place) / len(order)
    for place, (site, unit) in enumerate(rest):
        coded[site][unit] = 1 - (place + 1) / (len(rest) + 1)
    return coded
