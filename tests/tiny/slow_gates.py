"""Slow references for gates on neurons and heads: a copy of the model with weights scaled, whole forwards."""

from __future__ import annotations

import torch
from torch import Tensor

from memloc.sites import Kind, Site


def without(view, site: Site, units) -> object:
    """A copy of `view` in which those neurons (at mlp.out) or heads (at attn.out) are not read: no hook is involved."""
    changed = view.copy()
    weight = view.weight(site).detach().clone()
    width = view.head_width if site.kind is Kind.ATTN_OUT else 1
    for unit in units:
        weight[:, unit * width : (unit + 1) * width] = 0
    changed.place(site).write(changed.parameter(site).data, weight)
    return changed


@torch.no_grad()
def slow_nll(view, item) -> float:
    """Mean suffix NLL by the model's own logits, one passage, no padding."""
    ids = torch.tensor([item.ids])
    spoken = view.model(ids, use_cache=False).logits[0, len(item.prefix) - 1 : -1].log_softmax(-1)
    return float(-spoken[range(len(item.suffix)), list(item.suffix)].double().mean())


def slow_zero_out(view, item, site: Site, units) -> Tensor:
    """Rise of the NLL without each unit alone, float64."""
    clean = slow_nll(view, item)
    return torch.tensor([slow_nll(without(view, site, [unit]), item) - clean for unit in units], dtype=torch.float64)
