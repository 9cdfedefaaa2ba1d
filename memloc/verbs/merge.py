"""memloc merge: the localizations of shards as one."""

from __future__ import annotations

import argparse
from pathlib import Path

from memloc import store
from memloc.command import out
from memloc.terminal import Terminal
from memloc.verbs.printing import localization_json, print_localization


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.add_argument("parts", type=Path, nargs="+", metavar="PART", help="localizations of disjoint passages")
    out(parser, "localization.safetensors of all of them", required=True)
    parser.add_argument("--top", type=int, default=20, help="rows to print (default: 20)")


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Merge, save, print the best places."""
    from memloc.scores import Localization
    from memloc.shared_work import merged

    store.check_target(arguments.out)
    whole = merged([Localization.load(path) for path in arguments.parts])
    whole.save(arguments.out)
    print_localization(whole, terminal, arguments.top, None)
    terminal.result(localization_json(whole, arguments.top, None))
