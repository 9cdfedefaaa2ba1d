"""The whole sweep in one call: plan, cells, table, pictures. What `memloc ablate` does, for Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memloc.grids.cells import Plan, folder_of
from memloc.grids.grid import Grid
from memloc.grids.plots import draw
from memloc.grids.table import Row, table_of, write_csv, write_parquet
from memloc.grids.work import result, run_cells
from memloc.progress import steps


def sweep(grid: Grid | Plan, out: str | Path, *, jobs: int = 1, plots: bool = True) -> list[Row]:
    """Run a grid and write its table and pictures under `out`; results that are there already are not computed again.

    Args:
        grid: the grid, or the plan made of it.
        out: a folder: `cells/` (one measurement a cell), `table.csv`, `table.parquet` where pyarrow is installed,
            `plots/` (PNG and SVG).
        jobs: processes. A script that asks for more than one needs `if __name__ == "__main__":`.
        plots: whether to draw.

    Returns:
        The table.

    Raises:
        InputError, MismatchError, ModelError, TargetError: as `Plan.of` and `run_cells`.
    """
    plan = grid if isinstance(grid, Plan) else Plan.of(grid)
    folder = folder_of(out)
    run_cells(plan, folder, jobs=jobs)
    rows = table_of(plan, folder)
    write_csv(Path(out) / "table.csv", rows)
    write_parquet(Path(out) / "table.parquet", rows)
    if plots:
        for name, picture in steps(list(draw(rows)), "pictures"):
            picture.save(Path(out) / "plots" / name)
    return rows


def missing(plan: Plan, out: str | Path) -> Sequence[str]:
    """Keys of the cells that have no result under `out` yet."""
    return [key for key, cell in plan.cells.items() if result(folder_of(out), cell) is None]
