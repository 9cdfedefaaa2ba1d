"""How much of what maps read, or write, lies along directions of high and of low curvature, passage by passage.

Source: Merullo et al. 2025, arXiv:2510.24256.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from memloc import progress
from memloc.gradients.curvature import Basis, all_predicting
from memloc.gradients.flows import wide
from memloc.passages import Passages
from memloc.sites import Site
from memloc.view import ModelView

BANDS: Mapping[str, tuple[float, float]] = {
    "top 10%": (0.0, 0.1),
    "10-25%": (0.1, 0.25),
    "25-50%": (0.25, 0.5),
    "bottom 50%": (0.5, 1.0),
}
"""Bands of directions by the rank of their curvature, as shares of their number."""


def bands_of(ranks: int) -> list[slice]:
    """The ranks of each band, of `ranks` in all; together they are all, each rank once."""
    return [slice(round(low * ranks), round(high * ranks)) for low, high in BANDS.values()]


def band_energies(
    view: ModelView,
    passages: Passages,
    bases: Mapping[Site, Basis],
    *,
    energy: Literal["input", "output"] = "input",
    positions: Literal["predicting", "all"] = "predicting",
    size: int = 8,
) -> dict[Site, Tensor]:
    """Mean square of what maps read, or put out, by bands of curvature: site to `[n, bands]`.

    Input: ‖P a‖² with P onto the eigenvectors of A in the band; the bands sum to ‖a‖². Output: ‖U_G (C ∘ M) U_Aᵀ a‖²
    with M the pairs in the band, what that part of the weight writes; what the parts write sums to the whole, bias
    apart, but its squares do not.

    Args:
        view: the model.
        passages: whose tokens.
        bases: of the sites wanted.
        energy: of what the map reads, or of what its parts put out.
        positions: those predicting the suffix, or all but the last token.
        size: passages a batch; no effect.

    Cost: one forward.
    """
    found = {site: torch.zeros(len(passages), len(BANDS), dtype=torch.float64) for site in bases}
    parts = {site: band_maps(view, site, basis, energy) for site, basis in bases.items()}
    for batch in progress.steps(list(view.batches(passages, size=size)), "curvature bands"):
        with torch.no_grad(), view.record(list(bases)) as read:
            view.hidden(batch)
        where = batch.predicting if positions == "predicting" else all_predicting(batch)
        row = where.nonzero()[:, 0]
        for site, maps in parts.items():
            tokens = wide(read[site])[where]
            each = torch.stack([(tokens @ part.to(tokens)).square().sum(1) for part in maps], 1)
            sums = each.new_zeros(len(batch), len(BANDS)).index_add(0, row, each)
            found[site][list(batch.rows)] = (sums / where.sum(1, keepdim=True)).cpu().double()
    return found


def band_maps(view: ModelView, site: Site, basis: Basis, energy: str) -> list[Tensor]:
    """Of each band, a matrix [in, k] that takes what is read to coordinates whose squares sum to the band's energy."""
    if energy == "input":
        return [basis.read[:, band] for band in bands_of(basis.read.shape[1])]
    coordinates = basis.coordinates(view.weight(site).detach().cpu())
    order = basis.curvature().flatten().argsort(descending=True, stable=True)
    found = []
    for band in bands_of(len(order)):
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[band]] = True
        found.append(basis.read @ coordinates.masked_fill(~mask.view_as(coordinates), 0).T)
    return found
