"""memloc train-mend: the network that `memloc edit mend` needs, for one model."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from memloc.command import common, open_view, out, read_facts, read_text
from memloc.errors import InputError

if TYPE_CHECKING:
    from memloc.terminal import Terminal

DEFAULTS = {
    "kinds": "mlp.in,mlp.out", "last": 3, "rank": 64, "steps": 600, "lr": 1e-3, "alpha": 1e-3, "alpha_lr": 1e-4,
    "edit_weight": 1.0,
}  # fmt: skip


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    common(parser, "model", "facts", "text", "seed")
    for name, value in DEFAULTS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value, help=f"(default: {value})")
    out(parser, "mend.safetensors; one that is there, of the same inputs, is gone on from", required=True)


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Train, and say where the network is."""
    from editors.tuning.hypernet_training import Training
    from memloc.passages import Facts

    view = open_view(arguments)
    facts: Facts | None = read_facts(arguments.facts, view)
    if facts is None:
        raise InputError("--facts FILE is needed here")
    known = {field.name for field in fields(Training)}
    how = Training(**{name: getattr(arguments, name) for name in (*DEFAULTS, "seed") if name in known})
    made = how(view, facts, read_text(arguments.text, view), Path(arguments.out))
    rows: list[list[object]] = [
        ["facts", len(facts)],
        ["steps", made.step],
        ["maps", ", ".join(map(str, made.net.sizes))],
    ]
    terminal.table(f"network in {arguments.out}", ["what", "value"], rows)
    terminal.result({"file": str(arguments.out), "steps": made.step, "provenance": made.provenance.to_json()})
