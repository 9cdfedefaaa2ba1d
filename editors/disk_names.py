"""Which stored tensors hold a parameter of the live model, from the headers of a folder.

Mostly the parameter's own name, or one that differs by the family's prefix (`shards.Weights.resolve`; no model library
is asked). Where that finds nothing, transformers' own tables for loading are: the model is built without memory from
its config, and every stored name is renamed as loading would rename it. Those tables are internal to transformers;
this is the only file that reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from editors.shards import Weights
from memloc.errors import CheckpointError


@dataclass(frozen=True)
class Stored:
    """Where a parameter is kept.

    Attributes:
        names: stored tensors that hold it, in the order of the file names and names.
        converted: loading computes the parameter from them (experts put side by side, say); one that is not is
            `names[0]`, bit for bit.
    """

    names: tuple[str, ...]
    converted: bool = False


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
    except (ImportError, AttributeError, TypeError, ValueError, KeyError, OSError):
        return {}


def _by_loading(folder: Path, names: list[str]) -> dict[str, Stored]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    from memloc.loading import quiet

    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(folder)))
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    found: dict[str, Stored] = {}
    for name in names:
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if parameter in state:
            before = found.get(parameter, Stored(()))
            converted = before.converted or pattern is not None
            found[parameter] = Stored((*before.names, name), converted)
    return found
