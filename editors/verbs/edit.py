"""memloc edit: compute an edit, beside it the same for a random selection, and verify it."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editors.verbs import verify
from memloc import command
from memloc.command import common, out
from memloc.errors import InputError
from memloc.flags import DataFile
from memloc.terminal import Terminal

if TYPE_CHECKING:
    from editors.base import Request
    from editors.edit import Edit
    from memloc.scores import Selection
    from memloc.view import ModelView


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    common(parser, "model", "passages", "retain", "text", "facts", "localization", "fraction", "count", "per")
    common(parser, "prefix", "suffix", "seed")
    parser.add_argument("--keep-facts", type=DataFile.parse, metavar="FILE", help="facts the model should go on saying")
    parser.add_argument(
        "--past", type=Path, nargs="*", default=[], metavar="EDIT", help="edits the model holds already, in order"
    )
    parser.add_argument(
        "--rounding",
        choices=["nearest", "stochastic"],
        default="nearest",
        help="how to cast to the stored dtype; stochastic keeps small changes of bfloat16 weights (default: nearest)",
    )
    out(parser, "edit.safetensors", required=True)
    common(parser, "controls")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --passages and --controls: ask at once whether what was taken out is gone or only hidden, and what "
        "else broke (NAME.verified/)",
    )
    parser.add_argument(
        "--memorized",
        type=DataFile.parse,
        metavar="FILE",
        help="for --verify: memories the edit is not told of",
    )
    parser.add_argument(
        "--held-out", type=DataFile.parse, metavar="FILE", help="for --verify: ordinary text the edit does not see"
    )
    parser.add_argument(
        "--control",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --localization: also make the edit of a random selection of equal size (NAME.control.safetensors)",
    )


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Compute the edit and its control, save both, and verify where text never seen is given."""
    from editors.base import Request
    from editors.edit import Edit

    view = command.open_view(arguments)
    request = Request(
        forget=command.read_passages(arguments.passages, view, arguments),
        retain=command.read_passages(arguments.retain, view, arguments),
        text=command.read_text(arguments.text, view),
        facts=command.read_facts(arguments.facts, view),
        keep_facts=command.read_facts(arguments.keep_facts, view),
        past=tuple(Edit.load(path) for path in arguments.past),
        selection=_selection(arguments, view),
        seed=arguments.seed,
    )
    made = {"edit": _make(arguments, view, request, arguments.out, terminal)}
    if request.selection is not None and arguments.control:
        matched = replace(request, selection=request.selection.random_like(arguments.seed))
        path = arguments.out.with_suffix(f".control{arguments.out.suffix}")
        made["control"] = _make(arguments, view, matched, path, terminal)
    if request.forget is not None and arguments.verify and arguments.controls is not None:
        made["verified"] = verify.after_edit(arguments, view, terminal).to_json()
    elif request.forget is not None:
        terminal.note(f"gone or only hidden? {verify.suggestion(arguments)}")
    terminal.result(made)


def _selection(arguments: argparse.Namespace, view: ModelView) -> Selection | None:
    from memloc.errors import MismatchError
    from memloc.scores import Localization

    if arguments.localization is None:
        if arguments.fraction is not None or arguments.count is not None:
            raise InputError("--fraction and --count choose from a --localization; none was given")
        return None
    found = Localization.load(arguments.localization)
    digest = view.digest
    if found.provenance.inputs.get("model") not in (None, digest):
        raise MismatchError(
            f"{arguments.localization} was made on another model than {view.name}; localize on this one"
        )
    return found.top(arguments.count, fraction=arguments.fraction, per=arguments.per)


def _make(arguments: argparse.Namespace, view: ModelView, request: Request, path: Path, terminal: Terminal) -> Any:
    edit: Edit = arguments.method(view, request)
    if arguments.rounding != edit.rounding:
        edit = replace(edit, rounding=arguments.rounding, rounding_seed=arguments.seed).rebased(view)
    edit.save(path)
    print_edit(edit, path, terminal)
    return {"file": str(path), "bytes": path.stat().st_size, **edit.summary()}


def print_edit(edit: Edit, path: Path, terminal: Terminal) -> None:
    """Sites, sizes and what the cast to the stored dtype left of them."""
    rows = []
    for site, norm in edit.norms.items():
        left = edit.survived.get(site)
        rows.append(
            [str(site), type(edit.deltas[site]).__name__, norm, *([left.error, left.share] if left else [None] * 2)]
        )
    size = path.stat().st_size
    terminal.table(
        f"{path}: {edit.provenance.method}, {edit.count} entries touched, {size:,} bytes",
        ["site", "form", "norm", "lost in rounding", "share of entries changed"],
        rows,
    )
    for key, value in edit.notes.items():
        text = json.dumps(value, ensure_ascii=False)
        terminal.note(f"{key}: {text if len(text) <= 200 else text[:200] + ' …'}")
