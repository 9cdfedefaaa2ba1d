"""Forgetting ten of fifty planted passages in closed form, on trained labs: are they gone, and who else is?

    python scripts/claims/forget_passage_on_lab.py LAB [LAB ...] [--arms NAME,...] [--targets 10] [--seed 0]
        [--json FILE] [--set name=value]

Every lab folder is one that `memloc lab` wrote. Of the passages planted at the full dose the first ten are to be
forgotten, every other one of the rest is named as retained, and the others are named in no set: what befalls them is
the collateral. Text to keep and text to judge by are different windows of held-out text.

Arms:
    default      the editor as it comes
    random       its control: the same sites, ranks and norms, drawn at random
    unnamed-only no passage is named as retained
    no-replay    without the model's own samples
    rank-32, rank-8   each change cut to that rank
    mlp.out      only the MLPs' output maps
    last-layer   only the last layer
    fine-tune    sparse-fine-tune on a fifth of the weights, as it comes
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from editors.base import Request
from editors.control import random_like
from editors.edit import Edit
from editors.rewriters.forget_passage import ForgetPassage
from editors.rewriters.sparse_fine_tune import SparseFineTune
from memloc.localizers.weight_gradient import WeightGradient
from memloc.measures.extraction import Extraction
from memloc.measures.facts import FactRecall
from memloc.measures.perplexity import Perplexity
from memloc.passages import Facts, Passages, read_jsonl
from memloc.statistics import rate_interval
from memloc.view import ModelView

ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "random": {},
    "unnamed-only": {},
    "no-replay": {"replay": 0},
    "rank-32": {"rank": 32},
    "rank-8": {"rank": 8},
    "mlp.out": {"kinds": "mlp.out"},
    "last-layer": {"layers": "last"},
    "fine-tune": {},
}
COLUMNS = ("targets", "retained", "unnamed", "lower dose", "log p_z", "inside controls' range", "perplexity", "facts",
           "rank", "norm", "cpu s")  # fmt: skip


@dataclass(frozen=True)
class Lab:
    """One lab, divided."""

    view: ModelView
    groups: dict[str, Passages]
    controls: Passages
    text: Passages
    held: Passages
    facts: Facts

    @classmethod
    def open(cls, folder: Path, targets: int) -> Lab:
        """Read a lab's folder and divide what was planted."""
        view = ModelView.open(folder)
        passages = Passages.read(folder / "passages.jsonl")
        doses = sorted({item.tags["dose"] for item in passages}, reverse=True)
        full = passages.where(lambda item: item.tags["dose"] == doses[0])
        lower = passages.where(lambda item: item.tags["dose"] == doses[1])
        held = [row["text"] for _, row in read_jsonl(folder / "corpus.jsonl") if row["split"] == "held-out"]
        context = view.context or 64
        windows = Passages.from_texts(held, view.tokenizer, window=context).where(lambda row: len(row.ids) == context)
        rest = full[targets:]
        groups = {"targets": full[:targets], "retained": rest[0::2], "unnamed": rest[1::2], "lower": lower}
        controls, facts = Passages.read(folder / "controls.jsonl"), Facts.read(folder / "facts.jsonl", view.tokenizer)
        return cls(view, groups, controls, windows[0::2], windows[1::2], facts)

    def measure(self) -> dict[str, Any]:
        """All figures of the model as it is now."""
        found = {name: Extraction()(self.view, passages) for name, passages in self.groups.items()}
        never = sorted(row["log_pz"] for row in Extraction()(self.view, self.controls).rows)
        gone = sorted(row["log_pz"] for row in found["targets"].rows)
        return {
            "strict": {name: [sum(row["strict"] for row in each.rows), len(each.rows)] for name, each in found.items()},
            "log p_z": gone,
            "controls": [never[0], float(np.median(never)), never[-1]],
            "inside": sum(never[0] <= each <= never[-1] for each in gone),
            "perplexity": Perplexity()(self.view, self.held)["perplexity"],
            "facts": FactRecall()(self.view, self.facts)["true accuracy"],
        }  # fmt: skip


def edit_of(lab: Lab, arm: str, seed: int, settings: dict[str, Any]) -> Edit:
    """The arm's edit."""
    settings = {**ARMS[arm], **settings}
    if settings.get("layers") == "last":
        settings["layers"] = (lab.view.layers - 1,)
    retain = None if arm == "unnamed-only" else lab.groups["retained"]
    request = Request(forget=lab.groups["targets"], retain=retain, text=lab.text, seed=seed)
    if arm == "fine-tune":
        chosen = WeightGradient(grain="weight")(lab.view, lab.groups["targets"]).top(fraction=0.2)
        request = Request(forget=request.forget, retain=retain, text=request.text, selection=chosen, seed=seed)
        return SparseFineTune()(lab.view, request)
    return ForgetPassage(**settings)(lab.view, request)


def row(figures: dict[str, Any], before: dict[str, Any]) -> str:
    """One line of the table."""
    rates = [f"{hit}/{many}" for hit, many in figures["strict"].values()]
    gone = figures["log p_z"]
    cells = [
        *rates,
        f"{np.median(gone):.0f} ({gone[0]:.0f} to {gone[-1]:.0f})",
        f"{figures['inside']}/{len(gone)}",
        f"{100 * (figures['perplexity'] / before['perplexity'] - 1):+.2f} %",
        f"{figures['facts']:.3f}",
        *(str(figures.get(name, "")) for name in ("rank", "norm", "seconds")),
    ]
    return " | ".join(cells)


def main() -> int:
    """Run every arm on every lab and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="+", type=Path)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--targets", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    given = parser.parse_args()
    settings = {name: ast.literal_eval(value) for name, _, value in (entry.partition("=") for entry in given.set)}
    records, pooled = [], {}
    for folder in given.labs:
        lab = Lab.open(folder, given.targets)
        before, found = lab.measure(), {}
        low, middle, high = before["controls"]
        print(f"\n{folder.name}: controls' log p_z {middle:.0f} ({low:.0f} to {high:.0f})")
        print(
            f"| | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}\n| before | {row(before, before)} |",
            flush=True,
        )
        edit: Edit | None = None
        for arm in given.arms.split(","):
            start = time.process_time()
            made = random_like(edit, lab.view, given.seed) if arm == "random" and edit else edit_of(
                lab, arm, given.seed, settings)  # fmt: skip
            seconds = time.process_time() - start
            edit = made if arm == "default" else edit
            ranks = sorted({getattr(delta, "rank", 0) for delta in made.deltas.values()})
            with made.apply(lab.view):
                found[arm] = {**lab.measure(), "seconds": round(seconds), "rank": ranks[-1],
                              "norm": round(max(made.norms.values()), 2), "notes": dict(made.notes)}  # fmt: skip
            print(f"| {arm} | {row(found[arm], before)} |", flush=True)
            for name in ("targets", "retained", "unnamed"):
                hit, many = pooled.setdefault(arm, {}).get(name, (0, 0))
                more = found[arm]["strict"][name]
                pooled[arm][name] = (hit + more[0], many + more[1])
        records.append({"lab": folder.name, "before": before, "arms": found})
        if given.json:
            given.json.write_text(json.dumps(records, indent=1), encoding="utf8")
    print(f"\nRecited strictly, {len(records)} labs pooled, 95 % interval")
    for arm, groups in pooled.items():
        for name, (hit, many) in groups.items():
            low, high = rate_interval(hit, many)
            print(f"{arm}, {name}: {hit}/{many} = {hit / many:.3f} ({low:.3f} to {high:.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
