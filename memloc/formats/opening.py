"""A file is opened by its first bytes, whatever its name is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from memloc.errors import InputError
from memloc.formats import content
from memloc.formats.arrays import read_npy, read_parquet, read_pt
from memloc.formats.content import Content, filled
from memloc.formats.records import read_csv, read_json_list, read_json_objects

PICKLE = "a pickle, which can run code; save arrays with numpy.save, tensors with torch.save"


def open_content(path: str | Path) -> Content:
    """Open a file by its first bytes, whatever its name is.

    Raises:
        InputError: no such file, empty, compressed, pickled, not UTF-8, larger than `LIMIT`, or not what its first
            bytes promise.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(8)
        size = path.stat().st_size
    except OSError as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else (error.strerror or str(error))
        raise InputError(f"{path}: {why}") from error
    if not size:
        raise InputError(f"{path}: empty, no record in it")
    for magic, reader in MAGIC.items():
        if head.startswith(magic):
            return reader(path)
    if size > content.LIMIT:
        raise InputError(f"{path}: {size} bytes; at most {content.LIMIT} are read whole; cut the file")
    return _textual(path)


def _refused(why: str) -> Callable[[Path], Content]:
    def reader(path: Path) -> NoReturn:
        raise InputError(f"{path}: {why}; nothing in it was run")

    return reader


MAGIC: dict[bytes, Callable[[Path], Content]] = {
    b"\x93NUMPY": read_npy,
    b"PK\x03\x04": read_pt,
    b"PAR1": read_parquet,
    **{bytes((0x80, protocol)): _refused(PICKLE) for protocol in (2, 3, 4, 5)},
    b"\x1f\x8b": _refused("compressed by gzip; unpack it first"),
}
"""First bytes of what is no text, and its reader."""


def _textual(path: Path) -> Content:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no JSON; line ends become \n
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}, and no array or tensor either") from error
    bare = text.lstrip()
    if not bare:
        raise InputError(f"{path}: blank, no record in it")
    if "\0" in text:
        raise InputError(f"{path}: holds zero bytes, so it is no text, and no array or tensor either")
    if bare[0] == "[":
        found = read_json_list(path, text)
    elif bare[0] == "{":
        found = read_json_objects(path, text)
    else:
        return read_csv(path, text) or Content(path, "text", text=text)
    return filled(found)
