"""Gradients by the weights of maps: summed over batches, or only their norms, passage by passage, never formed whole.

The gradient of a passage's loss by a map is g = Σ_t δ_t a_tᵀ: a_t [in] what the map reads, δ_t [out] the gradient by
what it puts out. One batched backward pass holds every passage's a and δ. The squared norm of row i of g is
δ_iᵀ (a aᵀ) δ_i with the t × t Gram matrix of what was read, so that rows, and with a and δ exchanged columns, cost
t² (in + out) and no matrix of the weight's size; where t is large, forming one passage's g and summing its squares is
the cheaper way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.gradients.flows import Loss, flows, wide
from memloc.gradients.folding import Convention, centred, reading
from memloc.objectives import suffix_nll
from memloc.sites import Site
from memloc.view import ModelView

Gradients = dict[Site, Tensor]
"""Site to gradient by its weight, [out, in]."""
CHUNK = 2**22
"""Entries of gradients formed at a time where forming them is cheaper: about 16 MB in float32."""


@dataclass(frozen=True)
class Pull:
    """How a batch pulls on one map; in the model's dtype.

    Attributes:
        read: [n, t, in], what the map reads.
        pull: [n, t, out], the gradient of each row's loss by what it puts out; 0 where padded.
    """

    read: Tensor
    pull: Tensor

    def gradient(self) -> Tensor:
        """Gradient of the summed loss by the weight, [out, in], float32 (float64 stays)."""
        return wide(self.pull).flatten(0, 1).T @ wide(self.read).flatten(0, 1)

    def rows(self) -> Tensor:
        """Squared norms of the rows of each passage's gradient, [n, out]."""
        return squared_row_norms(wide(self.read), wide(self.pull))

    def columns(self) -> Tensor:
        """Squared norms of its columns, [n, in]."""
        return squared_row_norms(wide(self.pull), wide(self.read))


def pulls(
    view: ModelView,
    batch: Batch,
    sites: Sequence[Site],
    *,
    convention: Convention = "raw",
    loss: Loss = suffix_nll,
) -> tuple[Tensor, dict[Site, Pull]]:
    """The loss of each row, and how each pulls on the maps of `sites`; fused maps are split.

    Cost: one forward and one backward; memory of all activations and of (in + out) numbers a token and site.

    Raises:
        ModelError: folded, in a family whose row knows no norms.
    """
    with reading(view, sites, convention) as read:
        found = flows(view, batch, outputs=sites, loss=loss)
    reads = read()
    pulled = {site: found.outputs[site].gradient for site in sites}
    if convention == "folded":
        pulled = centred(view, pulled)
    return found.loss, {site: Pull(reads[site], pulled[site]) for site in sites}


def squared_row_norms(read: Tensor, written: Tensor) -> Tensor:
    """Squared norms of the rows of Σ_t written_t read_tᵀ, of every passage: [n, out].

    The Gram form errs by rounding of about eps times the square of Σ_t ‖written_t‖‖read_t‖: a row whose terms cancel to
    less than sqrt(eps) of that is lost in it, in either form nearly so.

    Args:
        read: [n, t, in].
        written: [n, t, out].
    """
    tokens, narrow, broad = read.shape[1], read.shape[2], written.shape[2]
    if by_gram(tokens, narrow, broad):
        gram = read @ read.mT
        return ((gram @ written) * written).sum(1).clamp_min(0)
    step = max(1, CHUNK // (narrow * broad))
    parts = zip(torch.split(read, step), torch.split(written, step), strict=True)
    return torch.cat([(part.mT @ entry).square().sum(-1) for entry, part in parts])


def by_gram(tokens: int, narrow: int, broad: int) -> bool:
    """Whether the Gram matrix takes fewer multiplications than the gradient itself."""
    return tokens * (narrow + broad) < narrow * broad


class Gathered:
    """Gradients of a sum of losses, in float32 (float64 stays), one buffer a stored parameter."""

    def __init__(self, view: ModelView, sites: Sequence[Site]) -> None:
        self._view = view
        self._places = {site: view.place(site) for site in sites}
        self._parameters = {self._places[site].parameter: view.parameter(site) for site in sites}
        self._sums: dict[str, Tensor] = {}

    def add(self, batch: Batch, loss: Loss) -> float:
        """Add the gradient of a batch's loss, and say what it is; no `.grad` is touched."""
        with self._view.trainable(list(self._parameters.values())):
            total = loss(self._view, batch).sum()
            found = torch.autograd.grad(total, list(self._parameters.values()))
        for name, part in zip(self._parameters, found, strict=True):
            self._sums[name] = self._sums[name] + wide(part) if name in self._sums else wide(part)
        return float(total.detach())

    def by_site(self) -> Gradients:
        """Site to gradient, [out, in]."""
        return {site: place.read(self._sums[place.parameter]) for site, place in self._places.items()}


class GatheredFolded(Gathered):
    """The same by folded weights, which no parameter holds: from what maps read and what pulls on them."""

    def __init__(self, view: ModelView, sites: Sequence[Site]) -> None:
        self._view, self._sites = view, sites
        self._found: Gradients = {}

    def add(self, batch: Batch, loss: Loss) -> float:
        """Add the gradient of a batch's loss, and say what it is."""
        total, pulled = pulls(self._view, batch, self._sites, convention="folded", loss=loss)
        for site, part in pulled.items():
            found = part.gradient()
            self._found[site] = self._found[site] + found if site in self._found else found
        return float(total.sum())

    def by_site(self) -> Gradients:
        """Site to gradient, [out, in]."""
        return self._found
