"""`memloc`, the one command: its own verbs (edit, apply, undo, demo) joined with those of the package that looks."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from editors.methods import EDITORS, PRUNERS
from editors.verbs import edit, editability, export, shared_subspace, sweep, train_mend, verify
from editors.verbs.export import print_written
from memloc import cli as looking
from memloc import command, processes
from memloc.command import Verb, common, out
from memloc.errors import MemlocError
from memloc.methods import LOCALIZERS, MEASURES
from memloc.terminal import Terminal, complain
from memloc.verbs import check

if TYPE_CHECKING:
    pass

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
        Verb("edit", "compute an edit, and verify it; no checkpoint is written", edit.flags, edit.run, EDITORS),
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
        Verb(
            "shared-subspace",
            "do memories share weights: masks of disjoint halves, their overlap, and what removal takes from the other",
            shared_subspace.flags,
            shared_subspace.run,
            PRUNERS,
        ),
        Verb("verify", "is what an edit took out gone or only hidden, and what else broke", verify.flags, verify.run),
        Verb("export", "write an edit as a PEFT adapter or a checkpoint with its model card", export.flags, export.run),
        Verb("sweep", "any localizer with any editor at equal budgets: what forgetting costs", sweep.flags, sweep.run),
        report,
        Verb("demo", "the whole loop on a model trained on the spot", _demo_flags, _demo),
    )


if __name__ == "__main__":
    processes.leave(main())
