"""What a run takes, told before it runs and counted while it does: tokens through blocks, and working memory.

The unit is the block-token: one token through one block. A forward of n passages of t tokens takes n·t·l of them; a
token run again on its cached prefix, or from the middle of the model, takes what it takes and no more.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from memloc import hooks
from memloc.batches import batches, length_read
from memloc.passages import Passages
from memloc.view import ModelView


@dataclass(frozen=True)
class Cost:
    """What a run takes.

    Attributes:
        forward: block-tokens, forward.
        backward: block-tokens, backward.
        bytes: working memory at its highest, model and results apart; an upper estimate.
        bound: forward and backward are "exact", or a run that decides on its way how long to go takes "at most" or
            "at least" so many.
    """

    forward: int
    backward: int = 0
    bytes: int = 0
    bound: Literal["exact", "at most", "at least"] = "exact"

    def __add__(self, other: Cost) -> Cost:
        """One run after the other: passes add up, memory is the larger."""
        bound = other.bound if self.bound == "exact" else self.bound
        passes = (self.forward + other.forward, self.backward + other.backward)
        return Cost(*passes, max(self.bytes, other.bytes), bound)

    def times(self, count: int) -> Cost:
        """`count` such runs, one after another."""
        return Cost(self.forward * count, self.backward * count, self.bytes, self.bound)

    def told(self, view: ModelView, passages: Passages) -> str:
        """One line for people, in passes over all the passages."""
        whole = max(1, view.layers * sum(length_read(item, view.mask_token) for item in passages))
        bound = "" if self.bound == "exact" else f"{self.bound} "
        ways = [f"{bound}{_round(self.forward / whole)} forward"]
        ways += [f"{_round(self.backward / whole)} backward"] if self.backward else []
        memory = f"; working memory up to {_size(self.bytes)}" if self.bytes else ""
        return f"{' and '.join(ways)} passes over {len(passages)} passages{memory}"


def block_tokens(view: ModelView, passages: Passages, *, size: int) -> int:
    """Block-tokens of one forward over `passages` in batches of `size`, padding counted as it is run."""
    return view.layers * sum(batch.ids.numel() for batch in batches(passages, size=size, cloze=view.mask_token))


def widest(passages: Passages, *, size: int) -> tuple[int, int]:
    """Rows and tokens of the largest batch, what stands behind suffixes counted."""
    shapes = [batch.ids.shape for batch in batches(passages, size=size, cloze=0)]
    rows, tokens = max(shapes, key=lambda shape: shape[0] * shape[1])
    return rows, tokens


def pass_bytes(view: ModelView, tokens: int, *, context: int, grad: bool = False, unembedded: int = 0) -> int:
    """About what `tokens` tokens of context `context` keep in memory at once: an upper estimate.

    Args:
        view: the model.
        tokens: rows times length of a batch.
        context: its length, for attention.
        grad: all layers are kept for a backward pass; otherwise two are alive at a time.
        unembedded: positions whose logits are computed.
    """
    block = 20 * view.width + 6 * max(view.widths) + 4 * view.heads * view.head_width + 3 * view.heads * context
    numbers = tokens * block * (view.layers if grad else 2) + 4 * unembedded * view.vocab
    wide = 8 if view.dtype == torch.float64 else 4
    # Masks and positions, whatever the size.
    return numbers * wide * (2 if grad else 1) + 64 * tokens * context + 2**16


@dataclass
class Spent:
    """What was counted; see `Cost`."""

    forward: int = 0
    backward: int = 0
    bytes: int = 0


@contextlib.contextmanager
def counted(view: ModelView) -> Iterator[Spent]:
    """Count what happens inside the block: tokens through the model's blocks, and memory at its highest.

    Complete when the block is left. Every operation is looked at, so what runs inside is slower.
    """
    spent, meter = Spent(), _Meter()
    blocks = [view.block(layer) for layer in range(view.layers)]
    with hooks.count_tokens(blocks) as seen, meter:
        yield spent
    spent.forward, spent.backward, spent.bytes = seen.forward, seen.backward, meter.highest


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that were made inside and are still alive, at their highest."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive, self.highest = 0, 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(entry.untyped_storage()) for entry in tree_iter((args, kwargs)) if isinstance(entry, Tensor)}
        found = func(*args, **(kwargs or {}))
        for entry in tree_iter(found):
            if isinstance(entry, Tensor) and id(entry.untyped_storage()) not in before:
                self._made(entry.untyped_storage())
        return found

    def _made(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.alive += storage.nbytes()
        self.highest = max(self.highest, self.alive)
        weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.alive -= size


def _round(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _size(count: int) -> str:
    return f"{count / 2**20:.0f} MB" if count < 2**30 else f"{count / 2**30:.1f} GB"
