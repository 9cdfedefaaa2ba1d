"""The demo over several seeds: every verdict of its report, seed by seed, as one Markdown table.

    python scripts/claims/demo_over_seeds.py --out out/seeds --seeds 0 1 2 > table.md

Each seed is a lab, targets, facts, edits and controls of its own. A finished seed is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from editors.cli import main as memloc

MARK = {True: "holds", False: "**does not hold**", None: ""}


def verdicts(out: Path, seed: int, size: str) -> list[dict[str, Any]]:
    """The verdicts of one seed's report; runs the demo where there is none yet."""
    folder = out / f"seed-{seed}"
    if not (folder / "report.json").is_file():
        with (out / f"seed-{seed}.log").open("w") as log:
            sys.stdout, before = log, sys.stdout
            try:
                code = memloc(["demo", "--out", str(folder), "--seed", str(seed), "--size", size])
            finally:
                sys.stdout = before
        if code:
            raise SystemExit(f"seed {seed}: the demo ended with {code}")
    found: list[dict[str, Any]] = json.loads((folder / "report.json").read_text(encoding="utf8"))["verdicts"]
    return found


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", default="demo")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = {seed: verdicts(arguments.out, seed, arguments.size) for seed in arguments.seeds}
    print("| condition | " + " | ".join(f"seed {seed}" for seed in found) + " |")
    print("|---|" + "---|" * len(found))
    for rows in zip(*found.values(), strict=True):
        cells = [f"{MARK[row['holds']]}; {row['measured']}".strip("; ") for row in rows]
        print(f"| {rows[0]['text']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
