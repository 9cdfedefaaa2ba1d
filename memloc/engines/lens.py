"""TransformerLens: visitors are called at a TransformerBridge's hook points. The only file that knows them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from memloc import hooks
from memloc.engines.engine import TRANSFORMER_LENS
from memloc.engines.twins import component, inside, twin
from memloc.errors import InputError, ModelError
from memloc.hooks import Point

K = TypeVar("K")


def is_bridge(model: Any) -> bool:
    """Whether it is a TransformerBridge, found out without importing TransformerLens."""
    return any(
        base.__name__ == "TransformerBridge" and base.__module__.startswith("transformer_lens")
        for base in type(model).__mro__
    )


def unwrapped(bridge: Any) -> Any:
    """A plain transformers model that holds the bridge's own parameters; the bridge is left as it is.

    Raises:
        ModelError: its weights have been processed (folded, centred), so that they are no longer the checkpoint's.
    """
    if bridge.compatibility_mode or bridge._weights_processed:
        raise ModelError(
            "this TransformerBridge is in compatibility mode: its weights are folded and no longer the checkpoint's, "
            "so none may be read or written back; build one without enable_compatibility_mode, or give the folder"
        )
    return twin(bridge.original_model)


def bridged(model: nn.Module) -> Any:
    """A bridge over the model's structural twin: the same parameters, and the user's module tree stays as it is.

    Raises:
        InputError: TransformerLens is not installed.
        ModelError: it has no adapter for this architecture.
    """
    try:
        from transformer_lens.model_bridge.sources import build_bridge_from_module
    except ImportError:
        raise InputError("the engine transformer-lens needs a package; pip install transformer-lens") from None
    made, flags = twin(model), [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        return build_bridge_from_module(made, type(model).__name__, hf_config=made.config)
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        raise ModelError(f"TransformerLens cannot bridge {type(model).__name__}: {told}; take engine hooks") from error
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class BridgeEngine:
    """Runs a TransformerBridge; hooks that its user has set on it are at work too.

    Args:
        bridge: over a tree that holds the parameters of `model`.
        model: the plain model, whose modules points are of.
    """

    name = TRANSFORMER_LENS

    def __init__(self, bridge: Any, model: nn.Module) -> None:
        self.bridge = bridge
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._modules = list(model.modules())
        self._copied = dict(_copied(bridge.original_model, model))
        self._versions = {name: parameter._version for name, parameter in self._copied.items()}

    @contextlib.contextmanager
    def visiting(self, points: Mapping[K, Point], visit: Callable[[K, Tensor], Tensor | None]) -> Iterator[None]:
        """By functions on the hook points before and after a component.

        Raises:
            ModelError: no hook point there, or none was passed in a run.
        """
        passed: dict[K, bool] = {}
        with contextlib.ExitStack() as stack:
            for key, point in points.items():
                stack.callback(_add(self.point(point), key, visit, passed))
            yield
        missed = [key for key in points if passed and key not in passed]
        if missed:
            raise ModelError(
                f"{missed[0]}: TransformerLens computes past this place (a fused map is split there); take engine hooks"
            )

    def point(self, point: Point) -> Any:
        """The HookPoint of a point.

        Raises:
            ModelError: there is none.
        """
        path = self._paths.get(id(point.module), "")
        found = getattr(component(self.bridge.original_model, path), "hook_in" if point.side == "input" else "hook_out",
                        None)  # fmt: skip
        if not path or found is None:
            raise ModelError(f"{path or type(point.module).__name__}: TransformerLens has no hook point there")
        return found

    def run(self, module: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """Through the bridge's components.

        Raises:
            ModelError: somebody listens on the plain modules, which a bridge does not run; or a fused map was edited.
        """
        if hooks.hooked(self._modules):
            raise ModelError(
                "this method listens on modules themselves, which TransformerLens does not run; take engine hooks"
            )
        for name, parameter in self._copied.items():
            if parameter._version != self._versions[name]:
                raise ModelError(
                    f"{name} was edited, but the bridge computes with copies split from it; open the model again"
                )
        return component(self.bridge.original_model, self._paths[id(module)])(**inputs)


def _copied(tree: nn.Module, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Fused parameters that the bridge has split into copies, which no longer follow them."""
    for path, module in model.named_modules():
        owner, _, last = path.rpartition(".")
        if not isinstance(module._parameters.get("weight"), nn.Parameter) or not last:
            continue
        around = component(tree, owner)
        if "qkv" not in around._modules or around._modules["qkv"] is not component(tree, path):
            continue
        split = inside(around._modules["q"], "")
        for name, parameter in module.named_parameters(recurse=False):
            part = split._parameters.get(name)
            if part is None or part.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
                yield f"{path}.{name}", parameter


def _add(
    place: Any, key: K, visit: Callable[[K, Tensor], Tensor | None], passed: dict[K, bool]
) -> Callable[[], None]:
    """Put the visitor there; what is returned takes it, and nothing else, away again."""

    def hook(tensor: Tensor, hook: Any) -> Tensor:
        passed[key] = True
        # Heads come as [n, t, h, width of one]; what was shown must be what the gradient passes through.
        shown = tensor.flatten(2) if tensor.dim() > 3 else tensor
        found = visit(key, shown)
        return (shown if found is None else found).reshape(tensor.shape)

    handle = place.add_hook(hook)

    def remove() -> None:
        handle.hook.remove()
        place.fwd_hooks.remove(handle)

    return remove
