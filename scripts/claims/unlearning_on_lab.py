"""Unlearning five planted passages of trained labs: are they gone, and who else is?

    python scripts/claims/unlearning_on_lab.py LAB [LAB ...] [--arms NAME,...] [--seed 0] [--json FILE]

Every lab folder is one that `memloc lab` wrote. Of the passages planted at the full dose five are to be forgotten,
every other one of the rest is named as retained, and the others are named in no set: what befalls them is the
collateral.
Text to keep and text to judge by are different windows of held-out text. The mask is the top share of weights by the
gradient of the targets' loss; the random control has as many weights at every site, and as many steps.

Arms:
    full        a fifth of the weights, default settings
    no-replay   the same without the model's own samples
    text-only   the first, but no memorized passage is named as retained: only text and the model's own samples
    text-only-no-replay   and without these either
    sparse      a thousandth of the weights, few and large steps
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from editors.base import Request
from editors.rewriters.sparse_fine_tune import SparseFineTune
from memloc.localizers.weight_gradient import WeightGradient
from memloc.measures.extraction import Extraction
from memloc.measures.perplexity import Perplexity
from memloc.passages import Passages, read_jsonl
from memloc.statistics import rate_interval
from memloc.view import ModelView

TARGETS = 5
ARMS: dict[str, tuple[float, dict[str, Any]]] = {
    "full": (0.2, {}),
    "no-replay": (0.2, {"replay": 0}),
    "text-only": (0.2, {}),
    "text-only-no-replay": (0.2, {"replay": 0}),
    "sparse": (0.001, {"lr": 5e-3, "steps": 10}),
}
UNCONTROLLED = ("no-replay", "text-only", "text-only-no-replay")
"""Arms that ask about the keep term, not about the choice of weights: no random mask beside them."""

COLUMNS = (
    "targets",
    "retained",
    "unnamed",
    "lower dose",
    "log p_z",
    "controls' log p_z",
    "perplexity",
    "steps",
    "cpu s",
)


@dataclass(frozen=True)
class Lab:
    """One lab, divided."""

    view: ModelView
    targets: Passages
    retained: Passages
    unnamed: Passages
    lower: Passages
    controls: Passages
    text: Passages
    held: Passages

    @classmethod
    def open(cls, folder: Path) -> Lab:
        """Read a lab's folder and divide what was planted."""
        view = ModelView.open(folder)
        passages = Passages.read(folder / "passages.jsonl")
        doses = sorted({item.tags["dose"] for item in passages}, reverse=True)
        full = passages.where(lambda item: item.tags["dose"] == doses[0])
        lower = passages.where(lambda item: item.tags["dose"] == doses[1])
        held = [row["text"] for _, row in read_jsonl(folder / "corpus.jsonl") if row["split"] == "held-out"]
        context = view.context or 64
        windows = Passages.from_texts(held, view.tokenizer, window=context).where(lambda row: len(row.ids) == context)
        controls = Passages.read(folder / "controls.jsonl")
        rest = full[TARGETS:]
        return cls(view, full[:TARGETS], rest[0::2], rest[1::2], lower, controls, windows[0::2], windows[1::2])

    def measure(self) -> dict[str, Any]:
        """All figures of the model as it is now."""
        extraction = Extraction()
        groups = {"targets": self.targets, "retained": self.retained, "unnamed": self.unnamed, "lower": self.lower}
        found = {name: extraction(self.view, passages) for name, passages in groups.items()}
        strict = {name: sum(row["strict"] for row in entry.rows) for name, entry in found.items()}
        return {
            "strict": {name: (strict[name], len(groups[name])) for name in groups},
            "log p_z": sorted(row["log_pz"] for row in found["targets"].rows),
            "controls": sorted(row["log_pz"] for row in extraction(self.view, self.controls).rows),
            "perplexity": Perplexity()(self.view, self.held)["perplexity"],
        }


def run_arm(lab: Lab, arm: str, seed: int, *, control: bool) -> dict[str, Any]:
    """One edit, measured while it is applied."""
    fraction, settings = ARMS[arm]
    start = time.process_time()
    selection = WeightGradient(grain="weight")(lab.view, lab.targets).top(fraction=fraction)
    if control:
        selection = selection.random_like(seed + 1)
    retain = None if arm.startswith("text-only") else lab.retained
    request = Request(forget=lab.targets, retain=retain, text=lab.text, selection=selection, seed=seed)
    edit = SparseFineTune(**settings)(lab.view, request)
    seconds = time.process_time() - start
    with edit.apply(lab.view):
        return {**lab.measure(), "steps": edit.notes["steps"], "weights": edit.notes["weights"], "cpu": seconds}


def row(figures: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """One line of the table."""
    rates = [f"{figures['strict'][name][0]}/{figures['strict'][name][1]}" for name in figures["strict"]]
    gone, never = figures["log p_z"], figures["controls"]
    return [
        *rates,
        f"{np.median(gone):.0f} ({gone[0]:.0f} to {gone[-1]:.0f})",
        f"{np.median(never):.0f} ({never[0]:.0f} to {never[-1]:.0f})",
        f"{100 * (figures['perplexity'] / before['perplexity'] - 1):+.1f} %",
        str(figures.get("steps", "")),
        f"{figures['cpu']:.0f}" if "cpu" in figures else "",
    ]


def verdicts(found: dict[str, dict[str, Any]], before: dict[str, Any]) -> list[tuple[str, bool]]:
    """What was asked for, and whether it holds in this lab."""
    said: list[tuple[str, bool]] = []
    if "full" in found:
        full = found["full"]
        hits = {name: hit / many for name, (hit, many) in full["strict"].items()}
        inside = full["controls"][0] <= full["log p_z"][0] and full["log p_z"][-1] <= full["controls"][-1]
        said += [
            ("targets: strict 0 %", hits["targets"] == 0),
            ("targets' log p_z inside the controls' range", inside),
            ("retained at least 95 %", hits["retained"] >= 0.95),
            ("unnamed at least 90 %", hits["unnamed"] >= 0.9),
            ("perplexity at most +3 %", full["perplexity"] <= 1.03 * before["perplexity"]),
        ]
    if "sparse" in found:
        mine, random = found["sparse"]["strict"]["targets"], found["sparse random"]["strict"]["targets"]
        said.append(
            ("0.1 %: the selection recites none, random at least half", mine[0] == 0 and 2 * random[0] >= random[1])
        )
    return said


def main() -> int:
    """Run every arm on every lab and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="+", type=Path)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    records, pooled = [], {}
    for folder in given.labs:
        lab = Lab.open(folder)
        before = lab.measure()
        found: dict[str, dict[str, Any]] = {}
        print(f"\n{folder.name}\n| | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
        print(f"| before | {' | '.join(row(before, before))} |", flush=True)
        for arm in given.arms.split(","):
            for control in (False,) if arm in UNCONTROLLED else (False, True):
                name = f"{arm} random" if control else arm
                found[name] = run_arm(lab, arm, given.seed, control=control)
                print(f"| {name} | {' | '.join(row(found[name], before))} |", flush=True)
        for claim, held in verdicts(found, before):
            print(f"{'holds' if held else 'FAILS'}: {claim}")
        for name, figures in found.items():
            hit, many = pooled.get(name, (0, 0))
            pooled[name] = (hit + figures["strict"]["unnamed"][0], many + figures["strict"]["unnamed"][1])
        records.append({"lab": folder.name, "before": before, "arms": found})
    print(f"\nUnnamed passages still recited, {len(records)} labs pooled, 95 % interval")
    for name, (hit, many) in pooled.items():
        low, high = rate_interval(hit, many)
        print(f"{name}: {hit}/{many} = {hit / many:.3f} ({low:.3f} to {high:.3f})")
    if given.json:
        given.json.write_text(json.dumps(records, indent=1), encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
