"""Localizations as grids of plain numbers: layer by head, and layer by token of a passage.

Like `profiles`, these are the numbers behind the pictures: a report stores them, a plot draws them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memloc.errors import InputError, MismatchError
from memloc.sites import OUTSIDE, Grain, Site

if TYPE_CHECKING:
    from torch import Tensor

    from memloc.scores import Localization, Selection


def head_map(
    localization: Localization, control: Localization | None = None, selection: Selection | None = None
) -> dict[str, Any]:
    """Layer by head: the scores themselves, not shares, for they have a sign.

    Returns:
        `layers` (rows), `scores` [layers][heads], `control_scores` alike or None, `chosen` [layers][heads] bools or
        None.

    Raises:
        InputError: scores are not of heads.
        MismatchError: the control scores other heads.
    """
    if localization.grain is not Grain.HEAD:
        raise InputError(f"{localization.provenance.method}: {localization.grain} scores make no map of heads")
    mine = _ordered(localization)
    theirs = None if control is None else _ordered(control)
    if theirs is not None and [(s, e.shape) for s, e in theirs] != [(s, e.shape) for s, e in mine]:
        raise MismatchError("the control scores other heads")
    masks = None if selection is None or selection.grain is not Grain.HEAD else selection.masks
    return {
        "layers": [site.layer for site, _ in mine],
        "scores": [entry.tolist() for _, entry in mine],
        "control_scores": None if theirs is None else [entry.tolist() for _, entry in theirs],
        "chosen": None if masks is None else [masks[site].tolist() for site, _ in mine if site in masks],
    }


def position_maps(
    localization: Localization,
    *,
    tokens: Mapping[str, Sequence[str]] | None = None,
    prefixes: Mapping[str, int] | None = None,
    most: int = 4,
) -> list[dict[str, Any]]:
    """Layer by token, for the first passages: one map for each kind of site.

    Args:
        localization: of positions.
        tokens: passage to the text of each token, where it may be shown.
        prefixes: passage to the tokens of its prefix.
        most: how many passages.

    Returns:
        Mappings with `id`, `length`, `prefix` (or None), `tokens` (or None) and `maps`: mappings with `kind`, `layers`
        and `scores` [layers][length]; a map of one place outside the blocks has the layer None.

    Raises:
        InputError: scores are not of positions.
    """
    if localization.grain is not Grain.POSITION:
        raise InputError(f"{localization.provenance.method}: {localization.grain} scores make no map of positions")
    if localization.passages is None:
        return [_map("mean of all passages", localization, None, None)]
    found = []
    for name in localization.passages[:most]:
        spoken = None if tokens is None or name not in tokens else list(tokens[name])
        prefix = None if prefixes is None else prefixes.get(name)
        found.append(_map(name, localization.of(name), spoken, prefix))
    return found


def _map(name: str, localization: Localization, tokens: list[str] | None, prefix: int | None) -> dict[str, Any]:
    scores = _ordered(localization)
    length = max((len(entry) for _, entry in scores), default=0)
    if tokens is not None and len(tokens) != length:
        raise InputError(f"{name}: {len(tokens)} tokens, but {length} positions are scored; name the same passages")
    kinds = dict.fromkeys((str(site.kind), site.layer == OUTSIDE) for site, _ in scores)
    maps = []
    for kind, outside in kinds:
        mine = [(site, entry) for site, entry in scores if (str(site.kind), site.layer == OUTSIDE) == (kind, outside)]
        layers = [None if site.layer == OUTSIDE else site.layer for site, _ in mine]
        maps.append({"kind": kind, "layers": layers, "scores": [entry.tolist() for _, entry in mine]})
    return {"id": name, "length": length, "prefix": prefix, "tokens": tokens, "maps": maps}


def _ordered(localization: Localization) -> list[tuple[Site, Tensor]]:
    return sorted(localization.mean().scores.items())
