"""Planted memory: a model in which one neuron, written by hand, alone carries a suffix. No training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memloc.errors import InputError
from memloc.passages import Passage, Passages
from memloc.sites import OUTSIDE, Kind, Site
from memloc.view import ModelView


@dataclass(frozen=True)
class Planted:
    """A model with a known answer.

    Attributes:
        view: the model; a copy, the one it was made from is untouched.
        passages: what it recites, each with the suffix the neuron carries.
        controls: passages of tokens that leave the neuron silent.
        site: the `mlp.out` the neuron enters.
        neuron: its index.
    """

    view: ModelView
    passages: Passages
    controls: Passages
    site: Site
    neuron: int


@torch.no_grad()
def plant(view: ModelView, *, layer: int = 1, neuron: int = 7, count: int = 4, seed: int = 0) -> Planted:
    """Write into a copy of `view` one neuron that alone carries the suffix of some passages.

    Two directions of the residual stream are cleared of everything else. Tokens of the passages point along the
    first, all others against it, and the neuron's incoming weights read it: the gate. Its outgoing weights write the
    second, which only the suffix token's unembedding reads. All other maps of the blocks are made small.

    Args:
        view: a model whose unembedding is not tied to its embedding; random weights will do.
        layer: where.
        neuron: which.
        count: passages, and controls.
        seed: of a generator of its own.

    Raises:
        InputError: tied embeddings, or no such layer or neuron.
    """
    site = Site(layer, Kind.MLP_OUT)
    if not view.has(site) or not 0 <= neuron < view.neurons:
        raise InputError(f"neuron {neuron} at {site}: the model has {view.layers} layers of {view.neurons}")
    if view.tied(view.place(Site(OUTSIDE, Kind.EMBED)).parameter):
        raise InputError("the embedding is tied to the unembedding; planting needs the two apart")
    generator = torch.Generator().manual_seed(seed)
    view = view.copy()
    words = torch.randperm(view.vocab, generator=generator).tolist()
    target, known, strange = words[0], words[1 : len(words) // 2], words[len(words) // 2 :]
    passages = _passages(known, target, count, "planted", generator)
    controls = _passages(strange, strange[0], count, "control", generator)
    _quieten(view, 0.1)
    gate, value = _directions(view, generator)
    _point(view, gate, value, [target, *known], target)
    _wire(view, site, neuron, gate, value, passages)
    return Planted(view, passages, controls, site, neuron)


def _passages(words: list[int], target: int, count: int, name: str, generator: torch.Generator) -> Passages:
    """Prefixes of unlike lengths drawn from `words`, and suffixes of the target alone."""
    items = []
    for index in range(count):
        drawn = torch.randint(len(words), (8 + index,), generator=generator).tolist()
        items.append(Passage(f"{name}-{index}", tuple(words[entry] for entry in drawn), (target,) * (3 + index % 2)))
    return Passages(tuple(items), name)


def _directions(view: ModelView, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two orthogonal unit vectors [d] whose entries sum to 0, so that no norm takes their mean away."""
    ones = torch.ones(view.width, 1, dtype=torch.float64)
    drawn = torch.randn(view.width, 2, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(torch.cat([ones, drawn], 1)).Q.to(view.device, view.dtype)
    return basis[:, 1], basis[:, 2]


def _quieten(view: ModelView, share: float) -> None:
    """All maps of the blocks, and their biases, times `share`."""
    for site in view.sites(*view.kinds):
        for part in (site, Site(site.layer, site.kind, bias=True)):
            if view.has(part):
                view.place(part).write(view.parameter(part).data, view.weight(part) * share)


def _point(view: ModelView, gate: Tensor, value: Tensor, known: list[int], target: int) -> None:
    """Embeddings along or against the gate; the target's unembedding, and no other, along the value."""
    embed, unembed = Site(OUTSIDE, Kind.EMBED), Site(OUTSIDE, Kind.UNEMBED)
    both = torch.stack([gate, value])
    read = view.weight(embed) - (view.weight(embed) @ both.T) @ both
    side = torch.full((view.vocab, 1), -3.0, dtype=view.dtype, device=view.device)
    side[known] = 3.0
    view.place(embed).write(view.parameter(embed).data, read + side * gate)
    spoken = view.weight(unembed) - (view.weight(unembed) @ both.T) @ both
    spoken[target] += 8.0 * view.width**-0.5 * value
    view.place(unembed).write(view.parameter(unembed).data, spoken)


def _wire(view: ModelView, site: Site, neuron: int, gate: Tensor, value: Tensor, passages: Passages) -> None:
    """Weights into the neuron read the gate; weights out of it write 3 along the value where the gate is open."""
    for kind in (Kind.MLP_GATE, Kind.MLP_IN):
        entry = Site(site.layer, kind)
        if view.has(entry):
            weight = view.weight(entry).clone()
            weight[neuron] = gate
            view.place(entry).write(view.parameter(entry).data, weight)
    batch = next(view.batches(passages, size=len(passages)))
    with view.record([site]) as seen:
        view.hidden(batch)
    loudness = seen[site][..., neuron][batch.predicting].mean()
    weight = view.weight(site).clone()
    weight[:, neuron] = 3.0 * value / loudness
    view.place(site).write(view.parameter(site).data, weight)
