"""The random control of an edit: as many entries, as large a change, in no particular direction."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editors.deltas import Delta, Dense, LowRank, Sparse
from editors.edit import Edit
from memloc.provenance import digest_bytes

if TYPE_CHECKING:
    from memloc.view import ModelView


def random_like(edit: Edit, view: ModelView, seed: int) -> Edit:
    """An edit of the same sites, forms, sizes and Frobenius norms as `edit`, with everything else drawn at random.

    A low-rank delta keeps its rank; a sparse one keeps its values and moves them to other entries.

    Args:
        edit: the edit to control for.
        view: the model it was computed for, unedited.
        seed: of generators of its own, one a site.

    Cost: that of binding an edit to `view`.
    """
    deltas: dict[object, Delta] = {}
    for site, delta in edit.deltas.items():
        name = digest_bytes(str(seed).encode(), str(site).encode())
        deltas[site] = _scrambled(delta, torch.Generator().manual_seed(int(name[:15], 16)))
    settings = {**edit.provenance.settings, "control_of": edit.provenance.method}
    provenance = replace(edit.provenance, method="random", settings=settings, seed=seed)
    how = {"rounding": edit.rounding, "rounding_seed": edit.rounding_seed}
    shared = any(part.shared for part in edit.touched.values())
    return Edit.of(view, deltas, provenance, shared=shared, **how)  # type: ignore[arg-type]


def _scrambled(delta: Delta, generator: torch.Generator) -> Delta:
    norm = delta.norm()
    if isinstance(delta, LowRank):
        left, right = _noise(delta.left.shape, generator), _noise(delta.right.shape, generator)
        made = LowRank(left, right)
        return LowRank(left * (norm / made.norm()), right)
    if isinstance(delta, Sparse):
        places = torch.randperm(torch.Size(delta.shape).numel(), generator=generator)[: len(delta.values)]
        index, order = places.sort()
        return Sparse(delta.shape, index, delta.values[order])
    noise = _noise(delta.shape, generator)
    return Dense(noise * (norm / float(torch.linalg.vector_norm(noise))))


def _noise(shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32)
