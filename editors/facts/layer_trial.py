"""Which blocks, and which token, to edit many facts at: measured, by small edits of some of the facts themselves.

Every candidate makes the edit of a few of the request's facts, with the same settings and protection. It is judged as
a single fact's sites are (`editors.facts.site_trial`): by what the model then says behind prefixes and in ways of its
own to the fact that no value was fitted to, and by what it still says of namesakes that were not protected. Nothing
but the request is looked at. Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from editors.base import Request
from editors.facts.batch_edit import Work
from editors.facts.batch_settings import BatchEditor
from editors.facts.contexts import Demand, Row, Token, demand, row_of, sample_prefixes
from editors.facts.ground import Ground, refuse_unheard
from editors.facts.layer_choice import usual_layers
from editors.facts.own_words import namesakes
from editors.facts.protected import spellings
from editors.facts.site_trial import TRIAL_LENGTHS, TRIALS, Tried, tried
from memloc import progress
from memloc.errors import InputError
from memloc.moments import Moments
from memloc.passages import Fact, Facts
from memloc.view import ModelView

RANGES = (0.0, 1.0), (0.0, 0.5), (0.25, 0.75), (0.5, 1.0), (0.75, 1.0)
"""Relative depths tried beside the editor's own and the layers that papers use."""

JUDGES = 24
"""Namesakes made up for each tried fact, every third of which judges and is not protected."""


class Place(NamedTuple):
    """Where to edit: at which token, in which blocks."""

    token: Token
    layers: tuple[int, ...]


def candidates(editor: BatchEditor, view: ModelView) -> list[Place]:
    """The places that are to be tried, the editor's own first; one where nothing is to be measured."""
    ranges = [editor.layers_of(view)]
    if editor.measured:
        ranges += [replace(editor, depths=depths).layers_of(view) for depths in RANGES]
        ranges.append(replace(editor, layers=usual_layers(view)).layers_of(view))
    tokens: tuple[Token, ...] = ("prompt-last", "subject-last") if editor.token == "measured" else (editor.token,)
    return [Place(token, layers) for token in tokens for layers in dict.fromkeys(ranges)]


def chosen(
    editor: BatchEditor, view: ModelView, request: Request, moments: Moments, places: Sequence[Place]
) -> tuple[BatchEditor, dict[str, Any]]:
    """The editor at the best of `places`, and what each of them did; at the only one without trying it.

    The best is the one of the highest merit: the mean of the shares of facts that are said after the bare prompt, of
    the target's probability behind other prefixes, and of what namesakes keep. The first of equals.

    Cost: for each token what the editor asks the model of so many facts, and a metric of every block that a candidate
    changes; for each candidate their values, and four small forwards a fact.

    Raises:
        InputError: no candidate can be edited; says why the first cannot.
    """
    if len(places) == 1:
        return replace(editor, token=places[0].token), {}
    few, trials = _drawn(request, editor.trials), {}
    rows: list[dict[str, Any]] = []
    for place in progress.steps(places, "candidate layers"):
        row: dict[str, Any] = {"token": place.token, "layers": list(place.layers)}
        try:
            refuse_unheard(view, request.need_facts(), place.token, place.layers)
            if place.token not in trials:
                trials[place.token] = Trial.of(replace(editor, token=place.token), view, request, few, moments)
            row |= trials[place.token].judged(place.layers)
        except InputError as error:
            row["refused"] = str(error)
        rows.append(row)
    open_ones = [index for index, row in enumerate(rows) if "refused" not in row]
    if not open_ones:
        raise InputError(
            f"{editor.name}: none of {len(rows)} candidates can be edited; the first: {rows[0]['refused']}"
        )
    best = places[max(open_ones, key=lambda index: (rows[index]["merit"], -index))]
    settled = replace(editor, token=best.token, layers=best.layers, measured=False)
    return settled, {
        "tried": rows,
        "tried on": list(few.ids),
        "chosen": {"token": best.token, "layers": list(best.layers)},
    }


def merit(seen: Sequence[Tried]) -> dict[str, float]:
    """What a candidate did to several facts, on average, and its merit."""
    count = len(seen)
    right, said = sum(one.right for one in seen) / count, sum(one.said for one in seen) / count
    kept = sum(one.kept for one in seen) / count
    return {"right": right, "said": said, "kept": kept, "merit": (right + said + kept) / 3}


@dataclass(frozen=True)
class Trial:
    """Some facts to be tried at one token.

    Attributes:
        ground: what the edits start from.
        asked: the facts behind prefixes that no value is fitted to.
        ways: of each every other of the model's own ways to it, which are not edited.
        judges: of each the namesakes that are not protected.
    """

    ground: Ground
    asked: tuple[Demand, ...]
    ways: tuple[tuple[Row, ...], ...]
    judges: tuple[tuple[Row, ...], ...]

    @classmethod
    def of(cls, editor: BatchEditor, view: ModelView, request: Request, facts: Facts, moments: Moments) -> Trial:
        """With what is needed to judge held back from what is used to edit."""
        ground = Ground.of(editor, view, request, facts, moments)
        # Drawn apart from what the edit draws, whose generator starts from the seed itself.
        draw = torch.Generator().manual_seed(request.seed + 1)
        unseen = _unseen_prefixes(ground, draw)
        asked = tuple(_asked(view, fact, unseen, editor.place) for fact in facts)
        ways = tuple(mine[1::2] for mine in ground.ways())
        subjects = [ids for fact in facts for ids in spellings(view, fact)]
        judges = tuple(_judges(view, fact, editor.place, subjects, draw) for fact in facts)
        return cls(ground.without({row for rows in (*judges, *ways) for row in rows}), asked, ways, judges)

    def judged(self, layers: tuple[int, ...]) -> dict[str, float]:
        """What the edit of `layers` does; no weight is touched."""
        deltas, _ = Work.on(self.ground, layers).solved()
        return merit(
            [tried(self.ground.view, deltas, *each) for each in zip(self.asked, self.ways, self.judges, strict=True)]
        )


def _drawn(request: Request, count: int) -> Facts:
    """At most `count` of the request's facts, in their order."""
    facts = request.need_facts()
    order = torch.randperm(len(facts), generator=torch.Generator().manual_seed(request.seed)).tolist()
    return Facts(tuple(facts[index] for index in sorted(order[:count])), facts.origin)


def _unseen_prefixes(ground: Ground, draw: torch.Generator) -> tuple[str, ...]:
    """Prefixes to judge with; none where the model cannot write any."""
    try:
        found = sample_prefixes(ground.view, TRIAL_LENGTHS, TRIALS, draw, top_k=ground.editor.top_k)
    except InputError:
        return ()
    return tuple(prefix for prefix in dict.fromkeys(found) if prefix not in ground.prefixes)


def _asked(view: ModelView, fact: Fact, prefixes: Sequence[str], token: Token) -> Demand:
    """The fact behind those prefixes with which it fits into the context."""
    found = demand(fact, view.tokenizer, prefixes, token, essence=False)
    most = (view.context or 1 << 30) - len(fact.target) + 1
    return replace(found, prompts=tuple(row for row in found.prompts if len(row.ids) <= most))


def _judges(
    view: ModelView, fact: Fact, token: Token, subjects: Sequence[tuple[int, ...]], draw: torch.Generator
) -> tuple[Row, ...]:
    """Prompts about others, none of whom is edited."""
    made = [row_of(prompt, token) for prompt in namesakes(view, fact.prompt, JUDGES, draw)]
    others = [row for row in made if not any(_holds(row.ids, subject) for subject in subjects)]
    return tuple(others[2::3])


def _holds(ids: tuple[int, ...], part: tuple[int, ...]) -> bool:
    return any(ids[start : start + len(part)] == part for start in range(len(ids) - len(part) + 1))
