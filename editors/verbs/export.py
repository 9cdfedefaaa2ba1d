"""memloc export: an edit as a PEFT adapter or a whole checkpoint, for those who do not have memloc."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memloc.command import common, out
from memloc.errors import InputError
from memloc.terminal import Terminal

if TYPE_CHECKING:
    from editors.edit import Edit
    from editors.shipping.checkpoint import Written


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.add_argument("edit", type=Path, help="edit.safetensors")
    parser.add_argument("--as", dest="form", choices=["adapter", "checkpoint"], required=True, help="what to write")
    common(parser, "model")
    out(parser, "folder to make (absent or empty)", required=True)
    parser.add_argument("--base", help="adapter: what it calls its base, a hub name say (default: --model)")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=dtypes, help="adapter: dtype of the factors (default: float32, exact)")
    parser.add_argument("--rank", type=int, help="adapter: cut deltas without factors to this rank (default: refuse)")
    parser.add_argument("--link", action="store_true", help="checkpoint: hard-link untouched files instead of copying")
    parser.add_argument("--report", type=Path, metavar="FILE", help="report.json whose figures the model card shows")


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Write the folder, say what is in it and what it lost."""
    from editors.edit import Edit
    from editors.shipping.model_card import evidence

    others = {"adapter": ["link"], "checkpoint": ["base", "dtype", "rank"]}[arguments.form]
    given = [name for name in others if getattr(arguments, name) not in (None, False)]
    if given:
        raise InputError(f"--{given[0]} means nothing --as {arguments.form}")
    shown = evidence(arguments.report) if arguments.report else []
    edit = Edit.load(arguments.edit)
    if arguments.form == "adapter":
        _adapter(edit, shown, arguments, terminal)
    else:
        _checkpoint(edit, shown, arguments, terminal)


def _adapter(edit: Edit, shown: list[dict[str, Any]], arguments: argparse.Namespace, terminal: Terminal) -> None:
    from editors.shipping.export import export_adapter

    how = {"base": arguments.base or "", "dtype": arguments.dtype or "float32", "rank": arguments.rank}
    made = export_adapter(edit, arguments.model, arguments.out, evidence=shown, **how)
    rows = [[name, entry.rank, entry.norm, entry.cut, entry.rounded] for name, entry in made.modules.items()]
    terminal.table(
        f"{made.folder}: PEFT LoRA adapter, {made.dtype}, {made.bytes:,} bytes",
        ["module", "rank", "norm", "cut off by rank", "lost in rounding"],
        rows,
    )
    terminal.result(made.to_json())


def _checkpoint(edit: Edit, shown: list[dict[str, Any]], arguments: argparse.Namespace, terminal: Terminal) -> None:
    from editors.shipping.export import export_checkpoint

    print_written(
        export_checkpoint(edit, arguments.model, arguments.out, link=arguments.link, evidence=shown), terminal
    )


def print_written(written: Written, terminal: Terminal) -> None:
    """What became of every file of a checkpoint folder."""
    rows = [["folder", str(written.folder)]]
    rows += [[name, "changed at " + ", ".join(map(str, sites))] for name, sites in written.tensors.items()]
    rows += [[name, "copied"] for name in written.copied] + [[name, "linked"] for name in written.linked]
    rows += [[name, f"left out: {why}"] for name, why in written.dropped.items()]
    terminal.table("checkpoint written", ["what", "how"], rows)
    terminal.result(written.to_json())
