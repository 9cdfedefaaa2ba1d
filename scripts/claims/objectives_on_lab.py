"""Unlearning ten planted passages of trained labs by every objective: who forgets, and who else pays?

    python scripts/claims/objectives_on_lab.py LAB [LAB ...] [--arms NAME,...] --json FILE

Every lab folder is one that `memloc lab` wrote, cut as the demo cuts it (editors/demo/material.py) but with ten
targets. The mask is the top fifth of the blocks' weights by the gradient of the targets' loss; "random" arms have as
many weights at every site, drawn at random, and "whole" arms no selection. Every arm is a row of FILE, written when it
is done; arms that are there already are not run again. Settings were chosen on the lab of seed 0.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from editors.base import Request
from editors.demo.material import SHARE, Material, material
from editors.methods import EDITORS
from memloc.localizers.weight_gradient import WeightGradient
from memloc.measures.extraction import Extraction
from memloc.measures.facts import FactRecall
from memloc.measures.perplexity import Perplexity
from memloc.view import ModelView

TARGETS = 10
ARMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sparse-fine-tune": ("sparse-fine-tune", "top", {}),
    "gradient-difference": ("gradient-difference", "top", {}),
    "npo": ("npo", "top", {}),
    "simnpo": ("simnpo", "top", {}),
    "rmu": ("rmu", "whole", {}),
    "gradient-ascent": ("gradient-ascent", "top", {}),
    "gradient-ascent all steps": ("gradient-ascent", "top", {"stop": "steps"}),
    "gradient-difference all steps": ("gradient-difference", "top", {"stop": "steps"}),
    "gradient-difference no replay": ("gradient-difference", "top", {"replay": 0}),
    "gradient-difference whole": ("gradient-difference", "whole", {}),
    "gradient-difference random": ("gradient-difference", "random", {}),
    "npo random": ("npo", "random", {}),
    "simnpo random": ("simnpo", "random", {}),
    "npo published form": ("npo", "top", {"beta": 0.1, "per_token": False}),
    "simnpo published form": ("simnpo", "top", {"delta": 0.0}),
}
COLUMNS = ("targets", "named", "unnamed", "facts", "held-out", "log p per token", "controls", "over", "steps", "s")


def measure(view: ModelView, data: Material) -> dict[str, Any]:
    """All figures of the model as it is now."""
    recite = Extraction()
    sets = {"targets": data.targets, "named": data.named, "unnamed": data.unnamed, "controls": data.controls}
    found = {name: recite(view, rows).rows for name, rows in sets.items()}
    strict = {name: [sum(row["strict"] for row in rows), len(rows)] for name, rows in found.items()}
    levels = {name: sorted(row["log_pz"] / row["tokens"] for row in found[name]) for name in ("targets", "controls")}
    return {
        "strict": strict,
        "levels": levels,
        "perplexity": Perplexity()(view, data.held_out)["perplexity"],
        "facts": FactRecall()(view, data.facts)["true accuracy"],
    }


def run_arm(view: ModelView, data: Material, arm: str) -> dict[str, Any]:
    """One edit, measured while it is applied."""
    name, where, settings = ARMS[arm]
    start = time.perf_counter()
    chosen = None
    if where != "whole":
        chosen = WeightGradient(grain="weight")(view, data.targets).top(fraction=SHARE)
        chosen = chosen.random_like(1) if where == "random" else chosen
    request = Request(forget=data.targets, retain=data.named, text=data.kept_text, selection=chosen)
    edit = EDITORS[name](**settings)(view, request)
    seconds = time.perf_counter() - start
    kept = {key: edit.notes[key] for key in ("steps", "history", "weights", "over-forgotten") if key in edit.notes}
    with edit.apply(view):
        return {**measure(view, data), "settings": settings, "seconds": seconds, "notes": kept}


def line(arm: str, row: dict[str, Any], before: dict[str, Any]) -> str:
    """One line of the table."""
    rates = [f"{hit}/{many}" for hit, many in (row["strict"][name] for name in ("targets", "named", "unnamed"))]
    mine, never = row["levels"]["targets"], row["levels"]["controls"]
    notes = row.get("notes", {})
    cells = [
        *rates,
        f"{row['facts']:.2f}",
        f"{100 * (row['perplexity'] / before['perplexity'] - 1):+.1f} %",
        f"{mine[0]:.1f} to {mine[-1]:.1f}",
        f"{never[0]:.1f} to {never[-1]:.1f}",
        str(notes.get("over-forgotten", "")),
        str(notes.get("steps", "")),
        f"{row['seconds']:.0f}" if "seconds" in row else "",
    ]
    return f"| {arm} | {' | '.join(cells)} |"


def main() -> int:
    """Run what is missing, and print everything that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="+", type=Path)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    rows: dict[str, dict[str, Any]] = json.loads(given.json.read_text("utf8")) if given.json.exists() else {}
    for folder in given.labs:
        view = ModelView.open(folder)
        data = material(folder, view, targets=TARGETS, facts=120)
        found = rows.setdefault(folder.name, {})
        print(f"\n{folder.name}\n| | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
        for arm in ("before", *given.arms.split(",")):
            if arm not in found:
                found[arm] = measure(view, data) if arm == "before" else run_arm(view, data, arm)
                given.json.write_text(json.dumps(rows), encoding="utf8")
            print(line(arm, found[arm], found["before"]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
