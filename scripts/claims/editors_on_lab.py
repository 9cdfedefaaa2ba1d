"""Every editor that forgets, at equal budgets, on trained labs: who wins, and what does chance reach?

    python scripts/claims/editors_on_lab.py LAB [LAB ...] --out FOLDER [--targets 10] [--only NAME,...]

Every lab folder is one that `memloc lab` wrote, cut as the demo cuts it (editors/demo/material.py) with ten targets.
Editors that take a selection are given the best weights (weight-gradient) or neurons (grad-activation) holding so much
of the model's weights, and as many at random; editors that choose for themselves run alone, at shares of their own.
Every edit is one file under FOLDER, so that a run can be taken up again; the table of all labs is written at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from editors.demo.material import material
from editors.methods import EDITORS
from editors.trade_offs.fronts import Judged
from editors.trade_offs.plan import How, Plan, Where
from editors.trade_offs.table import curves_of, rows_of, write_csv
from editors.trade_offs.work import Ground, Outcome, run
from memloc.localizers.grad_activation import GradActivation
from memloc.localizers.weight_gradient import WeightGradient
from memloc.view import ModelView

SHARES = (0.01, 0.16)
"""Of all parameters of the model; the second is the demo's fifth of the blocks' weights."""
TUNERS = ("sparse-fine-tune", "gradient-difference", "npo", "simnpo", "gradient-ascent")
ALONE: dict[str, list[dict[str, Any]]] = {
    "forget-passage": [{}],
    "rmu": [{}],
    "ultraedit": [{}],
    "durable": [{"share": share} for share in (0.01, 0.05)],
    "obs": [{"share": share, "gradients": 64} for share in (0.01, 0.05)],
    "subspace": [{"share": share} for share in (0.01, 0.05)]
    + [{"mode": "directions", "rank": rank} for rank in (2, 8)],
    "subnet": [{"share": 0.05}],
    "balanced-subnet": [{"share": 0.05}],
    "greedy": [{"share": 0.01}],
    "magnitude": [{"share": share} for share in (0.05, 0.2)],
    "random": [{"share": share} for share in (0.05, 0.2)],
    "curvature": [{"keep": keep} for keep in (0.6, 0.9)] + [{"keep": 0.9, "aim": "forget"}],
    "svd": [{"energy": 0.9}],
    "layernorm-removal": [{}],
}


def plans(lab: Path, seed: int, only: set[str]) -> Iterator[Plan]:
    """The tuners on weights, dropout on neurons, and those that choose for themselves."""
    snapshots = sorted(path for path in (lab / "snapshots").glob("step-*"))
    rewinds = [{"earlier": str(snapshots[-1])}] if snapshots else []
    shared: dict[str, Any] = {"model": str(lab), "files": {}, "seeds": (seed,), "magnitude": True}
    weights, neurons = Where("weights", WeightGradient(grain="weight", scale="raw")), Where("neurons", GradActivation())
    tuners = tuple(How(name, name, EDITORS[name]()) for name in TUNERS if not only or name in only)
    if tuners:
        yield Plan(where=(weights,), how=tuners, budgets=SHARES, **{**shared, "magnitude": False})
    if not only or "neuron-dropout" in only:
        dropout = How("neuron-dropout", "neuron-dropout", EDITORS["neuron-dropout"]())
        yield Plan(where=(neurons,), how=(dropout,), budgets=(0.002, 0.01, 0.04), **shared)
    chosen = {**ALONE, "layer-rewind": rewinds}
    alone = [
        How(" ".join([name, *(f"{key}={value}" for key, value in given.items() if key != "earlier")]), name,
            EDITORS[name](**given), alone=True)
        for name, settings in chosen.items() if not only or name in only
        for given in settings
    ]  # fmt: skip
    if alone:
        yield Plan(where=(), how=tuple(alone), budgets=(), **shared)


def ground_of(lab: Path, targets: int, seed: int) -> Ground:
    """The lab as the demo cuts it."""
    view = ModelView.open(lab)
    data = material(lab, view, targets=targets, seed=seed)
    return Ground(
        view, data.targets, {"retain": data.named, "unnamed": data.unnamed},
        {"retain": data.named, "text": data.kept_text}, data.held_out, data.facts, data.controls,
    )  # fmt: skip


def told(lab: Path, outcomes: list[Outcome], before: Judged) -> list[list[str]]:
    """Lines of a table: every edit, its control beside it."""
    rows = rows_of(outcomes, before)
    found = []
    for row in sorted(rows, key=lambda row: (row.get("memorized", 2.0) > 0.0, -row.get("utility", -1.0))):
        if "refused" in row:
            found.append([lab.name, row["editor"], row["control"], f"refused: {row['refused'][:60]}"])
            continue
        kept = [f"{100 * row[f'kept {name}']:.0f}" for name in ("retain", "unnamed", "facts")]
        budget = "" if row.get("budget") is None else f"{100 * row['budget']:g} %"
        found.append([
            lab.name, row["editor"], row["control"], budget, f"{100 * row['memorized']:.0f}", *kept,
            f"{100 * (row['perplexity'] / (before.perplexity or 1.0) - 1):+.1f}", f"{row['utility']:.3f}",
        ])  # fmt: skip
    return found


def main() -> int:
    """Run what is missing, print and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("labs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    only = {name for name in arguments.only.split(",") if name}
    lines = []
    for lab in arguments.labs:
        ground = ground_of(lab, arguments.targets, arguments.seed)
        before, _ = ground.judge()
        outcomes: list[Outcome] = []
        for plan in plans(lab, arguments.seed, only):
            outcomes += run(plan, ground, arguments.out / "cells").values()
        write_csv(arguments.out / f"{lab.name}.csv", rows_of(outcomes, before))
        areas = [curve.to_json() for curve in curves_of(outcomes, before)]
        (arguments.out / f"{lab.name}.areas.json").write_text(json.dumps(areas, indent=1) + "\n")
        lines += told(lab, outcomes, before)
    columns = [
        "lab",
        "editor",
        "selection",
        "budget",
        "targets %",
        "retain %",
        "unnamed %",
        "facts %",
        "ppl %",
        "utility",
    ]
    sys.stdout.write("\n".join("| " + " | ".join(line) + " |" for line in [columns, *lines]) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
