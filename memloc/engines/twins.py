"""A model's structural twin: a clean module tree that holds the very same parameters.

TransformerLens rewrites the module tree it is given. It is given a twin, so that the user's tree stays; and of a tree
that it has rewritten already, a twin is the plain model again. Neither takes memory for weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from memloc.errors import ModelError

_INNER = "_original_component"


def twin(model: nn.Module) -> Any:
    """A new module tree of the model's class and config, holding the same parameters and buffers.

    Args:
        model: a transformers model, or one that a bridge has rewritten in place.

    Raises:
        ModelError: the tree lacks a parameter that its class and config ask for.
    """
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        made: Any = type(model)(config)
    for path, module in list(made.named_modules()):
        source = inside(model, path)
        for name in list(module._parameters):
            _put(module._parameters, source._parameters, name, path)
        for name in list(module._buffers):
            _put(module._buffers, source._buffers, name, path)
    made.generation_config = getattr(model, "generation_config", None)
    return made.train(model.training)


def inside(model: nn.Module, path: str) -> nn.Module:
    """The plain module at a plain path of a tree that may hold a bridge's components.

    Raises:
        ModelError: the tree has no such path.
    """
    return _opened(component(model, path))


def component(model: nn.Module, path: str) -> nn.Module:
    """What stands at a plain path: a bridge's component where there is one, else the plain module.

    Raises:
        ModelError: the tree has no such path.
    """
    found = model
    for part in path.split(".") if path else ():
        step = _opened(found)._modules.get(part)
        if step is None:
            raise ModelError(f"{path}: not in this {type(model).__name__}, which its bridge has changed; reload it")
        found = step
    return found


def _opened(module: nn.Module) -> nn.Module:
    while True:
        within = module._modules.get(_INNER)
        if within is None:
            return module
        module = within


def _put(mine: Any, theirs: Any, name: str, path: str) -> None:
    if mine[name] is None:
        return
    if theirs.get(name) is None:
        raise ModelError(f"{path}.{name}: missing in the model that its bridge has changed; reload it from its folder")
    mine[name] = theirs[name]
