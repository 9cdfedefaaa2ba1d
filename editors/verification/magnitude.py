"""The magnitude control of an edit: as many entries, as large a change, in the largest weights instead of the chosen.

Large weights are what a damage of that size would hit if it asked nothing of the memory; the random control hits any.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from editors.deltas import Delta, Dense, LowRank, Sparse
from editors.edit import Edit
from memloc.sites import Site
from memloc.view import ModelView


def magnitude_like(edit: Edit, view: ModelView) -> Edit:
    """An edit of the same sites, forms, sizes and Frobenius norms that shrinks what is largest there.

    Each delta becomes -(‖delta‖ / ‖P W‖) P W, where P keeps of the weight W as many entries as a sparse delta touches
    (those largest in size), as many singular directions as a low-rank one has (those with the largest values, by
    subspace iteration), or everything for a dense one.

    Args:
        edit: the edit to control for.
        view: the model it was computed for, unedited.

    Cost: that of binding an edit to `view`.
    """
    deltas: dict[Site, Delta] = {}
    for site, delta in edit.deltas.items():
        deltas[site] = _shrunk(delta, view.weight(site).detach().float().cpu())
    settings: dict[str, Any] = {**edit.provenance.settings, "control_of": edit.provenance.method}
    provenance = replace(edit.provenance, method="magnitude", settings=settings)
    return Edit.of(view, deltas, provenance, rounding=edit.rounding, rounding_seed=edit.rounding_seed)


def _shrunk(delta: Delta, weight: Tensor) -> Delta:
    norm = delta.norm()
    if isinstance(delta, Sparse):
        flat = weight.reshape(-1)
        index = flat.abs().topk(len(delta.values)).indices.sort().values
        values = flat[index]
        return Sparse(delta.shape, index, values * -(norm / _size(values)))
    if isinstance(delta, LowRank):
        left, right = _leading(weight, delta.rank)
        made = LowRank(left, right)
        return LowRank(left * -(norm / max(made.norm(), 1e-30)), right)
    return Dense(weight * -(norm / _size(weight)))


def _leading(weight: Tensor, rank: int, rounds: int = 12) -> tuple[Tensor, Tensor]:
    """Factors [out, r] and [r, in] of the weight's part in its r largest singular directions."""
    generator = torch.Generator().manual_seed(0)
    wide, width = weight.double(), min(*weight.shape, rank + 8)
    basis = torch.linalg.qr(torch.randn(wide.shape[1], width, generator=generator, dtype=torch.float64)).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(wide.T @ (wide @ basis)).Q
    # Within the subspace found, the directions in order of their values.
    left, values, right = torch.linalg.svd(wide @ basis, full_matrices=False)
    directions = right[:rank] @ basis.T
    return (left[:, :rank] * values[:rank]).float(), directions.float().contiguous()


def _size(values: Tensor) -> float:
    return max(float(torch.linalg.vector_norm(values)), 1e-30)
