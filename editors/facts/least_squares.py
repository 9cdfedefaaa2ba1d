"""Closed forms: the smallest change of a matrix that meets a demand. Solved in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from editors.deltas import LowRank
from memloc.errors import InputError


class Pair(NamedTuple):
    """Factors of a rank-one change, float64: left [out], right [in]; the change is `outer(left, right)`."""

    left: Tensor
    right: Tensor


def insert_pair(
    weight: Tensor,
    key: Tensor,
    value: Tensor,
    moment: Tensor,
    *,
    damping: float = 1e-4,
    toward: Tensor | None = None,
) -> LowRank:
    """The gentlest update that makes `weight` answer `key` with `value`.

    Gentlest: of all D with (weight + D) @ key == value, the one with least trace(D @ C @ D.T), so that keys common
    in ordinary text move least. C is `moment`, damped. Solved in float64; the factors are rounded to float32 so
    that the demand is still met to one rounding of each entry.

    Args:
        weight: [out, in], oriented as `ModelView.weight` gives it.
        key: [in], what the matrix reads at the edited token.
        value: [out], what it should write there, without its bias.
        moment: [in, in], mean of k kᵀ per token over ordinary text; not centred.
        damping: share of the moment's mean diagonal added to its diagonal; no unit.
        toward: [in], a key to take the direction from instead of `key`; the demand is met all the same, no longer
            in the gentlest way. The original ROME does so: `toward` is a mean of keys, `key` that of the bare prompt.

    Returns:
        A rank-one delta: left [out, 1], right [1, in].

    Raises:
        InputError: shapes do not agree, the moment is singular, or no update can reach `value`.

    Cost: one Cholesky factor of C, in³/3.

    Source:
        Meng et al. 2022, arXiv:2202.05262; one key in all places: Gupta et al. 2024, arXiv:2403.07175. The damping
        is ours.
    """
    found = solve_pair(weight, key, value, moment, damping=damping, toward=toward)
    right = found.right.to(torch.float32)
    # Balancing the left factor against the rounded right one keeps the demand exact to the last rounding.
    gain = found.right @ key.to(found.right) / (right.double() @ key.to(found.right))
    return LowRank((found.left * gain)[:, None].to(torch.float32), right[None])


def solve_pair(
    weight: Tensor,
    key: Tensor,
    value: Tensor,
    moment: Tensor,
    *,
    damping: float = 1e-4,
    toward: Tensor | None = None,
) -> Pair:
    """`insert_pair` before any rounding: float64 factors, `right` of length one. Same arguments, same errors."""
    matrix, asked, wanted = (entry.detach().to("cpu", torch.float64) for entry in (weight, key, value))
    along = asked if toward is None else toward.detach().to("cpu", torch.float64)
    if matrix.shape != (*wanted.shape, *asked.shape) or along.shape != asked.shape:
        shapes = f"weight {list(weight.shape)}, key {list(key.shape)}, value {list(value.shape)}"
        raise InputError(f"{shapes}; expected [out, in], [in] and [out]")
    direction = whiten(along, moment, damping=damping)
    length = float(direction.norm())
    if not length:
        raise InputError("the key is zero, so no update can reach the value")
    direction = direction / length
    gain = float(direction @ asked)
    if not abs(gain) > torch.finfo(torch.float64).eps * float(asked.norm()):
        raise InputError("the direction is orthogonal to the key, so no update along it can reach the value")
    return Pair((wanted - matrix @ asked) / gain, direction)


def whiten(keys: Tensor, moment: Tensor, *, damping: float = 1e-4) -> Tensor:
    """C⁻¹ k of one key `[in]` or of the columns of `[in, n]`, float64, C being `moment` damped.

    Raises:
        InputError: shapes do not agree, or C is singular (neurons that never fire, less text than neurons).
    """
    plain = moment.detach().to("cpu", torch.float64)
    if plain.shape != 2 * (len(keys),):
        raise InputError(f"second moment {list(moment.shape)} for keys of {len(keys)} entries")
    plain = plain + damping * float(plain.diagonal().mean()) * torch.eye(len(plain), dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(plain)
    if int(failed) or not bool((factor.diagonal() > 0).all()):
        raise InputError("the second moment is singular; give more text, or a damping above 0")
    columns = keys.detach().to("cpu", torch.float64).reshape(len(keys), -1)
    return torch.cholesky_solve(columns, factor).reshape(keys.shape)
