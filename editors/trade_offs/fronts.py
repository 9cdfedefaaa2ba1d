"""Points of memorization and utility: the frontier of what can be had, the area under it, and its interval.

Pure arithmetic on the rows of measurements; no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from memloc.errors import InputError

Verdicts = Mapping[str, Sequence[float]]
"""Name of a group to one share a row: whether it is still recited, or known."""


class Point(NamedTuple):
    """One edit.

    Attributes:
        memorized: share of the targets still recited, in [0, 1].
        utility: what is kept of everything else, in [0, 1]; 1 is as before.
    """

    memorized: float
    utility: float


@dataclass(frozen=True)
class Judged:
    """What an edited model still does, row by row.

    Attributes:
        targets: a share for each passage to be forgotten.
        kept: group to a share for each of its rows (memorized passages, facts).
        perplexity: on held-out text; None where none was given.
    """

    targets: Sequence[float]
    kept: Verdicts
    perplexity: float | None = None

    def point(self, before: Judged) -> Point:
        """Against the model before: shares kept, relative to before, and perplexity's ratio, as one harmonic mean.

        A harmonic mean, so that one thing lost costs all; nothing counts as better than before.

        Raises:
            InputError: nothing was kept that could be lost.
        """
        parts = [_ratio(_mean(rows), _mean(before.kept[name])) for name, rows in self.kept.items() if len(rows)]
        if self.perplexity is not None and before.perplexity is not None:
            parts.append(min(1.0, before.perplexity / self.perplexity))  # 0 where it is infinite now
        if not parts:
            raise InputError("no group to keep and no held-out text: there is no utility to lose; name one")
        return Point(_mean(self.targets), harmonic(parts))

    def drawn(self, rows: Mapping[str, np.ndarray]) -> Judged:
        """The same with rows drawn again: group ("" for the targets) to row numbers."""
        kept = {name: np.asarray(values)[rows[name]].tolist() for name, values in self.kept.items()}
        return Judged(np.asarray(self.targets)[rows[""]].tolist(), kept, self.perplexity)


def harmonic(parts: Sequence[float]) -> float:
    """Harmonic mean of shares; 0 where one is 0."""
    return len(parts) / sum(1 / part for part in parts) if all(part > 0 for part in parts) else 0.0


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points no other beats in both, from the least memorized on; at equal memorization the most useful one."""
    found: list[Point] = []
    for point in sorted(points, key=lambda entry: (entry.memorized, -entry.utility)):
        if not found or point.utility > found[-1].utility:
            found.append(point)
    return found


def area(points: Sequence[Point], before: float) -> float:
    """Area under the frontier: the utility to be had at no more than x of the memorization before, over x in [0, 1].

    1 is everything forgotten at no cost, 0 nothing gained anywhere. Between points the last that is allowed counts (no
    edit was seen in between). The model before, which forgets nothing, adds no area.

    Args:
        points: the edits'.
        before: share of the targets recited before.

    Raises:
        InputError: nothing was memorized before.
    """
    if before <= 0:
        raise InputError("no target was recited before the edits, so there is nothing to forget")
    total, reached, utility = 0.0, 0.0, 0.0
    for point in frontier(points):
        at = min(1.0, point.memorized / before)
        total += (at - reached) * utility
        reached, utility = at, point.utility
    return total + (1.0 - reached) * utility


def area_interval(edits: Sequence[Judged], before: Judged, *, seed: int = 0, draws: int = 500) -> tuple[float, float]:
    """95 % bootstrap interval of `area`: the rows of every group are drawn again, the same for all edits.

    Draws in which no target was recited before are left out. It speaks of other targets and other things to keep, not
    of other seeds of the edits.
    """
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        sizes = {"": len(before.targets), **{name: len(values) for name, values in before.kept.items()}}
        rows = {name: generator.integers(0, size, size) for name, size in sizes.items() if size}
        was = before.drawn(rows)
        if _mean(was.targets) > 0:
            found.append(area([edit.drawn(rows).point(was) for edit in edits], _mean(was.targets)))
    if not found:
        return 0.0, 1.0
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if len(values) else 0.0


def _ratio(now: float, before: float) -> float:
    return min(1.0, now / before) if before > 0 else 1.0
