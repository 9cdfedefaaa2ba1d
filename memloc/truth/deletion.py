"""Deletion (DEL): a localizer is right where silencing what it names takes this passage away, and nothing else.

No place is known to be the answer here, so the effect is asked for: on the passage itself, on other memorized ones and
on ordinary text. Places are ablated while the model runs; no weight is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch

from memloc.ablations.ablation import Ablation
from memloc.ablations.reference import Reference
from memloc.batches import Batch
from memloc.errors import InputError, MismatchError
from memloc.objectives import suffix_logprobs
from memloc.passages import Passages, decode
from memloc.running.decoding import continuation
from memloc.scores import Localization, Selection
from memloc.sites import Grain
from memloc.truth.worlds import Ground, Known
from memloc.view import ModelView

How = Literal["zero", "mean", "resample"]


@dataclass(frozen=True)
class State:
    """What a model says of some passages, as it is or ablated; means over passages.

    Attributes:
        accuracy: share of suffix tokens that are the likeliest, teacher-forced.
        nll: nats per suffix token.
        distance: edits between the greedy continuation and the suffix, in characters (tokens without a tokenizer).
    """

    accuracy: float
    nll: float
    distance: float | None = None

    @property
    def perplexity(self) -> float:
        """Of a token: e to the nats."""
        return math.exp(min(self.nll, 700.0))


@dataclass(frozen=True)
class Subjects:
    """On whom effects are read: the passage itself, other memorized ones, ordinary text."""

    target: Passages
    others: Passages
    text: Passages


@dataclass(frozen=True, kw_only=True)
class Deletion:
    """Drop the best-scored share of every layer on one memorized passage, and see what is lost.

    Attributes:
        how: "zero", "mean" (over ordinary text) or "resample" (from ordinary text).
        shares: of the neurons of every layer, ascending; selectivity is averaged over their logarithms.
        distances: the shares at which greedy continuations are compared, too.
        first_layer: whether layer 0 may be touched; published figures leave it out.
        sequences: known answers a ground.
        others: other memorized passages that should stay.
        windows: of ordinary text.

    Source: Chang et al. 2024, arXiv:2311.09060, section 3.2, at shares .001 and .005, with perplexity as e^nats (the
    published figures are 2^nats). Mean and resample ablation and the curve up to a fifth of a layer are ours.
    """

    how: How = "zero"
    shares: tuple[float, ...] = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2)
    distances: tuple[float, ...] = (0.005, 0.05)
    first_layer: bool = False
    sequences: int = 5
    others: int = 8
    windows: int = 8
    headline: str = "selectivity"

    def __post_init__(self) -> None:
        """Raises InputError: settings that give no curve."""
        if self.how not in ("zero", "mean", "resample"):
            raise InputError(f"how={self.how!r}: expected 'zero', 'mean' or 'resample'")
        if list(self.shares) != sorted(set(self.shares)) or not all(0 < share < 1 for share in self.shares):
            raise InputError(f"shares {self.shares}: expected ascending numbers between 0 and 1")
        if min(self.sequences, self.others, self.windows, len(self.shares)) < 1:
            raise InputError("deletion: sequences, others, windows and shares are at least one each")

    def names(self, ground: Ground) -> tuple[str, ...]:
        """One name for each passage that is dropped."""
        memorized = [ground.need(name) for name in ("view", "text", "memorized")][-1]
        return tuple(f"passage-{index}" for index in range(min(self.sequences, len(memorized))))

    def make(self, ground: Ground, name: str) -> Known:
        """One memorized passage, chosen by the ground's seed, among others.

        Raises:
            InputError: the ground recites fewer passages than it takes, or has no text.
        """
        view: ModelView = ground.need("view")
        windows: Passages = ground.need("text")
        recited = recited_by(view, ground.need("memorized"))
        index = int(name.rpartition("-")[2])
        if len(recited) < max(2, index + 1):
            raise InputError(f"{ground.name}: {len(recited)} passages are recited; {name} needs {max(2, index + 1)}")
        order = torch.randperm(len(recited), generator=torch.Generator().manual_seed(ground.seed)).tolist()
        target = Passages((recited[order[index]],), "deleted")
        rest = [recited[row] for place, row in enumerate(order) if place != index]
        text = windows[: self.windows]
        subjects = Subjects(target, Passages(tuple(rest[: self.others]), "others"), text)
        judge = _Judge(self, subjects, Reference(windows[self.windows : 3 * self.windows] or text))
        return Known(name, view, target, ground.unknown, windows, judge=judge, notes=judge.told(view))


def recited_by(view: ModelView, passages: Passages) -> Passages:
    """Those with at least 9 in 10 suffix tokens right, teacher-forced, and not all of one or two tokens."""
    kept = []
    for batch in view.batches(passages):
        for row, right, total in zip(batch.rows, *_right(view, batch), strict=True):
            if right >= 0.9 * total and len(set(passages[row].suffix)) > 2:
                kept.append(row)
    return Passages(tuple(passages[row] for row in sorted(kept)), passages.origin)


@torch.no_grad()
def state(view: ModelView, passages: Passages, *, distance: bool = False) -> State:
    """What the model says now, within whatever ablation is in force.

    Cost: one forward over the passages; with `distance`, a greedy continuation of each, too.
    """
    right, nll = 0.0, 0.0
    for batch in view.batches(passages):
        hits, total = _right(view, batch)
        right += sum(hit / whole for hit, whole in zip(hits, total, strict=True))
        length = (batch.length - batch.prefix).to(torch.float64)
        nll -= float((suffix_logprobs(view, batch).double().sum(1) / length).sum())
    edits = _distance(view, passages) if distance else None
    return State(right / len(passages), nll / len(passages), edits)


def drop(
    view: ModelView, places: Selection, *, how: How = "zero", reference: Reference | None = None
) -> AbstractContextManager[None]:
    """Forward passes inside the block run without `places`; nothing is dropped where none is chosen."""
    if not places.count:
        return nullcontext()
    return Ablation(of=(places,), how=how).applied(view, reference=reference)


def curve_area(shares: Sequence[float], heights: Sequence[float]) -> float:
    """Mean height of a curve over the logarithm of the share, by the trapezoid rule; the height itself of one point."""
    if len(shares) == 1:
        return heights[0]
    steps = [math.log(right / left) for left, right in pairwise(shares)]
    middles = [(left + right) / 2 for left, right in pairwise(heights)]
    return sum(step * middle for step, middle in zip(steps, middles, strict=True)) / sum(steps)


def edit_distance(one: Sequence[object], two: Sequence[object]) -> int:
    """Fewest insertions, deletions and replacements that turn one sequence into the other (Levenshtein)."""
    start, end = 0, 0
    while start < min(len(one), len(two)) and one[start] == two[start]:
        start += 1
    while end < min(len(one), len(two)) - start and one[-1 - end] == two[-1 - end]:
        end += 1
    one, two = one[start : len(one) - end], two[start : len(two) - end]
    row = list(range(len(two) + 1))
    for index, left in enumerate(one, 1):
        above, row[0] = row[0], index
        for place, right in enumerate(two, 1):
            above, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, above + (left != right))
    return row[-1]


@dataclass(frozen=True)
class _Judge:
    """Effects of dropping what a localization names; the undamaged state is read once."""

    world: Deletion
    subjects: Subjects
    reference: Reference
    _clean: dict[str, State] = field(default_factory=dict, repr=False)

    def __call__(self, known: Known, found: Localization) -> dict[str, float]:
        """Figures at every share, and selectivity over them.

        Raises:
            MismatchError: scores of something else than neurons.
        """
        mean = found.mean()
        if mean.grain is not Grain.NEURON:
            raise MismatchError(f"{found.provenance.method} scores {mean.grain}s, and no neurons")
        kept = {site: scores for site, scores in mean.scores.items() if site.layer or self.world.first_layer}
        if not kept:
            raise MismatchError(f"{found.provenance.method} scored no layer but the first, which is left out here")
        places = Localization(mean.grain, kept, mean.provenance)
        figures: dict[str, float] = {}
        heights: dict[str, list[float]] = {"selectivity": [], "nll selectivity": []}
        for share in self.world.shares:
            figures |= self._effects(known.view, places.top(fraction=share, per="site"), share)
            for name, curve in heights.items():
                curve.append(figures[f"{name}@{_percent(share)}"])
        return {**{name: curve_area(self.world.shares, curve) for name, curve in heights.items()}, **figures}

    def told(self, view: ModelView) -> dict[str, float]:
        """The undamaged model, for the notes."""
        before = self._states(view)
        self._clean.update(before)
        return {"accuracy": before["self"].accuracy, "others' accuracy": before["other"].accuracy,
                "text perplexity": before["text"].perplexity}  # fmt: skip

    def _effects(self, view: ModelView, places: Selection, share: float) -> dict[str, float]:
        far = share in self.world.distances
        with drop(view, places, how=self.world.how, reference=self.reference):
            after = self._states(view, distance=far)
        label = _percent(share)
        lost = {who: self._clean[who].accuracy - now.accuracy for who, now in after.items()}
        risen = {who: now.nll - self._clean[who].nll for who, now in after.items()}
        figures = {
            f"selectivity@{label}": lost["self"] - lost["other"],
            f"nll selectivity@{label}": risen["self"] - risen["other"],
            f"self accuracy lost@{label}": lost["self"],
            f"other accuracy lost@{label}": lost["other"],
            f"self nll@{label}": risen["self"],
            f"other nll@{label}": risen["other"],
            f"text perplexity@{label}": after["text"].perplexity - self._clean["text"].perplexity,
        }
        for who in ("self", "other") if far else ():
            moved = (after[who].distance or 0.0) - (self._clean[who].distance or 0.0)
            figures[f"{who} distance@{label}"] = moved
        return figures

    def _states(self, view: ModelView, *, distance: bool = True) -> dict[str, State]:
        return {
            "self": state(view, self.subjects.target, distance=distance),
            "other": state(view, self.subjects.others, distance=distance),
            "text": state(view, self.subjects.text),
        }


@torch.no_grad()
def _right(view: ModelView, batch: Batch) -> tuple[list[int], list[int]]:
    """Suffix tokens of each row that are the likeliest, and how many there are."""
    row, column, token, _ = batch.suffix_index()
    hit = (view.logits_at(batch, row, column).argmax(-1) == token).long()
    hits = torch.zeros(len(batch), dtype=torch.long, device=hit.device).index_add(0, row, hit)
    return hits.tolist(), (batch.length - batch.prefix).tolist()


def _distance(view: ModelView, passages: Passages) -> float:
    """Mean edit distance of greedy continuations to the suffixes."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, item in enumerate(passages):
        groups.setdefault((len(item.prefix), len(item.suffix)), []).append(row)
    total = 0
    for (prefix, length), rows in groups.items():
        ids = torch.tensor([passages[row].prefix for row in rows], device=view.device)
        written = continuation(view, ids, length).ids[:, prefix:].tolist()
        for row, said in zip(rows, written, strict=True):
            wanted = passages[row].suffix
            if view.tokenizer is None:
                total += edit_distance(said, wanted)
            else:
                total += edit_distance(decode(view.tokenizer, said), decode(view.tokenizer, wanted))
    return total / len(passages)


def _percent(share: float) -> str:
    return f"{100 * share:g}%"


DEL = Deletion()
MEAN = Deletion(how="mean")
RESAMPLE = Deletion(how="resample")
