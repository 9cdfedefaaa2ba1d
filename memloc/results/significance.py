"""Which places count: scores of memorized passages against an empirical null, with the false discovery rate controlled.

Instead of a share of the best score: how often would a text never trained on score as high? The null is the same
method's scores on controls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memloc.errors import InputError, MismatchError
from memloc.scores import Localization, Selection
from memloc.sites import Site


@dataclass(frozen=True)
class Significance:
    """A p- and a q-value a place.

    Attributes:
        localization: what was tested.
        p: site to p-values, float64, shaped as the scores: how often a control does as well.
        q: site to q-values: the smallest false discovery rate at which the place is called.
        passages: memorized passages tested.
        controls: controls they were tested against.
        test: how.
    """

    localization: Localization
    p: Mapping[Site, Tensor]
    q: Mapping[Site, Tensor]
    passages: int
    controls: int
    test: str

    def called(self, rate: float = 0.05) -> Selection:
        """The places called at a false discovery rate of `rate`."""
        masks = {site: values <= rate for site, values in self.q.items()}
        made = self.localization.provenance
        settings = {**made.settings, "false_discovery_rate": rate, "test": self.test}
        return Selection(self.localization.grain, masks, replace(made, settings=settings))


def set_significance(
    localization: Localization, controls: Localization, *, permutations: int = 2000, seed: int = 0
) -> Significance:
    """Which places score higher on the memorized passages than on the controls, as sets.

    The statistic of a place is Welch's t, the difference of means over its standard error. Its null: the labels
    "memorized" and "control" permuted among all passages. p is the share of null statistics of *all* places, the one
    seen among them, that are as large: a place's own permutations would be too few for thousands of places. That
    assumes the scaled nulls of places to be alike.

    Args:
        localization: of the memorized passages, kept per passage.
        controls: by the same method, on passages never trained on, kept per passage.
        permutations: how many.
        seed: of them.

    Returns:
        p and Benjamini–Hochberg q of every place.

    Raises:
        InputError: scores are not kept per passage, or fewer than 4 passages on a side.
        MismatchError: other grains or sites.

    Source: permutation null pooled over units, Tusher et al. 2001 (SAM) and Efron 2004 in kind; step-up, Benjamini and
    Hochberg 1995.
    """
    mine, theirs = _rows(localization, controls)
    both = torch.cat([mine, theirs])
    count, generator = len(mine), torch.Generator().manual_seed(seed)
    seen = _welch(both, (torch.arange(len(both)) < count)[None])[0]
    labels = torch.stack([torch.randperm(len(both), generator=generator) < count for _ in range(permutations)])
    exceed, total = torch.zeros(seen.numel(), dtype=torch.float64), 0
    for part in labels.split(max(1, 2**23 // both.shape[1])):  # type: ignore[no-untyped-call]
        null = _welch(both, part).reshape(-1).sort().values
        exceed += len(null) - torch.searchsorted(null, seen)
        total += len(null)
    p = (1 + exceed) / (1 + total)
    return _significance(localization, p, len(mine), len(theirs), "permuted labels, pooled over places")


def passage_significance(localization: Localization, controls: Localization, passage: str) -> Significance:
    """Which places score higher on one passage than controls do.

    Scores are standardised at each place by the controls' mean and spread; the null is every control's own standardised
    score at every place, each control standardised by the *others*, so that it is as much a stranger to them as the
    passage is.

    Raises:
        InputError: no such passage, scores not kept per passage, or fewer than 4 controls.
        MismatchError: other grains or sites.
    """
    alone = replace(
        localization,
        scores={site: scores[None] for site, scores in localization.of(passage).scores.items()},
        passages=(passage,),
        lengths=None,
    )
    mine, theirs = _rows(alone, controls, least=1)
    z = _standardised(mine, theirs)[0]
    null = torch.stack([
        _standardised(theirs[row : row + 1], torch.cat([theirs[:row], theirs[row + 1 :]]))[0]
        for row in range(len(theirs))
    ]).reshape(-1).sort().values  # fmt: skip
    p = (1 + len(null) - torch.searchsorted(null, z)) / (1 + len(null))
    return _significance(localization.of(passage), p, 1, len(theirs), "standardised by controls, pooled over places")


def q_values(p: Tensor) -> Tensor:
    """Benjamini–Hochberg q-values of p-values, [m] float64: the smallest rate at which each would be called."""
    order = p.sort().indices
    ranks = torch.arange(1, len(p) + 1, dtype=torch.float64)
    raised = p[order].double() * len(p) / ranks
    lowest = raised.flip(0).cummin(0).values.flip(0).clamp(max=1.0)
    found = torch.empty_like(lowest)
    found[order] = lowest
    return found


def _rows(localization: Localization, controls: Localization, *, least: int = 4) -> tuple[Tensor, Tensor]:
    if localization.grain != controls.grain or localization.scores.keys() != controls.scores.keys():
        raise MismatchError(f"controls score {controls.grain}s, not the {localization.grain}s shown, or other sites")
    for name, entry, needed in (("memorized", localization, least), ("controls", controls, 4)):
        if entry.passages is None or len(entry.passages) < needed:
            raise InputError(f"{name}: scores kept per passage are needed, of at least {needed} passages")
    sides = []
    for entry in (localization, controls):
        parts = [scores.reshape(len(scores), -1).double() for _, scores in sorted(entry.scores.items())]
        sides.append(torch.cat(parts, 1))
    if sides[0].shape[1] != sides[1].shape[1]:
        raise MismatchError("controls score another number of places")
    return sides[0], sides[1]


def _welch(rows: Tensor, labels: Tensor) -> Tensor:
    """Welch's t of every place under every labelling, [b, m]; 0 where nothing varies.

    Args:
        rows: [n, m] scores.
        labels: [b, n], True where a row counts as memorized.
    """
    # Centred first, so that sums of squares lose nothing.
    rows = rows - rows.mean(0)
    difference, error = torch.zeros(()), torch.zeros(())
    for sign, side in ((1, labels.double()), (-1, (~labels).double())):
        count = side.sum(1, keepdim=True)
        mean = side @ rows / count
        variance = (side @ rows.square() - count * mean.square()).clamp(min=0) / (count - 1)
        difference = difference + sign * mean
        error = error + variance / count
    found: Tensor = (difference / error.sqrt()).nan_to_num(0.0, 0.0, 0.0)
    return found


def _standardised(rows: Tensor, reference: Tensor) -> Tensor:
    """(x - mean) / spread by the reference, at every place; 0 where the reference does not vary."""
    return ((rows - reference.mean(0)) / reference.std(0)).nan_to_num(0.0, 0.0, 0.0)


def _significance(localization: Localization, p: Tensor, passages: int, controls: int, test: str) -> Significance:
    mean = localization.mean().scores
    q = q_values(p)
    sizes = [mean[site].numel() for site in sorted(mean)]
    shaped = [
        {site: part.view(mean[site].shape) for site, part in zip(sorted(mean), torch.split(values, sizes), strict=True)}
        for values in (p, q)
    ]
    return Significance(localization, shaped[0], shaped[1], passages, controls, test)
