"""What a localization looks like from afar, as plain numbers: shares of layers and components, the best places.

These are the numbers behind the pictures: a report stores them, a plot draws them, a table prints them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from memloc.errors import InputError, MismatchError
from memloc.sites import OUTSIDE, Kind
from memloc.statistics import bootstrap_interval

if TYPE_CHECKING:
    from torch import Tensor

    from memloc.scores import Localization, Selection

Sums = list[float]
Place = TypeVar("Place")


def layer_profile(localization: Localization, control: Localization | None = None) -> dict[str, Any]:
    """How much of the total score each layer holds, in the blocks only.

    A share is the layer's sum of absolute scores over the sum of all layers', so that two sets of passages compare
    although the scores of one are many times smaller throughout. Where scores are kept per passage, each passage's own
    shares are averaged, so that a few passages with large scores do not speak for all.

    Args:
        localization: of the memorized passages.
        control: by the same method on the controls.

    Returns:
        `layers`: one mapping a layer with `layer`, `score`, `share`, and the control's two or None;
        `lower_half`: share of the lower half of the layers (a middle layer counts half), its control, their
        difference with a 95 % bootstrap interval where both keep scores per passage.

    Raises:
        MismatchError: the control is of another grain or other sites.
    """
    mine, theirs = _by_layer(localization), None if control is None else _by_layer(control)
    if control is not None and (control.grain != localization.grain or set(control.scores) != set(localization.scores)):
        raise MismatchError(f"the control scores {control.grain}s at other sites than the {localization.grain}s shown")
    shares, other = _shares(mine), {} if theirs is None else _shares(theirs)
    layers = [
        {
            "layer": layer,
            "score": _mean(score),
            "share": shares[layer],
            "control_score": None if theirs is None else _mean(theirs[layer]),
            "control_share": None if theirs is None else other[layer],
        }
        for layer, score in mine.items()
    ]
    low = _lower_half(list(shares.values()))
    low_control = None if theirs is None else _lower_half(list(other.values()))
    interval = None if control is None else _half_interval(localization, control)
    return {"layers": layers, "lower_half": {"share": low, "control": low_control, "difference": interval}}


def component_profile(localization: Localization, control: Localization | None = None) -> dict[str, Any]:
    """Layer by component: each place's share of the total absolute score.

    Returns:
        `kinds` (columns), `layers` (rows), `shares` [layers][kinds] with None where a family has no such part, and
        `control_shares` alike, or None.
    """
    tables = [_shares(_by_component(entry)) for entry in (localization, control) if entry is not None]
    layers = sorted({layer for layer, _ in tables[0]})
    kinds = [kind for kind in Kind if any((layer, kind) in tables[0] for layer in layers)]
    shares = [[[table.get((layer, kind)) for kind in kinds] for layer in layers] for table in tables]
    return {
        "kinds": [str(kind) for kind in kinds],
        "layers": layers,
        "shares": shares[0],
        "control_shares": shares[1] if len(shares) == 2 else None,
    }


def neuron_profile(
    localization: Localization, selection: Selection | None = None, *, per_layer: int = 60, top: int = 20
) -> dict[str, Any]:
    """The best-scored neurons (or heads, or whatever a site holds a row of) and how the others are spread.

    Args:
        localization: of a grain with one axis at a site.
        selection: what was chosen from it, marked.
        per_layer: how many of a site's neurons are listed with it, best first, and all chosen ones up to as many again.
        top: how many of the whole model are listed.

    Returns:
        `grain`, `count` (all scored), `selected` (all chosen), `sites`: one mapping a site with `site`, `layer`,
        `count`, `quantiles` (0, 5, 25, 50, 75, 95, 100 %) and `best` [[index, score, chosen]]; `top`: mappings with
        `site`, `index`, `score`, `share` and `chosen`.

    Raises:
        InputError: scores are single numbers or matrices a site.
    """
    scores = {site: entry for site, entry in sorted(localization.mean().scores.items())}
    odd = [str(site) for site, entry in scores.items() if entry.dim() != 1]
    if odd:
        raise InputError(f"{odd[0]}: {localization.grain} scores are no row of neurons; use layers or components")
    masks = {} if selection is None or selection.grain != localization.grain else selection.masks
    total = sum(float(entry.double().abs().sum()) for entry in scores.values())
    sites, best = [], []
    for site, entry in scores.items():
        order = entry.sort(descending=True, stable=True).indices.tolist()
        chosen = set(masks[site].reshape(-1).nonzero().reshape(-1).tolist()) if site in masks else set()
        listed = order[:per_layer] + [index for index in order[per_layer:] if index in chosen][:per_layer]
        sites.append(
            {
                "site": str(site),
                "layer": site.layer,
                "count": len(order),
                "chosen": len(chosen),
                "quantiles": _quantiles(entry),
                "best": [[index, float(entry[index]), index in chosen] for index in listed],
            }
        )
        best += [(-float(entry[index]), str(site), index, index in chosen) for index in order[:top]]
    return {
        "grain": str(localization.grain),
        "count": localization.count,
        "selected": sum(int(mask.sum()) for mask in masks.values()),
        "sites": sites,
        "top": [
            {"site": site, "index": index, "score": -score, "share": _share(abs(score), total), "chosen": chosen}
            for score, site, index, chosen in sorted(best, key=lambda entry: entry[0])[:top]
        ],
    }


def has_rows(localization: Localization) -> bool:
    """Whether every site holds one row of scores (neurons, heads, directions), as `neuron_profile` needs."""
    return all(entry.dim() == 1 for entry in localization.mean().scores.values())


def chosen_by_layer(selection: Selection) -> dict[int, int]:
    """How many places of every layer are chosen."""
    found: dict[int, int] = {}
    for site, mask in sorted(selection.masks.items()):
        found[site.layer] = found.get(site.layer, 0) + int(mask.sum())
    return found


def _by_layer(localization: Localization) -> dict[int, Sums]:
    found: dict[int, Sums] = {}
    for (layer, _), sums in _by_component(localization).items():
        found[layer] = [one + other for one, other in zip(found[layer], sums, strict=True)] if layer in found else sums
    return found


def _by_component(localization: Localization) -> dict[tuple[int, Kind], Sums]:
    """Sum of absolute scores at each place, one entry a passage where they are kept, else one."""
    found: dict[tuple[int, Kind], Sums] = {}
    for site, entry in sorted(localization.scores.items()):
        if site.layer == OUTSIDE:
            continue
        rows = entry.reshape(1 if localization.passages is None else len(entry), -1)
        sums, place = rows.double().abs().sum(1).tolist(), (site.layer, site.kind)
        found[place] = [one + other for one, other in zip(found[place], sums, strict=True)] if place in found else sums
    return found


def _shares(parts: Mapping[Place, Sums]) -> dict[Place, float]:
    """Each place's share of the total, averaged over the passages that have any score at all."""
    totals = [sum(column) for column in zip(*parts.values(), strict=True)]
    return {place: _mean([_share(part, whole) for part, whole in zip(sums, totals, strict=True) if whole])
            for place, sums in parts.items()}  # fmt: skip


def _mean(values: Sums) -> float:
    return sum(values) / len(values) if values else 0.0


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _lower_half(shares: list[float]) -> float:
    half, middle = divmod(len(shares), 2)
    return sum(shares[:half]) + (shares[half] / 2 if middle else 0.0)


def _half_interval(localization: Localization, control: Localization) -> Mapping[str, Any] | None:
    """Difference of the lower half's share, passages resampled on both sides; None without scores per passage."""
    if localization.passages is None or control.passages is None:
        return None
    sides = [_halves(entry) for entry in (localization, control)]
    means = [sum(side) / len(side) if side else math.nan for side in sides]
    ends = [bootstrap_interval(side) for side in sides]
    # Two independent means: their intervals' half-widths add in squares.
    value = means[0] - means[1]
    down = math.hypot(means[0] - ends[0][0], ends[1][1] - means[1])
    up = math.hypot(ends[0][1] - means[0], means[1] - ends[1][0])
    if not math.isfinite(value) or not math.isfinite(down) or not math.isfinite(up):
        return None
    return {"value": value, "low": value - down, "high": value + up, "n": [len(side) for side in sides]}


def _halves(localization: Localization) -> list[float]:
    """Every passage's own share of the lower half."""
    rows = zip(*_by_layer(localization).values(), strict=True)
    return [_lower_half([part / sum(row) for part in row]) for row in rows if sum(row) > 0]


def _quantiles(entry: Tensor) -> list[float]:
    ordered = entry.double().sort().values
    last = len(ordered) - 1
    return [float(ordered[round(share * last)]) for share in (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)] if last >= 0 else []
