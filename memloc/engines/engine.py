"""What an engine is: how visitors are brought to places in a model, and how the model is run.

What it means to record, to replace or to take a gradient is decided once, in `memloc/hooks.py`; an engine only says
where a visitor is called from. So the same method gives the same numbers by plain torch hooks, by nnsight's tracing
and by TransformerLens's hook points, and a test can hold them to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from memloc import hooks
from memloc.errors import UnknownName
from memloc.hooks import Point

K = TypeVar("K")

HOOKS, NNSIGHT, TRANSFORMER_LENS = "hooks", "nnsight", "transformer-lens"
ENGINES = (HOOKS, NNSIGHT, TRANSFORMER_LENS)


class Engine(Protocol):
    """A way to run a model and to be called at places in it.

    Points are of the plain transformers model's modules, whatever the engine runs. Tensors are shown to visitors as
    the plain model has them, [n, t, width].
    """

    @property
    def name(self) -> str:
        """What it is called on the command line."""

    def visiting(
        self, points: Mapping[K, Point], visit: Callable[[K, Tensor], Tensor | None]
    ) -> AbstractContextManager[None]:
        """Call `visit(key, tensor)` at every point in every run in the block; see `hooks.Visiting`.

        Raises:
            ModelError: the engine has no such place.
        """

    def run(self, module: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """The result of `module`, the plain model or its base, on keyword `inputs`."""


@dataclass(frozen=True)
class PlainHooks:
    """The default: torch hooks on the model's own modules."""

    name: str = HOOKS

    def visiting(
        self, points: Mapping[K, Point], visit: Callable[[K, Tensor], Tensor | None]
    ) -> AbstractContextManager[None]:
        """By torch hooks."""
        return hooks.visiting(points, visit)

    def run(self, module: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """Calls it."""
        return module(**inputs)


def as_tokens(tensor: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """[n, t, width], where a module is handed [n · t, width] (OPT's MLP) or heads apart, [n, t, h, width of one]."""
    if tensor.dim() > 3:
        return tensor.flatten(2)
    flat = tensor.dim() == 2 and tensor.is_floating_point() and len(tensor) == tokens[0] * tokens[1]
    return tensor.reshape(*tokens, -1) if flat else tensor


def check_name(engine: str) -> None:
    """Refuse a name that is no engine's.

    Raises:
        UnknownName: the known names are told.
    """
    if engine not in ENGINES:
        raise UnknownName(f"no engine called {engine!r}; engines: {', '.join(ENGINES)}")
