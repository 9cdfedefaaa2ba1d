"""Weights that a model leaves elsewhere between its forwards, as accelerate does with what does not fit a device.

They lie on the CPU or on disk and are loaded for each call. The model runs as always; only who looks at a weight must
ask the hook that holds it.

Nothing of accelerate is imported: its hooks are found where it puts them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def elsewhere(tensor: Tensor) -> bool:
    """Whether `tensor` has no values of its own at the moment."""
    return tensor.device.type == "meta"


def held(modules: Mapping[str, nn.Module], name: str) -> Tensor | None:
    """The values of the parameter called `name`, on the CPU, from the hook that loads it; None where no hook does.

    Args:
        modules: of the model, by their full names ("" is the model).
        name: the parameter's full name.

    Cost: the tensor is read from where it lies, each time.
    """
    path, own = name.rpartition(".")[::2]
    while True:
        for store in _stores(modules[path]):
            if own in store:
                found: Tensor = store[own]
                return found.to("cpu")
        if not path:
            return None
        path, _, last = path.rpartition(".")
        own = f"{last}.{own}"


def runs_on(module: nn.Module) -> Any:
    """The device `module` will be called on, where a hook decides it; None otherwise."""
    return next((hook.execution_device for hook in _hooks(module) if hook.execution_device is not None), None)


def hooked(module: nn.Module) -> bool:
    """Whether `module`, or a module in it, has weights that a hook loads before each call."""
    return any(hook.offload for part in module.modules() for hook in _hooks(part))


def unhooked(module: nn.Module) -> nn.Module:
    """`module` without a hook that loads its weights before each call, to be called with weights of the caller's."""
    if not any(True for _ in _hooks(module)):
        return module
    plain = copy.copy(module)
    for name in ("forward", "_hf_hook", "_old_forward"):
        plain.__dict__.pop(name, None)
    plain._parameters = dict(module._parameters)
    return plain


def _stores(module: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    for hook in _hooks(module):
        if hook.offload and hook.weights_map is not None:
            yield hook.weights_map


def _hooks(module: nn.Module) -> Iterator[Any]:
    given: Any = getattr(module, "_hf_hook", None)
    for hook in getattr(given, "hooks", None) or [given]:
        if hasattr(hook, "weights_map") and hasattr(hook, "execution_device"):
            yield hook
