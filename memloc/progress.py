"""Progress of long work: loops announce themselves, whoever listens draws. Silent unless somebody listens."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int | None, str], None]
"""Called with (label, done, total or None, a short note such as the latest loss)."""

_listener: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("memloc_progress", default=None)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Send the progress of everything inside the block to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def steps(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """`items`, announced one by one; `total` is found by len() where it can be."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    tell(label, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        tell(label, done, total)


def tell(label: str, done: int, total: int | None, note: str = "") -> None:
    """Announce one step by hand."""
    listener = _listener.get()
    if listener is not None:
        listener(label, done, total, note)
