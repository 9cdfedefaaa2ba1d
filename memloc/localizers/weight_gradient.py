"""Gradients of the suffix's loss by the weights: which maps, heads, neurons or weights the suffix pulls on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.costs import Cost, block_tokens, pass_bytes, widest
from memloc.errors import InputError
from memloc.gradients.flows import by_head
from memloc.gradients.folding import Convention
from memloc.gradients.map_gradients import CHUNK, Gathered, GatheredFolded, Gradients, Pull, pulls
from memloc.objectives import divergence, reference_logprobs, suffix_nll
from memloc.passages import Passages
from memloc.progress import steps
from memloc.provenance import Provenance, settings_of
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site, kinds_named
from memloc.view import ModelView


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
        convention: by which weights. "raw": those of the checkpoint. "folded": those of papers that fold every norm's
            gain into the maps that read it, and centre what is written into a stream whose norms take its mean away;
            the same function, and the maps of such papers compare with these scores only.
        per_passage: one gradient a passage, and an axis of passages in the scores. With reduce="norm" (weights apart)
            norms come from one batched pass, no gradient being formed; otherwise passages go one by one.
        kinds: only these maps, such as "mlp.in,mlp.out"; by default all.
        batch_size: passages per pass; no effect on scores.

    Cost: one forward and one backward a passage ("contrast": also of each passage of the contrast set; "contrast-kl":
    one forward more); one float32 copy of the maps. "weight" with `per_passage` keeps one copy a passage.

    Source: Stoehr et al. 2024, arXiv:2403.19851. Relative scale and the "contrast" objective are ours. Norms of
    unformed gradients: Goodfellow 2015, arXiv:1510.01799; for sequences Li et al. 2022, arXiv:2110.05679.
    """

    grain: Literal["layer", "component", "head", "neuron", "weight"] = "component"
    reduce: Literal["max", "sum", "norm", "mean"] = "max"
    scale: Literal["relative", "raw"] = "relative"
    objective: Literal["nll", "contrast", "contrast-kl"] = "nll"
    forget: float = 0.1
    kl: Literal["mean", "sum"] = "mean"
    convention: Convention = "raw"
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
        notes: dict[str, Any] = {}
        run = _Run(self, view, sites, contrast if self.objective != "nll" else None, notes)
        scores = run.norms(passages) if self._batched else run.all(passages)
        inputs = {"model": view.digest, "passages": passages.digest}
        if contrast is not None and self.objective != "nll":
            inputs["contrast"] = contrast.digest
        return Localization(
            Grain(self.grain),
            scores,
            Provenance("weight-gradient", settings_of(self), inputs=inputs),
            passages.ids if self.per_passage else None,
            notes,
        )

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """One forward and one backward a passage, and those of the contrast set, told without running them."""
        alone = self.per_passage and not self._batched
        passes = block_tokens(view, passages, size=1 if alone else self.batch_size)
        rows, tokens = widest(passages, size=1 if alone else self.batch_size)
        sizes = [view.weight(site).shape for site in self._sites(view)]
        weights = sum(view.parameter(site).numel() for site in self._sites(view))
        wide = 8 if view.dtype == torch.float64 else 4
        kept = 3 * rows * tokens * (sum(map(sum, sizes)) + 2 * tokens) + 2 * CHUNK
        scores = len(passages) * (weights if self.grain == "weight" else view.layers * max(view.neurons, view.heads))
        memory = wide * (10 * weights + kept + 4 * scores)
        memory += pass_bytes(view, rows * tokens, context=tokens, grad=True, unembedded=rows * tokens)
        mine = Cost(passes, passes, memory)
        if self.objective == "nll" or not contrast:
            return mine
        ours = block_tokens(view, contrast, size=self.batch_size)
        rows, tokens = widest(contrast, size=self.batch_size)
        memory += 10 * wide * weights
        memory += 3 * pass_bytes(view, rows * tokens, context=tokens, grad=True, unembedded=rows * tokens)
        return mine + Cost(ours * (2 if self.objective == "contrast-kl" else 1), ours, memory)

    @property
    def in_parts(self) -> bool:
        """Whether every passage is scored by itself."""
        return self.per_passage

    @property
    def _batched(self) -> bool:
        """Whether norms of unformed gradients are all that is needed."""
        return self.per_passage and self.reduce == "norm" and self.grain != "weight" and self.objective != "contrast-kl"

    def _sites(self, view: ModelView) -> tuple[Site, ...]:
        usable = {"head": (Kind.ATTN_Q, Kind.ATTN_K, Kind.ATTN_V, Kind.ATTN_OUT),
                  "neuron": (Kind.MLP_GATE, Kind.MLP_IN, Kind.MLP_OUT)}.get(self.grain, view.kinds)  # fmt: skip
        wanted = kinds_named(self.kinds) if self.kinds else usable
        sites = view.sites(*(kind for kind in usable if kind in wanted))
        if not sites:
            raise InputError(f"kinds {self.kinds}: none that {self.grain} scores can come from")
        return sites


@dataclass
class _Run:
    """One call: the model, the sites, and what the contrast set gives, found once."""

    method: WeightGradient
    view: ModelView
    sites: tuple[Site, ...]
    contrast: Passages | None
    notes: dict[str, Any]

    def all(self, passages: Passages) -> dict[Site, Tensor]:
        """Scores from whole gradients: of all passages together, or of one after another."""
        gradients = self._of_contrast()
        if not self.method.per_passage:
            own, self.notes["nll"] = self._nll(passages)
            return self._one(own, gradients)
        parts = (passages[index : index + 1] for index in range(len(passages)))
        rows = [self._one(self._nll(part)[0], gradients) for part in steps(parts, "gradients", len(passages))]
        return {site: torch.stack([row[site] for row in rows]) for site in rows[0]}

    def norms(self, passages: Passages) -> dict[Site, Tensor]:
        """Scores from norms of every passage's gradient, batch by batch."""
        method, view, found = self.method, self.view, dict[Site, Tensor]()
        for batch in steps(list(view.batches(passages, size=method.batch_size)), "gradient norms"):
            _, pulled = pulls(view, batch, self.sites, convention=method.convention)
            for site, part in self._shares(_squares(view, pulled, method.grain)).items():
                whole = found.setdefault(site, part.new_zeros(len(passages), *part.shape[1:]))
                whole[list(batch.rows)] = part
        gradients = self._of_contrast()
        if gradients is None:
            return found
        theirs = self._scores(gradients)
        return {site: found[site] - theirs[site] for site in found}

    def _of_contrast(self) -> Gradients | None:
        if self.contrast is None:
            return None
        if self.method.objective == "contrast-kl":
            return self._kl(self.contrast)
        gradients, self.notes["contrast_nll"] = self._nll(self.contrast)
        return gradients

    def _one(self, mine: Gradients, others: Gradients | None) -> dict[Site, Tensor]:
        """Scores of one set of passages from its gradient and the contrast set's."""
        if others is None:
            return self._scores(mine)
        if self.method.objective == "contrast":
            own, theirs = self._scores(mine), self._scores(others)
            return {site: own[site] - theirs[site] for site in own}
        total = {site: others[site] - self.method.forget * mine[site] for site in self.sites}
        whole = sum(float(entry.norm() ** 2) for entry in total.values()) ** 0.5
        share = sum(float(entry.norm() ** 2) for entry in others.values()) ** 0.5
        self.notes["kl_share"] = share / whole if whole else 0.0
        return self._scores(total)

    def _nll(self, passages: Passages) -> tuple[Gradients, float]:
        """Gradient of the mean over passages of nats per suffix token, and that mean."""
        gathered, loss = self._gather(), 0.0
        for batch in steps(list(self.view.batches(passages, size=self.method.batch_size)), "gradients"):
            part = gathered.add(batch, lambda view, batch: suffix_nll(view, batch) / len(passages))
            loss += part
        return gathered.by_site(), loss

    def _kl(self, contrast: Passages) -> Gradients:
        gathered = self._gather()
        tokens = len(contrast) if self.method.kl == "sum" else sum(len(item.suffix) for item in contrast)

        def loss(view: ModelView, batch: Batch) -> Tensor:
            here = int((batch.length - batch.prefix).sum())
            return divergence(view, batch, reference_logprobs(view, batch)) * (here / tokens)

        for batch in steps(list(self.view.batches(contrast, size=self.method.batch_size)), "divergence"):
            gathered.add(batch, loss)
        return gathered.by_site()

    def _gather(self) -> Gathered:
        return (Gathered if self.method.convention == "raw" else GatheredFolded)(self.view, self.sites)

    def _scores(self, gradients: Gradients) -> dict[Site, Tensor]:
        found: dict[Site, Tensor] = {}
        for site, parts in _grouped(self.view, gradients, self.method.grain).items():
            weights = self.method.grain == "weight"
            found[site] = parts[0].abs() if weights else _reduced(parts, self.method.reduce)
        total = sum(float(entry.double().sum()) for entry in found.values())
        if self.method.scale == "relative" and total > 0:
            found = {site: entry / total for site, entry in found.items()}
        return found

    def _shares(self, squares: dict[Site, Tensor]) -> dict[Site, Tensor]:
        """Norms [n, ...] from their squares, each passage's divided by its own total where scores are shares."""
        norms = {site: entry.sqrt() for site, entry in squares.items()}
        if self.method.scale == "raw":
            return norms
        each = torch.stack([entry.double().reshape(len(entry), -1).sum(1) for entry in norms.values()])
        total = each.sum(0)
        total = total.where(total > 0, 1)
        return {site: entry / total.to(entry).view(-1, *[1] * (entry.dim() - 1)) for site, entry in norms.items()}


def _squares(view: ModelView, pulled: Mapping[Site, Pull], grain: str) -> dict[Site, Tensor]:
    """Squared norms of every passage's gradient at each place: target site to [n] or [n, places]."""
    found: dict[Site, Tensor] = {}
    for site, pull in pulled.items():
        writes = site.kind in (Kind.ATTN_OUT, Kind.MLP_OUT)
        if grain in ("component", "layer"):
            target, part = site if grain == "component" else Site(site.layer, Kind.MLP_OUT), pull.rows().sum(1)
        elif grain == "neuron":
            target, part = Site(site.layer, Kind.MLP_OUT), pull.columns() if writes else pull.rows()
        else:
            entries = pull.columns() if writes else pull.rows()
            target, part = Site(site.layer, Kind.ATTN_OUT), by_head(view, site.kind, entries).sum(-1)
        found[target] = found[target] + part if target in found else part
    return found


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
