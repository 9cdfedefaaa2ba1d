"""Record and replace what flows into or out of torch modules. The only file that registers hooks.

Both are context managers: hooks are gone when the block ends, however it ends. What is recorded and replaced is decided
here once; where the visitor is called from may be another engine's affair (`visiting`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor, nn

from memloc import experts, slices
from memloc.errors import ModelError

K = TypeVar("K")
Side = Literal["input", "output"]


@dataclass(frozen=True)
class Inside:
    """A place inside a module of experts; see `memloc.experts`.

    Attributes:
        place: which.
        names: of the module's two parameters, into the experts and out of them.
        expert: whose, or `experts.EVERY`.
    """

    place: experts.Inner
    names: tuple[str, str]
    expert: int = experts.EVERY


@dataclass(frozen=True)
class Point:
    """The input or the output of one module (its first argument, or the first part of its result).

    Attributes:
        module: the module.
        side: which of the two.
        block: the block it is in, where that may hand it its tokens flat, [n · t, f]: they are seen as [n, t, f], as
            the block got them.
        overwritten: the model goes on to write over what the module puts out, so it is handed a copy.
        inside: a place inside a module of experts instead of its input or output.
    """

    module: nn.Module
    side: Side
    block: nn.Module | None = None
    overwritten: bool = False
    inside: Inside | None = None


def refuse_inside(points: Mapping[K, Point]) -> None:
    """For engines that run a module of experts as it is.

    Raises:
        ModelError: a point is inside one.
    """
    for key, point in points.items():
        if point.inside is not None:
            raise ModelError(
                f"{key}: the inside of a module of experts is visited by plain hooks only; take engine hooks"
            )


class Visiting(Protocol):
    """How a visitor is brought to points: `visit(key, tensor)` is called there in every pass in the block.

    What it returns takes the tensor's place; None leaves it.
    """

    def __call__(
        self, points: Mapping[K, Point], visit: Callable[[K, Tensor], Tensor | None]
    ) -> AbstractContextManager[None]:
        """The block."""


class Stopped(Exception):  # noqa: N818 - a signal, not an error
    """Raised to leave a forward pass once everything asked for has been recorded."""


@contextlib.contextmanager
def visiting(points: Mapping[K, Point], visit: Callable[[K, Tensor], Tensor | None]) -> Iterator[None]:
    """By torch hooks; see `Visiting`."""
    with _hooked(points, visit):
        yield


@contextlib.contextmanager
def record(
    points: Mapping[K, Point], *, grad: bool = False, stop: bool = False, by: Visiting = visiting
) -> Iterator[dict[K, Tensor]]:
    """What flows through `points` in the last forward pass inside the block.

    Args:
        points: key to point.
        grad: keep the graph, and the gradient of every recorded tensor (`.grad` after a backward), also where all
            parameters are frozen; otherwise the tensors are detached.
        stop: leave the forward pass once every point has been seen. The rest of the `with` body is then skipped, so
            the forward should be its last statement.
        by: how the points are visited; by default by torch hooks.

    Yields:
        A dict that fills as the model runs: key to the tensor itself (not a copy).
    """
    seen: dict[K, Tensor] = {}

    def keep(key: K, tensor: Tensor) -> Tensor | None:
        changed = None
        if grad:
            if not tensor.requires_grad:
                changed = tensor = tensor.detach().requires_grad_(True)
            if not tensor.is_leaf:
                tensor.retain_grad()
        seen[key] = tensor if grad else tensor.detach()
        if stop and len(seen) == len(points):
            raise Stopped
        return changed

    with contextlib.suppress(Stopped), by(points, keep):
        yield seen


@contextlib.contextmanager
def replace(
    points: Mapping[K, Point], change: Callable[[K, Tensor], Tensor], *, by: Visiting = visiting
) -> Iterator[None]:
    """Put `change(key, tensor)` in the place of what flows through each of `points`, in every pass in the block."""
    with by(points, change):
        yield


@dataclass(frozen=True)
class Call:
    """What a module was called with: everything but the first argument, to call it again.

    Attributes:
        args: by position, the first left out.
        kwargs: by name, that first one left out.
        rows: how many rows there were.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    rows: int = 1

    def again(self, module: nn.Module, tensor: Tensor) -> Any:
        """The module's result on another tensor, of as many rows, or of any number where the call had one."""
        call = self.fitted(len(tensor))
        # Some blocks take a view of what they are handed, which must lie in one piece.
        return module(tensor.contiguous(), *call.args, **call.kwargs)

    def of_rows(self, rows: Tensor) -> Call:
        """The call on some of its rows, by index: of every tensor that has one part a row (a mask), those parts."""

        def part(value: Any) -> Any:
            own = isinstance(value, Tensor) and value.dim() > 1 and len(value) == self.rows
            return value[rows] if own else value

        kwargs = {name: part(value) for name, value in self.kwargs.items()}
        return Call(tuple(map(part, self.args)), kwargs, len(rows))

    def fitted(self, rows: int) -> Call:
        """The call for so many rows, where it had one: what is not broadcast over rows is repeated."""
        # Masks and positions of one row broadcast. Alibi does not: its first axis may be rows · heads.
        alibi = self.kwargs.get("alibi")
        if rows == self.rows or self.rows != 1 or alibi is None:
            return self
        return Call(self.args, {**self.kwargs, "alibi": alibi.repeat(rows, *[1] * (alibi.dim() - 1))}, rows)


@contextlib.contextmanager
def record_calls(modules: Mapping[K, nn.Module]) -> Iterator[dict[K, Call]]:
    """How each module was called in the last forward pass inside the block, its first argument left out."""
    seen: dict[K, Call] = {}
    with contextlib.ExitStack() as stack:
        for key, module in modules.items():

            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], key: K = key) -> None:
                rest = dict(kwargs)
                entering = args[0] if args else rest.pop("hidden_states")
                seen[key] = Call(args[1:], rest, len(entering))

            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield seen


@contextlib.contextmanager
def record_order(modules: Mapping[K, nn.Module]) -> Iterator[list[tuple[K, Tensor, Tensor]]]:
    """Every call of `modules` inside the block, in order: the key, copies of what entered and of what came out."""
    seen: list[tuple[K, Tensor, Tensor]] = []
    with contextlib.ExitStack() as stack:
        for key, module in modules.items():

            def hook(_: nn.Module, args: tuple[Any, ...], output: Any, key: K = key) -> None:
                if args and isinstance(args[0], Tensor) and isinstance(first(output), Tensor):
                    # Copies: some models add in place onto what a map put out.
                    seen.append((key, args[0].detach().clone(), first(output).detach().clone()))

            stack.callback(module.register_forward_hook(hook).remove)
        yield seen


@dataclass
class Traffic:
    """Tokens that went through modules, forward and backward, all modules together."""

    forward: int = 0
    backward: int = 0


@contextlib.contextmanager
def count_tokens(modules: Iterable[nn.Module]) -> Iterator[Traffic]:
    """Counts what goes through `modules`: forward when one is called, backward when a gradient reaches its output."""
    seen = Traffic()

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        tensor = first(output)
        tokens = tensor.shape[:-1].numel()
        seen.forward += tokens
        if tensor.requires_grad:

            def back(_: Tensor) -> None:
                seen.backward += tokens

            tensor.register_hook(back)  # type: ignore[no-untyped-call]

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)
        yield seen


@contextlib.contextmanager
def _hooked(points: Mapping[K, Point], visit: Callable[[K, Tensor], Tensor | None]) -> Iterator[None]:
    tokens: dict[nn.Module, tuple[int, ...]] = {}

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens[block] = tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])

    with contextlib.ExitStack() as stack:
        for block in dict.fromkeys(point.block for point in points.values() if point.block is not None):
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.enter_context(_inside(points, visit, tokens))
        for key, point in points.items():
            if point.inside is not None:
                continue
            seen = _unflattened(_copied(visit) if point.overwritten else visit, tokens, point.block)
            seen = _joined(seen, point.module, point.side)
            if point.side == "input":
                handle = point.module.register_forward_pre_hook(_before(key, seen), with_kwargs=True)
            else:
                handle = point.module.register_forward_hook(_after(key, seen))
            stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def _inside(
    points: Mapping[K, Point], visit: Callable[[K, Tensor], Tensor | None], tokens: Mapping[nn.Module, tuple[int, ...]]
) -> Iterator[None]:
    """Visitors brought to those points that are inside modules of experts, each shown [n, t, f]."""

    def at(key: K, block: nn.Module | None) -> experts.Visit:
        def shown(tensor: Tensor) -> Tensor | None:
            whole = tensor if block is None else tensor.view(*tokens[block], -1)
            found = visit(key, whole)
            # What was shown must be what a gradient passes through.
            found = whole if found is None and whole.requires_grad else found
            return None if found is None else found.reshape(tensor.shape)

        return shown

    by_module: dict[nn.Module, tuple[tuple[str, str], list[tuple[experts.Inner, int, experts.Visit]]]] = {}
    for key, point in points.items():
        if point.inside is not None:
            _, visits = by_module.setdefault(point.module, (point.inside.names, []))
            visits.append((point.inside.place, point.inside.expert, at(key, point.block)))
    with contextlib.ExitStack() as stack:
        for module, (names, visits) in by_module.items():
            stack.enter_context(experts.visiting(module, names, visits))
        yield


def _joined(
    visit: Callable[[K, Tensor], Tensor | None], module: nn.Module, side: Side
) -> Callable[[K, Tensor], Tensor | None]:
    """`visit`, shown a tensor whole also where this process has a slice of it only."""

    def shown(key: K, tensor: Tensor) -> Tensor | None:
        cut = slices.cut(module, side, tensor)
        if cut is None:
            return visit(key, tensor)
        whole = cut.join(tensor)
        found = visit(key, whole)
        return cut.part(whole if found is None else found)

    return shown


def _copied(visit: Callable[[K, Tensor], Tensor | None]) -> Callable[[K, Tensor], Tensor]:
    """`visit`, after which the model goes on with a tensor of its own."""

    def shown(key: K, tensor: Tensor) -> Tensor:
        found = visit(key, tensor)
        return (tensor if found is None else found).clone()

    return shown


def _unflattened(
    visit: Callable[[K, Tensor], Tensor | None], tokens: Mapping[nn.Module, tuple[int, ...]], block: nn.Module | None
) -> Callable[[K, Tensor], Tensor | None]:
    """`visit`, shown [n, t, f] where the module is handed [n · t, f]."""

    def shown(key: K, tensor: Tensor) -> Tensor | None:
        if block is None or tensor.dim() != 2:
            return visit(key, tensor)
        whole = tensor.view(*tokens[block], -1)
        found = visit(key, whole)
        # Put back also where nothing is changed: what was shown must be what the gradient passes through.
        return (whole if found is None else found).flatten(0, 1)

    return shown


def _before(key: K, visit: Callable[[K, Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = visit(key, args[0] if args else kwargs["hidden_states"])
        if found is None:
            return None
        return ((found, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": found})

    return hook


def _after(key: K, visit: Callable[[K, Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        found = visit(key, first(output))
        if found is None:
            return None
        return (found, *output[1:]) if isinstance(output, tuple) else found

    return hook


def first(output: Any) -> Tensor:
    """A module's tensor: its output, or the first part of it where it returns a tuple."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


@contextlib.contextmanager
def rank_calls(modules: Iterable[nn.Module]) -> Iterator[dict[tuple[int, Side], int]]:
    """When each module was first entered and left: (its id, side) to a rank. Fills as the model runs."""
    seen: dict[tuple[int, Side], int] = {}

    def entered(module: nn.Module, _: Any) -> None:
        seen.setdefault((id(module), "input"), len(seen))

    def left(module: nn.Module, _: Any, __: Any) -> None:
        seen.setdefault((id(module), "output"), len(seen))

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(entered).remove)
            stack.callback(module.register_forward_hook(left).remove)
        yield seen


def count_hooks(modules: Iterable[nn.Module]) -> int:
    """How many hooks of this file there are on `modules` (transformers keeps some of its own there)."""
    there = [
        hook for module in modules for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return sum(getattr(hook, "__module__", None) == __name__ for hook in there)
