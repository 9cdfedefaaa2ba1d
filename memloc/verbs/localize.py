"""memloc localize: where it is kept."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from memloc.command import common, need_passages, open_view, out, read_facts, read_passages
from memloc.terminal import Terminal
from memloc.verbs.printing import localization_json, print_localization

if TYPE_CHECKING:
    from memloc.scores import Localization


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    common(parser, "model", "passages", "controls", "contrast", "facts", "prefix", "suffix", "seed")
    out(parser, "localization.safetensors (with --controls, theirs beside it: NAME.controls.safetensors)")
    parser.add_argument("--top", type=int, default=20, help="rows to print (default: 20)")


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Localize, print the best places, save."""
    view = open_view(arguments)
    facts = read_facts(arguments.facts, view)
    passages = facts.as_passages("true") if facts else need_passages(arguments.passages, view, arguments)
    contrast = read_passages(arguments.contrast, view, arguments)
    controls = read_passages(arguments.controls, view, arguments)
    found: Localization = arguments.method(view, passages, contrast=contrast)
    beside = None if controls is None else arguments.method(view, controls, contrast=contrast)
    if arguments.out is not None:
        found.save(arguments.out)
        if beside is not None:
            beside.save(arguments.out.with_suffix(f".controls{arguments.out.suffix}"))
    print_localization(found, terminal, arguments.top, beside)
    terminal.result(localization_json(found, arguments.top, beside))
