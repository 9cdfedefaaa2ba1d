"""A verification as a page: one sentence a check for everyone, and the numbers behind it for whoever checks them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from editors.verification.judging import Finding, share_text
from editors.verification.verification import NEVER_TESTED, Verification
from memloc.report import Curve, EditSummary, Entry, Note, Report, Sheet, Verdict
from memloc.report.wording import MINUS, number, p_value

DRAWN = ("relearn", "relearn-other-half", "relearn-unrelated", "layers")
"""Checks whose ways of asking lie in a row, and are drawn as a line."""


def page(found: Verification, commands: tuple[str, ...] = ()) -> Report:
    """The report of a verification; it holds no text of any passage."""
    edits: tuple[EditSummary, ...] = ()
    if found.edit:
        header = dict(found.edit)
        edits = (EditSummary(name="the edit", sites=header.pop("sites"), header=header),)
    return Report(
        title=_TITLES[found.verdict],
        model=found.model,
        model_digest=found.provenance.inputs["model"],
        summary=found.sentence,
        verdicts=tuple(_verdicts(found)),
        comparisons=found.comparisons,
        sheets=(_checks(found), *_lost(found), _untested(found)),
        curves=tuple(_curve(f) for f in found.findings if f.check in DRAWN),
        edits=edits,
        notes=(_reading(),),
        provenance=found.provenance.to_json(),
        commands=commands,
    )


_TITLES = {
    "gone": "Gone, as far as these checks can see",
    "cannot tell": "These checks cannot tell whether it is gone",
    "over-forgotten": "Over-forgotten: less likely than text never seen",
    "hidden": "Hidden, not gone",
    "not removed": "Not removed",
}

_TONES: dict[str, Any] = {"gone": "good", "intact": "good", "cannot tell": "quiet"}


def _verdicts(found: Verification) -> list[Verdict]:
    """One line a check: what was tried, what came out."""
    lines = []
    for entry in found.findings:
        holds = {"gone": True, "cannot tell": None}.get(entry.verdict, False)
        lines.append(Verdict(f"{entry.title}: {entry.verdict}", holds, f"{entry.tried} {entry.meaning}"))
    for damage in found.damages:
        holds = {"intact": True, "cannot tell": None}.get(damage.verdict, False)
        lines.append(Verdict(f"{damage.group.capitalize()}: {damage.verdict}", holds, damage.meaning))
    return lines


def _checks(found: Verification) -> Sheet:
    return Sheet(
        title="Gone or hidden",
        text="Each check asked the edited model, texts never seen, and the model before the edit in the same ways. "
        "“Memory left” is the difference between targets and texts never seen after the edit, as a share of that "
        "difference before it: 100 % is all of it, 0 % none. Where a check asks in several ways, the row shows the one "
        "in which the targets stand out most, and p allows for that choice.",
        columns=("check", "verdict", "memory left", "targets", "never seen", "targets before", "written whole", "p"),
        rows=tuple(_check(entry) for entry in found.findings),
        caption="Scores are mean log-probabilities of the true tokens, in nats (for samples: the longest stretch "
        "written, as a share); small print: 95 % bootstrap intervals, n, and standard errors",
    )  # fmt: skip


def _check(entry: Finding) -> tuple[Entry, ...]:
    column = list(entry.figures["ways"]).index(entry.way)
    scores = [_score(entry.figures[name], column) for name in ("targets", "never seen", "targets before")]
    return (
        Entry(text=entry.title, below=_way(entry), kind="text"),
        Entry(text=entry.verdict, tone=_TONES.get(entry.verdict, "bad")),
        _left(entry),
        *scores,
        _whole(entry),
        Entry(text=p_value(entry.p)),
    )


def _way(entry: Finding) -> str:
    ways = entry.figures["ways"]
    return f"{entry.way}; {len(ways)} ways asked" if len(ways) > 1 else entry.way


def _left(entry: Finding) -> Entry:
    left = entry.left
    if math.isnan(left.value):
        return Entry(text="—", below="not seen before either", tone="quiet")
    ends = f"{_percent(left.low)} to {_percent(left.high)}" if math.isfinite(left.high) else ""
    return Entry(text=_percent(left.value), below=f"95 %: {ends}" if ends else "", share=min(1.0, max(0.0, left.value)))


def _percent(share: float) -> str:
    return f"{round(100 * share)} %".replace("-", MINUS) if math.isfinite(share) else "—"


def _score(part: Any, column: int) -> Entry:
    error = part["error"][column]
    spread = f"± {number(float(f'{error:.2g}'))}, n = {part['n']}"
    return Entry(text=number(float(f"{part['mean'][column]:.3g}")), below=spread)


def _whole(entry: Finding) -> Entry:
    if entry.recited is None:
        return Entry(text="—", tone="quiet")
    targets, controls, before = entry.recited
    below = f"never seen: {controls} of {entry.controls}\nbefore: {before} of {entry.n}"
    return Entry(text=share_text(targets, entry.n).split(" (")[0], below=below, tone="bad" if targets else "")


def _lost(found: Verification) -> list[Sheet]:
    """What the edit cost, beside edits of equal size; and what rounding leaves of it."""
    sheets = []
    if found.damages:
        rows = tuple(
            (
                Entry(text=damage.group, below=damage.meaning, kind="text"),
                Entry(text=damage.verdict, tone=_TONES.get(damage.verdict, "bad")),
                *(_loss(value) for value in (damage.loss, damage.random, damage.magnitude)),
                Entry(text=str(damage.n)),
            )
            for damage in found.damages
        )
        columns = ("what should stay", "verdict", "lost by the edit", "by a random edit of equal size",
                   "by one of equal size in the largest weights", "n")  # fmt: skip
        sheets.append(Sheet(title="What else broke", columns=columns, rows=rows, caption="Share of what was recited or "
                            "answered before; for text, rise of perplexity; for writing, rise of repeated "
                            "4-grams"))  # fmt: skip
    if found.moved:
        cells = [(Entry(text=f"{bits} bits", kind="text"), Entry(text=number(share, "share")))
                 for bits, share in found.moved.items()]  # fmt: skip
        sheets.append(Sheet(title="What else broke", columns=("weights rounded to", "edited weights that still differ"),
                            rows=cells, caption="How much of the edit survives rounding"))  # fmt: skip
    return sheets


def _loss(value: float | None) -> Entry:
    return Entry(text="not run", tone="quiet") if value is None else Entry(text=number(float(f"{value:.3g}"), "share"))


def _untested(found: Verification) -> Sheet:
    rows = [(Entry(text=title, kind="text"), Entry(text=why, kind="text")) for title, why in found.untested.items()]
    rows += [(Entry(text=text[0].upper() + text[1:], kind="text"), Entry(text="no run covers it", kind="text"))
             for text in NEVER_TESTED]  # fmt: skip
    return Sheet(title="What was not tested", columns=("what", "why"), rows=rows,
                 text="No finding above speaks of these.")  # fmt: skip


def _curve(entry: Finding) -> Curve:
    """Targets and controls along the steps or layers, before the edit and after it."""
    ways = entry.figures["ways"]
    names = (("targets, edited", "targets"), ("never seen, edited", "never seen"),
             ("targets, before the edit", "targets before"), ("never seen, before", "never seen before"))  # fmt: skip
    series = {label: _points(entry.figures[name], _places(ways)) for label, name in names}
    axis = "layer" if entry.check == "layers" else "steps of training"
    return Curve(title=entry.title, x=axis, y="mean log-probability of a true token, nats", series=series,
                 text=f"{entry.tried} {entry.meaning}")  # fmt: skip


def _points(part: Any, places: Sequence[int]) -> list[dict[str, Any]]:
    return [{"x": x, "y": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error, "n": part["n"]}
            for x, mean, error in zip(places, part["mean"], part["error"], strict=True)]  # fmt: skip


def _places(ways: Sequence[str]) -> list[int]:
    """The numbers in "after 4 steps" and "after layer 2"."""
    return [int(next(word for word in way.split() if word.isdigit())) for way in ways]


def _reading() -> Note:
    return Note(
        heading="How to read the verdicts",
        text="“Gone” means that the targets did no better than texts the model never saw, in any way of asking, and "
        "that the check would have seen the memory had it been there: it sees it in the model before the edit. "
        "“Hidden” means that the plain question no longer brings a target up and this one does. “Over-forgotten” means "
        "that the targets are less likely than texts never seen. “Cannot tell” means that these passages are too few, "
        "or the check too blind. One target written whole where no text never seen is, is proof by itself; all other "
        "verdicts need p < 1 % and at least a tenth of the memory's difference.\n\nAll of this rests on texts never "
        "seen being of the same kind as the targets: if they are harder, a forgotten passage looks hidden, and if they "
        "are easier, a hidden one looks gone.",
    )
