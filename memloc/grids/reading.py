"""A TOML table taken apart key by key: what is there, of which kind, and that nothing is there which nobody reads."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from memloc.errors import InputError


def read_toml(path: Path, values: Mapping[str, str]) -> Any:
    """What a TOML file holds, with every {NAME} in its texts replaced.

    Raises:
        InputError: not a TOML file, or a name that `values` lacks; the file is named.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as TOML: {error}") from error
    return _filled(content, values, path.name)


class Table:
    """One table of a file; keys are taken, and what is left over is an error.

    Args:
        where: how messages call it, such as "heads.toml: measure[0]".
        values: its keys.
    """

    def __init__(self, where: str, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise InputError(f"{where}: {values!r}; expected a table of keys")
        self.where = where
        self._values = dict(values)
        self._known: list[str] = []

    def wrong(self, key: str, found: Any, expected: str) -> InputError:
        """The error that says so."""
        shown = "missing" if found is None else f"{found!r}"
        return InputError(f"{self.where}: {key}: {shown}; expected {expected}")

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys not taken yet."""
        return tuple(self._values)

    def has(self, key: str) -> bool:
        """Whether the key is there and not taken yet."""
        return key in self._values

    def lists(self, key: str) -> bool:
        """Whether the key holds a list."""
        return isinstance(self._values.get(key), list)

    def take(self, key: str, expected: str, default: Any = None, *, needed: bool = False) -> Any:
        """The value of `key`, if it is what `expected` says: "text", "number", "whole number", "true or false".

        "list of text" and its like take a single value for a list of one.

        Raises:
            InputError: missing where needed, or of another kind.
        """
        self._known.append(key)
        found = self._values.pop(key, None)
        if found is None and not needed:
            return default
        many = expected.startswith("list of ")
        kind = expected.removeprefix("list of ")
        entries = found if many and isinstance(found, Sequence) and not isinstance(found, str) else [found]
        if not entries or not all(_is(entry, kind) for entry in entries):
            raise self.wrong(key, found, f"a {expected}" + (" with an entry" if many else ""))
        return tuple(entries) if many else found

    def choice(self, key: str, allowed: Sequence[str], default: str | None = None, *, many: bool = False) -> Any:
        """A text (or, with `many`, a tuple of texts) among `allowed`."""
        found = self.take(key, "list of text" if many else "text", default, needed=default is None)
        for entry in found if many and not isinstance(found, str) else [found]:
            if entry not in allowed:
                raise self.wrong(key, entry, f"one of {', '.join(allowed)}")
        return (found,) if many and isinstance(found, str) else found

    def tables(self, key: str, *, needed: bool = True) -> list[Table]:
        """The tables of an array `[[key]]`."""
        self._known.append(key)
        found = self._values.pop(key, None)
        if found is None and not needed:
            return []
        if not isinstance(found, list) or not found:
            raise self.wrong(key, found, f"at least one table [[{key}]]")
        return [Table(f"{self.where}: {key}[{index}]", entry) for index, entry in enumerate(found)]

    def named(self, key: str) -> dict[str, Table]:
        """The tables `[key.NAME]`."""
        self._known.append(key)
        found = self._values.pop(key, None)
        if not isinstance(found, Mapping) or not found:
            raise self.wrong(key, found, f"at least one table [{key}.NAME]")
        return {name: Table(f"{self.where}: {key}.{name}", entry) for name, entry in found.items()}

    def build(self, method: type) -> Any:
        """`method`, a dataclass, with the keys that are left as its settings."""
        hints = typing.get_type_hints(method)
        names = [item.name for item in dataclasses.fields(method) if item.init]
        self._known += names
        given = {key: self._values.pop(key) for key in names if key in self._values}
        self.done()
        for key, value in given.items():
            if not _fits(value, hints[key]):
                raise self.wrong(key, value, str(getattr(hints[key], "__name__", hints[key])).replace("typing.", ""))
        try:
            return method(**given)
        except InputError as error:
            raise InputError(f"{self.where}: {error}") from error

    def done(self) -> None:
        """Raise for a key that nobody took."""
        for key in self._values:
            near = difflib.get_close_matches(key, self._known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"{self.where}: no key is called {key!r}; {hint}known: {', '.join(self._known)}")


def _is(value: Any, kind: str) -> bool:
    if kind == "true or false":
        return isinstance(value, bool)
    if kind == "table":
        return isinstance(value, Mapping)
    if kind == "whole number":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, str) and bool(value)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, list) and all(_fits(entry, arguments[0]) for entry in value)
    if hint in (int, float):
        return _is(value, "whole number" if hint is int else "number")
    return isinstance(hint, type) and isinstance(value, hint)


def _filled(value: Any, values: Mapping[str, str], where: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled(entry, values, where) for key, entry in value.items()}
    if isinstance(value, list):
        return [_filled(entry, values, where) for entry in value]
    if not isinstance(value, str) or "{" not in value:
        return value
    try:
        return value.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        missing = str(error).strip("'\"")
        raise InputError(f"{where}: {value!r} names {{{missing}}}; give it with --with {missing}=VALUE") from error
