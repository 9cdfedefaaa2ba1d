"""The empirical Fisher information of chosen weights in blocks along its diagonal, in bounded memory.

F = (1/m) Σ g gᵀ over m gradients, each of one suffix token's -log p. The chosen weights of a matrix, row by row, are
cut into blocks of B, and F is kept within blocks only: B floats a weight. Where that is more than the memory given,
maps are taken in groups and the gradients made again for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.masks import Masks
from memloc import progress
from memloc.batches import Batch
from memloc.errors import InputError
from memloc.objectives import suffix_logprobs
from memloc.passages import Passages
from memloc.sites import Site
from memloc.view import ModelView


@dataclass(frozen=True)
class Blocks:
    """Blocks of one matrix.

    Attributes:
        fisher: [b, B, B] float32 (float64 stays), without damping.
        damping: what is added to the diagonal.
        count: how many weights; the last block is filled up with weights of no gradient.
    """

    fisher: Tensor
    damping: float
    count: int

    def damped(self, start: int, stop: int) -> Tensor:
        """Blocks `start` to `stop`, damped, float64."""
        part = self.fisher[start:stop].double()
        return part + self.damping * torch.eye(part.shape[1], dtype=torch.float64)

    def inverse_diagonal(self, step: int = 2048) -> Tensor:
        """[count] float64, the diagonal of the damped inverse."""
        parts = []
        for start in range(0, len(self.fisher), step):
            factor = torch.linalg.cholesky(self.damped(start, start + step))
            parts.append(torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2).reshape(-1))
        return torch.cat(parts)[: self.count]

    def compensation(self, weights: Tensor, pruned: Tensor, step: int = 2048) -> Tensor:
        """Change of every weight [count] float64, minus the weight where `pruned`, elsewhere what costs least.

        Of all changes that make the pruned weights of a block zero it has the smallest δᵀFδ: with P the weights that
        stay and Q those that go, δ_P = F_PP⁻¹ F_PQ w_Q.
        """
        size = self.fisher.shape[1]
        values, gone = _folded(weights.double(), size), _folded(pruned, size)
        found = torch.where(gone, -values, 0.0)
        for start in range(0, len(values), step):
            part, out = self.damped(start, start + step), gone[start : start + step]
            lost = torch.where(out, values[start : start + step], 0.0)
            pull = torch.where(out, 0.0, (part @ lost[:, :, None])[:, :, 0])
            # Rows and columns of what goes become those of the identity, so that one batched solve serves all blocks.
            stay = (~out).double()
            inner = part * stay[:, :, None] * stay[:, None, :] + torch.diag_embed(out.double())
            found[start : start + step] += torch.linalg.solve(inner, pull[:, :, None])[:, :, 0]
        return found.reshape(-1)[: self.count]


@dataclass(frozen=True)
class Estimate:
    """How F is estimated.

    Attributes:
        gradients: at most so many suffix tokens, drawn evenly from all.
        block: B.
        damping: as a share of the matrix's mean diagonal, or
        absolute: as it is.
        megabytes: for the blocks of the maps worked on together; one map is always taken.
        seed: of which tokens are drawn.
    """

    gradients: int
    block: int
    damping: float
    absolute: bool
    megabytes: int
    seed: int

    def __post_init__(self) -> None:
        if min(self.gradients, self.block, self.megabytes) < 1 or self.damping <= 0:
            found = (
                f"gradients {self.gradients}, block {self.block}, megabytes {self.megabytes}, damping {self.damping}"
            )
            raise InputError(f"{found}: expected at least 1, and damping above 0")


def fisher_blocks(view: ModelView, where: Masks, passages: Passages, how: Estimate) -> Iterator[dict[Site, Blocks]]:
    """Blocks of the chosen weights, group of maps by group.

    Args:
        view: a working copy in float32 or float64.
        where: the chosen weights.
        passages: whose suffix tokens give the gradients.
        how: the settings.
    """
    drawn = _drawn(passages, how.gradients, how.seed)
    total = sum(map(len, drawn.values()))
    for group in _groups(where, how):
        sums = {site: _empty(int(where[site].sum()), how.block, view) for site in group}
        for row, tokens in progress.steps(list(drawn.items()), "gradients of single tokens"):
            batch = next(view.batches(passages[row : row + 1]))
            for found in _token_gradients(view, batch, tokens, group):
                for site in group:
                    part = _folded(found[site].cpu()[where[site]], how.block)
                    sums[site].baddbmm_(part[:, :, None], part[:, None, :], alpha=1 / total)
        yield {site: _blocks(sums.pop(site), int(where[site].sum()), how) for site in group}


def _blocks(fisher: Tensor, count: int, how: Estimate) -> Blocks:
    mean = float(fisher.diagonal(dim1=1, dim2=2).double().sum()) / count
    damping = how.damping if how.absolute else how.damping * mean
    return Blocks(fisher, max(damping, torch.finfo(torch.float64).tiny ** 0.5), count)


def _drawn(passages: Passages, count: int, seed: int) -> dict[int, list[int]]:
    """Row to steps in its suffix, in order."""
    every = [(row, step) for row, item in enumerate(passages) for step in range(len(item.suffix))]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    found: dict[int, list[int]] = {}
    for place in order.tolist():
        row, step = every[place]
        found.setdefault(row, []).append(step)
    return found


def _groups(where: Masks, how: Estimate) -> list[list[Site]]:
    """Maps together as long as their blocks fit."""
    room, groups, left = how.megabytes * 2**20, list[list[Site]](), 0.0
    for site, mask in sorted(where.items()):
        need = (int(mask.sum()) + how.block) * how.block * 4
        if not groups or need > left:
            groups.append([])
            left = room
        groups[-1].append(site)
        left -= need
    return groups


def _token_gradients(
    view: ModelView, batch: Batch, tokens: Sequence[int], sites: Sequence[Site]
) -> Iterator[Mapping[Site, Tensor]]:
    """Gradient of -log p of each of the suffix tokens of one row: site to `[out, in]`. One forward, a backward each."""
    places = {site: view.place(site) for site in sites}
    parameters = {places[site].parameter: view.parameter(site) for site in sites}
    with view.trainable(list(parameters.values())):
        spoken = suffix_logprobs(view, batch)[0]
        for token in tokens:
            found = torch.autograd.grad(-spoken[token], list(parameters.values()), retain_graph=True)
            by_name = dict(zip(parameters, found, strict=True))
            yield {site: place.read(by_name[place.parameter]) for site, place in places.items()}


def _empty(count: int, block: int, view: ModelView) -> Tensor:
    kind = torch.float64 if view.dtype == torch.float64 else torch.float32
    return torch.zeros(-(-count // block), block, block, dtype=kind)


def _folded(flat: Tensor, block: int) -> Tensor:
    """[n] as [b, B], filled up with zeros (or False)."""
    whole = flat.new_zeros(-(-len(flat) // block) * block)
    whole[: len(flat)] = flat
    return whole.view(-1, block)
