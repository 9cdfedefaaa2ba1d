"""What is scaled along a path of integrated gradients, and how the residual stream follows.

Either what enters `mlp.out`, and the stream moves in a line; or what leaves `mlp.in`, and the activation function bends
the line. That function is found by arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from memloc.errors import InputError, ModelError
from memloc.proof import TOLERANCE
from memloc.reading.readout import wide
from memloc.running.cached import Prefill
from memloc.sites import Kind, Site
from memloc.view import ModelView

Scaled = Literal["activation", "pre-activation"]


class Way(Protocol):
    """What is scaled along a path, and how the residual stream follows: m coordinates.

    Attributes:
        ends: [l, k, m], where each path ends; a path's gradient by its coordinates, times this, is its integral.
        site: what it scales.
    """

    ends: Tensor
    site: Scaled

    def move(self, layers: Tensor, at: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
        """A leaf to differentiate by, and how far the stream is moved at each α, [i, q, d].

        Args:
            layers: [i], ascending.
            at: [i], indices into the k positions.
            alphas: [i, q].
        """
        ...

    def slope(self, gradient: Tensor) -> Tensor:
        """Gradient by the coordinates [i, m], from the leaf's."""
        ...

    def neurons(self, layer: int, gradient: Tensor) -> Tensor:
        """Scores of a layer's neurons at each position [k, f], from the path's gradient [k, m]."""
        ...


class Straight:
    """α·h enters `mlp.out`: what it writes moves in a line, so d coordinates are enough, those of what it writes."""

    site: Scaled = "activation"

    def __init__(self, view: ModelView, prefill: Prefill, row: Tensor, column: Tensor) -> None:
        self._view = view
        written = torch.stack([prefill.written[layer][row, column] for layer in range(view.layers)])
        self.ends = written.to(wide(view.dtype))
        self._adding = _Adding(view, prefill, (row, column))
        self._said = {layer: prefill.neurons[layer][row, column] for layer in range(view.layers)}

    def move(self, layers: Tensor, at: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
        """See `Way`."""
        written = self.ends[layers, at]
        shift = torch.zeros_like(written).requires_grad_()
        return shift, self._adding.moved(layers, at, shift[:, None] + (alphas[..., None] - 1) * written[:, None])

    def slope(self, gradient: Tensor) -> Tensor:
        """See `Way`."""
        return gradient

    def neurons(self, layer: int, gradient: Tensor) -> Tensor:
        """See `Way`."""
        weight = self._view.weight(Site(layer, Kind.MLP_OUT)).detach().to(gradient)
        return self._said[layer].to(gradient) * (gradient @ weight)


class _Adding:
    """From what `mlp.out` writes to how the stream moves: the same, or a norm of it, or the norm of stream and it."""

    def __init__(self, view: ModelView, prefill: Prefill, where: tuple[Tensor, Tensor]) -> None:
        self._view = view
        normed = range(view.layers) if Kind.MLP_OUT in view.row.added else ()
        self._sums = {layer: total[where] for layer, total in prefill.sums.items()}
        self._out = {layer: view.module(_out(layer))(prefill.neurons[layer][where]).detach() for layer in normed}

    def moved(self, layers: Tensor, at: Tensor, change: Tensor) -> Tensor:
        """How far the stream moves, [i, q, d], when what is written changes by so much; layers ascend."""
        if not self._out and not self._sums:
            return change
        parts = []
        for layer in sorted(set(layers.tolist())):
            here = layers == layer
            if self._sums:
                total = self._sums[layer][at[here]][:, None]
                parts.append(self._normed(layer, (total.to(change) + change[here]).to(total), total).to(change))
                continue
            out = self._out[layer][at[here]][:, None]
            new = self._view.added(_out(layer), (out.to(change) + change[here]).to(out))
            parts.append((new - self._view.added(_out(layer), out)).to(change))
        return torch.cat(parts)

    def _normed(self, layer: int, new: Tensor, total: Tensor) -> Tensor:
        """How far the norm of the sum moves when the sum does."""
        none = torch.zeros_like(total)
        return self._view.joined(_out(layer), new, none) - self._view.joined(_out(layer), total, none)


def _out(layer: int) -> Site:
    return Site(layer, Kind.MLP_OUT)


class Bent:
    """α·z leaves `mlp.in`, and the activation function bends the path: f coordinates, those of z."""

    site: Scaled = "pre-activation"

    def __init__(self, view: ModelView, prefill: Prefill, before: Tensor, where: tuple[Tensor, Tensor]) -> None:
        dtype = wide(view.dtype)
        self._adding = _Adding(view, prefill, where)
        self.ends = before.to(dtype)
        self._weights = [view.weight(Site(layer, Kind.MLP_OUT)).detach() for layer in range(view.layers)]
        self._said = [prefill.neurons[layer][where].to(dtype) for layer in range(view.layers)]
        self._bends = [activation_of(view, layer, before[layer], prefill.neurons[layer][where])
                       for layer in range(view.layers)]  # fmt: skip

    def move(self, layers: Tensor, at: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
        """See `Way`."""
        leaf = (alphas[..., None] * self.ends[layers, at][:, None]).requires_grad_()
        parts = []
        # Stretches come by ascending layer, so the parts join in order.
        for layer in sorted(set(layers.tolist())):
            here = layers == layer
            change = self._bends[layer](leaf[here]) - self._said[layer][at[here]][:, None]
            parts.append(change @ self._weights[layer].to(change).T)
        return leaf, self._adding.moved(layers, at, torch.cat(parts))

    def slope(self, gradient: Tensor) -> Tensor:
        """See `Way`."""
        return gradient.sum(1)

    def neurons(self, layer: int, gradient: Tensor) -> Tensor:
        """See `Way`."""
        return self.ends[layer] * gradient


def activation_of(view: ModelView, layer: int, before: Tensor, after: Tensor) -> Callable[[Tensor], Tensor]:
    """The function that makes a layer's neurons of what leaves its `mlp.in`: found by arithmetic, not by name.

    Raises:
        ModelError: no module of the block without parameters turns `before` into `after`.
    """
    allowed = TOLERANCE.get(view.dtype, 1e-4) * max(1.0, float(after.abs().max()))
    for module in _functions(view.block(layer)):
        with torch.no_grad(), contextlib.suppress(TypeError):
            made = module(before)
            if made.shape == after.shape and float((made - after).abs().max()) <= allowed:
                return module
    raise ModelError(f"L{layer}: no module turns what leaves mlp.in into what enters mlp.out; take the activation site")


def _functions(block: nn.Module) -> Iterator[nn.Module]:
    for module in block.modules():
        if not any(True for _ in (*module.children(), *module.parameters(), *module.buffers())):
            yield module


def pre_activations(view: ModelView) -> tuple[Site, ...]:
    """The maps whose output is the neurons' pre-activation, one a layer.

    Raises:
        InputError: neurons are products of two maps (gated), or the family has no `mlp.in` of its own.
    """
    gated = view.has(Site(0, Kind.MLP_GATE))
    entrances = view.sites(Kind.MLP_IN)
    whole = len(entrances) == view.layers and view.place(entrances[0]).rows is None
    if gated or not whole:
        why = "a gated neuron is a product of two maps and has no one pre-activation" if gated else "mlp.in is fused"
        raise InputError(f"pre-activation: {view.row.family} has none, {why}; take the activation site")
    return entrances
