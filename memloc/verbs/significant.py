"""memloc significant: which places count, at a false discovery rate, against the controls' scores."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from memloc import store
from memloc.command import out
from memloc.errors import InputError
from memloc.terminal import Terminal


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.add_argument("file", type=Path, help="a localization with scores per passage")
    parser.add_argument(
        "--controls", type=Path, metavar="FILE", help="the controls' (default: NAME.controls.safetensors)"
    )
    parser.add_argument("--passage", help="ask about this passage alone (default: all as one set)")
    parser.add_argument("--fdr", type=float, default=0.05, help="false discovery rate (default: 0.05)")
    parser.add_argument("--permutations", type=int, default=2000, help="of the labels, for a set (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the permutations (default: 0)")
    parser.add_argument("--top", type=int, default=20, help="rows to print (default: 20)")
    out(parser, "selection.safetensors of the places called")


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Test every place, print the best of those called, save the selection."""
    from memloc.results.significance import passage_significance, set_significance
    from memloc.scores import Localization

    if not 0 < arguments.fdr < 1 or arguments.permutations < 1:
        raise InputError(
            f"--fdr {arguments.fdr}, --permutations {arguments.permutations}: above 0 each, a rate below 1"
        )
    beside = arguments.controls or arguments.file.with_suffix(f".controls{arguments.file.suffix}")
    if not beside.is_file():
        raise InputError(f"{beside}: no such file; localize with --controls, or name the controls' scores here")
    if arguments.out is not None:
        store.check_target(arguments.out)
    found, controls = Localization.load(arguments.file), Localization.load(beside)
    if arguments.passage is None:
        tested = set_significance(found, controls, permutations=arguments.permutations, seed=arguments.seed)
    else:
        tested = passage_significance(found, controls, arguments.passage)
    called = tested.called(arguments.fdr)
    if arguments.out is not None:
        called.save(arguments.out)
    mean = tested.localization.mean().scores
    rows: list[list[Any]] = [
        [str(site), index, float(mean[site].reshape(-1)[index]), float(tested.p[site].reshape(-1)[index]),
         float(tested.q[site].reshape(-1)[index])]
        for site, entries in called.indices().items() for index in entries
    ]  # fmt: skip
    rows.sort(key=lambda row: (row[3], -row[2]))
    columns = ["place", "index", "score", "p", "q"]
    title = f"{called.count} of {found.count} {found.grain} scores count at a false discovery rate of {arguments.fdr:g}"
    terminal.table(title, columns, rows[: arguments.top])
    terminal.note(f"{tested.passages} passages against {tested.controls} controls; null: {tested.test}")
    terminal.result({
        "called": called.count, "places": found.count, "fdr": arguments.fdr, "passages": tested.passages,
        "controls": tested.controls, "test": tested.test,
        "top": [dict(zip(columns, row, strict=True)) for row in rows[: arguments.top]],
    })  # fmt: skip
