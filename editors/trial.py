"""A trial: one edit judged on several groups, before, after and under its random control."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from memloc.measurement import Measurement
from memloc.measures.control import compared
from memloc.passages import Passages
from memloc.report import Comparison
from memloc.view import ModelView

Goal = Literal["forget", "keep", "learn", ""]
Measured = dict[str, Measurement]


@dataclass(frozen=True, kw_only=True)
class Group:
    """What is asked of the model, and what the edit should do to it.

    Attributes:
        name: such as "targets".
        measure: such as `Extraction()`.
        items: passages or facts.
        goal: "forget", "keep" or "learn".
        controls: passages never trained on, measured beside, or None.
        explanation: one sentence on what the group is.
        headline: figures for the first screen; empty for the measure's usual ones.
    """

    name: str
    measure: Callable[[ModelView, Any], Measurement]
    items: Any
    goal: Goal
    controls: Passages | None = None
    explanation: str = ""
    headline: tuple[str, ...] = ()


def measure_groups(view: ModelView, groups: Sequence[Group]) -> Measured:
    """Every group on one state of the model; controls shared by several groups are measured once."""
    seen: dict[str, Measurement] = {}
    found: Measured = {}
    for group in groups:
        measured = group.measure(view, group.items)
        if group.controls is not None:
            key = f"{measured.measure} {group.controls.digest}"
            if key not in seen:
                seen[key] = group.measure(view, group.controls)
            measured = compared(measured, seen[key])
        found[group.name] = measured
    return found


def comparisons(
    groups: Sequence[Group], before: Measured, after: Measured, random: Mapping[str, Measurement]
) -> tuple[Comparison, ...]:
    """The groups' measurements side by side, for a report."""
    return tuple(
        Comparison(
            name=group.name,
            before=before[group.name],
            after=after[group.name],
            random=random.get(group.name),
            goal=group.goal,
            explanation=group.explanation,
            headline=group.headline,
        )
        for group in groups
    )
