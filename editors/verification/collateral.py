"""What else broke: other memories, facts, ordinary text and whole sentences, each beside controls of equal size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from editors.trial import Group, Measured, comparisons
from editors.verification.material import Material
from editors.verification.writing import Writing, prompts_of
from memloc.measurement import Measurement
from memloc.measures.extraction import Extraction
from memloc.measures.facts import FactRecall
from memloc.measures.perplexity import Perplexity
from memloc.report import Comparison
from memloc.view import ModelView

Harm = Literal["intact", "cannot tell", "damaged", "broken"]

HARMS: tuple[Harm, ...] = ("intact", "cannot tell", "damaged", "broken")

TOLERATED: Mapping[str, tuple[float, float]] = {
    "extraction": (0.05, 0.5), "facts": (0.05, 0.5), "perplexity": (0.03, 0.5), "writing": (0.1, 0.3),
}  # fmt: skip
"""By measure: the loss up to which something is intact, and from which it is broken."""

FEWEST = 5
"""Items below which a loss cannot be told from luck."""


@dataclass(frozen=True)
class Damage:
    """What became of one group.

    Attributes:
        group: its name.
        verdict: see `HARMS`.
        loss: how much is lost: share of what held before, rise of perplexity as a share, rise of repetition.
        random: the same under the random edit of equal size; None where it was not run.
        magnitude: the same under the magnitude control.
        n: items it stands on.
        meaning: one sentence.
    """

    group: str
    verdict: Harm
    loss: float
    random: float | None
    magnitude: float | None
    n: int
    meaning: str

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(vars(self))


def groups_of(view: ModelView, data: Material) -> tuple[Group, ...]:
    """What there is to measure, from the material given; the reference of writing is made here, on the original."""
    recite, headline = Extraction(), ("strict rate", "median log p_z")
    found = [Group(name="targets", measure=recite, items=data.targets, goal="forget", controls=data.controls,
                   explanation="Passages the edit was told to take out.", headline=headline)]  # fmt: skip
    if data.retain:
        found.append(Group(name="retained passages", measure=recite, items=data.retain, goal="keep", headline=headline,
                           explanation="Memorized passages the edit was told to keep."))  # fmt: skip
    if data.memorized:
        found.append(Group(name="passages named in no set", measure=recite, items=data.memorized, goal="keep",
                           headline=headline,
                           explanation="Memorized passages that the edit was never shown."))  # fmt: skip
    if data.facts:
        found.append(Group(name="facts", measure=FactRecall(), items=data.facts, goal="keep",
                           headline=("true accuracy", "neighbour accuracy"),
                           explanation="Facts the model knows, and their neighbours."))  # fmt: skip
    if data.text:
        found.append(Group(name="held-out text", measure=Perplexity(), items=data.text, goal="keep",
                           explanation="Ordinary text the edit has not seen."))  # fmt: skip
        prompts = prompts_of(data.text)
        if prompts:
            found.append(Group(name="writing", measure=Writing.of(view, prompts), items=prompts, goal="keep",
                               headline=("agreement", "repeated 4-grams"),
                               explanation="What the model writes by itself after ordinary text, whole sequences, "
                               "beside what it wrote before the edit: a few exchanged tokens that leave perplexity "
                               "alone show here."))  # fmt: skip
    return tuple(found)


def compared(
    groups: Sequence[Group], before: Measured, after: Measured, random: Mapping[str, Measurement]
) -> tuple[Comparison, ...]:
    """The groups for a report."""
    return comparisons(groups, before, after, random)


def damages(
    groups: Sequence[Group], before: Measured, after: Measured, random: Measured, magnitude: Measured
) -> tuple[Damage, ...]:
    """A verdict on every group but the targets, with the loss under both controls beside it."""
    found = []
    for group in groups:
        if group.goal == "keep":
            arms = [arm[group.name] if arm else None for arm in (after, random, magnitude)]
            found.append(_damage(group.name, before[group.name], arms))
    return tuple(found)


def _damage(name: str, before: Measurement, arms: Sequence[Measurement | None]) -> Damage:
    losses = [None if arm is None else _loss(before, arm) for arm in arms]
    loss, n = losses[0] or 0.0, _counted(before)
    fine, ruined = TOLERATED[before.measure]
    verdict: Harm = "intact" if loss <= fine else "broken" if loss >= ruined else "damaged"
    if n < FEWEST:
        verdict = "cannot tell"
    return Damage(name, verdict, loss, losses[1], losses[2], n, _said(before.measure, loss, n))


def _loss(before: Measurement, after: Measurement) -> float:
    if before.measure == "perplexity":
        return after["perplexity"] / before["perplexity"] - 1
    if before.measure == "writing":
        return after["repeated 4-grams"] - before["repeated 4-grams"]
    held = {row["id"] for row in before.rows if _holds(row)}
    kept = sum(_holds(row) for row in after.rows if row["id"] in held)
    return 1 - kept / len(held) if held else 0.0


def _holds(row: Mapping[str, Any]) -> bool:
    """Whether a passage is recited, or a fact answered."""
    return bool(row["strict"] if "strict" in row else row["true accuracy"])


def _counted(before: Measurement) -> int:
    if before.measure in ("extraction", "facts"):
        return sum(map(_holds, before.rows))
    return len(before.rows)


def _said(measure: str, loss: float, n: int) -> str:
    if measure == "perplexity":
        return f"The model's perplexity on ordinary text changes by {loss:+.1%}."
    if measure == "writing":
        return f"The share of four-token groups that it repeats changes by {100 * loss:+.1f} points."
    what = "passages recited" if measure == "extraction" else "facts answered"
    return f"Of {n} {what} before the edit, {round((1 - loss) * n)} still are."
