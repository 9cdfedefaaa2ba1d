"""memloc merge: the localizations of shards, or second moments, as one."""

from __future__ import annotations

import argparse
from pathlib import Path

from memloc import store
from memloc.command import out
from memloc.terminal import Terminal
from memloc.verbs.moments import print_moments
from memloc.verbs.printing import localization_json, print_localization


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.add_argument(
        "parts",
        type=Path,
        nargs="+",
        metavar="PART",
        help="localizations of disjoint passages, or second moments of disjoint texts",
    )
    out(parser, "one file of all of them", required=True)
    parser.add_argument("--top", type=int, default=20, help="rows to print (default: 20)")


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Merge, save, print the best places."""
    from memloc.scores import Localization
    from memloc.shared_work import merged

    store.check_target(arguments.out)
    if store.header_of(arguments.parts[0])["kind"] == "moments":
        _moments(arguments, terminal)
        return
    whole = merged([Localization.load(path) for path in arguments.parts])
    whole.save(arguments.out)
    print_localization(whole, terminal, arguments.top, None)
    terminal.result(localization_json(whole, arguments.top, None))


def _moments(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Add up second moments; not shrunk, where they hold no halves to choose a share by."""
    from memloc.moment_judgement import shrinkages
    from memloc.moments import Moments

    first, *rest = (Moments.load(path) for path in arguments.parts)
    whole = first
    for part in rest:
        whole = whole.merge(part)
    if whole.split is not None:
        whole = whole.shrunk(shrinkages(whole))
    whole.save(arguments.out)
    print_moments(whole, arguments.out, terminal)
