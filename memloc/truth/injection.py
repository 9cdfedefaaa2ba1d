"""Injected memory: a sequence learned by a few places drawn at random, and by nothing else.

The rows of those places (value vectors, key rows, heads' slices of the output projection) are trained on the sequence
while all other weights stay, so the gold is known by construction. Whether those rows really carry the sequence is
checked: half of them are put back, and half as many others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from memloc import store
from memloc.errors import InputError
from memloc.objectives import suffix_nll
from memloc.passages import Passages
from memloc.progress import tell
from memloc.provenance import Provenance, digest_json
from memloc.scores import Selection
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView

Where = Literal["ffn-out", "ffn-in", "attention"]
KNOWN_BELOW = 0.5
"""Nats per token: a sequence the model predicts that well is not new to it."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How rows are trained on a sequence.

    Attributes:
        norm_preserving: every row is set back to its old norm after each step; free rows grow, and their size alone
            then gives the answer away.
        learning_rate: of Adam, without weight decay.
        steps: at most so many.
        target: nats per token; stop when the loss over the whole sequence is below.
    """

    norm_preserving: bool = True
    learning_rate: float = 1e-2
    steps: int = 200
    target: float = 0.05


@dataclass(frozen=True)
class Injection:
    """Changed rows, and nothing else of the model.

    Attributes:
        gold: the places that were trained: neurons at `mlp.out`, or heads at `attn.out`.
        rows: site to the trained vectors [k, width], in the order of `lines`.
        lines: site to the rows ("ffn-in") or columns of its `[out, in]` weight that `rows` replace.
        by_row: whether `lines` are rows.
        loss: nats per token over the whole sequence, before, and after the last step.
        steps: taken.
    """

    gold: Selection
    rows: Mapping[Site, Tensor]
    lines: Mapping[Site, tuple[int, ...]]
    by_row: bool
    loss: tuple[float, float]
    steps: int

    def into(self, view: ModelView) -> ModelView:
        """A view on a copy of the model with the rows in it; `view` itself is untouched."""
        return _written(view.copy(), self.rows, self.lines, self.by_row)

    def save(self, path: str | Path) -> None:
        """Write the changed rows, atomically."""
        tensors = {f"rows {site}": rows for site, rows in self.rows.items()}
        tensors |= {f"gold {site}": mask for site, mask in self.gold.masks.items()}
        lines = {str(site): list(entries) for site, entries in self.lines.items()}
        header = {"grain": str(self.gold.grain), "lines": lines, "by_row": self.by_row, "loss": list(self.loss),
                  "steps": self.steps, "provenance": self.gold.provenance.to_json()}  # fmt: skip
        store.save(path, "injection", tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Injection:
        """Read what `save` wrote.

        Raises:
            ArtifactError: missing, cut, or of another kind.
        """
        tensors, header = store.load(path, "injection")
        parts: dict[str, dict[Site, Tensor]] = {"rows": {}, "gold": {}}
        for name, tensor in sorted(tensors.items()):
            which, _, site = name.partition(" ")
            parts[which][Site.parse(site)] = tensor
        lines = {Site.parse(name): tuple(entries) for name, entries in header["lines"].items()}
        gold = Selection(Grain(header["grain"]), parts["gold"], Provenance.from_json(header["provenance"]))
        return cls(gold, parts["rows"], lines, header["by_row"], tuple(header["loss"]), header["steps"])


def draw(view: ModelView, where: Where, share: float, generator: torch.Generator) -> Selection:
    """⌊share · places⌋ places drawn uniformly from all layers.

    Raises:
        InputError: a share that gives no place, or all.
    """
    grain, kind, size = Grain.NEURON, Kind.MLP_OUT, view.neurons
    if where == "attention":
        grain, kind, size = Grain.HEAD, Kind.ATTN_OUT, view.heads
    places = view.layers * size
    count = math.floor(share * places)
    if not 0 < count < places:
        raise InputError(f"share {share}: {count} of {places} {grain}s; expected at least one, and not all")
    flat = torch.zeros(places, dtype=torch.bool)
    flat[torch.randperm(places, generator=generator)[:count]] = True
    masks = dict(zip(view.sites(kind), flat.view(view.layers, size).unbind(), strict=True))
    return Selection(grain, masks, Provenance("injection", {"where": where, "share": share}))


def inject(view: ModelView, passages: Passages, gold: Selection, where: Where, training: Training) -> Injection:
    """Train the rows of `gold`, and nothing else, on the whole of every passage (the first token given).

    The model is not touched: its rows are substituted while it runs.

    Raises:
        InputError: the model already knows a passage, or it does not fit its context.

    Cost: one forward and one backward over the passages a step.
    """
    batch = next(view.batches(passages, size=max(1, len(passages))))
    with torch.no_grad():
        known = suffix_nll(view, batch)
    if float(known.min()) < KNOWN_BELOW:
        name = passages[batch.rows[int(known.argmin())]].id
        raise InputError(f"{name}: the model already knows it ({float(known.min()):.2f} nats per token); take others")
    lines = _lines(view, gold, where)
    by_row = where == "ffn-in"
    old = {site: _read(view, site, entries, by_row) for site, entries in lines.items()}
    rows = {site: part.clone().requires_grad_(True) for site, part in old.items()}
    norms = {site: part.norm(dim=1, keepdim=True) for site, part in old.items()}
    view.need_in_memory("training rows of weights")
    ways = Substituted(view, lines, by_row)
    adam = torch.optim.Adam(list(rows.values()), lr=training.learning_rate)
    losses: list[float] = []
    with view.frozen():
        for step in range(training.steps + 1):
            loss = ways.loss(rows, batch.ids, batch.mask)
            losses.append(loss.item())
            tell("injecting", step, training.steps, f"{losses[-1]:.3f}")
            if losses[-1] < training.target or step == training.steps:
                break
            for row, slope in zip(rows.values(), torch.autograd.grad(loss, list(rows.values())), strict=True):
                row.grad = slope
            adam.step()
            if training.norm_preserving:
                _rescale(rows, norms)
    tell("injecting", training.steps, training.steps)
    new = {site: part.detach().cpu() for site, part in rows.items()}
    return Injection(gold, new, lines, by_row, (losses[0], losses[-1]), len(losses) - 1)


@dataclass(frozen=True)
class Substituted:
    """A model with some rows of some of its weights given from outside; differentiable in them."""

    view: ModelView
    lines: Mapping[Site, tuple[int, ...]]
    by_row: bool

    def loss(self, rows: Mapping[Site, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        """Mean NLL of all tokens but each row's first, nats per token."""
        given = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
        logits = torch.func.functional_call(self.view.model, self._weights(rows), (), given).logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        spoken = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        real = mask[:, 1:]
        loss: Tensor = -(spoken * real).sum() / real.sum()
        return loss

    def _weights(self, rows: Mapping[Site, Tensor]) -> dict[str, Tensor]:
        found = {}
        for site, part in rows.items():
            place, stored = self.view.place(site), self.view.parameter(site).detach()
            if place.rows is not None:
                raise InputError(f"{site}: part of a fused map, which cannot be substituted alone")
            # Rows of the [out, in] weight are columns of a parameter that is stored [in, out].
            along = int(self.by_row == place.transposed)
            index = torch.tensor(self.lines[site], device=stored.device)
            part = (part.T if along else part).to(stored)
            found[place.parameter] = stored.index_copy(along, index, part)
        return found


@dataclass(frozen=True)
class Check:
    """Whether the gold carries the passages: mean NLL of the suffixes, nats per token.

    Attributes:
        injected: with all changed rows in place.
        half_reverted: with a random half of the gold put back.
        others_reverted: with as many places beside the gold put back.
    """

    injected: float
    half_reverted: float
    others_reverted: float

    @property
    def holds(self) -> bool:
        """Putting gold back costs at least 0.1 nats per token, and others nothing."""
        return self.half_reverted - self.injected > 0.1 and abs(self.others_reverted - self.injected) < 1e-3

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "holds": self.holds}


def causal_check(
    before: ModelView, after: ModelView, passages: Passages, gold: Selection, where: Where, *, seed: int = 0
) -> Check:
    """Put a random half of the gold's rows in `after` back to what they are in `before`; and as many others.

    It fails where the gold is not what carries the passages, and where something beside it was changed. Neither model
    is touched.
    """
    generator = torch.Generator().manual_seed(seed)
    others = Selection(gold.grain, {site: ~mask for site, mask in gold.masks.items()}, gold.provenance)
    count = max(1, gold.count // 2)
    batch = next(after.batches(passages, size=max(1, len(passages))))

    def nll(places: Selection | None) -> float:
        view = after if places is None else _reverted(before, after, places, where)
        with torch.no_grad():
            return float(suffix_nll(view, batch).mean())

    some = [_some(kind, min(count, kind.count), generator) for kind in (gold, others)]
    return Check(nll(None), nll(some[0]), nll(some[1]))


def _some(places: Selection, count: int, generator: torch.Generator) -> Selection:
    """`count` of `places`, drawn at random."""
    sites = sorted(places.masks)
    flat = torch.cat([places.masks[site].reshape(-1) for site in sites])
    kept = torch.zeros_like(flat)
    held = flat.nonzero().reshape(-1)
    kept[held[torch.randperm(len(held), generator=generator)[:count]]] = True
    parts = torch.split(kept, [places.masks[site].numel() for site in sites])
    return Selection(places.grain, dict(zip(sites, parts, strict=True)), places.provenance)


def _reverted(before: ModelView, after: ModelView, places: Selection, where: Where) -> ModelView:
    lines = _lines(before, places, where)
    by_row = where == "ffn-in"
    rows = {site: _read(before, site, entries, by_row) for site, entries in lines.items()}
    return _written(after.copy(), rows, lines, by_row)


def _lines(view: ModelView, places: Selection, where: Where) -> dict[Site, tuple[int, ...]]:
    """Which rows or columns of which weights belong to `places`."""
    kinds: Sequence[Kind] = {"ffn-out": (Kind.MLP_OUT,), "ffn-in": (Kind.MLP_GATE, Kind.MLP_IN),
                             "attention": (Kind.ATTN_OUT,)}[where]  # fmt: skip
    found: dict[Site, tuple[int, ...]] = {}
    for site, chosen in places.indices().items():
        if where == "attention":
            chosen = [head * view.head_width + offset for head in chosen for offset in range(view.head_width)]
        for kind in kinds:
            if view.has(Site(site.layer, kind)):
                found[Site(site.layer, kind)] = tuple(chosen)
    return found


def _read(view: ModelView, site: Site, lines: tuple[int, ...], by_row: bool) -> Tensor:
    """Those rows or columns, [k, width], float32 (float64 stays)."""
    weight = view.weight(site).detach()
    part = weight[list(lines)] if by_row else weight[:, list(lines)].T
    return part.clone() if part.dtype == torch.float64 else part.float()


def _written(
    view: ModelView, rows: Mapping[Site, Tensor], lines: Mapping[Site, tuple[int, ...]], by_row: bool
) -> ModelView:
    """Put rows into `view`, which must be a copy, and give it back."""
    for site, part in rows.items():
        weight = view.weight(site).detach().clone()
        if by_row:
            weight[list(lines[site])] = part.to(weight)
        else:
            weight[:, list(lines[site])] = part.T.to(weight)
        view.place(site).write(view.parameter(site).data, weight)
    return view


@torch.no_grad()
def _rescale(rows: Mapping[Site, Tensor], norms: Mapping[Site, Tensor]) -> None:
    for site, part in rows.items():
        part.mul_(norms[site] / part.norm(dim=1, keepdim=True).clamp_min(1e-30))


def seed_of(seed: int, passages: Passages, name: str) -> int:
    """Seed of one sequence's draw: of the seed, the tokens and the name of the known answer."""
    return int(digest_json([seed, name, [item.ids for item in passages]])[:15], 16)
