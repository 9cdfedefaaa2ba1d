"""Tables of methods: explicit names to `module:Class`, resolved when asked for and never at import.

A table is answered without importing the methods (their first docstring line is read from the source), so
`memloc list` needs no torch.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memloc.errors import UnknownName


class Registry(Mapping[str, Any]):
    """Names to classes, each given as `module:Class` and imported on first use.

    Args:
        noun: what the entries are called in messages, such as "localizer".
        table: name to "module:Class".
    """

    def __init__(self, noun: str, table: Mapping[str, str]) -> None:
        self.noun = noun
        self._table = dict(table)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def target(self, name: str) -> tuple[str, str]:
        """The module and class of `name`, not imported.

        Raises:
            UnknownName: no such entry; the message suggests near names.
        """
        if name not in self._table:
            near = difflib.get_close_matches(name, self._table, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UnknownName(f"no {self.noun} called {name!r}; {hint}Known: {', '.join(sorted(self._table))}.")
        module, _, attribute = self._table[name].partition(":")
        return module, attribute

    def __getitem__(self, name: str) -> Any:
        """The class called `name`; imports its module."""
        module, attribute = self.target(name)
        return getattr(importlib.import_module(module), attribute)

    def source(self, name: str) -> Path:
        """The file that holds `name`; the module itself is not imported."""
        spec = importlib.util.find_spec(self.target(name)[0])
        if spec is None or spec.origin is None:
            raise UnknownName(f"{self.noun} {name!r} points at {self._table[name]}, which does not exist")
        return Path(spec.origin)

    def summary(self, name: str) -> str:
        """First line of the class's docstring, read from the source."""
        tree = ast.parse(self.source(name).read_text(encoding="utf8"))
        wanted = self.target(name)[1]
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == wanted:
                return (ast.get_docstring(node) or "").split("\n")[0]
        raise UnknownName(f"{self.noun} {name!r} points at {self._table[name]}, which has no such class")
