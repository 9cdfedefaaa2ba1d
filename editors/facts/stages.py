"""Rows of facts run up to the edited layer once, and what any change there makes the model say of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.facts.contexts import Demand
from memloc.batches import pad
from memloc.sites import Kind, Site
from memloc.view import ModelView


@dataclass
class Terms:
    """Of every fact: mean nats per token asked for, KL of its essence, probability after the bare prompt."""

    nll: Tensor
    kl: Tensor
    spoken: Tensor


class Stage:
    """Rows of the facts at work, run up to the edited layer once."""

    def __init__(
        self, view: ModelView, layer: int, demands: Sequence[Demand], changes: Sequence[int] | None = None
    ) -> None:
        """With which of the changes each row takes (those of `demands`, the essence last); by default its fact's."""
        self.view, self.layer, self.demands = view, layer, list(demands)
        rows = list(_rows(self.demands))
        batch = pad([ids for _, ids, _ in rows], device=view.device)
        with torch.no_grad(), view.record([Site(layer, Kind.MLP_OUT)], side="output") as seen:
            self.tail = view.tail(layer, batch)
        self.fact = torch.tensor(changes or [fact for fact, _, _ in rows], device=view.device)
        self.at = torch.tensor([at for _, _, at in rows], device=view.device)
        self.written = seen[Site(layer, Kind.MLP_OUT)][torch.arange(len(rows), device=view.device), self.at]
        self._score()
        with torch.no_grad():
            none = torch.zeros(int(self.fact.max()) + 1, view.width, device=view.device)
            self.clean = self._logs(none)[self.asked :]

    def only(self, facts: Sequence[int]) -> Stage:
        """The same with fewer facts."""
        return Stage(self.view, self.layer, [self.demands[index] for index in facts])

    def _score(self) -> None:
        """Which positions are unembedded: of every prompt those that predict the target, then one of each essence."""
        row, column, token, share, fact, bare, essence = [], [], [], [], [], [], []
        index = 0
        for place, demand in enumerate(self.demands):
            for order, prompt in enumerate(demand.prompts):
                for step, wanted in enumerate(demand.target):
                    row.append(index)
                    column.append(len(prompt.ids) - 1 + step)
                    token.append(wanted)
                    share.append(1 / (len(demand.prompts) * len(demand.target)))
                    fact.append(place)
                    bare.append(order == 0)
                index += 1
            if demand.essence is not None:
                essence.append((place, index, demand.essence.at))
                index += 1
        device = self.view.device
        self.asked = len(row)
        self.row = torch.tensor(row + [entry[1] for entry in essence], device=device)
        self.column = torch.tensor(column + [entry[2] for entry in essence], device=device)
        self.token, self.share = torch.tensor(token, device=device), torch.tensor(share, device=device)
        self.owner, self.bare = torch.tensor(fact, device=device), torch.tensor(bare, device=device)
        self.kept = torch.tensor([entry[0] for entry in essence], dtype=torch.long, device=device)

    def terms(self, change: Tensor) -> Terms:
        """The loss terms of every fact with `change` [n, d], differentiable."""
        spoken, now = self.spoken(change)
        zero = spoken.new_zeros(len(self.demands))
        nll = -zero.index_add(0, self.owner, spoken * self.share.to(spoken))
        said = zero.index_add(0, self.owner[self.bare], spoken.detach()[self.bare]).exp()
        kl = zero.index_add(0, self.kept, now)
        return Terms(nll.float(), kl.float(), said.float())

    def spoken(self, change: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of every token asked for, and KL(changed || clean) of every essence."""
        logs = self._logs(change)
        now = logs[self.asked :]
        said = logs[: self.asked].gather(1, self.token[:, None])[:, 0]
        return said, (now.exp() * (now - self.clean)).sum(1)

    def _logs(self, change: Tensor) -> Tensor:
        """Log-probabilities at the scored positions, `[k, v]`."""
        residual = self.tail.residual
        line = torch.arange(len(residual), device=residual.device)
        added = residual[line, self.at] + self._moved(change[self.fact])
        hidden = self.tail.hidden(residual.index_put((line, self.at), added.to(residual.dtype)))
        return self.view.unembed(hidden[self.row, self.column]).log_softmax(-1)

    def _moved(self, change: Tensor) -> Tensor:
        """How far the stream moves, [n, d], where `mlp.out` writes so much more: as far, but where that is normed."""
        site = Site(self.layer, Kind.MLP_OUT)
        if site.kind not in self.view.row.added:
            return change
        more = (self.written.to(change) + change).to(self.written)
        return (self.view.added(site, more) - self.view.added(site, self.written)).to(change)


def _rows(demands: Sequence[Demand]) -> Iterator[tuple[int, tuple[int, ...], int]]:
    for fact, demand in enumerate(demands):
        for row in demand.prompts:
            yield fact, row.ids + demand.target[:-1], row.at
        if demand.essence is not None:
            yield fact, demand.essence.ids, demand.essence.at
