"""Relearning: how fast a passage comes back when the edited model is taught, against texts it never saw.

A memory that was only covered returns in fewer steps than a text that has to be learnt. Targets and controls are
taught together, in one copy, in the same batches, so nothing but their past tells them apart. Half of each is taught
and the other half asked, and then the other way round: what comes back although nobody taught it was never gone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from editors.tuning.descent import working_copy
from editors.verification.material import Effort, Material, folds
from editors.verification.scores import Heard, Scores, heard, joined
from memloc.batches import Batch, pad
from memloc.errors import InputError
from memloc.objectives import suffix_nll
from memloc.passages import Passages
from memloc.progress import steps
from memloc.sites import Kind
from memloc.view import ModelView

RATE = 0.01
"""Step size over the root mean square of the model's MLP weights: the same haste in small models and large ones."""

ROWS = 16
"""Texts in a step."""


def taught(view: ModelView, data: Material, effort: Effort, seed: int) -> dict[str, Scores]:
    """Teach one half of the targets and as many controls; ask what was taught, and what was not.

    Returns:
        "relearn": of what was taught; "relearn-other-half": of what was not.

    Cost: two copies trained, one after the other: `relearn_steps` forwards and backwards each over 16 texts.
    """
    many = data.fewer(effort.targets, effort.controls, seed)
    mine, never = folds(many.targets, seed), folds(many.controls, seed)
    asked: dict[str, list[list[Heard]]] = {"relearn": [[], []], "relearn-other-half": [[], []]}
    lessons = [side for side in (0, 1) if len(mine[side])]
    for side in lessons:
        shown = (mine[side], never[side][: len(mine[side])])
        sets = [*shown, mine[1 - side], never[1 - side]]
        curves = curve(view, shown[0] + _renamed(shown[1]), [part for part in sets if part], effort, seed)
        found = iter(curves)
        for name, pair in (("relearn", sets[:2]), ("relearn-other-half", sets[2:])):
            for place, part in enumerate(pair):
                if part:
                    asked[name][place].append(next(found))
    ways = _ways(effort.relearn_steps)
    notes = {"rate": rate(view), "steps": effort.relearn_steps, "seed": seed}
    return {
        name: Scores.of(ways, [joined(part, [i for h in part for i in h.ids]) for part in parts], notes)
        for name, parts in asked.items()
    }


def on_text(view: ModelView, data: Material, effort: Effort, seed: int) -> dict[str, Scores]:
    """Teach ordinary text that has nothing to do with the targets, and ask them ("relearn-unrelated").

    Raises:
        InputError: no ordinary text was given.
    """
    if data.text is None:
        raise InputError("no ordinary text was given to teach (--text)")
    many = data.fewer(effort.targets, effort.controls, seed)
    length = max(len(item.ids) for item in many.targets)
    rows = [item for item in data.text if len(item.ids) >= min(length, 16)] or list(data.text)
    random.Random(seed).shuffle(rows)
    text = Passages(tuple(rows[: ROWS * effort.relearn_steps]), data.text.origin)
    found = curve(view, text, [many.targets, many.controls], effort, seed, longest=length)
    ways = _ways(effort.relearn_steps)
    return {"relearn-unrelated": Scores.of(ways, found, {"rate": rate(view), "texts": len(text), "seed": seed})}


def curve(
    view: ModelView,
    lesson: Passages,
    asked: Sequence[Passages],
    effort: Effort,
    seed: int,
    *,
    longest: int | None = None,
) -> list[Heard]:
    """Train a copy on `lesson`, whole texts, and ask `asked` along the way: one `Heard` each, a column a point.

    Args:
        view: the model; it is left as it was.
        lesson: what is taught.
        asked: what is asked.
        effort: for how many steps.
        seed: of the order.
        longest: tokens of each text that are taught, at most.
    """
    copy = working_copy(view)
    columns: list[list[Heard]] = [[] for _ in asked]
    wanted, parameters = set(points(effort.relearn_steps)), list(copy.model.parameters())
    optimiser = torch.optim.Adam(parameters, lr=rate(view))
    batches = _batches(copy, lesson, seed, longest)
    for step in steps(range(effort.relearn_steps + 1), "verify: relearning"):
        if step:
            with copy.trainable(parameters):
                suffix_nll(copy, next(batches)).mean().backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        if step in wanted:
            for column, part in zip(columns, asked, strict=True):
                column.append(heard(copy, [part], part.ids))
    return [_along(column) for column in columns]


def points(count: int) -> tuple[int, ...]:
    """Steps after which it is asked: none, powers of two, and the last."""
    found = [2**power for power in range(count.bit_length()) if 2**power < count]
    return (0, *found, count)


def _ways(count: int) -> tuple[str, ...]:
    return tuple(f"after {step} step{'' if step == 1 else 's'}" for step in points(count))


def rate(view: ModelView) -> float:
    """Step size of the lessons."""
    total = [view.weight(site).detach().float().square().mean() for site in view.sites(Kind.MLP_OUT)]
    return RATE * float(torch.stack(total).mean().sqrt())


def _batches(view: ModelView, lesson: Passages, seed: int, longest: int | None) -> Iterator[Batch]:
    """Whole texts, the first token alone being given; all rows in turn, shuffled each round."""
    lesson.check(view.vocab, view.context)
    order, generator = list(range(len(lesson))), random.Random(seed)
    while True:
        generator.shuffle(order)
        for start in range(0, len(order), ROWS):
            rows = [lesson[at].ids[:longest] for at in order[start : start + ROWS]]
            yield pad(rows, [1] * len(rows), device=view.device)


def _renamed(part: Passages) -> Passages:
    """Controls beside targets in one lesson: two sets may use the same names."""
    items: list[Any] = [type(item)(f"control/{item.id}", item.prefix, item.suffix) for item in part]
    return Passages(tuple(items), part.origin)


def _along(columns: list[Heard]) -> Heard:
    hits = [column.recited for column in columns if column.recited is not None]
    return Heard(columns[0].ids, np.concatenate([column.score for column in columns], 1), np.concatenate(hits, 1))
