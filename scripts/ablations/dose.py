"""How many neurons must go? The best neurons of a localization, more and more of them, beside as many random ones.

    memloc lab --size tiny --out out/lab
    python scripts/ablations/dose.py out/lab out/dose

The same as a grid for `memloc ablate` is dose.toml, which takes a localization that is there already:

    memloc ablate scripts/ablations/dose.toml --with lab=out/lab --with where=out/dose/where.safetensors --out out/dose
"""

from __future__ import annotations

import argparse
from pathlib import Path

from memloc.grids.grid import Grid
from memloc.grids.run import sweep
from memloc.grids.table import Row
from memloc.localizers.activation import Activation
from memloc.passages import Passages
from memloc.view import ModelView


def localized(lab: Path, out: Path) -> Path:
    """Where the most recited passages are kept, as a file."""
    view = ModelView.open(lab)
    passages = Passages.read(lab / "passages.jsonl", view.tokenizer)
    most = max(item.tags["dose"] for item in passages)
    path = out / "where.safetensors"
    Activation()(view, passages.where(lambda item: item.tags["dose"] == most)).save(path)
    return path


def strongest(rows: list[Row]) -> str:
    """One line: the largest loss, and what the random twins of the same set lose."""
    mine = [row for row in rows if row.figure == "exact memorization" and row.set and not row.control]
    worst = min(mine, key=lambda row: row.difference or 0.0)
    twins = [row for row in rows if row.figure == worst.figure and row.label == worst.label and row.how == worst.how]
    random = [row.value for row in twins if row.control]
    beside = ", ".join(f"{value:.2f}" for value in random)
    return (
        f"{worst.label}, {worst.how}: {worst.value:.2f} of the suffix (untouched {worst.baseline:.2f}; random {beside})"
    )


def main() -> None:
    """Localize, sweep, say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    where = localized(arguments.lab, arguments.out)
    values = {"lab": str(arguments.lab.absolute()), "where": str(where.absolute())}
    grid = Grid.read(Path(__file__).with_name("dose.toml"), **values)
    print(strongest(sweep(grid, arguments.out, jobs=arguments.jobs)))


if __name__ == "__main__":
    main()
