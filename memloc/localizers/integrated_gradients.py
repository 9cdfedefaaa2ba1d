"""Integrated gradients of neurons ("knowledge neurons"): what each adds to the probability of the suffix."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.cached import Column, Prefill
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.progress import steps
from memloc.provenance import Provenance, settings_of
from memloc.scores import Localization
from memloc.sites import Grain, Kind
from memloc.view import ModelView

Rule = Literal["gauss-legendre", "riemann-right", "inclusive"]


@dataclass(frozen=True, kw_only=True)
class IntegratedGradients:
    """Score of a neuron = its share in the probability of the suffix's tokens, by integrated gradients.

    At a position c that predicts suffix token y, with w̄ [f] what enters `mlp.out` there and P(α) the probability of y
    were it α·w̄ instead (at c only, in one layer at a time, other layers free to follow):

        score_i = w̄_i ∫₀¹ ∂P/∂w_i (α w̄) dα

    so a layer's scores sum to P(1) - P(0), what silencing it at c would take away; the remaining difference is the
    completeness gap, reported in the notes as a share of the passage's largest such effect. Scores are means over
    positions, probability per neuron, signed: positive neurons speed the suffix. One axis of passages.

    Exact and fast: the prefix is cached once, the integral runs on rows of one token that start at the changed layer.

    Attributes:
        position: which suffix tokens count: "all" (mean), "first" or "last".
        nodes: quadrature points to begin with.
        quadrature: "gauss-legendre"; "riemann-right" (the paper's, α = k/m); "inclusive" (m equal steps with both ends,
            each weighing 1/m: the rule of the public reference, which counts the ends twice).
        tolerance: Gauss-Legendre only: double the nodes where the gap is above this share.
        most_nodes: and stop doubling here.
        batch_size: passages prefilled together; no effect on scores.
        memory_mb: working memory the one-token rows may take, roughly; no effect on scores.

    Cost: one forward a passage; then, for each layer and suffix token, nodes + 1 single tokens forward and backward
    through half the blocks on average.

    Source: Dai et al. 2022, arXiv:2104.08696. Gauss-Legendre with doubling, the one-token form and the sum over
    all suffix tokens without decoding are ours.
    """

    position: Literal["all", "first", "last"] = "all"
    nodes: int = 8
    quadrature: Rule = "gauss-legendre"
    tolerance: float = 0.01
    most_nodes: int = 64
    batch_size: int = 8
    memory_mb: int = 512

    def __post_init__(self) -> None:
        if min(self.nodes, self.batch_size, self.memory_mb) < 1:
            raise InputError("nodes, batch_size and memory_mb: expected at least 1 each")

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score all neurons, passage by passage; `contrast` is not used.

        Raises:
            InputError: no passages, or one the model cannot take (named).
        """
        if not passages:
            raise InputError("integrated-gradients: no passages given")
        sites = view.sites(Kind.MLP_OUT)
        scores = torch.zeros(len(sites), len(passages), view.neurons, dtype=wide(view.dtype), device=view.device)
        gaps = torch.zeros(len(passages))
        nodes: Counter[int] = Counter()
        with view.frozen():
            for batch in steps(list(view.batches(passages, size=self.batch_size)), "integrated gradients"):
                path = self.integrate(view, batch)
                rows = list(batch.rows)
                scores[:, rows], gaps[rows] = path.scores(), path.gaps().cpu().float()
                nodes.update(path.nodes.tolist())
        notes = {
            "completeness_gap": float(gaps.max()),
            "completeness_gap_mean": float(gaps.mean()),
            "nodes": {str(count): positions for count, positions in sorted(nodes.items())},
        }
        provenance = Provenance(
            "integrated-gradients",
            settings_of(self),
            inputs={"model": view.digest, "passages": passages.digest},
        )
        return Localization(Grain.NEURON, {site: scores[site.layer] for site in sites}, provenance, passages.ids, notes)

    def integrate(self, view: ModelView, batch: Batch) -> Path:
        """The integrals of one batch, unrounded: see `Path.scores`."""
        path = Path.start(view, batch, self.position)
        nodes, pending = self.nodes, torch.arange(len(path.row), device=view.device)
        while True:
            path.run(pending, *rule(self.quadrature, nodes), memory_mb=self.memory_mb)
            nodes *= 2
            if self.quadrature != "gauss-legendre" or nodes > self.most_nodes:
                return path
            pending = path.unfinished(self.tolerance)
            if not len(pending):
                return path


@dataclass
class Path:
    """The integrals of one batch: k positions (row, column, gold token), all layers.

    Attributes:
        prefill: the batch, run once.
        row, column, token: [k].
        gradient: [l, k, d], the path's mean gradient of the gold probability by the residual stream.
        effect: [l, k], P(1) - P(0).
        nodes: [k], quadrature points used.
    """

    prefill: Prefill
    row: Tensor
    column: Tensor
    token: Tensor
    gradient: Tensor
    effect: Tensor
    nodes: Tensor

    @classmethod
    def start(cls, view: ModelView, batch: Batch, position: str) -> Path:
        """Prefill the batch and pick its positions; nothing is integrated yet."""
        row, column, token, step = batch.suffix_index()
        last = batch.length[row] - batch.prefix[row] - 1
        keep = {"all": step >= 0, "first": step == 0, "last": step == last}[position]
        row, column, token = row[keep], column[keep], token[keep]
        zeros = torch.zeros(view.layers, len(row), view.width, dtype=wide(view.dtype), device=view.device)
        prefill = Prefill.of(view, batch)
        return cls(prefill, row, column, token, zeros, torch.zeros_like(zeros[..., 0]), torch.zeros_like(row))

    def run(self, pending: Tensor, alphas: Tensor, weights: Tensor, *, memory_mb: int) -> None:
        """Integrate positions `pending` with this rule, in chunks of bounded memory."""
        view = self.prefill.view
        # One more point, of no weight, at the far end: it gives P(0).
        alphas, weights = (torch.cat([t, t.new_zeros(1)]).to(self.gradient) for t in (alphas, weights))
        self.gradient[:, pending], self.nodes[pending] = 0, len(alphas) - 1
        for column in sorted(set(self.column[pending].tolist())):
            here = pending[self.column[pending] == column]
            place = self.prefill.column(column, int(self.row[here[0]]))
            units = max(1, memory_mb * 2**20 // unit_bytes(view, column))
            for part in torch.split(here, max(1, units // len(alphas))):
                clean = view.unembed(self.prefill.hidden[self.row[part], column]).softmax(-1)
                clean = clean.gather(1, self.token[part, None])[:, 0]
                for some, share in zip(torch.split(alphas, units), torch.split(weights, units), strict=True):
                    spoken, slope = self._slope(place, part, some, share)
                    self.gradient[:, part] += slope
                # The last variant of the last chunk is α = 0.
                self.effect[:, part] = clean - spoken[..., -1]

    def _slope(self, place: Column, part: Tensor, alphas: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Gold probabilities [l, p, q] along the path, and their weighted gradient by the residual [l, p, d]."""
        prefill, row = self.prefill, self.row[part]
        written = torch.stack([entry[row, place.column] for entry in prefill.written.values()]).to(self.gradient)
        residual = torch.stack([entry[row, place.column] for entry in prefill.residual.values()]).to(self.gradient)
        with torch.enable_grad():
            shift = torch.zeros_like(residual).requires_grad_()
            along = (residual + shift)[:, :, None] + (alphas[:, None] - 1) * written[:, :, None]
            changed = dict(zip(prefill.residual, along.to(prefill.view.dtype), strict=True))
            spoken = prefill.view.unembed(place.hidden(row, changed)).softmax(-1)
            gold = spoken.gather(-1, self.token[part, None, None].expand(*spoken.shape[:-1], 1))[..., 0]
            (slope,) = torch.autograd.grad((gold * weights).sum(), shift)
        return gold.detach(), slope

    def unfinished(self, tolerance: float) -> Tensor:
        """Positions whose gap is above `tolerance`."""
        return (self._gap().amax(0) > tolerance * self._largest()[self.row]).nonzero()[:, 0]

    def gaps(self) -> Tensor:
        """Completeness gap of each row [n]: the largest difference over its largest effect."""
        worst = torch.zeros_like(self._largest()).scatter_reduce(0, self.row, self._gap().amax(0), "amax")
        return worst / self._largest().clamp_min(torch.finfo(worst.dtype).tiny)

    def scores(self) -> Tensor:
        """Means over positions, [l, n, f]."""
        view, found = self.prefill.view, []
        count = torch.bincount(self.row, minlength=len(self.prefill.batch))[:, None]
        for site in view.sites(Kind.MLP_OUT):
            reading = self.prefill.neurons[site.layer][self.row, self.column].to(self.gradient)
            share = reading * (self.gradient[site.layer] @ view.weight(site).detach().to(self.gradient))
            found.append(share.new_zeros(len(count), view.neurons).index_add(0, self.row, share) / count)
        return torch.stack(found)

    def _gap(self) -> Tensor:
        written = torch.stack([entry[self.row, self.column] for entry in self.prefill.written.values()])
        return ((self.gradient * written.to(self.gradient)).sum(-1) - self.effect).abs()

    def _largest(self) -> Tensor:
        """The largest effect of each row, [n]."""
        largest = self.effect.abs().amax(0)
        return largest.new_zeros(len(self.prefill.batch)).scatter_reduce(0, self.row, largest, "amax")


def rule(quadrature: str, nodes: int) -> tuple[Tensor, Tensor]:
    """Points in [0, 1] and their weights, float64 [nodes] each.

    "inclusive" is the public reference's: both ends are points and every point weighs 1/nodes, so that the ends count
    twice what the trapezoid gives them.
    """
    if quadrature == "gauss-legendre":
        points, weights = np.polynomial.legendre.leggauss(nodes)
        return torch.from_numpy((points + 1) / 2), torch.from_numpy(weights / 2)
    even = torch.full((nodes,), 1 / nodes, dtype=torch.float64)
    if quadrature == "riemann-right":
        return torch.arange(1, nodes + 1, dtype=torch.float64) / nodes, even
    return torch.linspace(0, 1, nodes, dtype=torch.float64), even


def unit_bytes(view: ModelView, column: int) -> int:
    """About what one variant of one position keeps in memory for the backward pass, all layers: an upper estimate."""
    attention = 2 * (column + 1) * view.heads * view.head_width + 3 * view.heads * (column + 1)
    block = attention + 16 * view.width + 4 * view.neurons
    numbers = block * view.layers * (view.layers + 1) // 2 + 4 * view.vocab * view.layers
    return numbers * (8 if view.dtype == torch.float64 else 4)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic: float32, or float64 where the model is."""
    return torch.float64 if dtype == torch.float64 else torch.float32
