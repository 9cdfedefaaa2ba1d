"""Which stored tensors hold a parameter of the live model, from the headers of a folder.

Mostly the parameter's own name, or one that differs by the family's prefix (`shards.Weights.resolve`; no model library
is asked). Where that finds nothing, transformers' own tables for loading are: the model is built without memory from
its config, and every stored name is renamed as loading would rename it. Those tables are internal to transformers;
this is the only file that reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from editors.disk.shards import Weights
from memloc.errors import CheckpointError, ModelError


@dataclass(frozen=True)
class Stored:
    """Where a parameter is kept.

    Attributes:
        names: stored tensors that hold it, in the order of the file names and names.
        converted: loading computes the parameter from them (experts put side by side, say); one that is not is
            `names[0]`, bit for bit.
        experts: where loading only stacks experts' matrices: for each expert the names of the matrices that make its
            own, one above the other; empty for any other computation.
    """

    names: tuple[str, ...]
    converted: bool = False
    experts: tuple[tuple[str, ...], ...] = ()


def locate(weights: Weights, parameters: Iterable[str]) -> dict[str, Stored]:
    """Parameter to where it is stored. Cost: nothing where names agree, else a model without memory.

    Raises:
        CheckpointError: a parameter is in none of the folder's weight files, or could be one of several.
    """
    found: dict[str, Stored] = {}
    told: dict[str, Stored] | None = None
    for parameter in parameters:
        try:
            found[parameter] = Stored((weights.resolve(parameter),))
        except CheckpointError:
            told = by_loading(weights) if told is None else told
            if parameter not in told:
                raise
            found[parameter] = told[parameter]
    return found


def by_loading(weights: Weights) -> dict[str, Stored]:
    """Parameter to where it is stored, for all of a folder, by the renaming that loading does.

    Nothing where transformers is absent, does not know the folder's config, or keeps its tables in another form.
    """
    try:
        return _by_loading(weights.folder, sorted(weights.entries))
    except (ImportError, AttributeError, TypeError, ValueError, KeyError, OSError, ModelError):
        return {}


def _by_loading(folder: Path, names: list[str]) -> dict[str, Stored]:
    import torch
    from transformers import AutoConfig
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    from memloc.loading import language_model, quiet

    with quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(str(folder))
        model = language_model(config).from_config(config)
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    found: dict[str, Stored] = {}
    stacked: dict[str, dict[tuple[int, int], str]] = {}
    for name in names:
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if parameter in state:
            before = found.get(parameter, Stored(()))
            converted = before.converted or pattern is not None
            found[parameter] = Stored((*before.names, name), converted)
            if pattern is not None:
                place = _of_expert(name, pattern, converters)
                stacked.setdefault(parameter, {})[place or (-1, len(found))] = name
    return {
        parameter: replace(stored, experts=_experts(stacked.get(parameter, {}), len(stored.names)))
        for parameter, stored in found.items()
    }


def _of_expert(name: str, pattern: str, converters: Iterable[Any]) -> tuple[int, int] | None:
    """Which expert's matrix a stored tensor is, and which of those stacked to make it; None for other conversions."""
    for entry in converters:
        if pattern in entry.source_patterns:
            done = [(type(step).__name__, step.dim) for step in entry.operations if hasattr(step, "dim")]
            stacks = done == [("MergeModulelist", 0), ("Concatenate", 1)][: len(done)] and len(done) in (1, 2)
            number = re.search(re.escape(pattern).replace(r"\*\.", r"(\d+)\."), name)
            if stacks and len(done) == len(entry.operations) and number is not None and number.groups():
                return int(number[1]), entry.source_patterns.index(pattern)
    return None


def _experts(places: Mapping[tuple[int, int], str], count: int) -> tuple[tuple[str, ...], ...]:
    """Names by expert, if every expert from 0 has its own, and as many as the others."""
    experts = len({expert for expert, _ in places})
    if not places or len(places) != count or count % experts:
        return ()
    wanted = [[(expert, part) for part in range(count // experts)] for expert in range(experts)]
    if {place for row in wanted for place in row} != set(places):
        return ()
    return tuple(tuple(places[place] for place in row) for row in wanted)
