"""TransformerLens: visitors are called at a TransformerBridge's hook points. The only file that knows them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from memloc import hooks
from memloc.engines.engine import TRANSFORMER_LENS, as_tokens
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

    Where a method runs blocks one by one, or listens on modules themselves, the plain model is run, on the same
    parameters: what it says there, `parity.prove_engine` has compared.

    Args:
        bridge: over a tree that holds the parameters of `model`.
        model: the plain model, whose modules points are of.
    """

    name = TRANSFORMER_LENS

    def __init__(self, bridge: Any, model: nn.Module) -> None:
        self.bridge = bridge
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._modules = list(model.modules())
        self._components = _components(bridge.original_model)
        self._copied = dict(_copied(bridge.original_model, model))
        self.runs = 0
        self._own = 0
        self._tokens: tuple[int, ...] = (0, 0)
        self._versions = {name: parameter._version for name, parameter in self._copied.items()}

    @contextlib.contextmanager
    def visiting(self, points: Mapping[K, Point], visit: Callable[[K, Tensor], Tensor | None]) -> Iterator[None]:
        """By functions on the hook points before and after a component.

        Raises:
            ModelError: no hook point there, or none was passed in a run.
        """
        hooks.refuse_inside(points)
        passed: dict[K, bool] = {}
        runs, hooked, own = self.runs, hooks.count_hooks(self._modules), self._own
        with contextlib.ExitStack() as stack:
            for key, point in points.items():
                stack.callback(self._add(self.point(point), key, visit, passed))
            # Methods also run blocks themselves, or the model from the middle: there the plain modules are visited.
            stack.enter_context(hooks.visiting(points, visit))
            self._own += hooks.count_hooks(self._modules) - hooked
            stack.callback(setattr, self, "_own", own)
            yield
        missed = [key for key in points if self.runs > runs and key not in passed]
        if missed:
            raise ModelError(
                f"{missed[0]}: TransformerLens computes past this place (a fused map is split there); take engine hooks"
            )

    def point(self, point: Point) -> Any:
        """The HookPoint of a point.

        Raises:
            ModelError: there is none.
        """
        path = self._paths[id(point.module)]
        around = self._components.get(id(inside(self.bridge.original_model, path)))
        found = getattr(around, "hook_in" if point.side == "input" else "hook_out", None)
        if found is None:
            raise ModelError(f"{path}: TransformerLens has no hook point there; take engine hooks")
        return found

    def run(self, module: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """Through the bridge's components; the plain model where somebody listens on its modules themselves.

        Raises:
            ModelError: a fused map was edited, of which the bridge keeps copies.
        """
        if hooks.count_hooks(self._modules) > self._own:
            return module(**inputs)
        for name, parameter in self._copied.items():
            if parameter._version != self._versions[name]:
                raise ModelError(
                    f"{name} was edited, but the bridge computes with copies split from it; open the model again"
                )
        self._tokens = tuple(inputs["input_ids"].shape)
        found = component(self.bridge.original_model, self._paths[id(module)])(**inputs)
        self.runs += 1
        return found

    def _add(
        self, place: Any, key: K, visit: Callable[[K, Tensor], Tensor | None], passed: dict[K, bool]
    ) -> Callable[[], None]:
        """Put the visitor there; what is returned takes it, and nothing else, away again."""

        def hook(tensor: Tensor, hook: Any) -> Tensor:
            passed[key] = True
            # Put back also where nothing is changed: what was shown must be what the gradient passes through. A copy,
            # since some models go on to write over what a map put out.
            shown = as_tokens(tensor, self._tokens)
            found = visit(key, shown)
            return (shown.clone() if found is None else found).reshape(tensor.shape)

        handle = place.add_hook(hook)

        def remove() -> None:
            handle.hook.remove()
            place.fwd_hooks.remove(handle)

        return remove


def _components(tree: nn.Module) -> dict[int, nn.Module]:
    """The bridge's component around each plain module, by the plain module's id.

    The outermost where several are: OPT's block is its own MLP's module too.
    """
    found: dict[int, nn.Module] = {}
    for module in tree.modules():
        if inside(module, "") is not module:
            found.setdefault(id(inside(module, "")), module)
    return found


def _copied(tree: nn.Module, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Fused parameters that the bridge has split into copies, which no longer follow them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for attention in tree.modules():
        if not {"q", "qkv"} <= attention._modules.keys():
            continue
        whole, part = (inside(attention.get_submodule(name), "") for name in ("qkv", "q"))
        for name, parameter in whole.named_parameters(recurse=False):
            split = part._parameters.get(name)
            if split is None or split.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
                yield names[id(parameter)], parameter
