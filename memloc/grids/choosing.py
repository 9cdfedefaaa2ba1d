"""Which components an [[ablate]] means, and the random twins of each set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from memloc.ablations.components import Components, Directions, apart, everything, layers, named, names_of
from memloc.errors import InputError
from memloc.grids.grid import Sets
from memloc.scores import Localization
from memloc.sites import Grain, Site
from memloc.view import ModelView

TRIES = 100
"""Random sets drawn for each twin that is asked for, before it is taken that there are no others."""


def chosen(view: ModelView, sets: Sets) -> Iterator[tuple[str, tuple[Components, ...]]]:
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


def shortened(names: Iterable[str], most: int = 6) -> str:
    """Names joined, the rest counted."""
    found = list(names)
    return "+".join(found[:most]) + (f"+{len(found) - most} more" if len(found) > most else "")


def twins(sets: Sets, label: str, of: tuple[Components, ...], notes: list[str]) -> Iterator[tuple[Components, ...]]:
    """Random sets of equal size, none of them the set itself and no two alike."""
    seen = [[_identity(entry) for entry in of]]
    for seed in range(TRIES * sets.controls):
        if len(seen) > sets.controls:
            break
        twin = tuple(_twin(entry, seed, sets.matched) for entry in of)
        identity = [_identity(entry) for entry in twin]
        if identity not in seen:
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
