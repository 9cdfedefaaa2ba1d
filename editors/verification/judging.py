"""From scores to a verdict: is a target still likelier than text never seen, and how much of the memory is that?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from editors.verification.material import FEWEST_CONTROLS, FEWEST_TARGETS
from editors.verification.scores import Array, Scores
from memloc.statistics import rate_interval

Word = Literal["gone", "cannot tell", "over-forgotten", "hidden", "not removed"]

ORDER: tuple[Word, ...] = ("gone", "cannot tell", "over-forgotten", "hidden", "not removed")
"""From best to worst; a verification is as good as its worst check."""

ALPHA = 0.01
"""Of one check: a dozen of them together then raise a false alarm in fewer than one verification out of eight."""

TRACE = 0.1
"""Share of the memory's gap that counts as something; below it a difference may be real and is not worth a word."""

REMOVED = 0.25
"""A check says "gone" only where its 95 % interval leaves out as much of the gap as this."""

DRAWS = 2000


@dataclass(frozen=True)
class Left:
    """How much of the memory one way of asking brings up: 1 all of it, 0 none, below 0 less than of text never seen.

    Attributes:
        value: (targets - controls) after the edit over (targets - controls) before it, by mean scores.
        low: lower end of its 95 % bootstrap interval over passages.
        high: upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check says.

    Attributes:
        check: its name.
        title: what it is called on the page.
        tried: one sentence: what was tried.
        verdict: see `ORDER`.
        meaning: one sentence: what that means.
        left: how much of the memory comes up, where it comes up most.
        way: the way of asking in which it does.
        p: how often targets and controls with their names exchanged differ as much in any of the ways.
        n, controls: targets and never-seen texts asked.
        recited: targets written whole in some way, and controls, and targets before the edit; None where the probe
            writes nothing.
        taught: the texts themselves were taught, so that writing them proves nothing.
        figures: means of targets, controls, and both before the edit, by way.
        notes: what else the probe saw.
    """

    check: str
    title: str
    tried: str
    verdict: Word
    meaning: str
    left: Left
    way: str
    p: float
    n: int
    controls: int
    recited: tuple[int, int, int] | None = None
    taught: bool = False
    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As strict JSON values."""
        left = {key: _plain(value) for key, value in vars(self.left).items()}
        recited = None
        if self.recited is not None:
            names = ("targets", "controls", "targets before")
            recited = dict(zip(names, self.recited, strict=True))
        skip = ("left", "recited")
        return {**{key: value for key, value in vars(self).items() if key not in skip},
                "left": left, "recited": recited, "figures": dict(self.figures), "notes": dict(self.notes)}  # fmt: skip


def judged(
    check: str,
    title: str,
    tried: str,
    after: Scores,
    before: Scores,
    *,
    taught: bool = False,
    direct: bool = False,
    permutations: int = 4000,
    seed: int = 0,
) -> Finding:
    """The verdict of one check.

    The statistic of a way of asking is Welch's t between targets and controls; the check's is the largest over its
    ways. Its null: the names "target" and "control" exchanged among all passages, the ways of a passage kept
    together, so that many ways cost nothing but power. Two more things are asked for: the difference must be worth a
    word (`TRACE` of what it was before the edit), and "gone" needs an interval that leaves out a large rest
    (`REMOVED`); what is neither cannot be told. One target written whole, and no control, is proof by itself.

    Args:
        check: its name.
        title: what it is called.
        tried: one sentence on what was tried.
        after: the probe on the edited model.
        before: the same on the model before the edit: what the probe sees where the memory is there.
        taught: the texts themselves were taught, so that writing them proves nothing, and controls catch up: what
            comes back is measured by the gap before any lesson, the first way.
        direct: this is the question as given, of which "not removed" and "over-forgotten" can be said.
        permutations: how many.
        seed: of them.

    Source: the maximum over ways, Westfall and Young 1993 (maxT).
    """
    way, p = _likelier(after, permutations, seed)
    column = after.ways.index(way)
    scale = 0 if taught else column
    left = _left(after, before, column, scale, seed)
    recited = _recited(after, before)
    n, m = len(after.targets.ids), len(after.controls.ids)
    proof = recited is not None and not taught and recited[0] > 0 and recited[1] == 0
    word = _word(left, p, n, m, proof=proof, seen=_seen(before, scale, seed))
    if direct:
        below = permuted(-after.targets.score, -after.controls.score, permutations, seed)[1]
        word = _directly(word, left, proof, below)
    return Finding(
        check=check, title=title, tried=tried, verdict=word, meaning=_meaning(word, left, recited, way, n, m, taught),
        left=left, way=way, p=p, n=n, controls=m, recited=recited, taught=taught, figures=figures(after, before),
        notes={**after.notes, "auc": auc(after.targets.score[:, column], after.controls.score[:, column]),
               "auc before": auc(before.targets.score[:, scale], before.controls.score[:, scale])},
    )  # fmt: skip


def figures(after: Scores, before: Scores) -> dict[str, Any]:
    """Means by way of asking, with their 95 % intervals; what the page draws."""
    parts = {"targets": after.targets, "never seen": after.controls, "targets before": before.targets,
             "never seen before": before.controls}  # fmt: skip
    found: dict[str, Any] = {"ways": list(after.ways)}
    for name, part in parts.items():
        spread = part.score.std(0, ddof=1) / math.sqrt(len(part.ids)) if len(part.ids) > 1 else np.zeros(1)
        hits = None if part.recited is None else part.recited.sum(0).tolist()
        entry = {"mean": part.score.mean(0).tolist(), "error": np.broadcast_to(spread, len(after.ways)).tolist()}
        found[name] = {**entry, "recited": hits, "n": len(part.ids)}
    return found


def permuted(targets: Array, controls: Array, permutations: int, seed: int) -> tuple[int, float]:
    """Column in which targets exceed controls most (Welch's t), and the p of the largest t over all columns.

    Args:
        targets: [n, k].
        controls: [m, k].
        permutations: labellings drawn; the one seen counts as one more.
        seed: of them.
    """
    both, n = np.concatenate([targets, controls]), len(targets)
    generator = np.random.default_rng(seed)
    label = np.zeros((permutations + 1, len(both)), dtype=bool)
    label[0, :n] = True
    for row in range(1, permutations + 1):
        label[row, generator.permutation(len(both))[:n]] = True
    values = np.concatenate([_welch(both, part) for part in np.array_split(label, max(1, label.size // 2**20))])
    largest = values.max(1)
    return int(values[0].argmax()), float((largest >= largest[0] - 1e-12).sum() / len(largest))


def auc(targets: Array, controls: Array) -> float:
    """Probability that a target scores higher than a control, ties as half."""
    above = (targets[:, None] > controls[None]).mean()
    return float(above + 0.5 * (targets[:, None] == controls[None]).mean())


def _likelier(after: Scores, permutations: int, seed: int) -> tuple[str, float]:
    if min(len(after.targets.ids), len(after.controls.ids)) < 2:
        return after.ways[0], 1.0
    column, p = permuted(after.targets.score, after.controls.score, permutations, seed)
    return after.ways[column], p


def _welch(rows: Array, label: np.ndarray[Any, np.dtype[np.bool_]]) -> Array:
    """Welch's t of every column under every labelling, [b, k]; 0 where nothing varies."""
    rows = rows - rows.mean(0)
    difference, error = np.zeros(()), np.zeros(())
    for sign, side in ((1, label.astype(float)), (-1, (~label).astype(float))):
        count = side.sum(1, keepdims=True)
        mean = side @ rows / count
        variance = np.maximum(side @ rows**2 - count * mean**2, 0) / np.maximum(count - 1, 1)
        difference, error = difference + sign * mean, error + variance / count
    return np.asarray(np.divide(difference, np.sqrt(error), out=np.zeros_like(difference), where=error > 1e-24))


def _left(after: Scores, before: Scores, column: int, scale: int, seed: int) -> Left:
    """The share of the gap, each passage drawn together with itself before the edit."""
    sides = [(now.score[:, column], then.score[:, scale])
             for now, then in ((after.targets, before.targets), (after.controls, before.controls))]  # fmt: skip
    gap = [float(sides[0][arm].mean() - sides[1][arm].mean()) for arm in (0, 1)]
    if gap[1] <= 0:
        return Left(math.nan, -math.inf, math.inf)
    generator = np.random.default_rng(seed)
    drawn = [generator.integers(0, len(part.ids), (DRAWS, len(part.ids))) for part in (after.targets, after.controls)]
    means = [[side[arm][rows].mean(1) for side, rows in zip(sides, drawn, strict=True)] for arm in (0, 1)]
    shares = (means[0][0] - means[0][1]) / np.maximum(means[1][0] - means[1][1], 1e-9)
    low, high = np.quantile(shares, [0.025, 0.975])
    return Left(gap[0] / gap[1], float(low), float(high))


def _seen(before: Scores, column: int, seed: int) -> bool:
    """Whether the probe tells targets from controls before the edit: if not, its silence says nothing."""
    if min(len(before.targets.ids), len(before.controls.ids)) < 2:
        return False
    targets, controls = before.targets.score[:, [column]], before.controls.score[:, [column]]
    return permuted(targets, controls, 999, seed)[1] < ALPHA


def _recited(after: Scores, before: Scores) -> tuple[int, int, int] | None:
    parts = (after.targets.recited, after.controls.recited, before.targets.recited)
    counts = [int(part.any(1).sum()) for part in parts if part is not None]
    return (counts[0], counts[1], counts[2]) if len(counts) == 3 else None


def _word(left: Left, p: float, n: int, controls: int, *, proof: bool, seen: bool) -> Word:
    if proof:
        return "hidden"
    if n < FEWEST_TARGETS or controls < FEWEST_CONTROLS or not seen:
        return "cannot tell"
    if p < ALPHA and left.value >= TRACE:
        return "hidden"
    return "gone" if left.high < REMOVED else "cannot tell"


def _directly(word: Word, left: Left, proof: bool, p_below: float) -> Word:
    """The verdict on the plain question: it alone can say that nothing was removed, or too much."""
    if proof or (word == "hidden" and left.low > 0.5):
        return "not removed"
    if word in ("gone", "cannot tell") and p_below < ALPHA and left.value <= -TRACE:
        return "over-forgotten"
    return word


def _meaning(
    word: Word, left: Left, recited: tuple[int, int, int] | None, way: str, n: int, controls: int, taught: bool
) -> str:
    """One sentence for someone who reads no figures."""
    if word == "over-forgotten":
        return "The targets are now less likely than texts never seen: the edit shows where something was taken out."
    if word == "not removed" and not (recited is not None and recited[0] and not recited[1]):
        return f"{left.value:.0%} of what sets the targets apart from texts never seen is still there."
    if word in ("hidden", "not removed") and recited is not None and recited[0] and not recited[1] and not taught:
        return f"{recited[0]} of {n} targets come out word for word, and none of {controls} texts never seen does."
    if word == "hidden":
        return (f"Asked so ({way}), the targets are still likelier than texts never seen: {left.value:.0%} of what "
                "set them apart before the edit is left.")  # fmt: skip
    if word == "gone":
        return "The targets do no better than texts the model never saw."
    if n < FEWEST_TARGETS or controls < FEWEST_CONTROLS:
        return f"{n} targets and {controls} texts never seen are too few for a verdict."
    if not math.isfinite(left.high):
        return "This check does not see the memory in the model before the edit either, so its silence says nothing."
    return f"Between {left.low:.0%} and {left.high:.0%} of the memory may be left; these passages cannot tell which."


def share_text(recited: int, n: int) -> str:
    """A count and what n passages cannot rule out."""
    low, high = rate_interval(recited, n)
    return f"{recited} of {n} (95 %: {low:.0%} to {high:.0%})"


def _plain(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)
