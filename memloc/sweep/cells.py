"""From a grid to cells: one measure under one ablation each, named by the digest of all that its result depends on."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from memloc.ablation import FACTORS, REFERRING, Ablation
from memloc.command import read_facts, read_passages, read_text
from memloc.components import Components, Directions, apart, everything, layers, named, names_of, parts_of
from memloc.costs import Cost, block_tokens, pass_bytes, widest
from memloc.errors import InputError, MemlocError
from memloc.passages import Facts, Passage, Passages
from memloc.ports import width
from memloc.provenance import digest_json, settings_of, versions
from memloc.reference import Reference
from memloc.scores import Localization, Selection
from memloc.sites import Grain, Site
from memloc.sweep.grid import Asked, Data, Grid, Sets
from memloc.view import ModelView

TRIES = 100


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
        lines: list[Line] = []
        models: dict[str, str] = {}
        data: dict[tuple[str, str], Passages | Facts] = {}
        rows: dict[tuple[str, str], Passages] = {}
        references: dict[str, Reference] = {}
        notes: list[str] = []
        costs: dict[str, Cost] = {}
        reading: dict[str, Cost] = {}
        for name in grid.models:
            view = ModelView.open(name)
            models[name] = view.digest
            for key, entry in grid.data.items():
                data[name, key] = _read(entry, view)
                rows[name, key] = _rows(data[name, key])
                rows[name, key].check(view.vocab, view.context)
            if grid.reference is not None:
                text = _rows(_read(grid.reference, view))
                references[name] = Reference(text, tokens=grid.reference_tokens)
            maker = _Maker(name, models[name], data, references.get(name))
            mine = [Line(maker.cell(asked, None), "", "", 0, "", 0) for asked in grid.measures]
            for sets in grid.sets:
                with _named(f"ablate {sets.name!r}"):
                    mine += _lines(view, sets, grid.measures, maker, notes)
            for line in mine:
                of = rows[name, line.cell.asked.data]
                with _named(f"ablate {line.sets!r}, {line.label}"):
                    _check(view, line, of)
                if line.cell.key not in costs:
                    costs[line.cell.key] = _cost(view, line.cell, of, grid.reference_tokens)
            lines += mine
            referring = any(line.cell.ablation and line.cell.ablation.how in REFERRING for line in mine)
            if name in references and referring:
                known = references[name]
                reading[name] = Cost(block_tokens(view, known.passages, size=known.batch_size))
        return cls(tuple(lines), models, data, rows, references, tuple(dict.fromkeys(notes)), costs, reading)


@dataclass(frozen=True)
class _Maker:
    model: str
    digest: str
    data: Mapping[tuple[str, str], Passages | Facts]
    reference: Reference | None

    def cell(self, asked: Asked, ablation: Ablation | None) -> Cell:
        data = self.data[self.model, asked.data]
        referring = ablation is not None and ablation.how in REFERRING and self.reference is not None
        content = {
            "model": self.digest,
            "data": data.digest,
            "measure": [asked.name, settings_of(asked.measure)],
            "ablation": None if ablation is None else ablation.digest,
            "reference": self.reference.digest if referring and self.reference is not None else None,
            "versions": {name: found for name, found in versions().items() if name in ("memloc", "torch")},
        }
        return Cell(digest_json(content), self.model, asked, ablation)


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
    pairs: dict[tuple[tuple[int, ...], tuple[int, ...]], None] = {}
    for fact in data:
        prompts = [prompt.ids for prompt in (fact.prompt, *fact.paraphrases)]
        pairs |= dict.fromkeys((ids, answer) for ids in prompts for answer in (fact.target, fact.target_true))
        for neighbor in fact.neighbors:
            pairs |= dict.fromkeys((neighbor.prompt.ids, answer) for answer in (neighbor.target, fact.target))
    return Passages(tuple(Passage(f"pair-{index}", *pair) for index, pair in enumerate(pairs)), data.origin)


# -- sets of components -----------------------------------------------------------------------------------------------


def _lines(view: ModelView, sets: Sets, measures: Sequence[Asked], maker: _Maker, notes: list[str]) -> Iterator[Line]:
    for label, of in _chosen(view, sets):
        twins = list(_twins(sets, label, of, notes))
        for how in sets.how:
            for control, components in enumerate([of, *twins]):
                for ablation in _ablations(sets, how, components):
                    grains = {str(entry.grain) if isinstance(entry, Selection) else "direction" for entry in of}
                    grain = grains.pop() if len(grains) == 1 else "mixed"
                    count = sum(entry.count for entry in of)
                    for asked in measures:
                        yield Line(maker.cell(asked, ablation), sets.name, label, control, grain, count)


def _ablations(sets: Sets, how: str, of: tuple[Components, ...]) -> Iterator[Ablation]:
    factors: tuple[float | None, ...] = sets.factors if how in FACTORS and sets.factors else (None,)
    seeds = sets.seeds if how in ("resample", "noise") else (0,)
    for factor in factors:
        for seed in seeds:
            yield Ablation(of=of, how=how, factor=factor, seed=seed, positions=sets.positions)  # type: ignore[arg-type]


def _chosen(view: ModelView, sets: Sets) -> Iterator[tuple[str, tuple[Components, ...]]]:
    """Every set of components with its label."""
    if sets.source == "every":
        for one in apart(everything(view, Grain(sets.value))):
            yield names_of(one)[0], (one,)
    elif sets.source == "components":
        found = named(view, sets.value)
        if not sets.each:
            yield shortened(name for entry in found for name in names_of(entry)), found
        for entry in found if sets.each else ():
            for one in apart(entry):
                yield names_of(one)[0], (one,)
    elif sets.source == "windows":
        for size in sets.value:
            if not 1 <= size <= view.layers:
                raise InputError(f"windows: {size}; expected 1 to {view.layers}, the model's layers")
            for start in range(view.layers - size + 1):
                label = f"L{start}" if size == 1 else f"L{start}-L{start + size - 1}"
                yield label, (layers(view, range(start, start + size)),)
    elif sets.source == "directions":
        yield from _directions(sets)
    else:
        localization = Localization.load(sets.value)
        name = localization.provenance.method
        for amount in sets.counts or sets.fractions:
            by = {"count": amount} if sets.counts else {"fraction": amount}
            label = f"top {amount} of {name}" if sets.counts else f"top {100 * amount:g} % of {name}"
            yield label, (localization.top(per=sets.per, **by),)  # type: ignore[arg-type]


def _directions(sets: Sets) -> Iterator[tuple[str, tuple[Components, ...]]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(sets.value)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{sets.value} cannot be read as safetensors: {error}") from error
    rows: dict[Site | int, torch.Tensor] = {}
    for name, tensor in sorted(tensors.items()):
        rows[int(name[1:]) if name[1:].lstrip("-").isdigit() else Site.parse(name)] = tensor
    whole = Directions(rows)
    if not sets.each:
        yield shortened(names_of(whole)), (whole,)
    for place, entry in rows.items() if sets.each else ():
        for index in range(len(entry)):
            at = str(place) if isinstance(place, Site) else f"L{place}"
            yield f"{at}~{index}", (Directions({place: entry[index : index + 1]}),)


def shortened(names: Any, most: int = 6) -> str:
    """Names joined, the rest counted."""
    found = list(names)
    return "+".join(found[:most]) + (f"+{len(found) - most} more" if len(found) > most else "")


def _twins(sets: Sets, label: str, of: tuple[Components, ...], notes: list[str]) -> Iterator[tuple[Components, ...]]:
    """Random sets of equal size, none of them the set itself and no two alike."""
    seen = [[_identity(entry) for entry in of]]
    for seed in range(TRIES * sets.controls):
        if len(seed_found := seen[1:]) == sets.controls:
            break
        twin = tuple(_twin(entry, seed, sets.matched) for entry in of)
        identity = [_identity(entry) for entry in twin]
        if identity not in seen and len(seed_found) < sets.controls:
            seen.append(identity)
            yield twin
    if len(seen) - 1 < sets.controls:
        notes.append(f"{sets.name}, {label}: {len(seen) - 1} of {sets.controls} random controls; there are no others")


def _twin(entry: Components, seed: int, matched: str) -> Components:
    if isinstance(entry, Directions):
        return entry.random_like(seed)
    if matched != "grain":
        return entry.random_like(seed, per=matched)
    # Where every chosen site is chosen whole, only the sites themselves can differ.
    whole = all(bool(mask.all()) for mask in entry.masks.values() if mask.any())
    return entry.random_like(seed, per="model" if whole else "site")


def _identity(entry: Components) -> Any:
    return entry.digest if isinstance(entry, Directions) else entry.indices()


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
