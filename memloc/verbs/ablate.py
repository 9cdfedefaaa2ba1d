"""memloc ablate: what happens without it, over a grid."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memloc.command import filled_values, out
from memloc.terminal import Terminal

if TYPE_CHECKING:
    from memloc.grids.cells import Plan
    from memloc.grids.table import Row


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.add_argument("grid", type=Path, help="TOML file: models, data, measures, what is ablated and how")
    out(parser, "folder for results, table and pictures; what is there already is not run again", required=True)
    told = "what {NAME} stands for in the grid; may be given more than once"
    parser.add_argument("--with", dest="values", action="append", default=[], metavar="NAME=VALUE", help=told)
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with its own model (default: 1)")
    parser.add_argument("--plan", action="store_true", help="print what a run takes, and stop")
    parser.add_argument("--no-plots", dest="plots", action="store_false", help="write no pictures")
    parser.add_argument("--top", type=int, default=20, help="rows to print (default: 20)")


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Read the grid, say what it takes, run it, print the largest changes."""
    from memloc.grids.cells import Plan
    from memloc.grids.grid import Grid
    from memloc.grids.run import missing, sweep

    grid = Grid.read(arguments.grid, **filled_values(arguments.values))
    plan = Plan.of(grid)
    left = missing(plan, arguments.out)
    told = told_plan(plan, left, arguments.jobs)
    for line in told:
        terminal.note(line)
    if arguments.plan:
        terminal.result({"plan": told, "cells": len(plan.cells), "missing": len(left)})
        return
    rows = sweep(plan, arguments.out, jobs=arguments.jobs, plots=arguments.plots)
    _print(rows, arguments.top, terminal)
    terminal.note(f"table and pictures: {arguments.out}")
    terminal.result({"cells": len(plan.cells), "rows": [vars(row) for row in rows]})


def told_plan(plan: Plan, missing: Sequence[str], jobs: int) -> list[str]:
    """What a run takes, line by line: cells, block-tokens, memory, and what was decided on the way."""
    tokens = sum(plan.costs[key].forward for key in missing)
    memory = max((cost.bytes for cost in plan.costs.values()), default=0)
    cells = len(plan.cells)
    reading = sum(cost.forward for cost in plan.reading.values())
    beside = f" ({reading:,} more for the reference text, in each process)" if reading and missing else ""
    lines = [
        f"{cells} cells ({cells - len(missing)} of them there already), {len(plan.lines)} lines of the table",
        f"{tokens:,} block-tokens forward for the {len(missing)} cells missing{beside}",
        f"working memory up to {memory / 2**20:.0f} MB, and the model, in each of {jobs} process{'es' * (jobs > 1)}",
    ]
    return lines + [f"note: {note}" for note in plan.notes]


def _print(rows: Sequence[Row], top: int, terminal: Terminal) -> None:
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if row.set:
            groups.setdefault((row.model, row.set, row.measure, row.data), []).append(row)
    columns = ["set", "how", "factor", "seed", "value", "untouched", "change", "95 % interval", "random twins", "n"]
    for (model, name, measure, data), group in groups.items():
        shown = [row for row in group if row.figure == group[0].figure]
        own = sorted((row for row in shown if not row.control), key=lambda row: -abs(row.difference or 0.0))
        title = f"{name}: {group[0].figure} ({measure} of {data}, {model}), change in {group[0].change}"
        title += f": {top} of {len(own)}" if top < len(own) else ""
        terminal.table(title, columns, [_line(row, shown) for row in own[:top]])


def _line(row: Row, group: Sequence[Row]) -> list[Any]:
    scale = 100.0 if row.change in ("points", "relative") else 1.0
    change = None if row.difference is None else scale * row.difference
    ends = None
    if row.difference_low is not None and row.difference_high is not None:
        ends = f"{scale * row.difference_low:.3g} to {scale * row.difference_high:.3g}"
    alike = (row.label, row.how, row.factor, row.seed)
    beside = [
        scale * twin.difference
        for twin in group
        if twin.control and twin.difference is not None and (twin.label, twin.how, twin.factor, twin.seed) == alike
    ]
    least, most = (f"{min(beside):.3g}", f"{max(beside):.3g}") if beside else (None, None)
    random = least if least == most else f"{least} to {most}"
    return [row.label, row.how, row.factor, row.seed, row.value, row.baseline, change, ends, random, row.n]
