"""memloc lab: train a small model here whose memories are known."""

from __future__ import annotations

import argparse
import json

from memloc.command import common, out
from memloc.terminal import Terminal


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    out(parser, "folder to make (absent, empty, or built before from the same recipe)", required=True)
    sizes = "demo: about a minute; large: about five, 420 facts, f = 1024; tiny: seconds"
    parser.add_argument("--size", choices=["demo", "large", "tiny"], default="demo", help=sizes)
    common(parser, "seed")


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Train the lab, or find it already there, and print its figures."""
    from memloc.lab.build import build as train
    from memloc.lab.recipe import preset

    folder = train(preset(arguments.size, seed=arguments.seed), arguments.out, log=terminal.note)
    figures = json.loads((folder / "lab.json").read_text(encoding="utf8"))
    last = figures["history"][-1]
    rows = [[key.replace("_", " "), value] for key, value in last.items() if key != "strict"]
    rows += [[f"recited, of those shown {dose} times", rate] for dose, rate in last["strict"].items()]
    terminal.table(f"lab model in {folder}", ["figure", "value"], rows)
    terminal.result({"folder": str(folder), "digest": figures["digest"], "figures": last})
