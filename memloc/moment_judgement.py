"""Are second moments of enough text? How far to shrink them, and what an edit loses by what they do not know.

All of it comes from the sums of two halves of the text: what they differ in is what the text left to chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memloc.errors import InputError
from memloc.moments import Moments, Split, towards_identity
from memloc.sites import Site

ENOUGH = 0.5
"""With half the text, an edit may disturb fresh text by so much more than with endless text, and all be enough."""

HOPELESS = 4.0
"""1 / (1 - f/n) of a half from which on nothing is known of the least there could be: f/n is 3/4 or more."""

FLOOR = 1e-5
"""The least a half is shrunk by before it is inverted: neurons that never fire make it singular, and its products are
rounded to float32."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the second moment of one site is worth.

    Attributes:
        tokens: summed over.
        width: f, entries of a key.
        rank: tr(C)² / ‖C‖², how many directions of equal size would have this spread.
        silent: neurons that never fired.
        shrinkage: the share τ that is nearest to the truth; see `shrinkage`.
        agreement: median cosine of the directions C⁻¹k that the two halves give, over the probes.
        excess: by how much more the gentlest change for a key, computed with half of this text, disturbs fresh text
            than the gentlest there is, as a share: an upper bound for all of the text. Median over the probes;
            infinite where there is too little text to tell.
        probes: keys that the last two stand on.
    """

    tokens: int
    width: int
    rank: float
    silent: int
    shrinkage: float
    agreement: float
    excess: float
    probes: int

    @property
    def enough(self) -> bool:
        """Whether the excess is small."""
        return self.excess <= ENOUGH

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "enough": self.enough}


def shrinkage(moments: Moments, site: Site) -> float:
    """The share τ for which (1-τ) C + τ tr(C)/f I is expected to be nearest to the moment of endless text.

    τ = E‖C - truth‖² / E‖C - tr(C)/f I‖², Frobenius norms, as Ledoit and Wolf have it. The error above is taken from
    what the two halves' means differ in, not from single tokens: tokens of a passage depend on one another, and as if
    they did not τ comes out several times too small.

    Raises:
        InputError: the halves were not collected, or one is empty.

    Source: Ledoit & Wolf 2004, J. Multivariate Analysis 88; the error from two halves is ours.
    """
    one, other, share = _halves(moments, site)
    return _share(one, other, share)


def shrinkages(moments: Moments) -> dict[Site, float]:
    """`shrinkage` of every site."""
    return {site: shrinkage(moments, site) for site in moments.sums}


def judge(moments: Moments, site: Site, keys: Tensor | None = None) -> Judgement:
    """Judge the second moment of `site`.

    The excess: a direction u from one half, u = C₁⁻¹k, disturbs the other half by uᵀC₂u / (uᵀk)² for each unit it
    changes the answer to k; the least there is 1 / kᵀC₂⁻¹k. Where n tokens leave f directions to chance, the first is
    1 / (1 - f/n) of the least there could be, and the second 1 - f/n of it, for that direction has fitted the half's
    own chance. The quotient of both, unshrunk, gives f/n; with it the least there could be is known, and so the excess
    of a shrunk half. With twice the tokens the whole has less: half of it where it is small, more where shrinking does
    most of the work.

    Args:
        moments: with halves.
        site: which.
        keys: [p, f] the keys to be edited; by default the probes, which are of ordinary text. Where subjects are
            rarer than the text's words, the moment knows less about their keys.

    Raises:
        InputError: as `shrinkage`.

    Cost: four Cholesky factors of [f, f] in float64.
    """
    one, other, share = _halves(moments, site)
    mean = moments.sums[site] / moments.count
    probes = _split(moments).probes[site] if keys is None else keys
    if probes.shape[1:] != mean.shape[:1] or not len(probes):
        raise InputError(f"{site}: keys {list(probes.shape)}, expected [p, {len(mean)}]")
    cosine, excess = _halves_compared(one, other, min(1.0, 2 * _share(one, other, share)), probes.double())
    return Judgement(
        tokens=moments.count,
        width=len(mean),
        rank=float(mean.trace() ** 2 / mean.square().sum().clamp_min(1e-300)),
        silent=int((mean.diagonal() == 0).sum()),
        shrinkage=_share(one, other, share),
        agreement=cosine,
        excess=excess,
        probes=len(probes),
    )


def judged(moments: Moments, keys: Mapping[Site, Tensor] | None = None) -> dict[Site, Judgement]:
    """`judge` of every site."""
    return {site: judge(moments, site, None if keys is None else keys[site]) for site in moments.sums}


def _split(moments: Moments) -> Split:
    split = moments.split
    if split is None:
        raise InputError("these second moments hold no halves to be judged by; collect them with halves")
    if not 0 < split.count < moments.count:
        raise InputError("these second moments are of one passage, which has no halves; give more text")
    return split


def _halves(moments: Moments, site: Site) -> tuple[Tensor, Tensor, float]:
    """Mean of each half, and the first one's share of the tokens."""
    split = _split(moments)
    moments.mean(site)  # says which sites there are
    first, rest = split.first[site], moments.count - split.count
    return first / split.count, (moments.sums[site] - first) / rest, split.count / moments.count


def _share(one: Tensor, other: Tensor, share: float) -> float:
    mean = share * one + (1 - share) * other
    flat = towards_identity(mean, 1.0)
    # Var(C₁ - C₂) = V/n₁ + V/n₂ and Var(C) = V/(n₁ + n₂), so the error of the whole is this part of the difference.
    error = share * (1 - share) * float((one - other).square().sum())
    spread = float((mean - flat).square().sum())
    return min(1.0, error / spread) if spread > 0 else 1.0


def _halves_compared(one: Tensor, other: Tensor, share: float, keys: Tensor) -> tuple[float, float]:
    """Median cosine of the two shrunk halves' directions for each key, and the median excess of such a half."""
    halves = one, other
    if min(int((half.diagonal() > 0).sum()) for half in halves) == 0:
        return 0.0, math.inf
    plain = [_solved(half, FLOOR, keys) for half in halves]
    shrunk = [_solved(half, max(share, FLOOR), keys) for half in halves]
    found, fitted = [], []
    for mine, its in ((0, 1), (1, 0)):
        least = 1 / (plain[its] * keys).sum(1)
        chance = (_disturbed(plain[mine], halves[its], keys) / least).clamp_min(1.0).sqrt()
        found.append(_disturbed(shrunk[mine], halves[its], keys) / (least * chance) - 1)
        fitted.append(float(chance.median()))
    cosine = float(torch.cosine_similarity(shrunk[0], shrunk[1], dim=1).median())
    return cosine, max(0.0, float(torch.cat(found).median())) if max(fitted) < HOPELESS else math.inf


def _solved(half: Tensor, share: float, keys: Tensor) -> Tensor:
    """C⁻¹k for each key, [p, f]."""
    factor, failed = torch.linalg.cholesky_ex(towards_identity(half, share))
    if int(failed):
        raise InputError("half of the second moment is singular; give more text")
    return torch.cholesky_solve(keys.T, factor).T


def _disturbed(directions: Tensor, half: Tensor, keys: Tensor) -> Tensor:
    return ((directions @ half) * directions).sum(1) / (directions * keys).sum(1).square()
