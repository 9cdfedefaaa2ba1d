"""The weights rounded to 8 and 4 bits: does a change survive the way models are shipped?

Round to nearest with one scale for each group of inputs of a row (the largest weight of the group is 127 or 7), the
rule that most formats share; the result is put back in full precision, so any family runs on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from editors.edit import Edit
from editors.verification.material import Effort, Material
from editors.verification.scores import Heard, Scores, heard, joined
from memloc.sites import Site
from memloc.view import ModelView

GROUP = 64
"""Weights that share a scale."""

BITS = (8, 4)


def quantised(view: ModelView, data: Material, effort: Effort, seed: int) -> Scores:
    """Every map in the blocks rounded to 8 and to 4 bits, in a copy."""
    del effort, seed
    columns = []
    for bits in BITS:
        copy = rounded(view, bits)
        columns.append([heard(copy, [part], part.ids) for part in (data.targets, data.controls)])
        del copy
    targets, controls = (_beside([column[side] for column in columns]) for side in (0, 1))
    return Scores(tuple(f"{bits} bits" for bits in BITS), targets, controls)


def rounded(view: ModelView, bits: int) -> ModelView:
    """A copy whose maps in the blocks are rounded to `bits`; biases, norms and embeddings stay."""
    copy = view.copy()
    for site in _maps(copy):
        weight = copy.weight(site).detach()
        codes, scale = buckets(weight, bits)
        place, stored = copy.place(site), copy.parameter(site).detach()
        place.write(stored, _back(codes, scale, weight.shape[1]).to(stored))
    return copy


def buckets(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integer codes [out, groups, GROUP] of a matrix [out, in] and their scales [out, groups, 1]; float32.

    The last group is filled with zeros. A group of zeros has scale 1.
    """
    most = 2 ** (bits - 1) - 1
    wide = weight.detach().float()
    padded = torch.nn.functional.pad(wide, (0, -wide.shape[1] % GROUP)).view(len(wide), -1, GROUP)
    scale = padded.abs().amax(-1, keepdim=True) / most
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (padded / scale).round().clamp(-most, most), scale


def moved_share(edit: Edit, view: ModelView, bits: int) -> float:
    """Share of the entries an edit changes whose integer code is another after it; the rest is lost in rounding.

    Args:
        edit: what is asked about.
        view: the model before the edit.
        bits: of the rounding; each side has its own scales.
    """
    moved = changed = 0
    for site, delta in edit.deltas.items():
        if site.bias or not site.kind.in_block:
            continue
        before = view.weight(site).detach().float().cpu()
        after = before + delta.dense()
        touched = after != before
        codes = [buckets(part, bits)[0].flatten(1)[:, : before.shape[1]] for part in (before, after)]
        moved += int(((codes[0] != codes[1]) & touched).sum())
        changed += int(touched.sum())
    return moved / changed if changed else float("nan")


def _maps(view: ModelView) -> Iterator[Site]:
    """Every map in the blocks, each stored entry once."""
    yield from view.sites(*view.kinds)


def _back(codes: Tensor, scale: Tensor, width: int) -> Tensor:
    return (codes * scale).flatten(1)[:, :width]


def _beside(columns: list[Heard]) -> Heard:
    """One way each, side by side."""
    first = columns[0]
    same = [joined([column], first.ids) for column in columns]
    hits = [column.recited for column in same if column.recited is not None]
    return Heard(first.ids, np.concatenate([column.score for column in same], 1), np.concatenate(hits, 1))
