"""The least change of maps that moves scalars to one side of their bounds, in the metric of what is to be kept.

A change D of a map is measured by tr(G D A Dᵀ), where A is the second moment of what the map reads on text to keep and
G that of the gradient by what it puts out: twice the Kullback-Leibler divergence it causes there, in the quadratic
approximation of K-FAC. A scalar i moves by Σ_maps g_iᵀ D k_i. The least change with moves of at least b_i is
D = Σ_i x_i G⁻¹ g_i k_iᵀ A⁻¹ with x ≥ 0 from a dual problem of as many unknowns as scalars, however wide the maps are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from editors.deltas import LowRank
from memloc.errors import InputError

TINY = 1e-9
"""Singular values below this share of the largest are dropped."""


@dataclass(frozen=True)
class Metric:
    """Cholesky factors of one map's A and G, damped; float64 on the CPU.

    Attributes:
        read: [in, in] lower triangular, A = read readᵀ.
        pull: [out, out], G alike.
    """

    read: Tensor
    pull: Tensor

    @classmethod
    def of(cls, read: Tensor, pull: Tensor, *, damping: float, pull_damping: float) -> Metric:
        """From the two moments; each damping is a share of the moment's mean diagonal added to its diagonal.

        Raises:
            InputError: a moment that is singular even so.
        """
        return cls(_factor(read, damping, "read"), _factor(pull, pull_damping, "pull"))

    def whitened(self, read: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [n, in] and [n, out] in coordinates in which the metric is the identity."""
        return _solve(self.read, read.T).T, _solve(self.pull, pull.T).T

    def change(self, read: Tensor, pull: Tensor, weight: Tensor, rank: int | None = None) -> LowRank:
        """The change Σ_i weight_i pull_i read_iᵀ of whitened rows, of at most `rank`: the nearest such by the metric.

        Cost: two QR factorisations of n rows and an SVD of at most [n, n].
        """
        (left, small), (right, tall) = torch.linalg.qr((pull * weight[:, None]).T), torch.linalg.qr(read.T)
        rotated, values, other = torch.linalg.svd(small @ tall.T, full_matrices=False)
        kept = int((values > TINY * values[0]).sum()) if len(values) else 0
        kept = max(1, min(kept, rank or kept))
        root = values[:kept].sqrt()
        first = torch.linalg.solve_triangular(self.pull.T, left @ rotated[:, :kept] * root, upper=True)
        second = torch.linalg.solve_triangular(self.read.T, right @ other[:kept].T * root, upper=True)
        return LowRank(first.float(), second.T.float())

    def energy(self, change: LowRank) -> float:
        """tr(G D A Dᵀ)."""
        left, right = self.pull.T @ change.left.double(), change.right.double() @ self.read
        return float(((left.T @ left) * (right @ right.T)).sum())


def gram(white: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """[n, n]: how much the least change for one scalar moves another, over all maps; of whitened (read, pull) rows."""
    found = [(read @ read.T) * (pull @ pull.T) for read, pull in white]
    return torch.stack(found).sum(0)


def dual(matrix: Tensor, asked: Tensor, *, ridge: float = 0.0, sweeps: int = 500, close: float = 1e-6) -> Tensor:
    """The x ≥ 0 that maximises asked·x - ½ xᵀ (matrix + ridge · mean diagonal · 1) x, [n] float64.

    Coordinate ascent: each step is exact in one coordinate, so the value never falls. At the optimum every scalar with
    x_i > 0 moves by just what was asked (less the ridge's share), and every other by at least that.

    Args:
        matrix: [n, n], symmetric, not negative.
        asked: [n] least move of each scalar; negative where it may give way.
        ridge: makes room where demands contradict each other.
        sweeps: at most that many over all coordinates.
        close: stop when no coordinate moved by more than this share of the largest.

    Cost: n² a sweep.
    """
    table = matrix.detach().double().cpu().numpy().copy()
    if ridge:
        table[np.diag_indices_from(table)] += ridge * float(np.trace(table)) / len(table)
    found, left, step = np.zeros(len(table)), asked.detach().double().cpu().numpy().copy(), np.diag(table).copy()
    for _ in range(sweeps):
        largest = 0.0
        for index in np.flatnonzero(step > 0):
            moved = max(0.0, found[index] + left[index] / step[index]) - found[index]
            if moved:
                left -= moved * table[index]
                found[index] += moved
                largest = max(largest, abs(moved))
        if largest <= close * found.max(initial=0.0):
            break
    return torch.from_numpy(found)


def _factor(moment: Tensor, damping: float, name: str) -> Tensor:
    plain = moment.detach().to("cpu", torch.float64)
    plain = plain + damping * float(plain.diagonal().mean()) * torch.eye(len(plain), dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(plain)
    if int(failed) or not bool((factor.diagonal() > 0).all()):
        raise InputError(f"the second moment of what maps {name} is singular; give more text, or a damping above 0")
    whole: Tensor = factor
    return whole


def _solve(factor: Tensor, columns: Tensor) -> Tensor:
    found: Tensor = torch.linalg.solve_triangular(factor, columns, upper=False)
    return found
