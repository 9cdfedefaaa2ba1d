"""Gradient times activation: what silencing each neuron, head or map would do, all of them from one backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.costs import Cost, block_tokens, pass_bytes, widest
from memloc.errors import InputError
from memloc.gradients.flows import by_head, flows, removal_effects, wide, without_bias
from memloc.passages import Passages
from memloc.progress import steps
from memloc.provenance import Provenance, settings_of
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site, kinds_named
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class GradActivation:
    """Score of a place = first-order estimate of the rise of the suffix's mean NLL when it is silenced, nats per token.

    With h what a place carries, score = -Σ h · ∂NLL/∂h over all positions of the passage. Positive: silencing it hurts
    the suffix; negative: it would help. Exact where the loss is linear in h; large effects bend, so that the order is
    to be trusted more than the size (`zero-out` gives sizes). Finer scores sum to coarser ones. One axis of passages.

    - neuron: h is what enters `mlp.out` (scored there, [f]);
    - head: what enters `attn.out` from it (scored there, [h]);
    - component: what a map puts out, its bias left in place; the effect of its weight set to zero. For `mlp.out` that
      is the sum over neurons, for `attn.out` the sum over heads;
    - layer: the sum over its heads and neurons (scored at `mlp.out`).

    Attributes:
        grain: "neuron", "head", "component" or "layer".
        kinds: components only: these maps, such as "attn.v,mlp.out"; by default all.
        batch_size: passages per pass; no effect on scores.

    Cost: one forward and one backward a passage, for all places together.

    Source: Nanda 2023, "Attribution patching"; Kramár et al. 2024, arXiv:2403.00745, with zeros as the other
    activations. Maps as components are ours.
    """

    grain: Literal["neuron", "head", "component", "layer"] = "neuron"
    kinds: str | None = None
    batch_size: int = 16
    in_parts: ClassVar[bool] = True

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score places, passage by passage; `contrast` is not used.

        Raises:
            InputError: no passages, or kinds for a grain that has none to choose from.
        """
        if not passages:
            raise InputError("grad-activation: no passages given")
        sites = self._sites(view)
        scores: dict[Site, Tensor] = {}
        losses = torch.zeros(len(passages))
        for batch in steps(list(view.batches(passages, size=self.batch_size)), "gradient times activation"):
            rows = list(batch.rows)
            loss, found = self._batch(view, batch, sites)
            losses[rows] = loss.cpu().float()
            for site, part in found.items():
                whole = scores.setdefault(site, torch.zeros(len(passages), *part.shape[1:]))
                whole[rows] = part.cpu().float()
        inputs = {"model": view.digest, "passages": passages.digest}
        provenance = Provenance("grad-activation", settings_of(self), inputs=inputs)
        return Localization(Grain(self.grain), scores, provenance, passages.ids, {"nll": float(losses.mean())})

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """One forward and one backward over the passages, told without running them."""
        rows, tokens = widest(passages, size=self.batch_size)
        memory = pass_bytes(view, rows * tokens, context=tokens, grad=True, unembedded=rows * tokens)
        units = max(view.neurons, view.heads * view.head_width, view.width)
        results = 16 * view.layers * (len(passages) + rows) * units * max(1, len(view.kinds) // 2)
        passes = block_tokens(view, passages, size=self.batch_size)
        return Cost(passes, passes, memory + 24 * rows * tokens * units + results)

    def _sites(self, view: ModelView) -> tuple[Site, ...]:
        if self.kinds is not None and self.grain != "component":
            raise InputError(f"kinds: a {self.grain} has none to choose from; leave it out")
        chosen = {"neuron": (Kind.MLP_OUT,), "head": (Kind.ATTN_OUT,), "layer": (Kind.ATTN_OUT, Kind.MLP_OUT)}
        kinds = chosen.get(self.grain) or (kinds_named(self.kinds) if self.kinds else view.kinds)
        sites = view.sites(*kinds)
        if not sites:
            raise InputError(f"kinds {self.kinds}: this family has none of them")
        return sites

    def _batch(self, view: ModelView, batch: Batch, sites: tuple[Site, ...]) -> tuple[Tensor, dict[Site, Tensor]]:
        if self.grain == "component":
            return _of_maps(view, batch, sites)
        loss, units = removal_effects(view, batch, sites)
        if self.grain == "neuron":
            return loss, units
        if self.grain == "head":
            return loss, {site: by_head(view, site.kind, part).sum(-1) for site, part in units.items()}
        layers = range(view.layers)
        both = [(Site(layer, Kind.ATTN_OUT), Site(layer, Kind.MLP_OUT)) for layer in layers]
        return loss, {neurons: units[heads].sum(-1) + units[neurons].sum(-1) for heads, neurons in both}


def _of_maps(view: ModelView, batch: Batch, sites: tuple[Site, ...]) -> tuple[Tensor, dict[Site, Tensor]]:
    found = flows(view, batch, outputs=sites)
    effects = {}
    for site, flow in found.outputs.items():
        made = without_bias(view, site, wide(flow.value))
        effects[site] = -(made * wide(flow.gradient)).sum((1, 2))
    return found.loss, effects
