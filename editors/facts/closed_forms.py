"""Closed forms for many keys at once, in the number of keys: one factor of the second moment serves all solves.

Every one of them is Δ = R (KᵀG K + S)⁻¹ KᵀG with keys K, what is missing of their values R, a diagonal S of slack, and
a metric G that says which directions are cheap: the inverse of a second moment (MEMIT, EMMET, ROME), or the projector
onto what ordinary text hardly uses (AlphaEdit).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from editors.deltas import LowRank
from memloc.errors import InputError

TINY = 1e-12
"""Pivot, against the largest, below which keys count as combinations of each other."""


class Metric(Protocol):
    """G, symmetric and positive: what a change along a key costs, inverted."""

    @property
    def unit(self) -> float:
        """At most by how much what should stay moves, mean squared, for each unit of cost."""
        ...

    def solve(self, columns: Tensor) -> Tensor:
        """G @ columns, `[f, k]` float64."""
        ...


@dataclass(frozen=True, eq=False)
class Factor:
    """A damped second moment, factored once: G = C⁻¹. Made by `Factor.of`.

    Attributes:
        lower: [f, f] float64, C = lower @ lowerᵀ.
        keys: [f, m] keys added to C since, each scaled by the root of its weight; none at first.
        reached: [f, m] C⁻¹ of them, by the factor alone.
        small: [m, m] Cholesky factor of I + keysᵀ C⁻¹ keys.
    """

    lower: Tensor
    keys: Tensor
    reached: Tensor
    small: Tensor
    unit: ClassVar[float] = 1.0

    @classmethod
    def of(cls, moment: Tensor, *, damping: float = 1e-4) -> Factor:
        """Factor `moment`, `damping` times its mean diagonal added to its diagonal. Cost: f³/3.

        Raises:
            InputError: not square, or singular (neurons that never fire, less text than neurons).
        """
        plain = moment.detach().to("cpu", torch.float64)
        if plain.ndim != 2 or plain.shape[0] != plain.shape[1]:
            raise InputError(f"second moment {list(moment.shape)}, expected a square matrix")
        plain = plain + damping * float(plain.diagonal().mean()) * torch.eye(len(plain), dtype=torch.float64)
        lower, failed = torch.linalg.cholesky_ex(plain)
        if int(failed) or not bool((lower.diagonal() > 0).all()):
            raise InputError("the second moment is singular; give more text, or a damping above 0")
        none = lower.new_zeros(len(lower), 0)
        return cls(lower, none, none, lower.new_zeros(0, 0))

    def solve(self, columns: Tensor) -> Tensor:
        """C⁻¹ @ columns. Cost: 2 f² a column."""
        plain = torch.cholesky_solve(columns, self.lower)
        if not self.keys.shape[1]:
            return plain
        return plain - self.reached @ torch.cholesky_solve(self.keys.T @ plain, self.small)

    def holding(self, keys: Tensor, weight: float) -> Factor:
        """With `weight` times the sum of k kᵀ over the columns of `keys` `[f, m]` added to C.

        By Woodbury's identity where m is small against f, by another factor where that is cheaper.
        """
        if not keys.shape[1] or not weight:
            return self
        total = torch.cat([self.keys, keys.to(self.lower) * weight**0.5], 1)
        if 3 * total.shape[1] > len(self.lower):
            return Factor.of(self.lower @ self.lower.T + total @ total.T, damping=0.0)
        reached = torch.cholesky_solve(total, self.lower)
        inner = torch.eye(total.shape[1], dtype=torch.float64) + total.T @ reached
        return Factor(self.lower, total, reached, torch.linalg.cholesky(inner))


@dataclass(frozen=True, eq=False)
class NullSpace:
    """The projector onto the directions that ordinary text hardly uses: G = U Uᵀ. Made by `NullSpace.of`.

    Attributes:
        basis: [f, k] float64, orthonormal: eigenvectors of the moment whose eigenvalue is below the threshold.
        threshold: of the eigenvalues, in the moment's units.
    """

    basis: Tensor
    threshold: float

    @property
    def unit(self) -> float:
        """The threshold: trace(Δ C Δᵀ) of a change within the basis is no more than so many times ‖Δ‖²."""
        return self.threshold

    @classmethod
    def of(cls, moment: Tensor, threshold: float, *, relative: bool = True) -> NullSpace:
        """Eigenvectors of `moment` below `threshold`. Cost: one eigendecomposition, about 10 f³.

        Args:
            moment: [f, f], mean of k kᵀ.
            threshold: an eigenvalue, or, if `relative`, a share of their mean.
            relative: whether it is a share. AlphaEdit's 0.02 is not, so what it means depends on the model's scale.

        Raises:
            InputError: no eigenvalue is below it.
        """
        plain = moment.detach().to("cpu", torch.float64)
        values, vectors = torch.linalg.eigh(plain)
        least = threshold * float(values.mean()) if relative else threshold
        basis = vectors[:, values < least]
        if not basis.shape[1]:
            found = f"the least of {len(values)} eigenvalues of the second moment is {float(values[0]):.2g}"
            raise InputError(f"{found}, not below the threshold {least:.2g}; raise the threshold")
        return cls(basis, least)

    def solve(self, columns: Tensor) -> Tensor:
        """The projection of `columns`."""
        return self.basis @ (self.basis.T @ columns)


class Pairs(NamedTuple):
    """Factors of a change of rank n or less, float64: left [d, n], right [n, f]; the change is left @ right."""

    left: Tensor
    right: Tensor


def insert_pairs(
    keys: Tensor, missing: Tensor, metric: Metric, *, slack: float | Tensor = 0.0, held: Tensor | None = None
) -> Pairs:
    """The change that adds `missing` to what a matrix answers to `keys`, moving cheap directions only.

    With C⁻¹ as the metric it has the least trace(Δ C Δᵀ) + ‖Δ K - R‖² / slack. No slack: the demand is met (EMMET; one
    key: ROME). Slack 1 and λC as the moment, or slack λ and C: MEMIT. With a projector P as the metric it has the least
    ‖ΔP K - R‖² + slack ‖ΔP‖²: AlphaEdit.

    Args:
        keys: [f, n], what the matrix reads.
        missing: [d, n], what its outputs lack.
        metric: which directions are cheap.
        slack: what a miss is allowed to cost; 0 to allow none. One for all, or one for each key `[n]`.
        held: [f, m] keys whose outputs should not move, demanded as strictly as the others (AlphaEdit's history).

    Returns:
        left [d, n] and right [n, f]: `missing`, and (KᵀG K + S)⁻¹ KᵀG.

    Raises:
        InputError: shapes do not agree, or keys are combinations of each other and there is no slack.

    Cost: G of n + m columns, and a factor of n + m.

    Source: MEMIT: Meng et al. 2023, arXiv:2210.07229. EMMET: Gupta et al. 2024, arXiv:2403.14236. AlphaEdit: Fang et
    al. 2025, arXiv:2410.02355. The form in the number of keys is that of the matrix inversion lemma.
    """
    asked, wanted = (entry.detach().to("cpu", torch.float64) for entry in (keys, missing))
    if asked.ndim != 2 or wanted.ndim != 2 or asked.shape[1] != wanted.shape[1]:
        raise InputError(f"keys {list(keys.shape)}, missing {list(missing.shape)}; expected [f, n] and [d, n]")
    count = asked.shape[1]
    every = asked if held is None else torch.cat([asked, _compressed(held.detach().to("cpu", torch.float64))], 1)
    cheap = metric.solve(every)
    inner = every.T @ cheap
    inner = (inner + inner.T) / 2 + _allowed(slack, count, len(inner))
    lower, failed = torch.linalg.cholesky_ex(inner)
    pivots = lower.diagonal() ** 2
    if int(failed) or not bool((pivots > TINY * inner.diagonal().max()).all()):
        raise InputError(f"{len(inner)} keys of {len(asked)} entries are combinations of each other, so not all can be "
                         "met; give slack, or fewer facts")  # fmt: skip
    chosen = torch.eye(len(inner), dtype=torch.float64)[:, :count]
    return Pairs(wanted, torch.cholesky_solve(chosen, lower).T @ cheap.T)


def _allowed(slack: float | Tensor, count: int, total: int) -> Tensor:
    """The diagonal matrix of slack, `[total, total]`: what is held beside `count` keys has the most any of them has."""
    each = torch.as_tensor(slack, dtype=torch.float64).expand(count)
    return torch.cat([each, each.max().expand(total - count)]).diag()


def _compressed(keys: Tensor) -> Tensor:
    """Columns with the same K Kᵀ, all that keys held at 0 count for: at most f of them."""
    if keys.shape[1] <= len(keys):
        return keys
    values, vectors = torch.linalg.eigh(keys @ keys.T)
    clear = values > TINY * values[-1]
    found: Tensor = vectors[:, clear] * values[clear].sqrt()
    return found


def charge(keys: Tensor, metric: Metric, slack: float | Tensor = 0.0) -> Tensor:
    """The n x n matrix A by which `insert_pairs` costs trace(R A Rᵀ), whatever the R: unit · (KᵀG K + slack)⁻¹.

    Of a metric C⁻¹ the cost is trace(Δ C Δᵀ), what the change moves on average over what C was taken of (and, with
    slack, ‖Δ K - R‖² / slack). Of a projector it is the most that this can be, threshold · ‖Δ‖² (and the slack's part).
    """
    asked = keys.detach().to("cpu", torch.float64)
    inner = asked.T @ metric.solve(asked)
    inner = (inner + inner.T) / 2
    allowed = _allowed(slack, len(inner), len(inner)).diagonal()
    least = allowed.clamp_min(1e-9 * float(inner.diagonal().max()))
    factor = torch.linalg.cholesky(inner + least.diag())
    return metric.unit * torch.cholesky_inverse(factor)


def rounded(pairs: Pairs, keys: Tensor) -> LowRank:
    """The factors in float32, the left ones balanced so that the answers to `keys` stay what they were.

    Keys are as many as the rank, [f, n]. Where they are too alike to balance, plainly rounded.
    """
    right = pairs.right.float()
    got, exact = right.double() @ keys.double(), pairs.right @ keys.double()
    solved, failed = torch.linalg.solve_ex(got.T, (pairs.left @ exact).T)
    small = float((solved.T - pairs.left).norm()) <= 1e-3 * float(pairs.left.norm())
    return LowRank((solved.T if not int(failed) and small else pairs.left).float(), right)
