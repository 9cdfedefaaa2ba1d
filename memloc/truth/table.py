"""The table method × world, made of trials: means with intervals, what a method took, and why it is not in the table.

It comes as rows, CSV, Markdown and JSON.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from memloc.statistics import bootstrap_interval, rate_interval
from memloc.store import write_text
from memloc.truth.trials import Made, Trial, Trials

TOOK = ("CPU s", "forward", "backward")
"""What a trial took: seconds, block-tokens forward, block-tokens backward; means per known answer."""

ENDS = tuple(
    f"{name}@{share}%" for share in ("0.5", "5")
    for name in ("self accuracy lost", "other accuracy lost", "self distance", "other distance", "text perplexity")
)  # fmt: skip
"""What is shown of a curve over shares; the whole of it stands in the CSV and the JSON."""


@dataclass(frozen=True)
class Mean:
    """A mean over known answers, with its 95 % interval.

    Attributes:
        value: the mean.
        low: lower end; models and seeds are resampled, then known answers within each.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if not np.isfinite([self.low, self.high]).all():
            return f"{self.value:.3g}"
        digits = 2 if max(abs(self.low), abs(self.high)) >= 0.2 else 3
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True)
class Row:
    """One method on one world.

    Attributes:
        world: its name.
        method: its name.
        n: known answers it was judged on.
        figures: name to mean; what it took is among them, see `TOOK`.
        failed: why it was not judged on the others, or on any; "" where it was on all.
        failures: how many it failed on.
    """

    world: str
    method: str
    n: int
    figures: Mapping[str, Mean] = field(default_factory=dict)
    failed: str = ""
    failures: int = 0


@dataclass(frozen=True)
class Table:
    """All rows, and what is known of the known answers.

    Attributes:
        rows: one a world and method, in the order judged.
        worlds: name to the figure that stands for it.
        made: what is known of each known answer.
    """

    rows: tuple[Row, ...]
    worlds: Mapping[str, str]
    made: tuple[Made, ...]

    @classmethod
    def of(cls, trials: Trials, headlines: Mapping[str, str]) -> Table:
        """Means of trials.

        Args:
            trials: what was judged.
            headlines: world to the figure that stands for it.
        """
        groups: dict[tuple[str, str], list[Trial]] = {}
        for trial in trials.trials:
            groups.setdefault((trial.world, trial.method), []).append(trial)
        return cls(tuple(_row(group) for group in groups.values()), dict(headlines), trials.made)

    def ranked(self, world: str) -> list[Row]:
        """Rows of a world, the best first, those that failed last."""
        headline = self.worlds[world]

        def height(row: Row) -> float:
            return row.figures[headline].value if headline in row.figures else -np.inf

        return sorted((row for row in self.rows if row.world == world), key=lambda row: -height(row))

    def overview(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows of method × world: the headline of each world, a dash where a method failed."""
        cells: dict[str, dict[str, str]] = {}
        for world, headline in self.worlds.items():
            for row in self.ranked(world):
                told = str(row.figures[headline]) if headline in row.figures else "–"
                cells.setdefault(row.method, {})[world] = told
        columns = ["method", *(f"{world}: {headline}" for world, headline in self.worlds.items()), "CPU s"]
        rows = [
            [method, *(found.get(world, "") for world in self.worlds), self._seconds(method)]
            for method, found in cells.items()
        ]
        return columns, sorted(rows, key=lambda row: all(entry in ("", "–") for entry in row[1:-1]))

    def _seconds(self, method: str) -> str:
        """Mean over the worlds it was judged on."""
        took = [row.figures["CPU s"].value for row in self.rows if row.method == method and row.n]
        return f"{sum(took) / len(took):.2f}" if took else ""

    def detail(self, world: str) -> tuple[list[str], list[list[str]]]:
        """Columns and rows of one world, and what the run took; of curves only their sum and two points, see `ENDS`."""
        rows = [row for row in self.ranked(world) if row.n]
        names = list(dict.fromkeys(name for row in rows for name in row.figures))
        names = [name for name in names if not name.endswith((" ceiling", " chance")) and name not in TOOK]
        names = [name for name in names if "%" not in name or name in (*ENDS, self.worlds[world])]
        body = [[row.method, str(row.n), *(str(row.figures[name]) for name in names), *_took(row)] for row in rows]
        return ["method", "n", *names, *TOOK], body

    def remarks(self, world: str) -> list[str]:
        """What a reader of a world's figures must know: ceiling, chance, how its known answers came out."""
        told = []
        rows = [row for row in self.rows if row.world == world and row.n]
        for end in ("ceiling", "chance"):
            means = {name: mean.value for row in rows for name, mean in row.figures.items() if name.endswith(f" {end}")}
            if means:
                told.append(f"{end}: " + ", ".join(f"{name.removesuffix(f' {end}')} {value:.3f}"
                                                   for name, value in means.items()))  # fmt: skip
        return told + _notes([entry for entry in self.made if entry.world == world])

    def failures(self) -> list[list[str]]:
        """World, method and reason of every failure; one row where a method failed in several worlds alike."""
        reasons: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.failed:
                part = "" if not row.n else f" ({row.failures} of {row.failures + row.n})"
                reasons.setdefault((row.method, row.failed), []).append(row.world + part)
        return [[method, ", ".join(worlds), why] for (method, why), worlds in reasons.items()]

    def to_json(self) -> dict[str, Any]:
        """As JSON values; ends of an interval that is not defined are None."""
        rows = [
            {"world": row.world, "method": row.method, "n": row.n, "failed": row.failed, "failures": row.failures,
             "figures": {name: _ends(mean) for name, mean in row.figures.items()}}
            for row in self.rows
        ]  # fmt: skip
        return {"kind": "truth", "worlds": dict(self.worlds), "rows": rows, "known": [vars(made) for made in self.made]}

    def to_csv(self) -> str:
        """One line a world, method and figure."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(["world", "method", "figure", "mean", "low", "high", "n", "failed"])
        for row in self.rows:
            for name, mean in row.figures.items():
                ends = _ends(mean)
                lines.writerow([row.world, row.method, name, mean.value, ends["low"], ends["high"], row.n, ""])
            if row.failed:
                lines.writerow([row.world, row.method, "", "", "", "", row.failures, row.failed])
        return text.getvalue()

    def to_markdown(self) -> str:
        """The overview, then each world, then who failed and why."""
        parts = [_markdown(*self.overview())]
        for world in self.worlds:
            remarks = "".join(f"- {line}\n" for line in self.remarks(world))
            parts.append(f"### {world}\n\n{remarks}\n{_markdown(*self.detail(world))}")
        if self.failures():
            parts.append("### Not judged\n\n" + _markdown(["method", "worlds", "why"], self.failures()))
        return "\n".join(parts)

    def write(self, out: str | Path) -> None:
        """`table.csv`, `table.md` and `table.json` in a folder."""
        out = Path(out)
        write_text(out / "table.csv", self.to_csv())
        write_text(out / "table.md", self.to_markdown())
        write_text(out / "table.json", json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n")


def interval(
    values: Sequence[float], groups: Sequence[Any], *, rate: bool = False, seed: int = 0, draws: int = 2000
) -> Mean:
    """Mean of values that come in groups: groups are resampled, then values within each; one alone plainly.

    Args:
        values: one a known answer.
        groups: the model and seed of each.
        rate: values are hits and misses: all alike, they get the exact bound of a rate, so that "always" is not said
            with certainty.
        seed: of the resampling.
        draws: how often.
    """
    mean = float(np.mean(values))
    if rate and set(values) in ({0.0}, {1.0}):
        return Mean(mean, *rate_interval(int(sum(values)), len(values)))
    members: dict[Any, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value)
    if len(members) < 2:
        return Mean(mean, *bootstrap_interval(values, seed=seed, draws=draws))
    size = np.array([len(part) for part in members.values()])
    padded = np.array([[*part, *[0.0] * (size.max() - len(part))] for part in members.values()])
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(size), (draws, len(size)))
    # [draws, groups, answers]: as many answers of each picked group as it has, drawn anew every time it is picked.
    within = (rng.random((*picks.shape, size.max())) * size[picks][..., None]).astype(int)
    drawn = padded[picks[..., None], within] * (np.arange(size.max()) < size[picks][..., None])
    means = drawn.sum((1, 2)) / size[picks].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Mean(mean, float(low), float(high))


def _row(group: Sequence[Trial]) -> Row:
    judged = [trial for trial in group if not trial.failed]
    failed = [trial.failed for trial in group if trial.failed]
    first = group[0]
    models = [(trial.ground, trial.seed) for trial in judged]
    figures = {}
    for name in dict.fromkeys(name for trial in judged for name in trial.figures):
        held = [index for index, trial in enumerate(judged) if name in trial.figures]
        values = [judged[at].figures[name] for at in held]
        figures[name] = interval(values, [models[at] for at in held], rate=name.startswith("hit@"))
    if judged:
        took = [[trial.seconds for trial in judged], [float(trial.forward) for trial in judged],
                [float(trial.backward) for trial in judged]]  # fmt: skip
        figures |= {name: interval(values, models) for name, values in zip(TOOK, took, strict=True)}
    return Row(first.world, first.method, len(judged), figures, failed[0] if failed else "", len(failed))


def _took(row: Row) -> list[str]:
    seconds, *tokens = (row.figures[name].value for name in TOOK)
    return [f"{seconds:.2f}", *(f"{count:,.0f}" for count in tokens)]


def _notes(made: Sequence[Made]) -> list[str]:
    """Numbers noted of known answers as their range, checks as how many held, and what could not be made."""
    told = []
    good = [entry.notes for entry in made if not entry.failed]
    for name in dict.fromkeys(name for notes in good for name in notes):
        values = [notes[name] for notes in good if name in notes]
        if all(isinstance(value, dict) and "holds" in value for value in values):
            told.append(f"{name}: holds in {sum(value['holds'] for value in values)} of {len(values)}")
            continue
        if all(isinstance(value, int | float) for value in values):
            middle = float(np.median(values))
            told.append(f"{name}: median {middle:.3g}, {min(values):.3g} to {max(values):.3g}")
    failed = [entry.failed for entry in made if entry.failed]
    return told + ([f"{len(failed)} of {len(made)} could not be made: {failed[0]}"] if failed else [])


def _ends(mean: Mean) -> dict[str, float | None]:
    ends = {"low": mean.low, "high": mean.high}
    return {"mean": mean.value, **{name: end if np.isfinite(end) else None for name, end in ends.items()}}


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
