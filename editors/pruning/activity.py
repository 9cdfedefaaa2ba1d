"""What flows into maps at chosen tokens: how large each input usually is, and in which directions it lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from memloc import progress
from memloc.passages import Passages
from memloc.sites import Site
from memloc.view import ModelView

Tokens = Literal["suffix", "all"]


@torch.no_grad()
def tokens_read(
    view: ModelView, passages: Passages, sites: Sequence[Site], tokens: Tokens, *, size: int = 16
) -> Iterator[dict[Site, Tensor]]:
    """What each site reads, a batch at a time: site to `[k, in]` float64 on the CPU.

    Args:
        view: the model.
        passages: the rows.
        sites: maps of the blocks.
        tokens: "all" real ones, or "suffix": those at which a suffix token is predicted.
        size: rows a batch.
    """
    for batch in progress.steps(list(view.batches(passages, size=size)), "activations"):
        with view.record(sites, stop=True) as seen:
            view.hidden(batch)
        where = batch.predicting if tokens == "suffix" else batch.mask
        yield {site: seen[site][where].double().cpu() for site in sites}


def root_mean_squares(
    view: ModelView,
    passages: Passages,
    sites: Sequence[Site],
    tokens: Tokens,
    *,
    normalized: bool = False,
    size: int = 16,
) -> dict[Site, Tensor]:
    """Root mean square of each input over tokens: site to `[in]` float64.

    A mean over tokens, so that sets of different size compare. `normalized`: every token's vector has length one first.
    """
    sums = {site: torch.zeros(view.weight(site).shape[1], dtype=torch.float64) for site in sites}
    count = 0
    for read in tokens_read(view, passages, sites, tokens, size=size):
        count += len(read[sites[0]])
        for site, rows in read.items():
            found = torch.nn.functional.normalize(rows, dim=1) if normalized else rows
            sums[site] += found.square().sum(0)
    return {site: (total / count).sqrt() for site, total in sums.items()}


def moments_at(
    view: ModelView, passages: Passages, sites: Sequence[Site], tokens: Tokens, *, size: int = 16
) -> dict[Site, Tensor]:
    """Mean of h hᵀ over tokens: site to `[in, in]` float64, not centred."""
    sums: dict[Site, Tensor] = {}
    count = 0
    for read in tokens_read(view, passages, sites, tokens, size=size):
        count += len(read[sites[0]])
        for site, rows in read.items():
            sums[site] = sums[site] + rows.T @ rows if site in sums else rows.T @ rows
    return {site: total / count for site, total in sums.items()}
