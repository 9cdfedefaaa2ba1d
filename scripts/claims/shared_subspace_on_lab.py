"""Do the lab's memories share weights? Chavhan et al. 2024 (arXiv:2406.18566) say so of images; here of text.

    python scripts/claims/shared_subspace_on_lab.py LAB [LAB ...] --rows FILE [--half 10] [--splits 3]

Of the passages at the full dose `--half` are drawn for each of two disjoint halves, `--splits` times. A pruner makes a
mask for either half, and for two sets of as many passages never trained on. Printed: the overlap (intersection over
union) of the halves' masks, what chance gives, what passages never trained on give; the share of passages recited in
the half whose mask is pruned, in the other half, and in both under the masks of passages never trained on. Rows already
in `--rows` are not done again.

The claim holds where the halves overlap more than either overlaps with passages never trained on, and the other half
falls nearly as far as the own half and further than under those.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

from editors.base import Request
from editors.demo.material import material
from editors.pruners.balanced_subnet import BalancedSubnet
from editors.pruners.durable import Durable
from editors.pruners.obs import Obs
from editors.pruners.subspace import Subspace
from editors.pruning.shared_subspace import shared_subspace
from memloc.measures.extraction import Extraction
from memloc.passages import Passages
from memloc.view import ModelView

PRUNERS: dict[str, Any] = {
    "subspace 0.05": Subspace(share=0.05),
    "subspace 0.1": Subspace(share=0.1),
    "durable-model 0.01": Durable(share=0.01, among="model"),
    "obs 0.01": Obs(share=0.01),
    "balanced-subnet 0.01": BalancedSubnet(share=0.01, epochs=130, mixing="both"),
}


def main() -> None:
    """Do what is missing, print every row and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="+", type=Path)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--half", type=int, default=10)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--pruners", default=",".join(PRUNERS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = given.rows.read_text(encoding="utf8").splitlines() if given.rows.exists() else []
    known = {row["key"]: row for row in map(json.loads, lines)}
    for lab in given.labs:
        view = ModelView.open(lab)
        data = material(lab, view, targets=0)
        for split in range(given.splits):
            for name in given.pruners.split(","):
                key = f"{lab.name} {name} half {given.half} split {split}"
                if key in known:
                    continue
                order = random.Random(split)
                memorized, never = list(data.named + data.unnamed), list(data.controls)
                order.shuffle(memorized)
                order.shuffle(never)
                halves = cut(memorized, given.half)
                request = Request(text=data.kept_text)
                found = shared_subspace(view, PRUNERS[name], request, halves, cut(never, given.half), recited)
                known[key] = row = {"key": key, "lab": lab.name, "pruner": name, **found.to_json()}
                with given.rows.open("a", encoding="utf8") as file:
                    file.write(json.dumps(row) + "\n")
                print(key, line(row), flush=True)
    for name in PRUNERS:
        rows = [row for row in known.values() if row["pruner"] == name]
        if rows:
            figures = [field for field in rows[0] if field not in ("key", "lab", "pruner", "transfer")]
            print(
                f"\n{name}, mean of {len(rows)}:\n  {line({f: sum(r[f] for r in rows) / len(rows) for f in figures})}"
            )
            print(f"  holds in {sum(map(holds, rows))} of {len(rows)}")


def cut(rows: list[Any], size: int) -> tuple[Passages, Passages]:
    """Two disjoint sets."""
    return Passages(tuple(rows[:size]), "first"), Passages(tuple(rows[size : 2 * size]), "second")


def recited(view: ModelView, passages: Passages) -> float:
    """Share of passages recited to the letter."""
    return float(Extraction()(view, passages)["strict rate"])


def holds(row: dict[str, Any]) -> bool:
    """Whether the claim holds in one row."""
    fell = row["before"] - row["own"]
    shared = row["halves"] > max(row["controls"], row["chance"])
    return shared and fell > 0 and row["before"] - row["other"] >= 0.7 * fell and row["other"] < row["under_controls"]


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    overlaps = (
        f"overlap {row['halves']:.3f} (chance {row['chance']:.3f}, with controls {row['controls']:.3f}, "
        f"of controls {row['between_controls']:.3f})"
    )
    recital = f"recited {row['before']:.2f} -> own {row['own']:.2f}, other {row['other']:.2f}"
    control = f"under controls' {row['under_controls']:.2f}"
    return f"{overlaps}; {recital}, {control}; {row['pruned']:.0f} / {row['pruned_controls']:.0f} weights"


if __name__ == "__main__":
    main()
