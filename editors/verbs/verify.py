"""memloc verify: is what an edit took out gone or only hidden, and what else broke."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memloc.command import common, open_view, out, read_facts, read_passages, read_text
from memloc.errors import InputError
from memloc.flags import DataFile
from memloc.terminal import Terminal

if TYPE_CHECKING:
    from editors.verification import Verification
    from memloc.view import ModelView


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.add_argument("model", help="checkpoint folder (or hub name) before the edit")
    parser.add_argument("edit", type=Path, help="edit.safetensors, or the folder of an edited checkpoint")
    common(parser, "device-map", "passages", "controls", "retain")
    parser.add_argument(
        "--memorized", type=DataFile.parse, metavar="FILE", help="memorized passages the edit was not told of, JSONL"
    )
    common(parser, "facts", "text", "prefix", "suffix")
    parser.add_argument(
        "--effort", choices=["quick", "full"], default="quick", help="how hard the checks try (default: quick)"
    )
    parser.add_argument("--only", nargs="*", metavar="CHECK", help="make only these checks")
    common(parser, "seed")
    out(parser, "folder for the report; checks that are finished there are not made again", required=True)


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Verify, print one line a check, write the report."""
    from editors.edit import Edit
    from memloc.view import ModelView

    if arguments.passages is None or arguments.controls is None:
        raise InputError("verify needs --passages FILE (what was to be forgotten) and --controls FILE (text never "
                         "seen): no figure says anything without them")  # fmt: skip
    if arguments.out.exists() and not arguments.out.is_dir():
        raise InputError(f"{arguments.out} is a file; name a folder for the report; nothing was written")
    view = open_view(arguments)
    edit = ModelView.open(arguments.edit) if arguments.edit.is_dir() else Edit.load(arguments.edit)
    terminal.result(_verified(view, edit, arguments, terminal).to_json())


def after_edit(arguments: argparse.Namespace, view: ModelView, terminal: Terminal) -> Verification:
    """Verify the edit that `memloc edit` has just written, with that command's own data.

    Its controls, retained passages, facts and seed; `--memorized` and `--held-out` where they are given.
    """
    from editors.edit import Edit

    given = dict(vars(arguments))
    own = {"edit": given["out"], "out": given["out"].with_suffix(".verified"), "text": given["held_out"]}
    asked = argparse.Namespace(**{**given, **own, "effort": "quick", "only": None})
    return _verified(view, Edit.load(asked.edit), asked, terminal)


def _verified(view: ModelView, edit: Any, arguments: argparse.Namespace, terminal: Terminal) -> Verification:
    from editors.verification import Effort, Material, verify

    data = Material(
        targets=_need(arguments.passages, view, arguments),
        controls=_need(arguments.controls, view, arguments),
        retain=read_passages(arguments.retain, view, arguments),
        memorized=read_passages(arguments.memorized, view, arguments),
        facts=read_facts(arguments.facts, view),
        text=read_text(arguments.text, view),
    )
    how: dict[str, Any] = {"effort": Effort.named(arguments.effort), "seed": arguments.seed, "only": arguments.only}
    found = verify(view, edit, data, folder=arguments.out / "checks", **how)
    written = found.save(arguments.out, commands=(command_of(arguments),))
    show(found, terminal)
    terminal.note("\n".join(f"written: {path}" for path in written))
    return found


def show(found: Verification, terminal: Terminal) -> None:
    """One row a check and a group, then the sentence."""
    rows = [
        [entry.title, entry.verdict, entry.left.value, entry.p, _written(entry), entry.meaning]
        for entry in found.findings
    ]
    columns = ["check", "verdict", "memory left", "p", "written whole: targets / never seen / before", "meaning"]
    terminal.table("gone or hidden", columns, rows)
    harms: list[list[Any]] = [
        [entry.group, entry.verdict, entry.loss, entry.random, entry.magnitude, entry.n] for entry in found.damages
    ]
    columns = ["what should stay", "verdict", "lost", "by a random edit", "by the largest weights", "n"]
    if harms:
        terminal.table("what else broke", columns, harms)
    for title, why in found.untested.items():
        terminal.note(f"not tested: {title} ({why})")
    terminal.note(found.sentence)


def command_of(arguments: argparse.Namespace) -> str:
    """What was typed, for the report and for whoever repeats it."""
    words = ["memloc", "verify", str(arguments.model), str(arguments.edit)]
    for name in ("passages", "controls", "retain", "memorized", "facts", "text", "effort", "seed", "out"):
        value = getattr(arguments, name, None)
        if value is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def suggestion(arguments: argparse.Namespace) -> str:
    """The command that verifies the edit just made with `memloc edit`, from that command's own arguments."""
    given = vars(arguments)
    words = ["memloc", "verify", str(given["model"]), str(given["out"]), "--passages", str(given["passages"])]
    for name in ("retain", "facts", "text"):
        if given.get(name) is not None:
            words += [f"--{name}", str(given[name])]
    return shlex.join([*words, "--controls", "NEVER-SEEN", "--out", str(given["out"].with_suffix(".verified"))])


def _need(file: DataFile, view: Any, arguments: argparse.Namespace) -> Any:
    found = read_passages(file, view, arguments)
    if found is None:
        raise InputError(f"{file}: no record matches")
    return found


def _written(entry: Any) -> str | None:
    return None if entry.recited is None else " / ".join(map(str, entry.recited))
