"""memloc sweep: any localizer with any editor at equal budgets, and what can be had for what."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from memloc import store
from memloc.command import filled_values, out
from memloc.errors import InputError
from memloc.terminal import Terminal


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.add_argument("plan", type=Path, help="TOML file: model, data, localizers, editors, budgets")
    out(parser, "folder for results, tables and pictures; what is there already is not run again")
    told = "what {NAME} stands for in the plan; may be given more than once"
    parser.add_argument("--with", dest="values", action="append", default=[], metavar="NAME=VALUE", help=told)
    parser.add_argument("--part", default="1/1", metavar="I/N", help="run only every Nth missing edit, from the Ith on")
    parser.add_argument("--cells", action="store_true", help="print the edits that would be made, and stop")
    parser.add_argument("--no-plots", dest="plots", action="store_false", help="write no pictures")


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Read the plan, run what is missing, write tables and pictures, print the areas."""
    from editors.trade_offs.plan import Plan

    plan = Plan.read(arguments.plan, **filled_values(arguments.values))
    cells = plan.cells()
    if arguments.cells:
        columns = ["localizer", "editor", "budget", "seed", "control"]
        rows = [[cell.where, cell.how, cell.budget, cell.seed, cell.control] for cell in cells]
        terminal.table(f"{len(cells)} edits", columns, rows)
        terminal.result({"cells": [vars(cell) for cell in cells]})
        return
    if arguments.out is None:
        raise InputError("--out FOLDER is needed, for results, tables and pictures (or --cells, to see the edits only)")
    from editors.trade_offs import work

    ground = work.Ground.of(plan)
    before, _ = ground.judge()
    if not sum(before.targets):
        raise InputError("no target is recited by the model as it is; name some that there is something to forget of")
    found = work.run(plan, ground, arguments.out / "cells", shard=_part(arguments.part))
    _tell(list(found.values()), before, len(cells), arguments, terminal)


def _part(text: str) -> tuple[int, int]:
    index, mark, count = text.partition("/")
    if not mark or not index.isdigit() or not count.isdigit() or not 1 <= int(index) <= int(count):
        raise InputError(f"--part {text}: expected I/N, I from 1 to N")
    return int(index) - 1, int(count)


def _tell(outcomes: list[Any], before: Any, wanted: int, arguments: argparse.Namespace, terminal: Terminal) -> None:
    from editors.trade_offs.pictures import pictures
    from editors.trade_offs.table import best_of, curves_of, rows_of, write_csv

    folder: Path = arguments.out
    rows, curves = rows_of(outcomes, before), curves_of(outcomes, before)
    write_csv(folder / "edits.csv", rows)
    best = [
        {"memorized": point.memorized, "utility": point.utility, **vars(entry.cell)}
        for point, entry in best_of(outcomes, before)
    ]
    told = {"areas": [curve.to_json() for curve in curves], "frontier": best, "edits": len(outcomes), "wanted": wanted}
    store.write_text(folder / "areas.json", json.dumps(told, indent=1, allow_nan=False) + "\n")
    for name, picture in pictures(outcomes, before) if arguments.plots else ():
        picture.save(folder / "plots" / name)
    columns = ["localizer", "editor", "area", "95 % interval", "random", "magnitude", "edits", "refused"]
    terminal.table("area under the frontier of memorization and utility; 1 is all forgotten at no cost", columns, [
        [curve.where, curve.how, curve.area, None if curve.low is None else f"{curve.low:.3g} to {curve.high:.3g}",
         curve.random, curve.magnitude, curve.edits, curve.refused[1] or None]
        for curve in curves
    ])  # fmt: skip
    columns = ["targets recited", "utility", "localizer", "editor", "budget", "seed"]
    terminal.table("edits that no other beats in both", columns, [
        [entry["memorized"], entry["utility"], entry["where"], entry["how"], entry["budget"], entry["seed"]]
        for entry in best
    ])  # fmt: skip
    if len(outcomes) < wanted:
        terminal.note(f"{wanted - len(outcomes)} of {wanted} edits are not made yet (--part {arguments.part})")
    terminal.note(f"tables and pictures: {folder}")
    terminal.result(told)
