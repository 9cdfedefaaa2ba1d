"""Parts of a map taken out in other coordinates than its own: which maps, what is left, and the smallest delta for it.

A weight is C = Aᵀ W B in two orthonormal bases, of what it writes and of what it reads; a pruner says which entries of
C go, and what is added to the weight is minus those, back in its own coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from editors.deltas import Delta, Dense, LowRank, Sparse
from editors.masks import weight_masks
from memloc.errors import InputError
from memloc.provenance import digest_json, digest_tensor
from memloc.scores import Selection
from memloc.sites import Kind, Site, kinds_named
from memloc.view import ModelView


def chosen_maps(
    view: ModelView, selection: Selection | None, *, kinds: str | None, layers: tuple[int, ...], usual: tuple[Kind, ...]
) -> dict[Site, Tensor | None]:
    """The weights of blocks to work on, each with the entries that may change (None: all).

    Args:
        view: the model.
        selection: places from a localizer, of any grain that names weights; or None.
        kinds: only these maps, as "mlp.in,mlp.out"; by default those selected, or, with no selection, `usual`.
        layers: only these; empty for all.
        usual: kinds taken where neither a selection nor `kinds` says which.

    Raises:
        InputError: no such layer or kind, or nothing is left.
    """
    for layer in layers:
        if not 0 <= layer < view.layers:
            raise InputError(f"layer {layer}: the model has {view.layers}, counted from 0")
    wanted = kinds_named(kinds) if kinds else view.kinds if selection else usual
    found: dict[Site, Tensor | None] = dict.fromkeys(view.sites(*(kind for kind in view.kinds if kind in wanted)))
    if selection is not None:
        masks = weight_masks(view, selection)
        found = {site: None if bool(masks[site].all()) else masks[site] for site in found if site in masks}
    found = {site: mask for site, mask in found.items() if not layers or site.layer in layers}
    if not found:
        where = f"layers {', '.join(map(str, layers))}" if layers else "any layer"
        raise InputError(f"no map of kinds {', '.join(wanted)} in {where} is left to prune; widen kinds or selection")
    return found


def maps_digest(maps: Mapping[Site, Tensor | None]) -> str:
    """Digest of which maps, and which of their entries, for provenance."""
    return digest_json({str(site): None if mask is None else digest_tensor(mask) for site, mask in maps.items()})


def taken_out(write: Tensor, coordinates: Tensor, read: Tensor) -> Delta:
    """- write @ coordinates @ readᵀ in the smaller of two forms: factors where few rows or columns are not zero.

    Args:
        write: [out, a] directions written, as columns; float64.
        coordinates: [a, b], what goes; zero where it stays.
        read: [in, b] directions read, as columns.
    """
    rows, columns = coordinates.any(1), coordinates.any(0)
    core, left, right = coordinates[rows][:, columns], write[:, rows], read[:, columns]
    rank, (out, into) = min(core.shape), (len(write), len(read))
    if rank * (out + into) < out * into:
        if core.shape[0] <= core.shape[1]:
            return LowRank(-left.float(), (core @ right.T).float())
        return LowRank(-(left @ core).float(), right.T.float())
    return Dense(-(left @ core @ right.T).float())


def inside(delta: Delta, mask: Tensor | None) -> Delta:
    """`delta` on the entries of `mask` only; all of it where that is None."""
    return delta if mask is None else Sparse.of(delta.dense(), mask)


def most_of(values: Tensor, share: float) -> Tensor:
    """Mask of the fewest entries of `values` (none below 0) whose sum is `share` of the whole, largest first.

    Raises:
        InputError: share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise InputError(f"share {share}: expected between 0 and 1")
    falling, order = values.flatten().sort(descending=True, stable=True)
    before = falling.cumsum(0) - falling
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order] = before < share * falling.sum()
    return mask.view(values.shape)


def dearest(gain: Tensor, price: Tensor, budget: float) -> Tensor:
    """Mask of the entries with the most gain per price, in falling order, while their prices sum to at most `budget`.

    The greedy answer to "most gain within a budget": no other set of the same price gains more. Entries that gain
    nothing are never taken. The first that does not fit ends it.

    Args:
        gain: any shape; only entries above 0 are taken.
        price: same shape, 0 or more.
        budget: in units of price.
    """
    useful = (gain > 0).flatten()
    ratio = (gain / price.clamp_min(torch.finfo(price.dtype).tiny)).flatten().masked_fill(~useful, -torch.inf)
    order = ratio.argsort(descending=True, stable=True)
    spent = price.flatten()[order].cumsum(0)
    mask = torch.zeros(gain.numel(), dtype=torch.bool)
    mask[order] = (spent <= budget) & useful[order]
    return mask.view(gain.shape)


def told(deltas: Mapping[Site, Delta], view: ModelView) -> dict[str, float]:
    """For the notes: Frobenius norm of what every delta takes out over that of its weight."""
    return {
        str(site): delta.norm() / max(float(view.weight(site).detach().double().norm()), 1e-30)
        for site, delta in deltas.items()
    }
