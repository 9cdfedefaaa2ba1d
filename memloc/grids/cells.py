"""From a grid to cells: one measure under one ablation each, named by the digest of all that its result depends on."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from memloc.ablations.ablation import FACTORS, REFERRING, Ablation
from memloc.ablations.components import Components, parts_of
from memloc.ablations.ports import width
from memloc.ablations.reference import Reference
from memloc.command import read_facts, read_passages, read_text
from memloc.costs import Cost, block_tokens, pass_bytes, widest
from memloc.errors import InputError, MemlocError
from memloc.grids.choosing import chosen, twins
from memloc.grids.grid import Asked, Data, Grid, Sets
from memloc.passages import Facts, Passage, Passages
from memloc.provenance import digest_json, settings_of, versions
from memloc.scores import Selection
from memloc.view import ModelView


@dataclass(frozen=True, eq=False)
class Cell:
    """One measure under one ablation (or under none: the baseline).

    Attributes:
        key: digest of model, data, measure, ablation, reference and version.
        model: name of the model.
        asked: the measure and its data.
        ablation: None for the baseline.
    """

    key: str
    model: str
    asked: Asked
    ablation: Ablation | None


@dataclass(frozen=True, eq=False)
class Line:
    """One place in the table: a cell, and as what it stands there. A cell may stand in several places.

    Attributes:
        cell: its result.
        sets: the [[ablate]] it belongs to; "" for a baseline.
        label: the set that is ablated, or whose random twin is.
        control: 0, or which random twin.
        grain: of the components; "mixed" where there are several.
        count: how many components.
    """

    cell: Cell
    sets: str
    label: str
    control: int
    grain: str
    count: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that is to be run, checked against models and data.

    Attributes:
        lines: the table's lines, baselines first.
        models: name to the digest of its weights.
        data: model name and data name to passages or facts (models may have tokenizers of their own).
        rows: likewise, every row a measure runs, as passages.
        references: model name to the reference text, where one is needed.
        notes: what was decided on the way and should be known.
        costs: key of a cell to what it takes.
        reading: model name to what its reference text takes, once in each process that needs it.
    """

    lines: tuple[Line, ...]
    models: Mapping[str, str]
    data: Mapping[tuple[str, str], Passages | Facts]
    rows: Mapping[tuple[str, str], Passages]
    references: Mapping[str, Reference]
    notes: tuple[str, ...]
    costs: Mapping[str, Cost]
    reading: Mapping[str, Cost]

    @property
    def cells(self) -> dict[str, Cell]:
        """Every cell once, by key."""
        return {line.cell.key: line.cell for line in self.lines}

    @classmethod
    def of(cls, grid: Grid) -> Plan:
        """Open every model once, read all data, and lay out the cells; nothing is run.

        Raises:
            InputError, MismatchError, ModelError, ...: anything in the grid that cannot be run.
        """
        draft = _Draft()
        for name in grid.models:
            draft.add(ModelView.open(name), name, grid)
        notes = tuple(dict.fromkeys(draft.notes))
        return cls(
            tuple(draft.lines), draft.models, draft.data, draft.rows, draft.references, notes, draft.costs,
            draft.reading,
        )  # fmt: skip


@dataclass
class _Draft:
    """A plan in the making; its fields are those of `Plan`."""

    lines: list[Line] = field(default_factory=list)
    models: dict[str, str] = field(default_factory=dict)
    data: dict[tuple[str, str], Passages | Facts] = field(default_factory=dict)
    rows: dict[tuple[str, str], Passages] = field(default_factory=dict)
    references: dict[str, Reference] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    costs: dict[str, Cost] = field(default_factory=dict)
    reading: dict[str, Cost] = field(default_factory=dict)

    def add(self, view: ModelView, name: str, grid: Grid) -> None:
        """All lines of one model."""
        self.models[name] = view.digest
        for key, entry in grid.data.items():
            self.data[name, key] = _read(entry, view)
            self.rows[name, key] = _rows(self.data[name, key])
            self.rows[name, key].check(view.vocab, view.context)
        if grid.reference is not None:
            self.references[name] = Reference(_rows(_read(grid.reference, view)), tokens=grid.reference_tokens)
        mine = [Line(self.cell(name, asked, None), "", "", 0, "", 0) for asked in grid.measures]
        for sets in grid.sets:
            with _named(f"ablate {sets.name!r}"):
                mine += self._lines(view, name, sets, grid.measures)
        for line in mine:
            of = self.rows[name, line.cell.asked.data]
            with _named(f"ablate {line.sets!r}, {line.label}"):
                _check(view, line, of)
            if line.cell.key not in self.costs:
                self.costs[line.cell.key] = _cost(view, line.cell, of, grid.reference_tokens)
        self.lines += mine
        known = self.references.get(name)
        if known is not None and any(line.cell.ablation and line.cell.ablation.how in REFERRING for line in mine):
            self.reading[name] = Cost(block_tokens(view, known.passages, size=known.batch_size))

    def _lines(self, view: ModelView, name: str, sets: Sets, measures: Sequence[Asked]) -> Iterator[Line]:
        for label, of in chosen(view, sets):
            grains = {str(entry.grain) if isinstance(entry, Selection) else "direction" for entry in of}
            grain, count = grains.pop() if len(grains) == 1 else "mixed", sum(entry.count for entry in of)
            others = list(twins(sets, label, of, self.notes))
            for how in sets.how:
                for control, components in enumerate([of, *others]):
                    for ablation in _ablations(sets, how, components):
                        for asked in measures:
                            yield Line(self.cell(name, asked, ablation), sets.name, label, control, grain, count)

    def cell(self, name: str, asked: Asked, ablation: Ablation | None) -> Cell:
        """A cell under its key."""
        reference = self.references.get(name) if ablation is not None and ablation.how in REFERRING else None
        content = {
            "model": self.models[name],
            "data": self.data[name, asked.data].digest,
            "measure": [asked.name, settings_of(asked.measure)],
            "ablation": None if ablation is None else ablation.digest,
            "reference": None if reference is None else reference.digest,
            "versions": {package: found for package, found in versions().items() if package in ("memloc", "torch")},
        }
        return Cell(digest_json(content), name, asked, ablation)


def _ablations(sets: Sets, how: str, of: tuple[Components, ...]) -> Iterator[Ablation]:
    factors: tuple[float | None, ...] = sets.factors if how in FACTORS and sets.factors else (None,)
    seeds = sets.seeds if how in ("resample", "noise") else (0,)
    for factor in factors:
        for seed in seeds:
            yield Ablation(of=of, how=how, factor=factor, seed=seed, positions=sets.positions)  # type: ignore[arg-type]


# -- data -------------------------------------------------------------------------------------------------------------


def _read(data: Data, view: ModelView) -> Passages | Facts:
    lengths = Namespace(prefix=data.prefix, suffix=data.suffix)
    readers = {"facts": read_facts, "text": read_text}
    found = readers[data.kind](data.file, view) if data.kind in readers else read_passages(data.file, view, lengths)
    if found is None:
        raise InputError(f"{data.file}: nothing to read")
    return found if data.limit is None else found[: data.limit]


def _rows(data: Passages | Facts) -> Passages:
    """Every prompt with every answer, where data are facts."""
    if isinstance(data, Passages):
        return data
    pairs: dict[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], None] = {}
    for fact in data:
        for prompt in (fact.prompt, *fact.paraphrases):
            pairs |= dict.fromkeys((prompt.ids, answer, prompt.after) for answer in (fact.target, fact.target_true))
        for entry in fact.neighbors:
            asked = entry.prompt
            pairs |= dict.fromkeys((asked.ids, answer, asked.after) for answer in (entry.target, fact.target))
    return Passages(
        tuple(Passage(f"pair-{index}", ids, answer, after=after) for index, (ids, answer, after) in enumerate(pairs)),
        data.origin,
    )


# -- checks and costs -------------------------------------------------------------------------------------------------


def _check(view: ModelView, line: Line, rows: Passages) -> None:
    """Whatever would fail at the first pass fails here."""
    ablation = line.cell.ablation
    if ablation is None:
        return
    prefixes = prefixes_of(ablation, rows)
    # Entered and left again: hooks are set and gone, no pass is run, and the reference is not read.
    probe = ablation if ablation.how not in REFERRING else replace(ablation, how="zero", factor=None)
    with probe.applied(view, prefixes=prefixes):
        pass


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Errors on purpose say where in the grid they come from."""
    try:
        yield
    except MemlocError as error:
        raise type(error)(f"{where}: {error}") from error


def prefixes_of(ablation: Ablation, rows: Passages) -> list[tuple[int, ...]]:
    """What the ablation has to know of the rows."""
    return sorted({item.prefix for item in rows}) if ablation.positions in ("prefix", "suffix") else []


def _cost(view: ModelView, cell: Cell, rows: Passages, tokens_kept: int) -> Cost:
    size = int(getattr(cell.asked.measure, "batch_size", 32))
    count, tokens = widest(rows, size=size)
    spoken = min(2**23 // view.vocab, count * tokens)
    memory = pass_bytes(view, count * tokens, context=tokens, unembedded=spoken)
    if cell.ablation is not None:
        parts = [part for entry in cell.ablation.of for part in parts_of(view, entry)]
        widths = [width(view, part.port) for part in parts]
        wide = 8 if view.dtype == torch.float64 else 4
        # What is put in the place of an activation and what it is made from, one port at a time; draws are float64.
        memory += count * tokens * max(widths) * (48 if cell.ablation.how == "noise" else 4 * wide)
        if cell.ablation.how in REFERRING:
            memory += wide * (tokens_kept + 2) * sum(widths)
    return Cost(block_tokens(view, rows, size=size), 0, memory)


def folder_of(out: str | Path) -> Path:
    """Where cells are kept under `out`."""
    return Path(out) / "cells"
