"""A selection becomes weight masks: which entries of which matrices an editor may change.

Neurons and heads live at the input of an output projection, so what they say is a set of its columns; asked for the
whole unit, also the rows that make them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from memloc.errors import InputError, MismatchError
from memloc.provenance import digest_bytes, digest_tensor
from memloc.scores import Selection
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView

Masks = Mapping[Site, Tensor]
Reach = Literal["columns", "unit"]


def weight_masks(view: ModelView, selection: Selection, *, reach: Reach = "columns") -> dict[Site, Tensor]:
    """Which weights a selection speaks of: site to bool, `[out, in]` (a bias: `[out]`), on the CPU.

    A weight is itself; a component or a layer is whole matrices with their biases; a neuron is its column of
    `mlp.out`; a head its `d_head` columns of `attn.out`.

    Args:
        view: the model.
        selection: from any localizer.
        reach: for neurons and heads, "columns" (what the unit says) or "unit": also what makes it, the rows of
            `mlp.in`, `mlp.gate` and of query, key and value with their biases. A key or value shared by several
            heads is taken only if all of them are selected.

    Returns:
        Sites with at least one entry, in order.

    Raises:
        InputError: nothing is selected, or the grain (position, direction) is no set of weights.
        MismatchError: a mask has another shape than its site in this model.
    """
    by_grain: dict[Grain, Callable[[ModelView, Selection, Reach], dict[Site, Tensor]]] = {
        Grain.WEIGHT: _of_weights,
        Grain.COMPONENT: _of_components,
        Grain.LAYER: _of_layers,
        Grain.NEURON: _of_neurons,
        Grain.HEAD: _of_heads,
    }
    if selection.grain not in by_grain:
        known = ", ".join(by_grain)
        raise InputError(f"a selection of {selection.grain}s names no set of weights; expected one of: {known}")
    masks = by_grain[selection.grain](view, selection, reach)
    found = {site: mask for site, mask in sorted(masks.items()) if bool(mask.any())}
    if not found:
        raise InputError(f"the selection of {selection.grain}s is empty, so there is nothing to change")
    return found


def share(view: ModelView, masks: Masks) -> float:
    """Masked entries over all parameters of the model."""
    total = sum(int(parameter.numel()) for parameter in view.model.parameters())
    return sum(int(mask.sum()) for mask in masks.values()) / total


def digest(masks: Masks) -> str:
    """Digest of masks, for provenance."""
    return digest_bytes(*(f"{site}:{digest_tensor(mask)}".encode() for site, mask in sorted(masks.items())))


def head_columns(view: ModelView, mask: Tensor) -> Tensor:
    """A mask over heads `[h]` as one over the inputs of `attn.out`, `[h * d_head]`."""
    return mask.repeat_interleave(view.head_width)


def _of_weights(view: ModelView, selection: Selection, _: Reach) -> dict[Site, Tensor]:
    return {site: _shaped(site, mask, tuple(view.weight(site).shape)) for site, mask in selection.masks.items()}


def _of_components(view: ModelView, selection: Selection, _: Reach) -> dict[Site, Tensor]:
    masks: dict[Site, Tensor] = {}
    for site, mask in selection.masks.items():
        if bool(_shaped(site, mask, ())):
            masks |= _whole(view, site)
    return masks


def _of_layers(view: ModelView, selection: Selection, _: Reach) -> dict[Site, Tensor]:
    masks: dict[Site, Tensor] = {}
    for site, mask in selection.masks.items():
        if bool(_shaped(site, mask, ())):
            for kind in view.kinds:
                masks |= _whole(view, Site(site.layer, kind))
    return masks


def _of_neurons(view: ModelView, selection: Selection, reach: Reach) -> dict[Site, Tensor]:
    masks: dict[Site, Tensor] = {}
    for site, mask in selection.masks.items():
        _at(site, Kind.MLP_OUT, selection.grain)
        _shaped(site, mask, (view.weight(site).shape[1],))
        masks[site] = mask.expand(view.weight(site).shape).clone()
        if reach == "unit":
            for kind in (Kind.MLP_GATE, Kind.MLP_IN):
                masks |= _rows(view, replace(site, kind=kind), mask)
    return masks


def _of_heads(view: ModelView, selection: Selection, reach: Reach) -> dict[Site, Tensor]:
    masks: dict[Site, Tensor] = {}
    for site, mask in selection.masks.items():
        _at(site, Kind.ATTN_OUT, selection.grain)
        _shaped(site, mask, (view.heads,))
        masks[site] = head_columns(view, mask).expand(view.weight(site).shape).clone()
        if reach == "unit":
            shared = mask.view(view.kv_heads, -1).all(1)
            for kind, heads in ((Kind.ATTN_Q, mask), (Kind.ATTN_K, shared), (Kind.ATTN_V, shared)):
                masks |= _rows(view, Site(site.layer, kind), head_columns(view, heads))
    return masks


def _whole(view: ModelView, site: Site) -> dict[Site, Tensor]:
    sites = (site, replace(site, bias=True))
    return {part: torch.ones(view.weight(part).shape, dtype=torch.bool) for part in sites if view.has(part)}


def _rows(view: ModelView, site: Site, mask: Tensor) -> dict[Site, Tensor]:
    if not view.has(site):
        return {}
    bias = replace(site, bias=True)
    found = {site: mask[:, None].expand(view.weight(site).shape).clone()}
    return found | ({bias: mask.clone()} if view.has(bias) else {})


def _at(site: Site, kind: Kind, grain: Grain) -> None:
    if site.kind is not kind or site.bias:
        raise InputError(f"{site}: {grain}s are selected at {kind}")


def _shaped(site: Site, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(mask.shape) != shape:
        raise MismatchError(f"{site}: mask {list(mask.shape)}, expected {list(shape)} in this model")
    return mask
