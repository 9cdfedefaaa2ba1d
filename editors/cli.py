"""`memloc`, the one command: its own verbs (edit, apply, undo, demo) joined with those of the package that looks."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editors.methods import EDITORS
from editors.verbs import editability, export, sweep, train_mend, verify
from editors.verbs.export import print_written
from memloc import cli as looking
from memloc import command, processes
from memloc.command import Verb, common, out
from memloc.errors import InputError, MemlocError
from memloc.flags import DataFile
from memloc.methods import LOCALIZERS, MEASURES
from memloc.terminal import Terminal, complain
from memloc.verbs import check

if TYPE_CHECKING:
    from editors.base import Request
    from editors.edit import Edit
    from memloc.scores import Selection
    from memloc.view import ModelView

ABOUT = """memloc finds where a transformer language model keeps what it has memorized, and changes those weights.

  measure  ->  localize  ->  edit  ->  apply  ->  measure again  ->  report
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done, 2 an error on purpose (one line), 130 interrupted."""
    # Small models run fastest on one thread; this must be said before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        given = sys.argv[1:] if argv is None else list(argv)
        processes.run(lambda: command.run("memloc", ABOUT, verbs(), given))
    except MemlocError as error:
        if not processes.rank():  # every process knows of it
            complain(f"memloc: {error}")
        return 2
    except KeyboardInterrupt:
        complain("memloc: interrupted; what was being written is absent, what was written before is whole")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _list_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", help="localizers, editors or measures; by default all")


def _list(arguments: argparse.Namespace, terminal: Terminal) -> None:
    looking.list_methods([MEASURES, LOCALIZERS, EDITORS], terminal, arguments.what)


def _check(arguments: argparse.Namespace, terminal: Terminal) -> None:
    check.run(arguments, terminal, (LOCALIZERS, EDITORS))


def _edit_flags(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument(
        "--control",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --localization: also make the edit of a random selection of equal size (NAME.control.safetensors)",
    )


def _edit(arguments: argparse.Namespace, terminal: Terminal) -> None:
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
    if request.forget is not None:
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


def _apply_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("edit", type=Path, help="edit.safetensors")
    common(parser, "model")
    out(parser, "checkpoint folder to make (absent or empty)", required=True)
    parser.add_argument("--link", action="store_true", help="hard-link untouched files instead of copying them")


def _apply(arguments: argparse.Namespace, terminal: Terminal) -> None:
    from editors.edit import Edit
    from editors.shipping.checkpoint import apply_edit

    written = apply_edit(Edit.load(arguments.edit), Path(arguments.model), arguments.out, link=arguments.link)
    print_written(written, terminal)


def _undo(arguments: argparse.Namespace, terminal: Terminal) -> None:
    from editors.edit import Edit
    from editors.shipping.checkpoint import undo_edit

    written = undo_edit(Edit.load(arguments.edit), Path(arguments.model), arguments.out, link=arguments.link)
    print_written(written, terminal)


def _demo_flags(parser: argparse.ArgumentParser) -> None:
    out(parser, "folder for everything the demo makes", required=True)
    parser.add_argument("--size", choices=["demo", "tiny"], default="demo", help="of the lab model (default: demo)")
    common(parser, "seed")


def _demo(arguments: argparse.Namespace, terminal: Terminal) -> None:
    from editors.demo.run import demo

    terminal.result(demo(arguments.out, size=arguments.size, seed=arguments.seed, terminal=terminal))


def verbs() -> tuple[Verb, ...]:
    """Every verb, in the order of the loop."""
    *looks, report = looking.verbs()
    looks = [replace(verb, run=_check) if verb.name == "check" else verb for verb in looks]
    return (
        Verb("list", "every localizer, editor and measure", _list_flags, _list),
        *looks,
        Verb("edit", "compute an edit; no checkpoint is written", _edit_flags, _edit, EDITORS),
        Verb("train-mend", "train the network that `memloc edit mend` needs", train_mend.flags, train_mend.run),
        Verb("apply", "write a checkpoint folder with an edit in it", _apply_flags, _apply),
        Verb("undo", "write the checkpoint folder as it was before an edit", _apply_flags, _undo),
        Verb(
            "editability",
            "does localization predict which layer can be edited",
            editability.flags,
            editability.run,
            EDITORS,
        ),
        Verb("verify", "is what an edit took out gone or only hidden, and what else broke", verify.flags, verify.run),
        Verb("export", "write an edit as a PEFT adapter or a checkpoint with its model card", export.flags, export.run),
        Verb("sweep", "any localizer with any editor at equal budgets: what forgetting costs", sweep.flags, sweep.run),
        report,
        Verb("demo", "the whole loop on a model trained on the spot", _demo_flags, _demo),
    )


if __name__ == "__main__":
    processes.leave(main())
