"""Gradients of the suffix's loss by the weights: which maps, heads, neurons or weights the suffix pulls on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from memloc.errors import InputError
from memloc.objectives import divergence, reference_logprobs, suffix_nll
from memloc.passages import Passages
from memloc.progress import steps
from memloc.provenance import Provenance, settings_of
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site, kinds_named
from memloc.view import ModelView

Gradients = dict[Site, Tensor]


@dataclass(frozen=True, kw_only=True)
class WeightGradient:
    """Score of a place = size of the gradient of the suffixes' mean NLL by its weights.

    The loss is the mean over passages of each one's mean nats per suffix token; g is its gradient by every linear map
    of the blocks (embeddings, norms and biases are left out), oriented [out, in] also where maps are stored fused or
    transposed. A place's score reduces |g| over its weights:

    - component: one map; layer: all maps of a block (scored at the block's `mlp.out`);
    - head: its rows of q, k, v and its columns of attn.out (scored at `attn.out`, [h]; heads of a group share k and v);
    - neuron: its row of mlp.in and of mlp.gate, its column of mlp.out (scored at `mlp.out`, [f]);
    - weight: |g| itself, [out, in].

    Attributes:
        grain: "layer", "component", "head", "neuron" or "weight".
        reduce: "max" (the paper's for components), "sum" (the paper's for layers), "norm" or "mean" of |g|.
        scale: "relative" divides by the total over the model, so scores sum to 1; "raw" does not. The gradient of a
            text known by heart is many times smaller than that of any other, everywhere, because its loss is nearly
            zero: raw scores of memorized and other texts say whose loss is larger, shares say where it lives.
        objective: what is derived.
            "nll": the loss above.
            "contrast": scores of the passages minus scores of the contrast set, each scaled first (so with "relative"
            they sum to 0); negative where the contrast set pulls harder.
            "contrast-kl": the paper's, -forget · NLL(passages) + KL(before ‖ now) on the contrast set's suffixes. At
            the model being scored, before and now are the same and a divergence is at its minimum, so the gradient of
            the second term is zero and scores rank as with "nll". It is computed all the same, and its share of the
            gradient is reported in the notes: rounding. The term matters once weights move, in fine-tuning.
        forget: weight of the forgetting term in "contrast-kl".
        kl: "mean" per suffix token, or "sum" over a passage's tokens (the paper's code), averaged over passages.
        per_passage: one gradient a passage, and an axis of passages in the scores.
        kinds: only these maps, such as "mlp.in,mlp.out"; by default all.
        batch_size: passages per pass; no effect on scores.

    Cost: one forward and one backward a passage ("contrast": also of each passage of the contrast set; "contrast-kl":
    one forward more); one float32 copy of the maps. "weight" with `per_passage` keeps one copy a passage.

    Source: Stoehr et al. 2024, arXiv:2403.19851. Relative scale and the "contrast" objective are ours.
    """

    grain: Literal["layer", "component", "head", "neuron", "weight"] = "component"
    reduce: Literal["max", "sum", "norm", "mean"] = "max"
    scale: Literal["relative", "raw"] = "relative"
    objective: Literal["nll", "contrast", "contrast-kl"] = "nll"
    forget: float = 0.1
    kl: Literal["mean", "sum"] = "mean"
    per_passage: bool = False
    kinds: str | None = None
    batch_size: int = 8

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score places; `contrast` is needed by the contrastive objectives and otherwise not used.

        Raises:
            InputError: no passages, no contrast set where one is needed, kinds the grain cannot use.
        """
        if not passages:
            raise InputError("weight-gradient: no passages given")
        if self.objective != "nll" and not contrast:
            raise InputError(f"weight-gradient: objective {self.objective!r} needs a contrast set")
        sites = self._sites(view)
        parameters = {view.place(site).parameter: view.parameter(site) for site in sites}
        notes: dict[str, Any] = {}
        with view.trainable(list(parameters.values())):
            rows = [self._one(view, sites, part, contrast, notes) for part in self._parts(passages)]
        inputs = {"model": view.digest, "passages": passages.digest}
        if contrast is not None and self.objective != "nll":
            inputs["contrast"] = contrast.digest
        return Localization(
            Grain(self.grain),
            {site: torch.stack([row[site] for row in rows]) if self.per_passage else rows[0][site] for site in rows[0]},
            Provenance("weight-gradient", settings_of(self), inputs=inputs),
            passages.ids if self.per_passage else None,
            notes,
        )

    def _parts(self, passages: Passages) -> Iterator[Passages]:
        if not self.per_passage:
            yield passages
            return
        yield from steps((passages[index : index + 1] for index in range(len(passages))), "gradients", len(passages))

    def _one(
        self,
        view: ModelView,
        sites: tuple[Site, ...],
        passages: Passages,
        contrast: Passages | None,
        notes: dict[str, Any],
    ) -> dict[Site, Tensor]:
        """Scores of one set of passages, not yet stacked."""
        gradients, loss = self._nll(view, sites, passages)
        if not self.per_passage:
            notes["nll"] = loss
        if self.objective == "nll" or contrast is None:
            return self._scores(view, gradients)
        if self.objective == "contrast":
            mine = self._scores(view, gradients)
            other, loss = self._nll(view, sites, contrast)
            notes["contrast_nll"] = loss
            theirs = self._scores(view, other)
            return {site: mine[site] - theirs[site] for site in mine}
        kept = self._kl(view, sites, contrast)
        total = {site: kept[site] - self.forget * gradients[site] for site in sites}
        whole = sum(float(entry.norm() ** 2) for entry in total.values()) ** 0.5
        notes["kl_share"] = sum(float(entry.norm() ** 2) for entry in kept.values()) ** 0.5 / whole if whole else 0.0
        return self._scores(view, total)

    def _nll(self, view: ModelView, sites: tuple[Site, ...], passages: Passages) -> tuple[Gradients, float]:
        """Gradient of the mean over passages of nats per suffix token, and that mean."""
        gathered, loss = _Gathered(view, sites), 0.0
        for batch in steps(list(view.batches(passages, size=self.batch_size)), "gradients"):
            part = suffix_nll(view, batch).sum() / len(passages)
            gathered.add(part)
            loss += float(part.detach())
        return gathered.by_site(), loss

    def _kl(self, view: ModelView, sites: tuple[Site, ...], contrast: Passages) -> Gradients:
        gathered = _Gathered(view, sites)
        tokens = len(contrast) if self.kl == "sum" else sum(len(item.suffix) for item in contrast)
        for batch in steps(list(view.batches(contrast, size=self.batch_size)), "divergence"):
            here = int((batch.length - batch.prefix).sum())
            gathered.add(divergence(view, batch, reference_logprobs(view, batch)) * (here / tokens))
        return gathered.by_site()

    def _sites(self, view: ModelView) -> tuple[Site, ...]:
        usable = {"head": (Kind.ATTN_Q, Kind.ATTN_K, Kind.ATTN_V, Kind.ATTN_OUT),
                  "neuron": (Kind.MLP_GATE, Kind.MLP_IN, Kind.MLP_OUT)}.get(self.grain, view.kinds)  # fmt: skip
        wanted = kinds_named(self.kinds) if self.kinds else usable
        sites = view.sites(*(kind for kind in usable if kind in wanted))
        if not sites:
            raise InputError(f"kinds {self.kinds}: none that {self.grain} scores can come from")
        return sites

    def _scores(self, view: ModelView, gradients: Gradients) -> dict[Site, Tensor]:
        found: dict[Site, Tensor] = {}
        for site, parts in _grouped(view, gradients, self.grain).items():
            found[site] = parts[0].abs() if self.grain == "weight" else _reduced(parts, self.reduce)
        total = sum(float(entry.double().sum()) for entry in found.values())
        if self.scale == "relative" and total > 0:
            found = {site: entry / total for site, entry in found.items()}
        return found


class _Gathered:
    """Gradients of a sum of losses, in float32 (float64 stays), one buffer a stored parameter."""

    def __init__(self, view: ModelView, sites: tuple[Site, ...]) -> None:
        self._places = {site: view.place(site) for site in sites}
        self._parameters = {self._places[site].parameter: view.parameter(site) for site in sites}
        self._sums: dict[str, Tensor] = {}

    def add(self, loss: Tensor) -> None:
        """Add the gradient of `loss`; no `.grad` is touched."""
        found = torch.autograd.grad(loss, list(self._parameters.values()))
        for name, part in zip(self._parameters, found, strict=True):
            part = part if part.dtype == torch.float64 else part.float()
            self._sums[name] = self._sums[name] + part if name in self._sums else part

    def by_site(self) -> Gradients:
        """Site to gradient, [out, in]."""
        return {site: place.read(self._sums[place.parameter]) for site, place in self._places.items()}


def _grouped(view: ModelView, gradients: Mapping[Site, Tensor], grain: str) -> dict[Site, list[Tensor]]:
    """Where each gradient is scored: target site to parts [places, weights] (component, layer: [1, weights])."""
    groups: dict[Site, list[Tensor]] = {}
    for site, gradient in gradients.items():
        if grain in ("component", "weight"):
            groups[site] = [gradient]
        elif grain == "layer":
            groups.setdefault(Site(site.layer, Kind.MLP_OUT), []).append(gradient)
        elif grain == "neuron":
            rows = gradient.T if site.kind is Kind.MLP_OUT else gradient
            groups.setdefault(Site(site.layer, Kind.MLP_OUT), []).append(rows)
        else:
            groups.setdefault(Site(site.layer, Kind.ATTN_OUT), []).append(_by_head(view, site, gradient))
    if grain in ("component", "layer"):
        return {site: [part.reshape(1, -1) for part in parts] for site, parts in groups.items()}
    return groups


def _by_head(view: ModelView, site: Site, gradient: Tensor) -> Tensor:
    """The weights of each head, [h, weights]; heads of a group share their group's keys and values."""
    rows = gradient.T if site.kind is Kind.ATTN_OUT else gradient
    many = view.kv_heads if site.kind in (Kind.ATTN_K, Kind.ATTN_V) else view.heads
    return rows.reshape(many, -1).repeat_interleave(view.heads // many, 0)


def _reduced(parts: list[Tensor], reduce: str) -> Tensor:
    """|g| over all weights of each place: [places], or [] where there is one."""
    sizes = [part.abs() for part in parts]
    if reduce == "max":
        found = torch.stack([part.amax(1) for part in sizes]).amax(0)
    elif reduce == "norm":
        found = torch.stack([part.square().sum(1) for part in sizes]).sum(0).sqrt()
    else:
        found = torch.stack([part.sum(1) for part in sizes]).sum(0)
        found = found / sum(part.shape[1] for part in sizes) if reduce == "mean" else found
    return found[0] if len(found) == 1 else found
