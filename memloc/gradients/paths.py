"""Integrated gradients of neurons, exact and fast: the integral along a path from silence to what a layer says.

Along the path one layer's neurons at one position are scaled together, from 0 to what they are; other layers are free
to follow. The prefix is cached once, and the integral runs on rows of one token that start at the changed layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from memloc.batches import Batch, batches
from memloc.costs import Cost, block_tokens, pass_bytes, widest
from memloc.errors import InputError
from memloc.gradients.ways import Bent, Scaled, Straight, Way, pre_activations
from memloc.passages import Passages
from memloc.reading.readout import Position, row_means, spoken_at
from memloc.running.cached import Column, Prefill
from memloc.running.whole import WholeRows
from memloc.view import ModelView

Rule = Literal["gauss-legendre", "riemann-right", "riemann-left", "inclusive"]


@dataclass(frozen=True, kw_only=True)
class Integral:
    """How the integrals are taken: the settings that methods which live on them share.

    Attributes:
        position: which suffix tokens count: "all" (mean), "first" or "last".
        site: what is scaled: "activation", what enters `mlp.out`; or "pre-activation", what leaves `mlp.in`.
        nodes: quadrature points of a path, and of each half where one is halved.
        quadrature: see `rule`.
        tolerance: Gauss-Legendre only: halve a stretch of a path where its own gap is too large for this share in all.
        halvings: and so many times at most, nor below the rounding of a model in half precision.
        batch_size: passages prefilled together; no effect on scores.
        memory_mb: working memory the one-token rows may take, roughly; no effect on scores.
    """

    position: Position = "all"
    site: Scaled = "activation"
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

    def integrate(self, view: ModelView, batch: Batch) -> Path:
        """The integrals of one batch, unrounded: see `Path.scores`."""
        path = Path.start(view, batch, self.position, self.site)
        panels = path.whole()
        for left in range(self._halvings, -1, -1):
            slope, change = path.walk(panels, *rule(self.quadrature, self.nodes), memory_mb=self.memory_mb)
            if left == self._halvings:
                path.set_scale(change)
            rough = path.rough(panels, slope, change, self.tolerance) & (left > 0)
            path.add(panels.those(~rough), slope[~rough], change[~rough])
            panels = panels.those(rough).halves()
            if not len(panels.layer):
                break
        return path

    def taken(self, view: ModelView, passages: Passages) -> Cost:
        """What the integrals of `passages` take, no path being halved; working memory whatever is halved."""
        ends, columns = self.nodes + 2, 0
        run = most = single = 0
        for batch in batches(passages, size=self.batch_size, cloze=view.mask_token):
            counts = torch.bincount(spoken_at(batch, self.position)[1])
            columns += int((counts > 0).sum()) if view.row.causal else 0
            run += int(counts.sum()) * (1 if view.row.causal else batch.ids.shape[1])
            most, single = max(most, int(counts.sum())), max(single, int(counts.max()))
        rows = run * ends * view.layers * (view.layers - 1) // 2
        rows_tokens, length = widest(passages, size=self.batch_size)
        unit = point_bytes(view, length, length, self.site)
        fits = max(1, self.memory_mb * 2**20 // (ends * unit))
        panels = fits if self._halvings else min(fits, single * view.layers)
        memory = panels * ends * unit
        memory += _standing_bytes(view, rows_tokens * length, most, self.site)
        memory += pass_bytes(view, rows_tokens * length, context=length)
        forward = block_tokens(view, passages, size=self.batch_size) + columns * view.layers + rows
        return Cost(forward, rows, memory, "at least" if self._halvings else "exact")

    @property
    def _halvings(self) -> int:
        return self.halvings if self.quadrature == "gauss-legendre" else 0


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
        way: what is scaled.
        row: [k], row of each position in the batch.
        column: [k].
        token: [k], the gold token.
        gradient: [l, k, m], the path's mean gradient of the gold probability by the way's coordinates.
        effect: [l, k], P(1) - P(0).
        points: [l, k], gradients taken, in units of nodes.
        scale: [n], each row's largest |effect|.
    """

    prefill: Prefill
    way: Way
    row: Tensor
    column: Tensor
    token: Tensor
    gradient: Tensor
    effect: Tensor
    points: Tensor
    scale: Tensor

    @classmethod
    def start(cls, view: ModelView, batch: Batch, position: Position, site: Scaled) -> Path:
        """Prefill the batch and pick its positions; nothing is integrated yet."""
        row, column, token = spoken_at(batch, position)
        way: Way
        if site == "activation":
            prefill = Prefill.of(view, batch)
            way = Straight(view, prefill, row, column)
        else:
            entrances = pre_activations(view)
            with view.record(entrances, side="output") as leaving:
                prefill = Prefill.of(view, batch)
            before = torch.stack([leaving[entrance][row, column] for entrance in entrances])
            way = Bent(view, prefill, before, (row, column))
        none = torch.zeros_like(way.ends[..., 0])
        points, scale = torch.zeros_like(none, dtype=torch.long), none.new_zeros(len(batch))
        return cls(prefill, way, row, column, token, torch.zeros_like(way.ends), none, points, scale)

    def whole(self) -> Panels:
        """Every path from 0 to 1."""
        layers, positions = self.effect.shape
        layer = torch.arange(layers, device=self.row.device).repeat_interleave(positions)
        at = torch.arange(positions, device=self.row.device).repeat(layers)
        none = torch.zeros(layers * positions, dtype=torch.float64, device=self.row.device)
        return Panels(layer, at, none, none + 1)

    def walk(self, panels: Panels, nodes: Tensor, weights: Tensor, *, memory_mb: int) -> tuple[Tensor, Tensor]:
        """Integral of the gradient over each panel [i, m], and how the gold probability changes over it [i]."""
        view, coordinates = self.prefill.view, self.gradient.shape[-1]
        slope = self.gradient.new_zeros(len(panels.at), coordinates)
        change = slope.new_zeros(len(panels.at))
        columns = self.column[panels.at]
        for column in sorted(set(columns.tolist())):
            here = (columns == column).nonzero()[:, 0]
            place = self.prefill.column(column, int(self.row[panels.at[here[0]]]))
            rows = memory_mb * 2**20 // point_bytes(view, column, self.prefill.batch.ids.shape[1], self.way.site)
            for part in torch.split(here, max(1, rows // (len(nodes) + 2))):
                slope[part], change[part] = self._stretch(place, panels.those(part), nodes, weights)
        return slope, change

    def _stretch(
        self, place: Column | WholeRows, panels: Panels, nodes: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        prefill, row, layers = self.prefill, self.row[panels.at], panels.layer.tolist()
        width = panels.high - panels.low
        # Both ends are points too, of no weight: what the probability changes by is known exactly.
        alphas = torch.stack([panels.low, panels.high], 1)
        alphas = torch.cat([panels.low[:, None] + width[:, None] * nodes.to(width), alphas], 1).to(self.gradient)
        share = torch.cat([weights, weights.new_zeros(2)]).to(self.gradient) * width[:, None].to(self.gradient)
        residual = torch.stack([prefill.residual[layer][r, place.column] for layer, r in zip(layers, row, strict=True)])
        with torch.enable_grad():
            leaf, moved = self.way.move(panels.layer, panels.at, alphas)
            along = residual.to(moved)[:, None] + moved
            hidden = place.hidden(row, layers, along.to(prefill.view.dtype))
            spoken = prefill.view.unembed(hidden).softmax(-1)
            gold = spoken.gather(-1, self.token[panels.at, None, None].expand(*spoken.shape[:-1], 1))[..., 0]
            (gradient,) = torch.autograd.grad((gold * share).sum(), leaf)
        return self.way.slope(gradient), (gold[:, -1] - gold[:, -2]).detach()

    def set_scale(self, effect: Tensor) -> None:
        """Each row's largest effect, from the effects of all whole paths in order."""
        largest = effect.view_as(self.effect).abs().amax(0)
        self.scale = self.scale.scatter_reduce(0, self.row, largest, "amax")

    def rough(self, panels: Panels, slope: Tensor, change: Tensor, tolerance: float) -> Tensor:
        """Which panels are to be halved: mask [i].

        A panel may err by its share of half the tolerance, a narrow one by an eighth of that half: a path has few.
        """
        error = ((slope * self.way.ends[panels.layer, panels.at]).sum(-1) - change).abs()
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
        gap = ((self.gradient * self.way.ends).sum(-1) - self.effect).abs().amax(0)
        worst = torch.zeros_like(self.scale).scatter_reduce(0, self.row, gap, "amax")
        return worst / self.scale.clamp_min(torch.finfo(worst.dtype).tiny)

    def scores(self) -> Tensor:
        """Means over positions, [l, n, f]."""
        layers, rows = range(len(self.gradient)), len(self.prefill.batch)
        return torch.stack(
            [row_means(self.way.neurons(layer, self.gradient[layer]), self.row, rows) for layer in layers]
        )


def rule(quadrature: str, nodes: int) -> tuple[Tensor, Tensor]:
    """Points in [0, 1] and their weights, float64 [nodes] each.

    "gauss-legendre"; "riemann-right", α = k/m for k = 1 … m, the paper's; "riemann-left", k = 0 … m - 1, its authors'
    code; "inclusive", a later public code's: both ends are points and every point weighs 1/nodes, so that the ends
    count twice what the trapezoid gives them.
    """
    if quadrature == "gauss-legendre":
        points, weights = np.polynomial.legendre.leggauss(nodes)
        return torch.from_numpy((points + 1) / 2), torch.from_numpy(weights / 2)
    even = torch.full((nodes,), 1 / nodes, dtype=torch.float64)
    if quadrature == "inclusive":
        return torch.linspace(0, 1, nodes, dtype=torch.float64), even
    first = 1 if quadrature == "riemann-right" else 0
    return torch.arange(first, nodes + first, dtype=torch.float64) / nodes, even


def unit_bytes(view: ModelView, column: int, site: Scaled = "activation") -> int:
    """About what one point of one path keeps in memory for the backward pass: an upper estimate."""
    attention = 2 * (column + 1) * view.heads * view.head_width + 3 * view.heads * (column + 1)
    numbers = (attention + 16 * view.width + 4 * view.neurons) * view.layers + 4 * view.vocab
    numbers += 8 * view.neurons if site == "pre-activation" else 0
    return numbers * (8 if view.dtype == torch.float64 else 4)


def point_bytes(view: ModelView, column: int, tokens: int, site: Scaled) -> int:
    """What one point of one path keeps: one token's, or a whole row's of `tokens` where tokens hear both ways."""
    return unit_bytes(view, column, site) if view.row.causal else tokens * unit_bytes(view, tokens, site)


def _standing_bytes(view: ModelView, tokens: int, positions: int, site: Scaled) -> int:
    """What a prefilled batch and its paths keep: an upper estimate."""
    coordinates = view.width if site == "activation" else view.neurons
    kept = tokens * (2 * view.neurons + 4 * view.width + 2 * view.kv_heads * view.head_width)
    paths = positions * (6 * coordinates + 3 * view.neurons)
    return (view.layers * (kept + paths) + 2 * view.width * view.neurons) * (8 if view.dtype == torch.float64 else 4)
