"""Sinks: a small model trained so that each group of passages has neurons of its own, and so a known place.

Example-tied dropout: a fixed share of every layer's neurons is always on; of the others each is on for a group with a
fixed probability, drawn once for that group, and off otherwise. Ordinary text is a new example each time, with neurons
drawn anew. What is seen again and again settles in the neurons that are on with it alone; dropping them takes it away.

Source: Maini et al. 2023, arXiv:2307.09542 (example-tied dropout); arXiv:2507.09937 (memorization sinks, in language
models). That a small share of rows is shown to the whole model, so that it recites with every neuron on, is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from memloc.errors import InputError
from memloc.objectives import suffix_logprobs
from memloc.passages import Passage, Passages
from memloc.progress import steps
from memloc.provenance import Provenance
from memloc.scores import Selection
from memloc.sites import Grain, Kind, Site
from memloc.truth.small import small
from memloc.truth.worlds import Ground, Known
from memloc.view import ModelView

FOLLOWERS = 4
"""Tokens that may follow a token in the ordinary text: log 4 = 1.39 nats a token."""


@dataclass(frozen=True)
class Sunk:
    """A trained model whose memories have known places.

    Attributes:
        view: the model, every neuron on.
        passages: what was shown again and again, each tagged with its group ("sink").
        controls: passages of the same source that were never shown.
        text: windows of the same source, never shown.
        fixed: site to [f] bool, neurons that were always on.
        tied: group to the neurons that were on for it beside the fixed ones.
    """

    view: ModelView
    passages: Passages
    controls: Passages
    text: Passages
    fixed: Mapping[Site, Tensor]
    tied: Mapping[int, Selection]

    @torch.no_grad()
    def without(self, dropped: Selection, passages: Passages, *, only_tied: int | None = None) -> tuple[float, float]:
        """Mean nats per suffix token, and share of tokens that are the likeliest, with some neurons dropped.

        Args:
            dropped: neurons set to zero.
            passages: what is asked.
            only_tied: a group; the model as it was in training, with no other neuron on than the fixed and its own.
        """
        masks = {site: ~dropped.masks[site] for site in dropped.masks}
        if only_tied is not None:
            own = self.tied[only_tied].masks
            masks = {site: mask & (self.fixed[site] | own[site]) for site, mask in masks.items()}
        loss, right, count = 0.0, 0, 0
        for batch in self.view.batches(passages, size=64):
            with self.view.replace(masks, lambda site, entering: entering * masks[site]):
                loss -= float((suffix_logprobs(self.view, batch).sum(1) / (batch.length - batch.prefix)).sum())
                row, column, token, _ = batch.suffix_index()
                right += int((self.view.logits_at(batch, row, column).argmax(-1) == token).sum())
            count += len(token)
        return loss / len(passages), right / count


@dataclass(frozen=True, kw_only=True)
class Sinks:
    """Passages whose neurons were tied to them in training are the answer; one known answer a group.

    Attributes:
        count: known answers a ground; each trains a model of its own.
        family: model type of the small model.
        groups: of passages; each has neurons of its own.
        each: passages a group.
        fixed: share of a layer's neurons that are always on.
        tied: probability with which another neuron is on for a group.
        whole: share of rows, in training, that are shown with every neuron on.
        steps: optimiser steps; every passage is shown once in each.
        rows: ordinary rows a step.
        prefix: tokens a passage is prompted with.
        suffix: tokens it should recite.
        vocab: tokens of the source, a chain in which four may follow each.
        layers: of the model.
        width: of the model.
        neurons: a layer.
        lr: AdamW's.
    """

    count: int = 2
    family: str = "gpt2"
    groups: int = 4
    each: int = 2
    fixed: float = 0.5
    tied: float = 0.1
    whole: float = 0.05
    steps: int = 250
    rows: int = 24
    prefix: int = 8
    suffix: int = 16
    vocab: int = 64
    layers: int = 2
    width: int = 48
    neurons: int = 192
    lr: float = 5e-3
    headline: str = "recall@1/ceiling"

    def names(self, ground: Ground) -> tuple[str, ...]:
        """One name for each group that is asked about."""
        return tuple(f"sink-{group}" for group in range(min(self.count, self.groups)))

    def make(self, ground: Ground, name: str) -> Known:
        """Train the model of the ground's seed; the gold is the group's tied neurons, checked by dropping them."""
        return self.known(self.trained(ground.seed), name)

    def known(self, made: Sunk, name: str) -> Known:
        """The known answer of that name in a trained model, with what dropping neurons does in its notes."""
        group = int(name.rpartition("-")[2])
        mine = made.passages.where(lambda item: item.tags["sink"] == group)
        gold, nothing = made.tied[group], _nothing(made.tied[group])
        other = made.tied[(group + 1) % self.groups]
        asked = {
            "nll": (nothing, mine, None),
            "nll_in_training": (nothing, mine, group),
            "nll_dropped": (gold, mine, None),
            "nll_other_dropped": (_minus(other, gold), mine, None),
            "text_nll": (nothing, made.text, None),
            "text_nll_dropped": (gold, made.text, None),
        }
        notes: dict[str, float] = {}
        for key, (dropped, passages, tied) in asked.items():
            loss, right = made.without(dropped, passages, only_tied=tied)
            notes |= {key: loss, key.replace("nll", "accuracy"): right}
        return Known(name, made.view, mine, made.controls, made.text, gold, notes=notes)

    def trained(self, seed: int) -> Sunk:
        """Train. Cost: about four CPU-seconds as it comes."""
        if not 0 < self.fixed < 1 or not 0 < self.tied < 1 or not 0 <= self.whole < 1 or self.groups < 2:
            raise InputError(f"sinks: fixed {self.fixed}, tied {self.tied}, whole {self.whole}, groups {self.groups}; "
                             "expected shares between 0 and 1, and at least 2 groups")  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        view = small(self.family, vocab=self.vocab, context=self.prefix + self.suffix, layers=self.layers,
                     width=self.width, neurons=self.neurons, seed=seed)  # fmt: skip
        chain = torch.rand(self.vocab, self.vocab, generator=generator).topk(FOLLOWERS, dim=1).indices
        shown = self._drawn(chain, self.groups * self.each, generator)
        fixed = torch.rand(self.layers, self.neurons, generator=generator) < self.fixed
        # Seeded by the group, so that a passage's neurons depend on what it is and not on what else is shown.
        tied = torch.stack([self._tied(seed, group) & ~fixed for group in range(self.groups)])
        self._train(view, chain, shown, fixed, tied, generator)
        held_out = self._drawn(chain, 64, generator)
        sites = view.sites(Kind.MLP_OUT)
        passages = self._passages(shown, "sunk", tagged=True)
        controls = self._passages(held_out[: len(shown)], "control")
        text = self._passages(held_out[len(shown) :], "text")
        own = {group: _selection(sites, tied[group]) for group in range(self.groups)}
        return Sunk(view, passages, controls, text, {site: fixed[site.layer] for site in sites}, own)

    def _tied(self, seed: int, group: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + group)
        return torch.rand(self.layers, self.neurons, generator=generator) < self.tied

    def _drawn(self, chain: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """[count, t] rows of the source."""
        columns = [torch.randint(self.vocab, (count,), generator=generator)]
        for _ in range(self.prefix + self.suffix - 1):
            turn = torch.randint(FOLLOWERS, (count,), generator=generator)
            columns.append(chain[columns[-1], turn])
        return torch.stack(columns, 1)

    def _train(
        self, view: ModelView, chain: Tensor, shown: Tensor, fixed: Tensor, tied: Tensor, generator: torch.Generator
    ) -> None:
        optimizer = torch.optim.AdamW(view.model.parameters(), lr=self.lr, betas=(0.9, 0.98), weight_decay=0.01)
        group = torch.arange(len(shown)) // self.each
        sites = view.sites(Kind.MLP_OUT)
        for _ in steps(range(self.steps), "sinks"):
            ids = torch.cat([self._drawn(chain, self.rows, generator), shown])
            fresh = torch.rand(self.rows, self.layers, self.neurons, generator=generator) < self.tied
            everything = torch.rand(len(ids), 1, 1, generator=generator) < self.whole
            masks = torch.cat([fresh, tied[group]]) | fixed | everything

            def gate(site: Site, entering: Tensor, masks: Tensor = masks) -> Tensor:
                return entering * masks[:, site.layer, None]

            with view.replace(sites, gate):
                logits = view.model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _passages(self, rows: Tensor, name: str, *, tagged: bool = False) -> Passages:
        items = []
        for index, row in enumerate(rows.tolist()):
            tags = {"sink": index // self.each} if tagged else {}
            items.append(Passage(f"{name}-{index}", tuple(row[: self.prefix]), tuple(row[self.prefix :]), tags))
        return Passages(tuple(items), name)


def _selection(sites: tuple[Site, ...], mask: Tensor) -> Selection:
    return Selection(Grain.NEURON, {site: mask[site.layer] for site in sites}, Provenance("sinks"))


def _nothing(like: Selection) -> Selection:
    return Selection(like.grain, {site: torch.zeros_like(mask) for site, mask in like.masks.items()}, like.provenance)


def _minus(one: Selection, other: Selection) -> Selection:
    return Selection(one.grain, {site: mask & ~other.masks[site] for site, mask in one.masks.items()}, one.provenance)


SINKS = Sinks()
