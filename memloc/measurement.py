"""What a measure returns: figures with their n and interval, rows per item, and the same for the controls."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memloc.errors import ArtifactError
from memloc.lazy import method
from memloc.provenance import Provenance
from memloc.store import write_text

SCHEMA = "memloc.measurement/1"


@dataclass(frozen=True)
class Figure:
    """One number of a measurement.

    Attributes:
        name: such as "strict rate".
        value: the number; rates are shares in [0, 1].
        n: rows it stands on.
        low: lower end of its 95 % interval, or None where none is defined.
        high: upper end.
        unit: "share", "nats", "nats/token", "perplexity", "queries", ... .
        better: "lower" or "higher" for whoever wants a memory gone or kept; "" where neither.
    """

    name: str
    value: float
    n: int
    low: float | None = None
    high: float | None = None
    unit: str = "share"
    better: str = ""


@dataclass(frozen=True)
class Measurement:
    """Figures and rows of one measure on one model, with its control beside it.

    Attributes:
        measure: the measure's name in its table.
        figures: the aggregates, by name.
        rows: one mapping per item; each has "id".
        provenance: model, data and settings.
        control: the same measure on the controls, or None where none were given.
    """

    measure: str
    figures: Mapping[str, Figure]
    rows: tuple[Mapping[str, Any], ...]
    provenance: Provenance
    control: Measurement | None = None

    __repr__ = method("memloc.notebook:plain")
    _repr_html_ = method("memloc.notebook:html")

    def __getitem__(self, figure: str) -> float:
        return self.figures[figure].value

    def with_control(self, control: Measurement | None) -> Measurement:
        """This measurement with `control` beside it."""
        return replace(self, control=control)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; infinite and missing numbers become strings ("inf", "-inf", "nan")."""
        figures = {
            name: {key: _number(entry) for key, entry in vars(figure).items() if key != "name"}
            for name, figure in self.figures.items()
        }
        return {
            "schema": SCHEMA,
            "measure": self.measure,
            "figures": figures,
            "rows": [{key: _number(entry) for key, entry in row.items()} for row in self.rows],
            "provenance": self.provenance.to_json(),
            "control": None if self.control is None else self.control.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Measurement:
        """Back from `to_json`.

        Raises:
            ArtifactError: not a measurement, or of another schema.
        """
        try:
            if value["schema"] != SCHEMA:
                raise ArtifactError(f"expected schema {SCHEMA}, found {value['schema']}")
            figures = {
                name: Figure(name, **{key: _back(entry, key) for key, entry in figure.items()})
                for name, figure in value["figures"].items()
            }
            control = None if value["control"] is None else cls.from_json(value["control"])
            rows = tuple({key: _back(entry, key) for key, entry in row.items()} for row in value["rows"])
            return cls(value["measure"], figures, rows, Provenance.from_json(value["provenance"]), control)
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"not a measurement: {error} is missing or of another kind") from error

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        write_text(path, json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Measurement:
        """Read what `save` wrote.

        Raises:
            ArtifactError: missing, not JSON, or not a measurement.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf8")))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read as a measurement: {error}") from error
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from error


def _number(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list | tuple):
        return [_number(entry) for entry in value]
    return value


def _back(value: Any, key: str) -> Any:
    if value in ("inf", "-inf", "nan") and key != "id" and isinstance(value, str):
        return float(value)
    return value
