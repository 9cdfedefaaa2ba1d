"""Names given as text, `module:name`, resolved when they are first asked for and never at import.

A package offers the names of its files without importing them, and a type is drawn by a module that stands floors above
it, without the type importing anything.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def resolve(target: str) -> Any:
    """What `module:name` names; imports the module."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def offer(package: str, table: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package that offers the names of `table`, each imported when it is used.

    Args:
        package: the package's name.
        table: name to "module:name".

    Returns:
        The two functions; the first raises AttributeError with a near name for one that is not offered.
    """

    def look_up(name: str) -> Any:
        if name in table:
            return resolve(table[name])
        raise AttributeError(_unknown(package, name, table))

    def names() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *table})

    return look_up, names


def method(target: str) -> Callable[[Any], str]:
    """A method without arguments whose body is the function `module:name`, imported when it is called."""

    def call(self: Any) -> str:
        text: str = resolve(target)(self)
        return text

    return call


def _unknown(package: str, name: str, table: Mapping[str, str]) -> str:
    import difflib

    # Dunders are asked for by tools, submodules by the import system: neither wants a suggestion.
    near = [] if name.startswith("__") else difflib.get_close_matches(name, table, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{package} offers no {name!r}; {hint}Known: {', '.join(sorted(table))}."
