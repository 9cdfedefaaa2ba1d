"""Patching to first order: every place of a grain by one backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.costs import Cost, pass_bytes
from memloc.patching.corruption import Corrupted
from memloc.patching.pairs import Run, constant_run, through
from memloc.patching.places import Places
from memloc.patching.question import Question
from memloc.patching.sweep import Sweep, batch_of
from memloc.sites import Kind, Site
from memloc.view import ModelView

Slopes = Mapping[Site, Tensor]


@dataclass(frozen=True)
class FirstOrder:
    """The linear estimate of what a sweep would measure.

    Attributes:
        sweep: corruption, direction and metric.
        graddrop: mean of absolute estimates, over gradients that each skip one layer's two contributions to the
            residual stream; divided by l - 1, for the gradient of a place that skips its own layer is 0.
    """

    sweep: Sweep
    graddrop: bool = False

    def __call__(
        self, view: ModelView, places: Places, batch: Batch, given: list[Corrupted] | Mapping[Site, Tensor]
    ) -> dict[Site, Tensor]:
        """Estimates of a batch: scored site to [n, units] or [n].

        Args:
            view: the model, its parameters frozen.
            places: what is patched.
            batch: the clean rows.
            given: corrupted rows of all passages (the batch's rows are indices into it), or constants.
        """
        sums: list[dict[Site, Tensor]] = []
        for base, slopes, other in self._pairs(view, places, batch, given):
            donor = through(view, places, base, other.reads) if places.read_sites else other.values
            step = {site: _wide(donor[site]) - _wide(base.values[site]) for site in base.values}
            found = [places.sums({site: step[site] * _wide(slope[site]) for site in step}) for slope in slopes]
            sums = found if not sums else [_added(one, two) for one, two in zip(sums, found, strict=True)]
        factor = (1 if self.sweep.direction == "noise" else -1) / self._draws
        if not self.graddrop:
            return {site: factor * entry for site, entry in sums[0].items()}
        share = abs(factor) / max(1, view.layers - 1)
        return {site: share * torch.stack([entry[site].abs() for entry in sums]).sum(0) for site in places.scored}

    def cost(self, view: ModelView, places: Places, batch: Batch) -> Cost:
        """Of one batch."""
        rows, tokens = batch.ids.shape
        corrupted = self.sweep.corruption.rows
        forward = 1 + corrupted + (self._draws if places.read_sites else 0)
        backward = (self._draws if self.sweep.direction == "denoise" else 1) * (view.layers if self.graddrop else 1)
        # The lowest place of the residual stream is the first block's output: no gradient enters that block.
        blocks = view.layers - places.after_blocks
        wide = view.neurons + view.heads * view.head_width + 4 * view.width
        kept = 8 * 8 * view.layers * rows * tokens * wide * (view.layers if self.graddrop else 1)
        unembedded = int(batch.suffix_mask.sum())
        memory = kept + 2 * pass_bytes(view, rows * tokens, context=tokens, grad=True, unembedded=unembedded)
        size = rows * tokens
        return Cost(view.layers * forward * size, blocks * backward * size, memory + 8 * 3 * size * view.width)

    @property
    def _draws(self) -> int:
        return max(1, self.sweep.corruption.rows)

    def _pairs(
        self, view: ModelView, places: Places, batch: Batch, given: list[Corrupted] | Mapping[Site, Tensor]
    ) -> Iterator[tuple[Run, list[Slopes], Run]]:
        """The run that is patched, its gradients, and the run that gives: one of each for every corrupted row."""
        noise = self.sweep.direction == "noise"
        gates = _Gates(view) if self.graddrop else None
        inner = gates.hung() if gates and noise else None
        clean = Run.of(view, places, batch, grad=noise, inner=inner)
        question = Question.about(view, self.sweep.metric, batch, clean.hidden)
        if isinstance(given, Mapping):
            yield clean, self._slopes(question, clean, gates), constant_run(view, places, clean, given)
            return
        slopes = self._slopes(question, clean, gates) if noise else []
        for draw in range(self._draws):
            rows, embedded = batch_of(given, draw, batch)
            if noise:
                yield clean, slopes, Run.of(view, places, rows, embedded)
            else:
                hung = gates.hung() if gates else None
                base = Run.of(view, places, rows, embedded, grad=True, inner=hung)
                yield base, self._slopes(question, base, gates), clean

    def _slopes(self, question: Question, run: Run, gates: _Gates | None) -> list[Slopes]:
        """Gradients of each row's loss by every place; with gates, one for each layer that is skipped."""
        with torch.enable_grad():
            loss = question.losses(run.hidden).sum()
        sites = list(run.values)
        found: list[Slopes] = []
        shut: list[int | None] = [None] if gates is None else list(range(question.view.layers))
        for layer in shut:
            if gates is not None:
                gates.shut = layer
            slopes = torch.autograd.grad(loss, [run.values[site] for site in sites], retain_graph=layer != shut[-1])
            found.append(dict(zip(sites, slopes, strict=True)))
        return found


class _Gates:
    """One on each contribution to the residual stream: the gradient of layer `shut` does not pass."""

    def __init__(self, view: ModelView) -> None:
        self.view = view
        self.shut: int | None = None

    def hung(self) -> AbstractContextManager[None]:
        """Inside, forward passes go through the gates; they stay in their graphs."""
        sites = self.view.sites(Kind.ATTN_OUT, Kind.MLP_OUT)
        return self.view.replace(sites, self._gate, side="output")

    def _gate(self, site: Site, tensor: Tensor) -> Tensor:
        found: Tensor = _Gate.apply(tensor, self, site.layer)  # type: ignore[no-untyped-call]
        return found


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gates: _Gates, layer: int) -> Tensor:
        ctx.gates, ctx.layer = gates, layer
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        return (torch.zeros_like(slopes[0]) if ctx.gates.shut == ctx.layer else slopes[0]), None, None


def _added(one: Mapping[Site, Tensor], two: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    return {site: one[site] + two[site] for site in one}


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.float()
