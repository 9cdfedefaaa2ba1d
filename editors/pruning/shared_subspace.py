"""Do memories share weights? Masks of two disjoint halves of the passages, and what pruning either does to both.

A method that picks weights for one half should, if what it finds is shared, pick much the same for the other; and
pruning what one half picked should take the other half's memories too. Masks overlap for other reasons as well (large
weights, busy inputs), so the same is asked of passages that were never trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from editors.base import Editor, Request
from editors.deltas import LowRank
from editors.edit import Edit
from editors.masks import Masks
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.sites import Site
from memloc.view import ModelView

Measure = Callable[[ModelView, Passages], float]


@dataclass(frozen=True)
class Shared:
    """What was found; overlaps are intersection over union.

    Attributes:
        halves: overlap of the two halves' masks.
        chance: expected overlap of masks as large at every site, drawn independently.
        controls: mean overlap of a half's mask with one of passages never trained on.
        between_controls: overlap of the masks of two sets never trained on.
        before: the measure of both halves together, nothing pruned.
        own: mean measure of the half whose mask is pruned.
        other: mean measure of the half whose mask is not.
        under_controls: mean measure of both halves when a control's mask is pruned.
        pruned: mean size of a half's mask.
        pruned_controls: mean size of a control's mask.
        harm_before: what is asked of ordinary text, nothing pruned; None where nothing is asked.
        harm_halves: the same when a half's mask is pruned, mean of the two.
        harm_controls: when a control's mask is.
    """

    halves: float
    chance: float
    controls: float
    between_controls: float
    before: float
    own: float
    other: float
    under_controls: float
    pruned: float
    pruned_controls: float
    harm_before: float | None = None
    harm_halves: float | None = None
    harm_controls: float | None = None

    @property
    def transfer(self) -> float | None:
        """Fall of the other half over fall of the own half: 1 if all is shared; None where nothing fell."""
        return (self.before - self.other) / (self.before - self.own) if self.before > self.own else None

    @property
    def transfer_controls(self) -> float | None:
        """The same of a mask of passages never trained on: what damage alone makes of the fall."""
        return (self.before - self.under_controls) / (self.before - self.own) if self.before > self.own else None

    @property
    def overlaps(self) -> bool:
        """Whether the halves share more than chance, and than passages never trained on do with them or each other."""
        return self.halves > max(self.chance, self.controls, self.between_controls)

    @property
    def transfers(self) -> bool | None:
        """Whether the other half falls further than under a control's mask; None where the own half does not fall."""
        return self.other < self.under_controls if self.before > self.own else None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "transfer": self.transfer, "transfer_controls": self.transfer_controls}


def shared_subspace(
    view: ModelView,
    pruner: Editor,
    request: Request,
    halves: tuple[Passages, Passages],
    controls: tuple[Passages, Passages],
    measure: Measure,
    *,
    harm: Callable[[ModelView], float] | None = None,
) -> Shared:
    """Prune for each half and for each set of controls, and compare.

    Args:
        view: the model; it is left as it was.
        pruner: an editor that makes single weights zero.
        request: what it is asked beside passages to forget; neither half may be in it.
        halves: disjoint passages the model knows by heart.
        controls: passages never trained on, as many.
        measure: such as the share of passages recited.
        harm: what pruning does to the rest, such as the perplexity of ordinary text; a half that falls because the
            model broke shares nothing.

    Raises:
        InputError: halves that share a passage, or an edit that is no mask.

    Cost: four prunings, ten measurements of half the passages, and five of harm.
    """
    if {item.ids for item in halves[0]} & {item.ids for item in halves[1]}:
        raise InputError("the halves share a passage, so their masks overlap for that alone")
    edits, masks = [], []
    for rows in (*halves, *controls):
        edits.append(pruner(view, replace(request, forget=rows)))
        masks.append(pruned(edits[-1]))
    before = [measure(view, rows) for rows in halves]
    harms, after = [harm(view)] if harm else [], []
    for edit in edits:
        with edit.apply(view):
            after.append([measure(view, rows) for rows in halves])
            harms += [harm(view)] if harm else []
    sizes = [float(sum(int(mask.sum()) for mask in found.values())) for found in masks]
    harmed = [harms[0], sum(harms[1:3]) / 2, sum(harms[3:]) / 2] if harm else [None] * 3
    return Shared(
        halves=overlap(masks[0], masks[1]),
        chance=chance_overlap(masks[0], masks[1]),
        controls=sum(overlap(masks[i], masks[j]) for i in (0, 1) for j in (2, 3)) / 4,
        between_controls=overlap(masks[2], masks[3]),
        before=sum(before) / 2,
        own=(after[0][0] + after[1][1]) / 2,
        other=(after[0][1] + after[1][0]) / 2,
        under_controls=sum(after[2] + after[3]) / 4,
        pruned=sum(sizes[:2]) / 2,
        pruned_controls=sum(sizes[2:]) / 2,
        harm_before=harmed[0],
        harm_halves=harmed[1],
        harm_controls=harmed[2],
    )


def pruned(edit: Edit) -> Masks:
    """The entries of matrices an edit changes, each matrix's made when asked for: four of a whole model are large.

    Raises:
        InputError: the edit is of low rank, so it changes them all.
    """
    for site, delta in edit.deltas.items():
        if isinstance(delta, LowRank):
            raise InputError(f"{site}: the change is of low rank and picks no weights; masks cannot be compared")
    return _Pruned(edit)


class _Pruned(Mapping[Site, Tensor]):
    def __init__(self, edit: Edit) -> None:
        self._deltas = {site: delta for site, delta in edit.deltas.items() if not site.bias}

    def __getitem__(self, site: Site) -> Tensor:
        return self._deltas[site].dense() != 0

    def __iter__(self) -> Iterator[Site]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)


def overlap(first: Masks, second: Masks) -> float:
    """Intersection over union; 1 where both are empty."""
    both = sum(int((first[site] & second[site]).sum()) for site in first.keys() & second.keys())
    either = sum(int(mask.sum()) for masks in (first, second) for mask in masks.values()) - both
    return both / either if either else 1.0


def chance_overlap(first: Masks, second: Masks) -> float:
    """Overlap of masks as large at every site, drawn independently: expected intersection over its union."""
    both = 0.0
    for site in first.keys() & second.keys():
        both += float(first[site].sum()) * float(second[site].sum()) / torch.Size(first[site].shape).numel()
    either = sum(int(mask.sum()) for masks in (first, second) for mask in masks.values()) - both
    return both / either if either else 1.0
