"""Units silenced, scaled or held at a constant, in two forms that are equal: an edit of weights, and hooks.

Neurons and heads speak through columns of an output projection W with bias b. Replacing what flows into column i by
factor · h_i + constant_i is the same as scaling the column by the factor and adding constant_i · W[:, i] to b.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from editors.base import Request
from editors.deltas import Delta, Sparse
from editors.masks import head_columns, weight_masks
from memloc import progress
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.scores import Selection
from memloc.sites import Grain, Site
from memloc.view import ModelView

Mode = Literal["zero", "mean", "scale", "resample"]


@dataclass(frozen=True)
class Silencing:
    """What becomes of the chosen inputs of output projections.

    Attributes:
        chosen: site to bool `[in]`.
        factor: what they are multiplied by.
        constants: site to float64 `[in]`, what is then added at the chosen inputs; empty for nothing.
    """

    chosen: Mapping[Site, Tensor]
    factor: float
    constants: Mapping[Site, Tensor]

    def deltas(self, view: ModelView) -> dict[Site, Delta]:
        """As an edit. Raises InputError where a constant has no bias to go to."""
        found: dict[Site, Delta] = {}
        for site, chosen in self.chosen.items():
            weight = view.weight(site).detach().cpu().float()
            found[site] = Sparse.of(weight * (self.factor - 1.0), chosen.expand(weight.shape))
            if site in self.constants:
                shift = weight.double()[:, chosen] @ self.constants[site][chosen]
                found[_bias(view, site)] = Sparse.of(shift.float(), torch.ones(len(shift), dtype=torch.bool))
        return found

    def hooked(self, view: ModelView) -> AbstractContextManager[None]:
        """As hooks: inside the block the model computes what the edited one does; no bias is needed."""

        def change(site: Site, entering: Tensor) -> Tensor:
            chosen = self.chosen[site].to(entering.device)
            become = entering * self.factor if self.factor else torch.zeros_like(entering)
            if site in self.constants:
                become = become + self.constants[site].to(entering)
            return torch.where(chosen, become, entering)

        return view.replace(list(self.chosen), change)


def silencing(
    view: ModelView, request: Request, mode: Mode, factor: float, grains: tuple[Grain, ...], *, batch_size: int = 16
) -> Silencing:
    """What the selection's units become.

    Raises:
        InputError: no selection, one of another grain, or no text where a mode needs one.
    """
    selection = request.need_selection()
    if selection.grain not in grains:
        expected = " or ".join(f"{grain}s" for grain in grains)
        raise InputError(f"a selection of {selection.grain}s cannot be silenced; expected {expected}")
    chosen = {site: inputs(view, selection, site) for site in weight_masks(view, selection)}
    if mode not in ("mean", "resample"):
        return Silencing(chosen, factor if mode == "scale" else 0.0, {})
    text = request.text or request.retain
    if not text:
        raise InputError(f"mode {mode} needs ordinary text (or passages to retain) to take values from")
    if mode == "mean":
        return Silencing(chosen, 0.0, mean_inputs(view, tuple(chosen), text, size=batch_size))
    return Silencing(chosen, 0.0, drawn_inputs(view, tuple(chosen), text, seed=request.seed))


def check_mode(mode: str, factor: float) -> None:
    """Raises InputError for settings that name no mode or change nothing."""
    if mode not in ("zero", "mean", "scale", "resample"):
        raise InputError(f"mode {mode!r}: expected 'zero', 'mean', 'scale' or 'resample'")
    if mode == "scale" and factor == 1:
        raise InputError("factor 1 changes nothing; give another, 0 silences")


def need_biases(view: ModelView, request: Request, mode: Mode) -> None:
    """Raises InputError, before any forward pass, where a mode needs biases the family does not have."""
    if mode in ("mean", "resample"):
        for site in weight_masks(view, request.need_selection()):
            _bias(view, site)


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


@torch.no_grad()
def drawn_inputs(view: ModelView, sites: tuple[Site, ...], text: Passages, *, seed: int) -> dict[Site, Tensor]:
    """What flows into each site at one token of `text`, drawn evenly from all of them: float64 `[in]`, on the CPU.

    One token for all sites, so that the values belong together. Cost: one forward of the row it lies in.
    """
    lengths = torch.tensor([len(item.ids) for item in text])
    place = int(torch.randint(int(lengths.sum()), (1,), generator=torch.Generator().manual_seed(seed)))
    row = int(torch.searchsorted(lengths.cumsum(0), place, right=True))
    token = place - int(lengths[:row].sum())
    batch = next(view.batches(text[row : row + 1]))
    with view.record(sites, stop=True) as seen:
        view.hidden(batch)
    return {site: seen[site][0, token].double().cpu() for site in sites}


def _bias(view: ModelView, site: Site) -> Site:
    bias = replace(site, bias=True)
    if not view.has(bias):
        raise InputError(f"{site} has no bias to hold a constant; use mode zero or scale, or the hook form")
    return bias
