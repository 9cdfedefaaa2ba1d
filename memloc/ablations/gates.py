"""Gates: one number a neuron or head, by which what it says is multiplied. 1 leaves it, 0 silences it.

Neurons are gated where they enter `mlp.out`, heads where they enter `attn.out`, in every family alike. The loss's
gradient by the gates at 1 is gradient times activation for all of them in one backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.errors import InputError
from memloc.objectives import suffix_nll
from memloc.scores import Selection
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView


def gate_sites(view: ModelView, grain: Grain | str) -> tuple[Site, ...]:
    """Where units of `grain` are gated, one site a layer.

    Raises:
        InputError: neither neurons nor heads.
    """
    if grain not in (Grain.NEURON, Grain.HEAD):
        raise InputError(f"{grain}s have no gates; expected neurons or heads")
    return view.sites(Kind.MLP_OUT if grain == Grain.NEURON else Kind.ATTN_OUT)


def gate_count(view: ModelView, grain: Grain | str) -> int:
    """How many units of `grain` a layer has."""
    return view.neurons if grain == Grain.NEURON else view.heads


def gated(view: ModelView, gates: Mapping[Site, Tensor]) -> AbstractContextManager[None]:
    """Multiply what enters each site by its gates; differentiable in both.

    Gates compose: with those of a `with` around this one, with hooks of whatever runs inside, which sees what is left.

    Args:
        view: the model; its weights are not touched.
        gates: site to `[u]`, for every row and position, or `[n, u]`, a row each; u is the site's neurons or heads.
    """

    def change(site: Site, entering: Tensor) -> Tensor:
        gate = gates[site].to(entering)
        gate = gate if gate.dim() == 1 else gate[:, None]
        units = entering.view(*entering.shape[:-1], gate.shape[-1], -1)
        return (units * gate[..., None]).flatten(-2)

    return view.replace(gates, change)


def silenced(view: ModelView, selection: Selection) -> AbstractContextManager[None]:
    """The model without the selected neurons or heads, for as long as the block runs; no weight is written.

    Raises:
        InputError: a selection of something else, or of sites where such units do not enter.
    """
    known = gate_sites(view, selection.grain)
    for site in selection.masks:
        if site not in known:
            raise InputError(f"{site}: {selection.grain}s are not gated there, but at {known[0].kind}")
    return gated(view, {site: (~mask).to(view.device, torch.float32) for site, mask in selection.masks.items()})


def gate_gradients(view: ModelView, batch: Batch, grain: Grain | str = Grain.NEURON) -> Tensor:
    """The gradient of each row's mean suffix NLL by its own gates, all at 1: `[n, l, u]`, nats per token.

    Minus that is the first-order estimate of what silencing the unit at all positions adds to the NLL.
    float32, or float64 where the model is. Cost: one forward and one backward of the batch.
    """
    sites = gate_sites(view, grain)
    kind = torch.float64 if view.dtype == torch.float64 else torch.float32
    with view.frozen(), torch.enable_grad():
        gates = torch.ones(len(batch), len(sites), gate_count(view, grain), dtype=kind, device=view.device)
        gates.requires_grad_()
        with gated(view, dict(zip(sites, gates.unbind(1), strict=True))):
            loss = suffix_nll(view, batch).sum()
        (slope,) = torch.autograd.grad(loss, gates)
    return slope
