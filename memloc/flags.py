"""A method's fields as command-line flags, and data files as arguments. No torch here."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Union

from memloc.errors import InputError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage; the command line prints the line and exits with 2."""
        raise InputError(f"{message}; see `{self.prog} --help`")


@dataclass(frozen=True)
class DataFile:
    """A file of records and which of them: `FILE` or `FILE#key=value[,value...]`.

    `lab/passages.jsonl#dose=64` names the records whose `dose` is 64, `...#id=a,b` those called a and b.
    """

    path: Path
    key: str | None = None
    values: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> DataFile:
        """From the command line."""
        head, mark, tail = text.rpartition("#")
        if not mark or "=" not in tail or Path(text).exists():
            return cls(Path(text))
        key, _, values = tail.partition("=")
        return cls(Path(head), key, tuple(values.split(",")))

    def keeps(self, record: Any) -> bool:
        """Whether a passage or fact (with `id` and `tags`) or a plain record is meant."""
        if self.key is None:
            return True
        if isinstance(record, Mapping):
            return str(record.get(self.key)) in self.values
        found = record.id if self.key == "id" else record.tags.get(self.key)
        return str(found) in self.values

    def __str__(self) -> str:
        return str(self.path) if self.key is None else f"{self.path}#{self.key}={','.join(self.values)}"


def shard(text: str) -> tuple[int, int]:
    """Number and count from "1/4" (numbers from 1).

    Raises:
        InputError: not of that form, or a number outside the count.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"--shard {text}: expected NUMBER/COUNT, such as 1/4, numbers from 1 to the count")
    return int(found[1]), int(found[2])


def add_fields(parser: argparse.ArgumentParser, method: type) -> list[str]:
    """One flag for every field of `method` (a dataclass) that a shell can spell; returns those fields' names.

    `int`, `float`, `str`, `bool`, `Path`, enums, `Literal`, their optional forms and homogeneous tuples have flags,
    and so has the one such form of a field that may be something else in Python (`Moments | Path`); other fields
    (tensors, say) are for Python. Fields named as a flag that is already there share it.
    """
    taken = {option for action in parser._actions for option in action.option_strings}
    hints = typing.get_type_hints(method)
    told = _told(method)
    group = parser.add_argument_group("settings of this method")
    names = []
    for item in dataclasses.fields(method):
        flag = f"--{item.name.replace('_', '-')}"
        options = _options(hints[item.name])
        if options is None:
            continue
        names.append(item.name)
        if flag in taken:
            continue
        default = None if item.default is dataclasses.MISSING else item.default
        shown = f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
        text = (told.get(item.name, "") + ("" if default is None else shown)).strip().replace("%", "%%")
        group.add_argument(flag, dest=item.name, default=argparse.SUPPRESS, help=text or None, **options)
    return names


def build(method: type, names: list[str], arguments: argparse.Namespace) -> Any:
    """`method` with the fields that were given on the command line."""
    hints = typing.get_type_hints(method)
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
        elif isinstance(hints[name], type) and issubclass(hints[name], enum.Enum):
            given[name] = hints[name](value)
    return method(**given)


def _options(hint: Any) -> dict[str, Any] | None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        spelled = [part for part in arguments if part is not type(None) and _options(part) is not None]
        # What may be an object in Python is a file in a shell, whether Python may give its path as text or not.
        return _options(Path if Path in spelled else spelled[0]) if Path in spelled or len(spelled) == 1 else None
    if origin is Literal:
        return {"choices": list(arguments), "type": type(arguments[0])}
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        inner = _options(arguments[0])
        return None if inner is None or "action" in inner else {**inner, "nargs": "*"}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"type": _member(hint), "choices": list(hint)}
    if hint is Path:
        return {"type": Path, "metavar": "FILE"}
    if hint in (int, float, str):
        return {"type": hint, "metavar": hint.__name__.upper()}
    return None


def _member(kind: type[enum.Enum]) -> Callable[[str], enum.Enum]:
    def convert(text: str) -> enum.Enum:
        try:
            return kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(str(m.value) for m in kind)}") from error

    return convert


def _told(method: type) -> dict[str, str]:
    """What the docstring's Attributes (or Args) section says of each field, or that of the class it comes from."""
    text = "\n".join(sys.intern(base.__doc__ or "") for base in reversed(method.__mro__))
    found: dict[str, str] = {}
    for name, rest in re.findall(r"^ {8}(\w+): (.*(?:\n {10,}.*)*)", text, re.MULTILINE):
        found[name] = " ".join(rest.split())
    return found
