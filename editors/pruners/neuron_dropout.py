"""Neuron dropout: silence neurons or heads by editing the columns they speak through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from editors.base import Request
from editors.deltas import Delta, Sparse
from editors.edit import Edit
from editors.masks import digest, head_columns, weight_masks
from memloc import progress
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.provenance import Provenance, settings_of
from memloc.scores import Selection
from memloc.sites import Grain, Site
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class NeuronDropout:
    """Silence the selected neurons (or heads): their columns of the output projection become zero, or smaller.

    The edited model is the model whose activations were replaced: h_i by 0, by factor · h_i, or by its mean μ_i over
    ordinary text. With W the output projection and b its bias, W[:, i] becomes factor · W[:, i], and for the mean also
    b becomes b + Σ_i μ_i W[:, i].

    Attributes:
        mode: "zero"; "scale"; or "mean", over all tokens of `text`, or, without it, of `retain`.
        factor: what "scale" multiplies by; 1 changes nothing and is refused.
        batch_size: rows of a forward pass in "mean"; no effect beyond rounding.

    Cost: none beyond the edit; "mean" one forward over the text, up to the last layer selected.

    Source: Chang et al. 2024, arXiv:2311.09060 (zero). The mean as a bias is exact algebra.
    """

    mode: Literal["zero", "mean", "scale"] = "zero"
    factor: float = 0.5
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.mode not in ("zero", "mean", "scale"):
            raise InputError(f"mode {self.mode!r}: expected 'zero', 'mean' or 'scale'")
        if self.mode == "scale" and self.factor == 1:
            raise InputError("factor 1 changes nothing; give another, 0 silences")

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched.

        Raises:
            InputError: no selection, one that is not of neurons or heads, or "mean" without text or without a bias.
        """
        selection = request.need_selection()
        if selection.grain not in (Grain.NEURON, Grain.HEAD):
            raise InputError(f"a selection of {selection.grain}s cannot be silenced; expected neurons or heads")
        masks = weight_masks(view, selection)
        factor = self.factor if self.mode == "scale" else 0.0
        deltas: dict[Site, Delta] = {}
        for site, mask in masks.items():
            deltas[site] = Sparse.of(_columns(view, site) * (factor - 1.0), mask)
        if self.mode == "mean":
            deltas |= self._shifts(view, request, {site: inputs(view, selection, site) for site in masks})
        given = {**request.inputs(view), "masks": digest(masks)}
        return Edit.of(view, deltas, Provenance("neuron-dropout", settings_of(self), None, given))

    def _shifts(self, view: ModelView, request: Request, chosen: dict[Site, Tensor]) -> dict[Site, Delta]:
        """What the mean activations of the silenced inputs add to each bias."""
        shifts: dict[Site, Delta] = {}
        for site in chosen:
            if not view.has(_bias(site)):
                raise InputError(f"{site} has no bias to hold a mean; use mode zero or scale")
        text = request.text or request.retain
        if not text:
            raise InputError("mode mean needs ordinary text (or passages to retain) to take the mean over")
        for site, mean in mean_inputs(view, tuple(chosen), text, size=self.batch_size).items():
            weight = _columns(view, site).double()
            shift = weight[:, chosen[site]] @ mean[chosen[site]]
            shifts[_bias(site)] = Sparse.of(shift.float(), torch.ones(len(shift), dtype=torch.bool))
        return shifts


def inputs(view: ModelView, selection: Selection, site: Site) -> Tensor:
    """Which inputs of `site` the selection speaks of: bool `[in]`."""
    mask = selection.masks[site]
    return head_columns(view, mask) if selection.grain is Grain.HEAD else mask


@torch.no_grad()
def mean_inputs(view: ModelView, sites: tuple[Site, ...], text: Passages, *, size: int = 16) -> dict[Site, Tensor]:
    """Mean over all tokens of what flows into each site: float64 `[in]`, on the CPU."""
    totals = {site: torch.zeros(view.weight(site).shape[1], dtype=torch.float64) for site in sites}
    count = 0
    for batch in progress.steps(list(view.batches(text, size=size)), "means"):
        with view.record(sites, stop=True) as seen:
            view.hidden(batch)
        count += int(batch.length.sum())
        for site in sites:
            totals[site] += seen[site][batch.mask].double().sum(0).cpu()
    return {site: total / count for site, total in totals.items()}


def _columns(view: ModelView, site: Site) -> Tensor:
    return view.weight(site).detach().cpu().float()


def _bias(site: Site) -> Site:
    return replace(site, bias=True)
