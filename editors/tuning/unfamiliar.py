"""Tokens made unfamiliar by the least change: what is asked of each, what is kept, and the rounds of solving.

`editors.rewriters.forget_passage` says what is asked; here it is brought about. Every round takes the slopes of all
log-odds, solves for the least change that brings them where they should be, and looks at what that did.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from editors.deltas import LowRank
from editors.edit import Edit
from editors.tuning.least_change import Metric, dual, gram
from editors.tuning.odds import Row, Slopes, every_odds, log_odds, slopes
from memloc import progress
from memloc.batches import pad
from memloc.errors import InputError
from memloc.passages import Passage, Passages
from memloc.provenance import Provenance
from memloc.sites import Site
from memloc.view import ModelView

FULL_STEPS = 2
"""Rounds that go all the way; later ones go part of it, because each solve holds to first order only."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """How the change is searched for; as the fields of the same names of `ForgetPassage`."""

    rounds: int
    step: float
    close: float
    ridge: float
    rank: int | None
    protect: int
    batch_size: int

    @classmethod
    def of(cls, settings: object) -> Search:
        """From those of an editor, which has fields of the same names."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class Asked:
    """Every token to forget.

    Attributes:
        targets: the passages.
        rows: one a token.
        levels: a tensor a passage, the log-odds its tokens should fall to.
    """

    targets: Passages
    rows: list[Row]
    levels: list[Tensor]

    @property
    def level(self) -> Tensor:
        """[n], of all rows."""
        return torch.cat(self.levels)

    def excess(self, odds: Tensor) -> Tensor:
        """Mean log-odds of each passage above its level, nats per token, [targets]."""
        parts = torch.split(odds - self.level, [len(level) for level in self.levels])
        return torch.stack([part.mean() for part in parts])

    def recited(self, odds: Tensor) -> int:
        """How many passages have every token likelier than not (fewer than are recited greedily)."""
        return sum(bool((part > 0).all()) for part in torch.split(odds, [len(level) for level in self.levels]))


@dataclass(frozen=True)
class Kept:
    """Tokens the model is sure of and should stay sure of.

    Attributes:
        rows: each up to the token that counts.
        floor: [n] log-odds it should not fall below.
        whole: rows as they are run, and for each token which row it is in and where.
    """

    whole: list[Row]
    line: Tensor
    column: Tensor
    floor: Tensor
    size: int

    @classmethod
    def of(cls, view: ModelView, pool: Sequence[tuple[int, Row]], margin: float, size: int) -> Kept:
        """Tokens likelier than not, as the model is now."""
        whole = [row for start, row in pool if len(row) > 1]
        starts = [max(1, start) for start, row in pool if len(row) > 1]
        odds = every_odds(view, whole, size=size)
        line, column, floor = [], [], []
        for index, (start, found) in enumerate(zip(starts, odds, strict=True)):
            for at in (found > 0).nonzero()[:, 0].tolist():
                if at + 1 >= start:
                    line.append(index)
                    column.append(at)
                    floor.append(min(margin, float(found[at])))
        return cls(whole, torch.tensor(line), torch.tensor(column), torch.tensor(floor, dtype=torch.float64), size)

    def odds(self, view: ModelView) -> Tensor:
        """[n], now."""
        if not len(self.floor):
            return self.floor
        found = torch.nn.utils.rnn.pad_sequence(every_odds(view, self.whole, size=self.size), batch_first=True)
        return found[self.line, self.column]

    def row(self, index: int) -> Row:
        """The row up to token `index`."""
        return self.whole[int(self.line[index])][: int(self.column[index]) + 2]


class Solver:
    """Measure, solve, and again."""

    def __init__(self, how: Search, view: ModelView, metrics: Mapping[Site, Metric], asked: Asked, kept: Kept) -> None:
        self.how, self.view, self.metrics, self.asked, self.kept = how, view, metrics, asked, kept
        self.held: list[int] = []

    def run(self) -> tuple[dict[Site, LowRank], dict[str, Any]]:
        """The best change found, and what happened."""
        change: dict[Site, LowRank] = {}
        best: tuple[tuple[float, ...], dict[Site, LowRank]] | None = None
        history = []
        for index in range(self.how.rounds + 1):
            with self._changed(change):
                kept = self.kept.odds(self.view)
                self._hold(kept)
                found = slopes(self.view, list(self.metrics), self._rows(), size=self.how.batch_size)
            entry = self._judged(found, kept, change)
            progress.tell("forget-passage", index, self.how.rounds, f"above {entry['above']:.2f} lost {entry['lost']}")
            if not change and bool((found.odds[: len(self.asked.rows)] <= self.asked.level).all()):
                raise InputError(
                    "nothing to do: no token of a target is said more readily than after disturbed prefixes"
                )
            if change:
                history.append(entry)
                merit = (entry["recited"], max(0.0, entry["above"] - self.how.close) + entry["short"])
                if best is None or merit < best[0]:
                    best = merit, change
                if entry["met"] and not entry["lost"]:
                    break
            if index < self.how.rounds:
                step = 1.0 if index < FULL_STEPS else self.how.step
                change = self._solve(found, change, step)
        if best is None:
            raise InputError("the solve gave no change; lower the ridge or the dampings")
        return best[1], {"rounds": history, "protected": len(self.held), **self._about(best[1])}

    def _rows(self) -> list[Row]:
        return self.asked.rows + [self.kept.row(index) for index in self.held]

    def _solve(self, found: Slopes, change: Mapping[Site, LowRank], step: float) -> dict[Site, LowRank]:
        """The least whole change by these slopes, and `step` of the way from the present one to it."""
        down, held = len(self.asked.rows), torch.tensor(self.held, dtype=torch.long)
        sign = torch.cat([-torch.ones(down), torch.ones(len(held))]).double()
        bound = torch.cat([self.asked.level, self.kept.floor[held]])
        present = {site: delta.left.double() @ delta.right.double() for site, delta in change.items()}
        asked = sign * (bound - found.odds + found.moved(present))
        white = {
            site: metric.whitened(found.read[site], found.pull[site] * sign[:, None])
            for site, metric in self.metrics.items()
        }
        weight = dual(gram(white.values()), asked, ridge=self.how.ridge)
        made = {}
        for site, metric in self.metrics.items():
            read, pull = white[site]
            if step < 1 and site in change:
                old = metric.whitened(
                    change[site].right.double() @ metric.read @ metric.read.T,
                    (metric.pull @ metric.pull.T @ change[site].left.double()).T,
                )
                read, pull = torch.cat([read, old[0]]), torch.cat([pull, old[1]])
                both = torch.cat([step * weight, torch.full((len(old[0]),), 1 - step, dtype=torch.float64)])
                made[site] = metric.change(read, pull, both, self.how.rank)
            else:
                made[site] = metric.change(read, pull, weight, self.how.rank)
        return made

    def _hold(self, kept: Tensor) -> None:
        """Add the tokens worst hit by the present change to what the next solve protects."""
        short = self.kept.floor - kept
        known = set(self.held)
        for index in short.argsort(descending=True, stable=True).tolist()[: self.how.protect]:
            if short[index] > 0 and index not in known:
                self.held.append(index)

    def _judged(self, found: Slopes, kept: Tensor, change: Mapping[Site, LowRank]) -> dict[str, Any]:
        odds = found.odds[: len(self.asked.rows)]
        excess = self.asked.excess(odds)
        short = (self.kept.floor - kept).clamp_min(0)
        return {
            "recited": self.asked.recited(odds),
            "above": float(excess.clamp_min(0).max()),
            "met": bool((excess <= self.how.close).all()),
            "lost": int((kept < 0).sum()),
            "short": float(short.mean()) if len(short) else 0.0,
            "held": len(self.held),
            "energy": sum(self.metrics[site].energy(delta) for site, delta in change.items()),
        }

    @contextlib.contextmanager
    def _changed(self, change: Mapping[Site, LowRank]) -> Any:
        """The working copy with `change` in it."""
        if not change:
            yield
            return
        with Edit.of(self.view, change, Provenance("forget-passage", {}, None, {})).apply(self.view):
            yield

    def _about(self, change: Mapping[Site, LowRank]) -> dict[str, Any]:
        levels = zip(self.asked.targets, self.asked.levels, strict=True)
        return {
            "tokens": len(self.asked.rows),
            "sure tokens": len(self.kept.floor),
            "own log p": {item.id: float(torch.nn.functional.logsigmoid(level).sum()) for item, level in levels},
            "rank": {str(site): delta.rank for site, delta in change.items()},
        }


@torch.no_grad()
def own_odds(view: ModelView, copies: Tensor, item: Passage, positions: int | None) -> Tensor:
    """Mean over `copies` of the log-odds of each of the passage's true suffix tokens: [s] float64."""
    tokens = torch.tensor(item.suffix[:positions])
    column = torch.arange(len(tokens)) + len(item.prefix) - 1
    line = torch.arange(len(copies)).repeat_interleave(len(tokens))
    batch = pad(copies.tolist(), device=view.device)
    logits = view.logits_at(batch, line.to(view.device), column.repeat(len(copies)).to(view.device))
    found = log_odds(logits, tokens.repeat(len(copies)).to(view.device))
    return found.view(len(copies), -1).cpu().double().mean(0)


def disturbed(item: Passage, vocab: int, share: float, tries: int, generator: torch.Generator) -> Tensor:
    """[tries, t]: copies in which every token but the first was substituted with probability `share`."""
    ids = torch.tensor(item.ids).repeat(tries, 1)
    chosen = torch.rand(ids.shape, generator=generator) < share
    chosen[:, 0] = False
    # A step of 1 to v - 1, modulo v, never gives the same token back.
    moved = (ids + torch.randint(1, vocab, ids.shape, generator=generator)) % vocab
    return torch.where(chosen, moved, ids)
