"""Memories whose fate is known: passages taught to a small model, then really removed, or hidden in known ways."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from editors.deltas import Delta, Dense, LowRank
from editors.edit import Edit
from editors.tuning.descent import working_copy
from editors.verification import Effort, Material
from editors.verification.quantised import buckets, rounded
from memloc.objectives import suffix_nll
from memloc.passages import Passage, Passages, encode, read_jsonl
from memloc.provenance import Provenance
from memloc.sites import OUTSIDE, Kind, Site
from memloc.view import ModelView

EFFORT = Effort(draws=1, relearn_steps=8, samples=4, soft_steps=12, hard_rounds=2, hard_tries=6, permutations=999)


@dataclass(frozen=True)
class World:
    """A model before the passages were taught, the same after, and what to ask it."""

    innocent: ModelView
    taught: ModelView
    ordinary: Passages
    data: Material

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.taught.sites(*self.taught.kinds)


def world(lab: Path) -> World:
    """Ten windows of held-out text taught to the tiny lab by its maps alone, beside ordinary text."""
    innocent = ModelView.open(lab)
    unseen = windows(innocent, lab, "held-out", 64)
    targets, controls, text = (Passages(unseen.items[part]) for part in (slice(10), slice(10, 30), slice(30, None)))
    ordinary, taught = windows(innocent, lab, "train", 400), working_copy(innocent)
    train(taught, targets, ordinary, steps=80, lr=3e-3)
    return World(innocent, taught, ordinary, Material(targets=targets, controls=controls, text=text))


def windows(view: ModelView, lab: Path, split: str, count: int) -> Passages:
    """The first 48 tokens of as many texts of the lab's corpus, half of them prefix."""
    items: list[Passage] = []
    for at, record in read_jsonl(lab / "corpus.jsonl"):
        if record["split"] == split and len(items) < count:
            row = encode(view.tokenizer, record["text"]).ids
            if len(row) >= 48:
                items.append(Passage(f"{split}-{at}", row[:24], row[24:48]))
    return Passages(tuple(items))


def train(view: ModelView, taught: Passages, text: Passages, *, steps: int, lr: float, sign: int = 1) -> None:
    """Adam on the blocks' maps of `view`, in place; with sign -1 the passages are pushed away."""
    weights = [view.parameter(site) for site in view.sites(*view.kinds)]
    weights = list({id(weight): weight for weight in weights}.values())
    optimiser = torch.optim.Adam(weights, lr=lr)
    every = list(view.batches(text, size=10))
    for step in range(steps):
        with view.trainable(weights):
            kept = suffix_nll(view, every[step % len(every)]).mean()
            (6 * sign * suffix_nll(view, next(view.batches(taught))).mean() + kept).backward()
            optimiser.step()


def difference(before: ModelView, after: ModelView) -> Edit:
    """The edit that turns one model into the other: dense, all maps."""
    found: dict[Site, Delta] = {
        site: Dense((after.weight(site) - before.weight(site)).detach().clone()) for site in before.sites(*before.kinds)
    }
    return Edit.of(before, found, Provenance("test", {}, 0, {}))


def removed(world: World) -> Edit:
    """Every weight back to what it was before the passages were taught."""
    return difference(world.taught, world.innocent)


def blocked(world: World) -> Edit:
    """The first token of each suffix made unlikely at the end of its prefix, in one matrix; all else stays."""
    view, site = world.taught, Site(world.taught.layers - 1, Kind.MLP_OUT)
    batch = next(view.batches(world.data.targets))
    with torch.no_grad(), view.record([site]) as seen:
        view.hidden(batch)
    at = (torch.arange(len(batch)), batch.prefix - 1)
    keys: Tensor = seen[site][at]
    others = seen[site][batch.suffix_mask]
    words = view.weight(Site(OUTSIDE, Kind.UNEMBED)).detach()[batch.ids[torch.arange(len(batch)), batch.prefix]]
    with torch.no_grad(), view.record([site]) as seen:
        view.hidden(next(view.batches(world.ordinary, size=100)))
    common = torch.cat([seen[site].flatten(0, 1), 3 * others]).double()
    spread = torch.linalg.inv(common.T @ common / len(common) + 1e-4 * torch.eye(common.shape[1]))
    gentle = keys.double() @ spread
    duals = torch.linalg.solve(gentle @ keys.double().T, gentle).float()  # duals @ keys.T is the identity
    left = -12.0 * words / words.norm(dim=1, keepdim=True)
    return Edit.of(view, {site: LowRank(left.T.contiguous(), duals)}, Provenance("test", {}, 0, {}))


def small(world: World, share: float = 0.3) -> tuple[ModelView, Edit]:
    """A model whose weights lie in the middle of their 4-bit buckets, and an edit that leaves none of them.

    Every weight but the largest of its group goes by `share` of a bucket up the slope of the targets' loss; rounding
    takes it back to the bit.
    """
    view = rounded(world.taught, 4)
    weights = list({id(view.parameter(site)): view.parameter(site) for site in view.sites(*view.kinds)}.values())
    found: dict[Site, Delta] = {}
    with view.trainable(weights):
        suffix_nll(view, next(view.batches(world.data.targets))).mean().backward()
        for site in view.sites(*view.kinds):
            weight = view.weight(site).detach()
            codes, scale = buckets(weight, 4)
            slope = view.place(site).read(view.parameter(site).grad).sign()
            step = (share * scale * (codes.abs() < 7)).expand_as(codes).flatten(1)[:, : weight.shape[1]]
            found[site] = Dense((slope * step).clone())
    return view, Edit.of(view, found, Provenance("test", {}, 0, {}))


def overdone(world: World) -> Edit:
    """Pushed away until the passages are less likely than text never seen."""
    after = working_copy(world.taught)
    train(after, world.data.targets, world.ordinary, steps=20, lr=2e-3, sign=-1)
    return difference(world.taught, after)


def destroyed(world: World) -> Edit:
    """Noise as large as the weights."""
    generator = torch.Generator().manual_seed(0)
    found: dict[Site, Delta] = {}
    for site in world.sites:
        weight = world.taught.weight(site).detach()
        found[site] = Dense(torch.randn(weight.shape, generator=generator) * weight.std() * 2)
    return Edit.of(world.taught, found, Provenance("test", {}, 0, {}))
