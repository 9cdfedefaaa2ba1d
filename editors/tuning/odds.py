"""The log-odds of a token, and how each map moves them from the position that predicts it.

Log-odds are what an edit of a memory should speak of. Where a token is sure its log-probability is flat, and an edit
solved to first order in it goes wrong by orders of magnitude; log(p / (1 - p)) is nearly linear in the logits there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memloc import progress
from memloc.batches import Batch, pad
from memloc.gradients.map_gradients import pulls
from memloc.sites import Site
from memloc.view import ModelView

Row = tuple[int, ...]
"""Token ids; what is spoken of is the last."""


def log_odds(logits: Tensor, token: Tensor) -> Tensor:
    """log(p / (1 - p)) of `token` [n] under `logits` [n, v], nats; exact also where p rounds to 1."""
    chosen = logits.gather(1, token[:, None])
    rest = logits.scatter(1, token[:, None], -torch.inf)
    return chosen[:, 0] - rest.logsumexp(1)


@dataclass(frozen=True)
class Slopes:
    """Log-odds of rows and their derivatives; float64 on the CPU.

    Attributes:
        odds: [n] nats.
        read: site to [n, in], what the map reads at the predicting position.
        pull: site to [n, out], the derivative of the log-odds by what it puts out there.
    """

    odds: Tensor
    read: Mapping[Site, Tensor]
    pull: Mapping[Site, Tensor]

    def moved(self, change: Mapping[Site, Tensor]) -> Tensor:
        """How far `change` (site to [out, in]) moves each row's odds to first order, [n]."""
        total = torch.zeros_like(self.odds)
        for site, matrix in change.items():
            total += ((self.pull[site] @ matrix.to(total)) * self.read[site]).sum(1)
        return total


def slopes(view: ModelView, sites: Sequence[Site], rows: Sequence[Row], *, size: int = 64) -> Slopes:
    """Log-odds of each row's last token, and how each map moves them from the position before it.

    What a map does at earlier positions reaches the token through attention; that way is left out, so that a row is two
    vectors a site and not a matrix. Whoever solves with these derivatives should solve again.

    Cost: one forward and one backward over the rows; n (in + out) float64 a site.
    """
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index]), index))
    odds: list[Tensor] = []
    read: dict[Site, list[Tensor]] = {site: [] for site in sites}
    pull: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for start in progress.steps(range(0, len(rows), size), "slopes"):
        batch = pad([rows[index] for index in order[start : start + size]], device=view.device)
        found, flowed = pulls(view, batch, sites, loss=_last_odds)
        line, at = torch.arange(len(batch), device=view.device), batch.length - 2
        odds.append(found.cpu().double())
        for site in sites:
            read[site].append(flowed[site].read[line, at].detach().cpu().double())
            pull[site].append(flowed[site].pull[line, at].cpu().double())
    back = torch.tensor(order).argsort()
    joined = [{site: torch.cat(parts)[back] for site, parts in side.items()} for side in (read, pull)]
    return Slopes(torch.cat(odds)[back], joined[0], joined[1])


@torch.no_grad()
def every_odds(view: ModelView, rows: Sequence[Row], *, size: int = 64) -> list[Tensor]:
    """Log-odds of every token of each row but the first: a tensor [t - 1] a row, float64 on the CPU."""
    found = []
    for start in range(0, len(rows), size):
        batch = pad(rows[start : start + size], device=view.device)
        inner = batch.mask[:, 1:]
        line, column = inner.nonzero(as_tuple=True)
        odds = log_odds(view.logits_at(batch, line, column), batch.ids[line, column + 1]).cpu().double()
        found += list(torch.split(odds, inner.sum(1).tolist()))
    return found


def _last_odds(view: ModelView, batch: Batch) -> Tensor:
    line = torch.arange(len(batch), device=view.device)
    logits = view.logits_at(batch, line, batch.length - 2)
    return log_odds(logits, batch.ids[line, batch.length - 1])
