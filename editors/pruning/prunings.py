"""What pruners of single weights share: where they may prune, how many, which score highest, and the edit that results.

A pruner scores the weights it may prune; the best-scored share of them becomes zero. The share is always of the
weights that may be pruned: all of the chosen kinds, or, with a selection, those the selection names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from editors.base import Request
from editors.deltas import Delta, Sparse
from editors.edit import Edit
from editors.masks import Masks, digest, share, weight_masks
from memloc.errors import InputError, ModelError
from memloc.passages import Passages
from memloc.provenance import Provenance
from memloc.sites import Kind, Site
from memloc.view import ModelView

Kinds = Literal["mlp", "mlp-out", "attention", "all"]
Among = Literal["matrix", "row", "model"]
Scores = Mapping[Site, Tensor]

_MLP = (Kind.MLP_IN, Kind.MLP_GATE, Kind.MLP_OUT)
_ATTENTION = (Kind.ATTN_Q, Kind.ATTN_K, Kind.ATTN_V, Kind.ATTN_OUT)
KINDS: dict[str, tuple[Kind, ...]] = {
    "mlp": _MLP, "mlp-out": (Kind.MLP_OUT,), "attention": _ATTENTION, "all": (*_ATTENTION, *_MLP),
}  # fmt: skip


def allowed(view: ModelView, request: Request, kinds: Kinds) -> dict[Site, Tensor]:
    """Which weights may be pruned: site to bool `[out, in]`, on the CPU.

    Those the request's selection names; without one, every weight of the maps of `kinds`. Biases are never pruned.

    Raises:
        InputError: the selection names no weight of a matrix inside a block.
    """
    if request.selection is None:
        return {site: torch.ones(view.weight(site).shape, dtype=torch.bool) for site in view.sites(*KINDS[kinds])}
    masks = {site: mask for site, mask in weight_masks(view, request.selection).items() if not site.bias}
    for site in masks:
        if not site.kind.in_block:
            raise InputError(f"{site}: only maps inside blocks can be pruned; take it out of the selection")
    if not masks:
        raise InputError("the selection names biases only, and biases are never pruned")
    return masks


def highest(scores: Scores, where: Masks, part: float, among: Among) -> dict[Site, Tensor]:
    """The best-scored `part` of the entries of `where`: site to bool, empty sites left out.

    Ties go to the earlier site, then the earlier entry. Exactly ⌊part · n⌋ are taken of the n entries of every matrix,
    of every row, or of the model.

    Args:
        scores: larger is pruned first; of the same shapes as `where`.
        where: the entries that compete.
        part: of them, in (0, 1].
        among: what competes with what.

    Raises:
        InputError: so small a part that nothing is pruned.
        ModelError: a score that is not finite (the site is named).
    """
    for site, mask in where.items():
        if not bool(torch.isfinite(scores[site][mask]).all()):
            raise ModelError(f"{site}: scores that are not finite; the model's loss or activations overflow")
    if among == "model":
        found = _apart(where, _top(_joined(scores, where), part))
    else:
        best = _top_of_rows if among == "row" else _top_of_matrix
        found = {site: best(scores[site], mask, part) for site, mask in sorted(where.items())}
    found = {site: mask for site, mask in found.items() if bool(mask.any())}
    if not found:
        total = sum(int(mask.sum()) for mask in where.values())
        raise InputError(f"a share of {part:g} of {total} weights, taken per {among}, is none; ask for more")
    return found


def largest(flat: Tensor, count: int) -> Tensor:
    """The `count` largest as bool `[n]`, the earlier among equals, in O(n)."""
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    if count:
        least = flat.kthvalue(len(flat) - count + 1).values
        chosen = flat > least
        chosen[(flat == least).nonzero()[: count - int(chosen.sum()), 0]] = True
    return chosen


def randomly(where: Masks, counts: Mapping[Site, int], seed: int) -> dict[Site, Tensor]:
    """So many entries of `where` at each site, drawn without replacement."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for site, mask in sorted(where.items()):
        places = mask.reshape(-1).nonzero()[:, 0]
        flat = torch.zeros(mask.numel(), dtype=torch.bool)
        flat[places[torch.randperm(len(places), generator=generator)[: counts[site]]]] = True
        if bool(flat.any()):
            found[site] = flat.view(mask.shape)
    return found


def how_many(part: float, count: int) -> int:
    """⌊part · count⌋, where a product that is whole but for rounding counts as whole."""
    return min(count, int(part * count * (1 + 1e-12) + 1e-9))


def check_share(part: float) -> None:
    """Raises InputError for a share outside (0, 1]."""
    if not 0 < part <= 1:
        raise InputError(f"share {part}: expected above 0 and at most 1")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raises InputError for a value that is none of a Literal's."""
    known = get_args(choices)
    if value not in known:
        raise InputError(f"{name} {value!r}: expected one of {', '.join(map(str, known))}")


def check_budget(part: float, kinds: str, among: str = "matrix") -> None:
    """Raises InputError for settings of a budget that no pruner can have."""
    check_share(part)
    check_choice("kinds", kinds, Kinds)
    check_choice("among", among, Among)


def kept_rows(request: Request) -> Passages | None:
    """Passages to retain and ordinary text, together; None where neither was given.

    Raises:
        InputError: one of them is also to be forgotten.
    """
    gone = {item.ids for item in request.forget or ()}
    rows = []
    for name, part in (("retain", request.retain), ("text", request.text)):
        for item in part or ():
            if item.ids in gone:
                raise InputError(f"passage {item.id!r} is both to forget and to keep; take it out of one set")
            rows.append(replace(item, id=f"{name}: {item.id}"))
    return Passages(tuple(rows), "kept") if rows else None


def need_text(request: Request) -> Passages:
    """Ordinary text, or, without it, the passages to retain.

    Raises:
        InputError: neither was given.
    """
    text = request.text or request.retain
    if not text:
        raise InputError("this editor needs ordinary text (or passages to retain) to compare with; none was given")
    return text


def zeroed(view: ModelView, masks: Masks) -> dict[Site, Delta]:
    """The deltas that make the entries of `masks` zero: minus the weights there."""
    return {site: Sparse.of(-view.weight(site).detach().cpu().float(), mask) for site, mask in masks.items()}


def pruning(
    view: ModelView,
    masks: Masks,
    method: str,
    settings: dict[str, Any],
    request: Request,
    *,
    deltas: Mapping[Site, Delta] | None = None,
    notes: Mapping[str, Any] | None = None,
    counted: bool = True,
) -> Edit:
    """The edit that prunes `masks`.

    Args:
        view: the model.
        masks: what is pruned.
        method: the pruner's name.
        settings: its settings.
        request: what it was asked.
        deltas: where more than the pruned weights change.
        notes: beside the counts.
        counted: whether `masks` become zero; where they are only what changes, nothing is counted as pruned.
    """
    inputs = {**request.inputs(view), "masks": digest(masks)}
    if request.selection is not None:
        inputs["selection"] = digest(weight_masks(view, request.selection))
    dead = sum(int((view.weight(site).detach().cpu()[mask] == 0).sum()) for site, mask in masks.items())
    counts: dict[str, Any] = {
        "pruned": sum(int(mask.sum()) for mask in masks.values()),
        "zero before": dead,
        "share of the model": share(view, masks),
        "by site": {str(site): int(mask.sum()) for site, mask in sorted(masks.items())},
    }
    if not counted:
        counts = {}
    provenance = Provenance(method, settings, request.seed, inputs)
    return Edit.of(
        view, zeroed(view, masks) if deltas is None else deltas, provenance, notes={**counts, **(notes or {})}
    )


def _joined(scores: Scores, where: Masks) -> Tensor:
    return torch.cat([scores[site][mask].reshape(-1) for site, mask in sorted(where.items())])


def _apart(where: Masks, chosen: Tensor) -> dict[Site, Tensor]:
    """A flat choice among the entries of `where` as masks."""
    sites, found = sorted(where), {}
    parts = torch.split(chosen, [int(where[site].sum()) for site in sites])
    for site, part in zip(sites, parts, strict=True):
        mask = torch.zeros_like(where[site])
        mask[where[site]] = part
        found[site] = mask
    return found


def _top(flat: Tensor, part: float) -> Tensor:
    return largest(flat, how_many(part, len(flat)))


def _top_of_matrix(scores: Tensor, mask: Tensor, part: float) -> Tensor:
    found = torch.zeros_like(mask)
    found[mask] = _top(scores[mask], part)
    return found


def _top_of_rows(scores: Tensor, mask: Tensor, part: float) -> Tensor:
    """Row by row, all at once: an entry is taken if fewer than its row's count rank before it."""
    counts = torch.tensor([how_many(part, size) for size in mask.sum(1).tolist()])
    order = scores.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return (rank < counts[:, None]) & mask
