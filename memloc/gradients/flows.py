"""One forward and one backward: what flows through maps, and the gradient of a loss by it. Many methods live on this.

A loss that is a sum over rows has, by a row's activations, that row's own gradient: a batch gives every passage its own
numbers from one backward pass, exactly. No parameter needs a gradient, so none is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.objectives import suffix_nll
from memloc.sites import Kind, Site
from memloc.view import ModelView

Loss = Callable[[ModelView, Batch], Tensor]
"""A differentiable loss of each row, [n]."""


@dataclass(frozen=True)
class Flow:
    """What passed one place, and the gradient of the summed loss by it: each [n, t, width], in the model's dtype."""

    value: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Flows:
    """One batch, forward and backward. Made by `flows`.

    Attributes:
        loss: [n], of each row.
        inputs: site to what entered its map.
        outputs: site to what its map put out; of a fused map its own columns only, [n, t, out].
        blocks: layer to the residual stream after the block.
    """

    loss: Tensor
    inputs: Mapping[Site, Flow] = field(default_factory=dict)
    outputs: Mapping[Site, Flow] = field(default_factory=dict)
    blocks: Mapping[int, Flow] = field(default_factory=dict)


def flows(
    view: ModelView,
    batch: Batch,
    *,
    inputs: Sequence[Site] = (),
    outputs: Sequence[Site] = (),
    blocks: Sequence[int] = (),
    loss: Loss = suffix_nll,
) -> Flows:
    """Run `batch` forward and backward, and keep what passed the places named.

    Gradients by an input are of everything that reads the same tensor: exact for `attn.out` and `mlp.out`, which read
    theirs alone; of `attn.q` and its like take the outputs.

    Cost: one forward and one backward; memory of all activations, twice that at the places kept.
    """
    with (
        torch.enable_grad(),
        view.frozen(),
        view.record(inputs, grad=True) as entering,
        view.record(outputs, side="output", grad=True) as leaving,
        view.record_blocks(blocks, grad=True) as streams,
    ):
        rows = loss(view, batch)
        places = [*entering.values(), *leaving.values(), *streams.values()]
        found = iter(torch.autograd.grad(rows.sum(), places))
    into = {site: Flow(tensor.detach(), next(found)) for site, tensor in entering.items()}
    out = {site: Flow(tensor.detach(), next(found)) for site, tensor in leaving.items()}
    stream = {layer: Flow(tensor.detach(), next(found)) for layer, tensor in streams.items()}
    return Flows(rows.detach(), into, {site: _own(view, site, flow) for site, flow in out.items()}, stream)


def removal_effects(view: ModelView, batch: Batch, sites: Sequence[Site], *, loss: Loss = suffix_nll) -> Effects:
    """First-order estimate of what silencing each neuron, or entry of a head, at all positions adds to each row's loss.

    That is, minus the sum over positions of h · ∂loss/∂h: gradient times activation. Exact where the loss is linear.

    Args:
        view: the model.
        batch: the rows.
        sites: of `mlp.out` (neurons enter it) and `attn.out` (heads do).
        loss: of each row; by default the suffix's nats per token.

    Returns:
        The loss of each row [n], and site to [n, width], float32 (float64 stays).

    Cost: one forward and one backward for all sites together.
    """
    found = flows(view, batch, inputs=sites, loss=loss)
    return found.loss, {site: -(wide(flow.value) * wide(flow.gradient)).sum(1) for site, flow in found.inputs.items()}


Effects = tuple[Tensor, dict[Site, Tensor]]


def wide(tensor: Tensor) -> Tensor:
    """In the dtype of arithmetic: float32, or float64 where it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def without_bias(view: ModelView, site: Site, output: Tensor) -> Tensor:
    """What the weight alone makes of its input: an output of `site`, its own columns, less the bias."""
    bias = Site(site.layer, site.kind, bias=True)
    return output - view.weight(bias).detach().to(output) if view.has(bias) else output


def by_head(view: ModelView, kind: Kind, entries: Tensor) -> Tensor:
    """The last axis as [heads, head width]; a head of a group shows its group's keys and values."""
    many = view.kv_heads if kind in (Kind.ATTN_K, Kind.ATTN_V) else view.heads
    return entries.reshape(*entries.shape[:-1], many, view.head_width).repeat_interleave(view.heads // many, -2)


def _own(view: ModelView, site: Site, flow: Flow) -> Flow:
    rows = view.place(site).shown
    if rows is None:
        return flow
    part = rows if isinstance(rows, slice) else list(rows)
    return Flow(flow.value[..., part], flow.gradient[..., part])
