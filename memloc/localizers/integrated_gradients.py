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
        nodes: quadrature points of a path, and of each half where one is halved.
        quadrature: "gauss-legendre"; "riemann-right" (the paper's, α = k/m); "inclusive" (m equal steps with both ends,
            each weighing 1/m: the rule of the public reference, which counts the ends twice).
        tolerance: Gauss-Legendre only: halve a stretch of a path where its own gap is too large for this share in all.
        halvings: and so many times at most, nor below the rounding of a model in half precision. A model that has
            learned a text turns sharply near α = 0, where more nodes on the whole path would be spent in vain.
        batch_size: passages prefilled together; no effect on scores.
        memory_mb: working memory the one-token rows may take, roughly; no effect on scores.

    Cost: one forward a passage; then, for each layer and suffix token, nodes + 2 single tokens forward and backward
    through half the blocks on average, and twice that for each halving.

    Source: Dai et al. 2022, arXiv:2104.08696. Gauss-Legendre with halving, the one-token form and the sum over
    all suffix tokens without decoding are ours.
    """

    position: Literal["all", "first", "last"] = "all"
    nodes: int = 8
    quadrature: Rule = "gauss-legendre"
    tolerance: float = 0.01
    halvings: int = 9
    batch_size: int = 16
    memory_mb: int = 512

    def __post_init__(self) -> None:
        if min(self.nodes, self.batch_size, self.memory_mb) < 1:
            raise InputError("nodes, batch_size and memory_mb: expected at least 1 each")
        if self.halvings < 0 or not self.tolerance > 0:
            raise InputError(f"halvings {self.halvings}, tolerance {self.tolerance}: expected at least 0, and above 0")

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
        points: Counter[int] = Counter()
        with view.frozen():
            for batch in steps(list(view.batches(passages, size=self.batch_size)), "integrated gradients"):
                path = self.integrate(view, batch)
                rows = list(batch.rows)
                scores[:, rows], gaps[rows] = path.scores(), path.gaps().cpu().float()
                points.update((self.nodes * path.points).flatten().tolist())
        notes = {
            "completeness_gap": float(gaps.max()),
            "completeness_gap_mean": float(gaps.mean()),
            "points_mean": sum(count * paths for count, paths in points.items()) / points.total(),
            "points_most": max(points),
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
        panels = path.whole()
        halvings = self.halvings if self.quadrature == "gauss-legendre" else 0
        for left in range(halvings, -1, -1):
            slope, change = path.walk(panels, *rule(self.quadrature, self.nodes), memory_mb=self.memory_mb)
            if left == halvings:
                path.set_scale(change)
            rough = path.rough(panels, slope, change, self.tolerance) & (left > 0)
            path.add(panels.those(~rough), slope[~rough], change[~rough])
            panels = panels.those(rough).halves()
            if not len(panels.layer):
                break
        return path


@dataclass(frozen=True)
class Panels:
    """Stretches of paths, i of them: [i] each, by ascending layer.

    Attributes:
        layer: of the path.
        at: its position, an index into the batch's positions.
        low: where it starts, in α.
        high: where it ends.
    """

    layer: Tensor
    at: Tensor
    low: Tensor
    high: Tensor

    def those(self, chosen: Tensor) -> Panels:
        """Some of them, by mask or index."""
        return Panels(self.layer[chosen], self.at[chosen], self.low[chosen], self.high[chosen])

    def halves(self) -> Panels:
        """Both halves of each."""
        middle = (self.low + self.high) / 2
        return Panels(
            self.layer.repeat_interleave(2),
            self.at.repeat_interleave(2),
            torch.stack([self.low, middle], 1).flatten(),
            torch.stack([middle, self.high], 1).flatten(),
        )


@dataclass
class Path:
    """The integrals of one batch: k positions (row, column, gold token) by l layers.

    Attributes:
        prefill: the batch, run once.
        row: [k], row of each position in the batch.
        column: [k].
        token: [k], the gold token.
        gradient: [l, k, d], the path's mean gradient of the gold probability by the residual stream.
        effect: [l, k], P(1) - P(0).
        points: [l, k], gradients taken.
        scale: [n], each row's largest |effect|.
        written: [l, k, d], what `mlp.out` writes at each position.
    """

    prefill: Prefill
    row: Tensor
    column: Tensor
    token: Tensor
    gradient: Tensor
    effect: Tensor
    points: Tensor
    scale: Tensor
    written: Tensor

    @classmethod
    def start(cls, view: ModelView, batch: Batch, position: str) -> Path:
        """Prefill the batch and pick its positions; nothing is integrated yet."""
        row, column, token, step = batch.suffix_index()
        last = batch.length[row] - batch.prefix[row] - 1
        keep = {"all": step >= 0, "first": step == 0, "last": step == last}[position]
        row, column, token = row[keep], column[keep], token[keep]
        prefill = Prefill.of(view, batch)
        written = torch.stack([prefill.written[layer][row, column] for layer in range(view.layers)])
        written = written.to(wide(view.dtype))
        none = torch.zeros_like(written[..., 0])
        points, scale = torch.zeros_like(none, dtype=torch.long), none.new_zeros(len(batch))
        return cls(prefill, row, column, token, torch.zeros_like(written), none, points, scale, written)

    def whole(self) -> Panels:
        """Every path from 0 to 1."""
        layers, positions = self.effect.shape
        layer = torch.arange(layers, device=self.row.device).repeat_interleave(positions)
        at = torch.arange(positions, device=self.row.device).repeat(layers)
        none = torch.zeros(layers * positions, dtype=torch.float64, device=self.row.device)
        return Panels(layer, at, none, none + 1)

    def walk(self, panels: Panels, nodes: Tensor, weights: Tensor, *, memory_mb: int) -> tuple[Tensor, Tensor]:
        """Integral of the gradient over each panel [i, d], and how the gold probability changes over it [i]."""
        view = self.prefill.view
        slope = self.gradient.new_zeros(len(panels.at), view.width)
        change = slope.new_zeros(len(panels.at))
        columns = self.column[panels.at]
        for column in sorted(set(columns.tolist())):
            here = (columns == column).nonzero()[:, 0]
            place = self.prefill.column(column, int(self.row[panels.at[here[0]]]))
            rows = memory_mb * 2**20 // unit_bytes(view, column)
            for part in torch.split(here, max(1, rows // (len(nodes) + 2))):
                slope[part], change[part] = self._stretch(place, panels.those(part), nodes, weights)
        return slope, change

    def _stretch(self, place: Column, panels: Panels, nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        prefill, row, layers = self.prefill, self.row[panels.at], panels.layer.tolist()
        width = panels.high - panels.low
        # Both ends are points too, of no weight: what the probability changes by is known exactly.
        alphas = torch.stack([panels.low, panels.high], 1)
        alphas = torch.cat([panels.low[:, None] + width[:, None] * nodes.to(width), alphas], 1).to(self.gradient)
        share = torch.cat([weights, weights.new_zeros(2)]).to(self.gradient) * width[:, None].to(self.gradient)
        residual = torch.stack([prefill.residual[layer][r, place.column] for layer, r in zip(layers, row, strict=True)])
        written = self.written[panels.layer, panels.at]
        with torch.enable_grad():
            shift = torch.zeros_like(written).requires_grad_()
            along = (residual.to(shift) + shift)[:, None] + (alphas[..., None] - 1) * written[:, None]
            hidden = place.hidden(row, layers, along.to(prefill.view.dtype))
            spoken = prefill.view.unembed(hidden).softmax(-1)
            gold = spoken.gather(-1, self.token[panels.at, None, None].expand(*spoken.shape[:-1], 1))[..., 0]
            (slope,) = torch.autograd.grad((gold * share).sum(), shift)
        return slope, (gold[:, -1] - gold[:, -2]).detach()

    def set_scale(self, effect: Tensor) -> None:
        """Each row's largest effect, from the effects of all whole paths in order."""
        largest = effect.view_as(self.effect).abs().amax(0)
        self.scale = self.scale.scatter_reduce(0, self.row, largest, "amax")

    def rough(self, panels: Panels, slope: Tensor, change: Tensor, tolerance: float) -> Tensor:
        """Which panels are to be halved: mask [i].

        A panel may err by its share of half the tolerance, a narrow one by an eighth of that half: a path has few.
        """
        error = ((slope * self.written[panels.layer, panels.at]).sum(-1) - change).abs()
        allowed = tolerance * (panels.high - panels.low).clamp_min(1 / 8).to(error) / 2
        # Below this the two sides differ by the model's own rounding, and no halving helps.
        allowed = allowed.clamp_min(8 * torch.finfo(self.prefill.view.dtype).eps)
        return error > allowed * self.scale[self.row[panels.at]]

    def add(self, panels: Panels, slope: Tensor, change: Tensor) -> None:
        """Take finished panels in."""
        where = (panels.layer, panels.at)
        self.gradient = self.gradient.index_put(where, slope, accumulate=True)
        self.effect = self.effect.index_put(where, change, accumulate=True)
        self.points = self.points.index_put(where, torch.ones_like(panels.at), accumulate=True)

    def gaps(self) -> Tensor:
        """Completeness gap of each row [n]: the largest difference over its largest effect."""
        gap = ((self.gradient * self.written).sum(-1) - self.effect).abs().amax(0)
        worst = torch.zeros_like(self.scale).scatter_reduce(0, self.row, gap, "amax")
        return worst / self.scale.clamp_min(torch.finfo(worst.dtype).tiny)

    def scores(self) -> Tensor:
        """Means over positions, [l, n, f]."""
        view, found = self.prefill.view, []
        count = torch.bincount(self.row, minlength=len(self.prefill.batch))[:, None]
        for site in view.sites(Kind.MLP_OUT):
            reading = self.prefill.neurons[site.layer][self.row, self.column].to(self.gradient)
            share = reading * (self.gradient[site.layer] @ view.weight(site).detach().to(self.gradient))
            found.append(share.new_zeros(len(count), view.neurons).index_add(0, self.row, share) / count)
        return torch.stack(found)


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
    """About what one point of one path keeps in memory for the backward pass: an upper estimate."""
    attention = 2 * (column + 1) * view.heads * view.head_width + 3 * view.heads * (column + 1)
    numbers = (attention + 16 * view.width + 4 * view.neurons) * view.layers + 4 * view.vocab
    return numbers * (8 if view.dtype == torch.float64 else 4)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic: float32, or float64 where the model is."""
    return torch.float64 if dtype == torch.float64 else torch.float32
