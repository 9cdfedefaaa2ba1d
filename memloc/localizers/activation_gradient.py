"""Gradients of the suffix's loss by activations: where the text passes that its loss depends on, unit by unit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.costs import Cost, block_tokens, pass_bytes, widest
from memloc.errors import InputError
from memloc.gradients.flows import Flow, Flows, by_head, flows, wide
from memloc.passages import Passages
from memloc.progress import steps
from memloc.provenance import Provenance, settings_of
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView

PARTS: Mapping[str, tuple[Kind, str]] = {
    "q": (Kind.ATTN_Q, "output"),
    "k": (Kind.ATTN_K, "output"),
    "v": (Kind.ATTN_V, "output"),
    "z": (Kind.ATTN_OUT, "input"),
    "attn_out": (Kind.ATTN_OUT, "output"),
    "gate": (Kind.MLP_GATE, "output"),
    "pre": (Kind.MLP_IN, "output"),
    "post": (Kind.MLP_OUT, "input"),
    "mlp_out": (Kind.MLP_OUT, "output"),
    "residual": (Kind.MLP_OUT, "block"),
}
"""Name of an activation to where its score stands and what is read there."""

DEFAULT_PARTS = {
    "layer": "residual",
    "component": "q,k,v,attn_out,gate,pre,mlp_out",
    "head": "z",
    "neuron": "post",
    "position": "residual",
}
SHARES = {"max": 0.0, "top-1%": 0.01, "top-10%": 0.1}


@dataclass(frozen=True, kw_only=True)
class ActivationGradient:
    """Score of a place = size of the gradient of the suffix's mean NLL by what passes it, nats per token and unit.

    g = ∂NLL/∂h at every position; |g| is reduced over the units of the place at each position, then averaged over
    positions. It has no sign: a large score says that the loss is steep there, not which way. Activations:

    - q, k, v: what the maps put out (before rotation by position); z: what enters `attn.out`, by head;
    - attn_out, mlp_out: what attention and the MLP add; pre, gate: what `mlp.in`, `mlp.gate` put out; post: neurons;
    - residual: the stream after the block (scored at `mlp.out`).

    Keys and values shared by a group of heads are scored once for each of its heads. One axis of passages.

    Attributes:
        grain: "layer" (the residual stream), "component" (one score an activation), "head", "neuron", or "position"
            ([t] for each activation, reduced over its units only).
        parts: other activations than the grain's own: q, k, v, attn_out, gate, pre, mlp_out for components (or z, post
            in the place of the two that stand at the same map), z, q, k or v for heads, any for positions.
        reduce: over units: "max", or the mean of the largest "top-1%" or "top-10%" (at least one unit). Neurons are
            units themselves.
        positions: averaged over "all" tokens, those of the "prefix", or those "predicting" the suffix. The last token
            of a passage predicts nothing, so its gradient is 0.
        scale: "relative" divides by the passage's total over the model, so that its scores sum to 1; "raw" does not.
            The gradient of a text known by heart is many times smaller than any other's, everywhere.
        batch_size: passages per pass; no effect on scores.

    Cost: one forward and one backward a passage.

    Source: Stoehr et al. 2024, arXiv:2403.19851, section on activation gradients. Relative scale, layers and neurons
    are ours.
    """

    grain: Literal["layer", "component", "head", "neuron", "position"] = "component"
    parts: str | None = None
    reduce: Literal["max", "top-1%", "top-10%"] = "max"
    positions: Literal["all", "prefix", "predicting"] = "all"
    scale: Literal["relative", "raw"] = "relative"
    batch_size: int = 16
    in_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        allowed = {
            "layer": {"residual"}, "neuron": {"post"}, "head": {"z", "q", "k", "v"},
            "component": set(PARTS) - {"residual"}, "position": set(PARTS),
        }[self.grain]  # fmt: skip
        for part in self._parts:
            if part not in allowed:
                raise InputError(f"parts: no {self.grain} scores of {part!r}; there are those of {_list(allowed)}")
        places = [PARTS[part][0] for part in self._parts]
        if len(set(places)) < len(places) or (self.grain == "head" and len(places) > 1):
            raise InputError(f"parts {self.parts!r}: two of them stand at one place; ask for one at a time")

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score places, passage by passage; `contrast` is not used.

        Raises:
            InputError: no passages, or a family that has none of the activations asked for.
        """
        if not passages:
            raise InputError("activation-gradient: no passages given")
        longest = max(len(item.ids) for item in passages)
        scores: dict[Site, Tensor] = {}
        for batch in steps(list(view.batches(passages, size=self.batch_size)), "activation gradients"):
            for site, part in self._scaled(self._batch(view, batch)).items():
                if self.grain == "position":
                    part = torch.nn.functional.pad(part, (0, longest - part.shape[1]))
                whole = scores.setdefault(site, torch.zeros(len(passages), *part.shape[1:]))
                whole[list(batch.rows)] = part.cpu().float()
        inputs = {"model": view.digest, "passages": passages.digest}
        provenance = Provenance("activation-gradient", settings_of(self), inputs=inputs)
        lengths = tuple(len(item.ids) for item in passages) if self.grain == "position" else None
        return Localization(Grain(self.grain), scores, provenance, passages.ids, {}, lengths)

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """One forward and one backward over the passages, told without running them."""
        rows, tokens = widest(passages, size=self.batch_size)
        memory = pass_bytes(view, rows * tokens, context=tokens, grad=True, unembedded=rows * tokens)
        units = max(view.neurons, 2 * view.heads * view.head_width, view.width)
        entries = {"neuron": view.neurons, "head": view.heads, "position": 7 * max(map(len, _ids(passages)))}
        results = 16 * view.layers * (len(passages) + rows) * max(8, entries.get(self.grain, 0))
        passes = block_tokens(view, passages, size=self.batch_size)
        # The stream after the first block is where the gradients end, if nothing inside the block is asked for.
        inside = view.layers - all(PARTS[part][1] == "block" for part in self._parts)
        backward = passes // view.layers * inside
        return Cost(passes, backward, memory + 48 * rows * tokens * units + results)

    @property
    def _parts(self) -> list[str]:
        return [part.strip() for part in (self.parts or DEFAULT_PARTS[self.grain]).split(",")]

    def _batch(self, view: ModelView, batch: Batch) -> dict[Site, Tensor]:
        """Raw scores of a batch's rows."""
        sides: dict[str, list[Site]] = {"input": [], "output": [], "block": []}
        for kind, side in (PARTS[part] for part in self._parts):
            sides[side] += view.sites(kind)
        if not any(sides.values()):
            raise InputError(f"parts {self.parts!r}: {view.row.family} has none of them")
        blocks = [site.layer for site in sides["block"]]
        found = flows(view, batch, inputs=sides["input"], outputs=sides["output"], blocks=blocks)
        counted = {"all": batch.mask, "prefix": batch.mask & ~batch.suffix_mask, "predicting": batch.predicting}
        where = batch.mask if self.grain == "position" else counted[self.positions]
        return {site: self._score(view, site, flow, where) for site, flow in _by_site(found)}

    def _score(self, view: ModelView, site: Site, flow: Flow, where: Tensor) -> Tensor:
        sizes = wide(flow.gradient).abs()
        if self.grain == "head":
            sizes = self._reduced(by_head(view, site.kind, sizes))
        elif self.grain != "neuron":
            sizes = self._reduced(sizes)
        mask = where.view(*where.shape, *[1] * (sizes.dim() - 2))
        # Not multiplied away: a padded position holds no gradient, but must not hold a NaN either.
        sizes = sizes.masked_fill(~mask, 0)
        return sizes if self.grain == "position" else sizes.sum(1) / where.sum(1).view(-1, *[1] * (sizes.dim() - 2))

    def _reduced(self, sizes: Tensor) -> Tensor:
        count = max(1, math.ceil(SHARES[self.reduce] * sizes.shape[-1]))
        return sizes.topk(count, -1).values.mean(-1)

    def _scaled(self, scores: dict[Site, Tensor]) -> dict[Site, Tensor]:
        if self.scale == "raw":
            return scores
        totals = sum(part.flatten(1).sum(1) if part.dim() > 1 else part for part in scores.values())
        totals = torch.as_tensor(totals)
        totals = totals.where(totals > 0, 1)
        return {site: part / totals.view(-1, *[1] * (part.dim() - 1)) for site, part in scores.items()}


def _by_site(found: Flows) -> list[tuple[Site, Flow]]:
    streams = {Site(layer, Kind.MLP_OUT): flow for layer, flow in found.blocks.items()}
    return sorted({**found.inputs, **found.outputs, **streams}.items(), key=lambda entry: entry[0])


def _ids(passages: Passages) -> list[tuple[int, ...]]:
    return [item.ids for item in passages]


def _list(names: set[str]) -> str:
    return ", ".join(name for name in PARTS if name in names)
