"""Ports: places where activations are read and replaced, those of a whole block among them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from memloc.errors import InputError
from memloc.sites import Kind, Site
from memloc.view import ModelView

Side = Literal["added", "residual", "input", "output"]


@dataclass(frozen=True, order=True)
class Port:
    """Where activations are changed.

    Attributes:
        side: "added" (what a block adds to the residual stream), "residual" (the stream after a block; layer -1 is
            what enters the first), "input" or "output" of a map.
        layer: the block's.
        kind: of the map, for the last two.
    """

    side: Side
    layer: int
    kind: Kind | None = None

    @property
    def site(self) -> Site:
        """The map's site."""
        if self.kind is None:
            raise InputError(f"{self} is no map")
        return Site(self.layer, self.kind)

    def __str__(self) -> str:
        return f"L{self.layer}.{self.side}" if self.kind is None else f"{self.site}.{self.side}"


def width(view: ModelView, port: Port) -> int:
    """How many numbers a token has at `port`."""
    if port.kind is None:
        return view.width
    out, into = view.weight(port.site).shape
    return int(into if port.side == "input" else out)


@contextlib.contextmanager
def changing(view: ModelView, port: Port, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Put `change(values)` [n, t, width] in the place of what passes `port`, in every pass in the block.

    Where `change` gives None, nothing is touched, to the bit. What a block adds is its output less its input.
    """
    with contextlib.ExitStack() as stack:
        if port.kind is not None:
            side: Literal["input", "output"] = "input" if port.side == "input" else "output"
            stack.enter_context(view.replace([port.site], lambda _, x: _or(change(x), x), side=side))
        elif port.side == "residual":
            side = "output" if port.layer >= 0 else "input"
            layer = max(0, port.layer)
            stack.enter_context(view.replace_blocks([layer], lambda _, x: _or(change(x), x), side=side))
        else:
            entered: list[Tensor] = []

            def enter(_: int, before: Tensor) -> Tensor:
                entered[:] = [before]
                return before

            def leave(_: int, after: Tensor) -> Tensor:
                before = entered.pop()
                added = change(after - before)
                return after if added is None else before + added

            stack.enter_context(view.replace_blocks([port.layer], enter, side="input"))
            stack.enter_context(view.replace_blocks([port.layer], leave, side="output"))
        yield


def _or(found: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if found is None else found
