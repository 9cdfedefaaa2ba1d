"""The tidy table: one row a cell and figure, beside its baseline, with the interval of the difference."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from memloc.errors import ArtifactError
from memloc.grids.cells import Cell, Line, Plan
from memloc.grids.choosing import shortened
from memloc.grids.work import check_figures, result
from memloc.measurement import Measurement
from memloc.report.comparison import Comparison
from memloc.store import atomic_file, write_text


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table; an empty field is one that does not apply.

    Attributes:
        model: the model's name.
        set: the [[ablate]] it belongs to; empty for the baseline.
        label: the set of components, or the one a random control matches.
        control: 0, or which random control.
        components: what is ablated, by name; the first few.
        grain: layer, component, head, neuron, position, direction or mixed.
        count: how many components.
        how: what is done.
        factor: of scale and noise.
        seed: of resample and noise.
        positions: at which tokens.
        measure: the measure.
        data: the data's name in the grid.
        figure: the figure.
        value: its value under the ablation.
        low: lower end of its 95 % interval.
        high: upper end.
        n: rows it stands on.
        unit: of the value.
        better: "lower" or "higher", for whoever wants a memory gone or kept.
        baseline: the value on the model as it is.
        change: "points" and "difference" are value less baseline, "relative" is value / baseline - 1, "factor" value
            / baseline.
        difference: the change.
        difference_low: lower end of its 95 % interval, rows paired.
        difference_high: upper end.
        interval: how that interval was made.
        cell: key of the cell whose result this is.
    """

    model: str
    set: str
    label: str
    control: int
    components: str
    grain: str
    count: int
    how: str
    factor: float | None
    seed: int | None
    positions: str
    measure: str
    data: str
    figure: str
    value: float
    low: float | None
    high: float | None
    n: int
    unit: str
    better: str
    baseline: float
    change: str
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    interval: str
    cell: str


COLUMNS = tuple(item.name for item in fields(Row))


def table_of(plan: Plan, folder: Path) -> list[Row]:
    """The table of a plan all of whose cells have results.

    Raises:
        ArtifactError: a result is missing.
        InputError: a figure that a measure does not give.
    """
    found = {key: _needed(folder, cell) for key, cell in plan.cells.items()}
    baselines = {(line.cell.model, id(line.cell.asked)): found[line.cell.key] for line in plan.lines if not line.sets}
    changes: dict[str, Mapping[str, Any]] = {}
    rows: list[Row] = []
    for line in plan.lines:
        measured, baseline = found[line.cell.key], baselines[line.cell.model, id(line.cell.asked)]
        if line.sets and line.cell.key not in changes:
            changes[line.cell.key] = _changes(measured, baseline)
        rows += _rows(line, measured, baseline, changes.get(line.cell.key, {}))
    return rows


def _needed(folder: Path, cell: Cell) -> Measurement:
    found = result(folder, cell)
    if found is None:
        raise ArtifactError(f"{folder / cell.key}.json: the cell has no result; run the command again")
    return found


def _rows(line: Line, measured: Measurement, baseline: Measurement, changes: Mapping[str, Any]) -> list[Row]:
    cell, ablation = line.cell, line.cell.ablation
    check_figures(cell, measured)
    wanted = cell.asked.figures or tuple(measured.figures)
    positions = "" if ablation is None else ablation.positions
    drawn = ablation is not None and ablation.how in ("resample", "noise")
    rows = []
    for name in wanted:
        figure, change = measured.figures[name], changes.get(name) or {}
        rows.append(
            Row(
                model=cell.model,
                set=line.sets,
                label=line.label,
                control=line.control,
                components="" if ablation is None else shortened(ablation.names),
                grain=line.grain,
                count=line.count,
                how="" if ablation is None else ablation.how,
                factor=None if ablation is None else ablation.strength,
                seed=ablation.seed if drawn and ablation is not None else None,
                positions=positions if isinstance(positions, str) else " ".join(map(str, positions)),
                measure=cell.asked.name,
                data=cell.asked.data,
                figure=name,
                value=figure.value,
                low=figure.low,
                high=figure.high,
                n=figure.n,
                unit=figure.unit,
                better=figure.better,
                baseline=baseline.figures[name].value,
                change=change.get("kind", ""),
                difference=_number(change.get("value")),
                difference_low=_number(change.get("low")),
                difference_high=_number(change.get("high")),
                interval=change.get("how", ""),
                cell=cell.key,
            )
        )
    return rows


def _changes(measured: Measurement, baseline: Measurement) -> dict[str, Any]:
    compared = Comparison(name=measured.measure, before=baseline, after=measured).to_json()
    return {entry["name"]: entry["change"] for entry in compared["figures"] if entry["change"] is not None}


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


# -- files ------------------------------------------------------------------------------------------------------------


def write_csv(path: str | Path, rows: Sequence[Row]) -> None:
    """Write the table as CSV, atomically; missing values are empty, infinite ones "inf"."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([["" if getattr(row, name) is None else getattr(row, name) for name in COLUMNS] for row in rows])
    write_text(path, text.getvalue())


def read_csv(path: str | Path) -> list[Row]:
    """Read what `write_csv` wrote.

    Raises:
        ArtifactError: missing, or another table.
    """
    try:
        with Path(path).open(encoding="utf8", newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ArtifactError(f"{path}: columns {reader.fieldnames}; expected {list(COLUMNS)}")
            return [Row(**{name: _cell(name, text) for name, text in record.items()}) for record in reader]
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as a table of ablations: {error}") from error


def write_parquet(path: str | Path, rows: Sequence[Row]) -> bool:
    """Write the table as Parquet, atomically, if pyarrow is installed; returns whether it is."""
    try:
        pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    except ImportError:
        return False
    kinds = {"int": pyarrow.int64(), "float": pyarrow.float64(), "str": pyarrow.string()}
    schema = pyarrow.schema([(item.name, kinds[str(item.type).split(" ")[0]]) for item in fields(Row)])
    columns = {name: [getattr(row, name) for row in rows] for name in COLUMNS}
    with atomic_file(path) as part:
        parquet.write_table(pyarrow.table(columns, schema=schema), part)
    return True


def _cell(name: str, text: str) -> Any:
    kind = str({item.name: item.type for item in fields(Row)}[name])
    if text == "" and "None" in kind:
        return None
    return int(text) if kind.startswith("int") else float(text) if kind.startswith("float") else text
