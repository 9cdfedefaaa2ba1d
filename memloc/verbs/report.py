"""memloc report: one page of evidence from measurements, localizations and edits."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memloc import store
from memloc.command import common, need_passages, out, read_facts, read_passages
from memloc.errors import InputError
from memloc.terminal import Terminal

if TYPE_CHECKING:
    from memloc.passages import Passages
    from memloc.view import ModelView


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.add_argument(
        "--compare",
        action="append",
        nargs="+",
        metavar=("NAME:GOAL BEFORE [AFTER", "RANDOM]"),
        required=True,
        help="measurements of one group, before, after and under the random edit; GOAL is forget, keep or learn",
    )
    parser.add_argument("--localization", action="append", type=Path, default=[], help="a localization to draw")
    parser.add_argument("--edit", action="append", type=Path, default=[], help="an edit to describe")
    parser.add_argument("--title", default="memloc report", help="title of the page")
    parser.add_argument("--model", help="with --edited and --passages: show what both models say after each prefix")
    parser.add_argument("--edited", help="the edited checkpoint")
    parser.add_argument("--show-text", action="store_true", help="print the passages themselves (by default redacted)")
    common(parser, "passages", "facts", "prefix", "suffix")
    out(parser, "folder for report.html, report.json and report.md", required=True)


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Write the page."""
    from memloc.report import Comparison, EditSummary, Located, Report
    from memloc.scores import Localization

    comparisons = [_comparison(words, Comparison) for words in arguments.compare]
    located = []
    tokens, prefixes = spelled(arguments) if arguments.localization else (None, None)
    for path in arguments.localization:
        beside = path.with_suffix(f".controls{path.suffix}")
        control = Localization.load(beside) if beside.is_file() else None
        found = Localization.load(path)
        located.append(Located(localization=found, control=control, title=path.stem, tokens=tokens, prefixes=prefixes))
    first = comparisons[0].before.provenance
    report = Report(
        title=arguments.title,
        model=arguments.model or "",
        model_digest=first.inputs.get("model", ""),
        comparisons=tuple(comparisons),
        localizations=tuple(located),
        edits=tuple(
            EditSummary(name=path.stem, header=store.header_of(path), bytes=path.stat().st_size)
            for path in arguments.edit
        ),
        texts=_texts(arguments),
        provenance=first.to_json(),
        show_text=arguments.show_text,
    )
    written = report.save(arguments.out)
    terminal.note("\n".join(f"written: {path}" for path in written))
    terminal.result({"written": [str(path) for path in written], "passed": report.passed})


def _comparison(words: list[str], make: Any) -> Any:
    from memloc.measurement import Measurement

    if not 2 <= len(words) <= 4:
        raise InputError(f"--compare {' '.join(words)}: expected NAME:GOAL and one to three measurement files")
    name, _, goal = words[0].partition(":")
    if goal not in ("", "forget", "keep", "learn"):
        raise InputError(f"--compare {words[0]}: the goal is forget, keep or learn, found {goal!r}")
    before, *others = (Measurement.load(path) for path in words[1:])
    after, random = [*others, None, None][:2]
    return make(name=name, before=before, after=after, random=random, goal=goal)


def spelled(arguments: argparse.Namespace) -> tuple[dict[str, tuple[str, ...]] | None, dict[str, int] | None]:
    """Tokens and prefix lengths of the passages and facts named, by id; None where neither, or no model, is named."""
    if arguments.model is None or (arguments.passages is None and arguments.facts is None):
        return None, None
    from memloc.view import ModelView

    view = ModelView.open(arguments.model)
    facts = read_facts(arguments.facts, view)
    passages = [*(read_passages(arguments.passages, view, arguments) or ())]
    passages += [] if facts is None else facts.as_passages("true", paraphrases=True)
    return {item.id: view.spell(item.ids) for item in passages}, {item.id: len(item.prefix) for item in passages}


def _texts(arguments: argparse.Namespace) -> tuple[Any, ...]:
    if arguments.passages is None:
        return ()
    if arguments.edited is None and arguments.model is not None and arguments.localization:
        return ()
    if arguments.model is None or arguments.edited is None:
        raise InputError("--passages in a report needs --model and --edited, the two models that continue them")
    from memloc.view import ModelView

    view, edited = ModelView.open(arguments.model), ModelView.open(arguments.edited)
    return text_rows(need_passages(arguments.passages, view, arguments), before=view, after=edited)


def text_rows(
    passages: Passages, *, before: ModelView, after: ModelView, control: ModelView | None = None
) -> tuple[Any, ...]:
    """What two or three models say after each prefix, token by token, for a report."""
    from memloc.measures.continuation import continue_greedy
    from memloc.report import TextRow

    arms = [view for view in (before, after, control) if view is not None]
    said = zip(*(continue_greedy(view, passages) for view in arms), strict=True)
    return tuple(
        TextRow(item.id, before.spell(item.prefix), before.spell(item.suffix), *map(before.spell, rows))
        for item, rows in zip(passages, said, strict=True)
    )
