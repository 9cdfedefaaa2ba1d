"""How far edits may carry a map: its whole change, edits already made included, against its own norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from editors.deltas import Delta, LowRank, add
from editors.edit import Edit
from memloc.errors import InputError
from memloc.sites import Site
from memloc.view import ModelView


def limited(
    view: ModelView, deltas: Mapping[Site, LowRank], past: Iterable[Edit], growth: float | None
) -> tuple[dict[Site, LowRank], list[dict[str, Any]]]:
    """The deltas, scaled down where they would carry a map too far, and a note for each map.

    Args:
        view: the model, which holds `past`.
        deltas: what is to be added.
        past: edits it holds.
        growth: largest ‖all changes‖ / ‖weight now‖; None for no limit.

    Returns:
        Deltas, and for each site its growth by this edit and in all, with the factor it was scaled by where it was.

    Raises:
        InputError: the edits already made are beyond the limit.
    """
    final, notes, earlier = {}, [], tuple(past)
    for site, delta in deltas.items():
        norm = max(float(view.weight(site).detach().double().norm()), 1e-300)
        before = [edit.deltas[site] for edit in earlier if site in edit.deltas]
        so_far = _norm(before) / norm
        if growth is not None and so_far >= growth:
            found = f"{site}: edits already made are {so_far:.2g} of the weight's norm, the limit is {growth:.2g}"
            raise InputError(f"{found}; undo some, or raise growth")
        factor = 1.0 if growth is None else _fitting(before, delta, growth * norm)
        final[site] = delta if factor == 1 else LowRank(delta.left * factor, delta.right)
        note = {"site": str(site), "norm": final[site].norm() / norm, "grown": _norm([*before, final[site]]) / norm}
        notes.append(note | ({"scaled by": factor} if factor < 1 else {}))
    return final, notes


def _norm(deltas: list[Delta]) -> float:
    if not deltas:
        return 0.0
    total = deltas[0]
    for delta in deltas[1:]:
        total = add(total, delta)
    return total.norm()


def _fitting(before: list[Delta], delta: LowRank, most: float) -> float:
    """The largest factor, up to 1, with which `delta` stays within `most`."""
    if _norm([*before, delta]) <= most:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        fits = _norm([*before, LowRank(delta.left * middle, delta.right)]) <= most
        low, high = (middle, high) if fits else (low, middle)
    return low
