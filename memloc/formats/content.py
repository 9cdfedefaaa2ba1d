"""What is in a file, before anyone says what it means: records with their lines, a matrix of token ids, or text.

Files come from strangers: nothing here runs what a file holds. Pickles are refused, arrays and tensors are mapped and
checked against the size of their file before a row is read, JSON with a key twice or a number that is none is refused.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from memloc.errors import InputError

if TYPE_CHECKING:
    import numpy as np

LIMIT = 2**31
"""Bytes of the largest JSON, CSV or text file that is read whole."""
PICKLE_LIMIT = 2**16
"""Bytes of the largest description of tensors in a .pt file; one of a single matrix takes a few hundred."""

Row = tuple[str, Any]
"""Where a record stands ("line 3", "row 0"), and the record."""


@dataclass(frozen=True)
class Problem:
    """A record that cannot be used, and why."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        path: the file.
        container: how it is written: "JSON list", "JSON lines", "JSON object", "CSV", "parquet", "npy", "pt", "text".
        rows: its records, for containers of records.
        problems: records that could not even be parsed.
        matrix: token ids [n, t], for "npy" and "pt".
        text: the whole text, for "text".
    """

    path: Path
    container: str
    rows: tuple[Row, ...] = ()
    problems: tuple[Problem, ...] = ()
    matrix: np.ndarray[Any, Any] | None = field(default=None, repr=False)
    text: str = field(default="", repr=False)

    @cached_property
    def first(self) -> Any:
        """The first record, by which a file is recognised; None where there is none."""
        return self.rows[0][1] if self.rows else None

    @property
    def keys(self) -> frozenset[str]:
        """Keys of the first record; empty where it is no object."""
        return frozenset(self.first) if isinstance(self.first, Mapping) else frozenset()

    def has(self, *keys: str) -> bool:
        """Whether the first record has all of `keys`."""
        return self.keys.issuperset(keys)

    def described(self) -> str:
        """What was seen, in a few words."""
        if self.matrix is not None:
            return f"{self.container} with {self.matrix.dtype} of shape {list(self.matrix.shape)}"
        if self.container == "text":
            return f"text of {len(self.text)} characters"
        if isinstance(self.first, Mapping):
            return f"{self.container} whose first record has the keys {', '.join(sorted(self.keys)) or '(none)'}"
        return f"{self.container} whose first record is a {type(self.first).__name__}"


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
        raise InputError(f"{path}: empty; expected at least one record")
    for magic, reader in MAGIC.items():
        if head.startswith(magic):
            return reader(path)
    if size > LIMIT:
        raise InputError(f"{path}: {size} bytes; at most {LIMIT} are read whole; cut the file")
    return _textual(path)


# -- arrays and tensors -----------------------------------------------------------------------------------------------


def _npy(path: Path) -> Content:
    import numpy as np

    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, OverflowError, MemoryError, TypeError) as error:
        raise InputError(f"{path}: not a plain array of numbers ({_short(error)}); nothing in it was run") from error
    return Content(path, "npy", matrix=_ids(path, found))


def _pt(path: Path) -> Content:
    _check_archive(path)
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler of an untrusted file may raise anything
        raise InputError(f"{path}: not a plain tensor ({_short(error)}); nothing in it was run") from error
    if not isinstance(found, torch.Tensor):
        raise InputError(f"{path}: found {type(found).__name__}, expected one tensor [n, t] of token ids")
    kind = str(found.dtype).removeprefix("torch.")
    if found.layout != torch.strided or found.is_quantized or found.is_floating_point() or found.is_complex():
        raise InputError(f"{path}: a tensor of {kind}; expected token ids, [n, t] of an integer kind")
    if found.numel() * found.element_size() > path.stat().st_size:
        raise InputError(f"{path}: a tensor of shape {list(found.shape)} claims more than the file holds")
    return Content(path, "pt", matrix=_ids(path, found.numpy()))


def _check_archive(path: Path) -> None:
    """Refuse archives that grow when read and long pickles, before anything is read from them.

    Raises:
        InputError: not an archive torch wrote, a compressed entry, an entry longer than the file, a long pickle.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise InputError(f"{path}: an archive that cannot be read ({_short(error)})") from error
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        names = ", ".join(entry.filename for entry in entries[:4])
        raise InputError(f"{path}: an archive of {names or 'nothing'}; expected a tensor that torch.save wrote")
    grown = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if grown or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise InputError(f"{path}: {(grown or ['its content'])[0]} grows when unpacked; torch.save does not compress")
    if pickles[0].file_size > PICKLE_LIMIT:
        raise InputError(
            f"{path}: {pickles[0].file_size} bytes describe its tensors, at most {PICKLE_LIMIT} are read; "
            "expected one tensor"
        )


def _ids(path: Path, found: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if found.dtype.kind not in "iu":
        raise InputError(f"{path}: values of {found.dtype}; expected token ids, [n, t] of an integer kind")
    if found.ndim != 2 or not found.size:
        raise InputError(f"{path}: shape {list(found.shape)}; expected [n, t], rows of token ids")
    return found


def _refused(why: str) -> Callable[[Path], Content]:
    def reader(path: Path) -> NoReturn:
        raise InputError(f"{path}: {why}; nothing in it was run")

    return reader


def _parquet(path: Path) -> Content:
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise InputError(f"{path}: parquet; `pip install pyarrow`, or give JSON lines") from error
    try:
        file = parquet.ParquetFile(path)
        meta = file.metadata
        size = sum(meta.row_group(index).total_byte_size for index in range(meta.num_row_groups))
        if size > LIMIT:
            raise InputError(f"{path}: {size} bytes unpacked; at most {LIMIT} are read whole; cut the file")
        records = file.read().to_pylist()
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: parquet that cannot be read ({_short(error)})") from error
    return _filled(Content(path, "parquet", tuple((f"row {index}", row) for index, row in enumerate(records))))


MAGIC: dict[bytes, Callable[[Path], Content]] = {
    b"\x93NUMPY": _npy,
    b"PK\x03\x04": _pt,
    b"PAR1": _parquet,
    b"\x80\x02": _refused("a pickle, which can run code; save arrays with numpy.save, tensors with torch.save"),
    b"\x80\x03": _refused("a pickle, which can run code; save arrays with numpy.save, tensors with torch.save"),
    b"\x80\x04": _refused("a pickle, which can run code; save arrays with numpy.save, tensors with torch.save"),
    b"\x80\x05": _refused("a pickle, which can run code; save arrays with numpy.save, tensors with torch.save"),
    b"\x1f\x8b": _refused("compressed by gzip; unpack it first"),
}
"""First bytes of what is no text, and its reader."""


# -- JSON, CSV, text --------------------------------------------------------------------------------------------------


def _textual(path: Path) -> Content:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no JSON; line ends become \n
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}, and no array or tensor either") from error
    bare = text.lstrip()
    if not bare:
        raise InputError(f"{path}: blank; expected at least one record")
    if "\0" in text:
        raise InputError(f"{path}: holds zero bytes, so it is no text, and no array or tensor either")
    if bare[0] == "[":
        found = _json_list(path, text)
    elif bare[0] == "{":
        found = _json_objects(path, text)
    else:
        return _csv(path, text) or Content(path, "text", text=text)
    return _filled(found)


def _filled(content: Content) -> Content:
    if not content.rows and not content.problems:
        raise InputError(f"{content.path}: {content.container} without a record; expected at least one")
    return content


def _json_list(path: Path, text: str) -> Content:
    """The entries of a list, one by one, so that each has its line."""
    rows: list[Row] = []
    decoder, at, line, seen = _decoder(), text.index("[") + 1, 1, 0
    try:
        at = _space(text, at)
        while not text.startswith("]", at):
            line, seen = line + text.count("\n", seen, at), at
            record, at = decoder.raw_decode(text, at)
            rows.append((f"record {len(rows)} (line {line})", record))
            at = _space(text, at)
            if text.startswith(",", at):
                at = _space(text, at + 1)
            elif not text.startswith("]", at):
                raise ValueError(f"expected ',' or ']' after record {len(rows) - 1}")
        if text[at + 1 :].strip():
            raise ValueError("more text after the list")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {1 + text.count(chr(10), 0, at)}: not JSON ({_short(error)})") from error
    return Content(path, "JSON list", tuple(rows))


def _json_objects(path: Path, text: str) -> Content:
    """One object in the whole file, or one a line."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows, problems = [], []
    for number, line in lines:
        try:
            rows.append((f"line {number}", _decoder().decode(line.strip())))
        except (ValueError, RecursionError) as error:
            if number == lines[0][0]:
                return _one_object(path, text)
            problems.append(Problem(f"line {number}", f"not JSON ({_short(error)})"))
    return Content(path, "JSON lines" if len(lines) > 1 else "JSON object", tuple(rows), tuple(problems))


def _one_object(path: Path, text: str) -> Content:
    try:
        return Content(path, "JSON object", (("line 1", _decoder().decode(text.strip())),))
    except (ValueError, RecursionError) as error:
        at = re.search(r"line (\d+)", str(error))
        line = int(at.group(1)) + text[: len(text) - len(text.lstrip())].count("\n") if at else 1
        raise InputError(f"{path}, line {line}: not JSON ({_short(error)})") from error


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) < float("inf") else _no_number(text)


def _space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


COLUMNS = frozenset({
    "text", "prefix", "suffix", "prompt", "completion", "question", "answer", "paragraph", "id", "count", "em", "nll",
    "index", "tokens", "score", "subject", "target", "target_true", "target_new",
})  # fmt: skip
"""Columns that some format reads; a first line of two of them, or a .csv name, makes a text a table."""


def _csv(path: Path, text: str) -> Content | None:
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        header = [name.strip() for name in next(reader)]
    except (csv.Error, StopIteration):
        return None
    if path.suffix.lower() != ".csv" and len(COLUMNS.intersection(header)) < 2:
        return None
    if len(set(header)) < len(header):
        raise InputError(f"{path}, line 1: a column named twice in {', '.join(header)}")
    rows, problems, line = [], [], reader.line_num + 1
    for cells, line in _csv_lines(path, reader):
        if len(cells) == len(header):
            rows.append((f"line {line}", dict(zip(header, map(_cell, cells), strict=True))))
        elif cells:
            problems.append(Problem(f"line {line}", f"{len(cells)} cells, expected {len(header)}"))
    return _filled(Content(path, "CSV", tuple(rows), tuple(problems)))


def _csv_lines(path: Path, reader: Any) -> Iterator[tuple[list[str], int]]:
    """Cells and the line on which they start; a quoted cell may run over several."""
    while True:
        line = reader.line_num + 1
        try:
            yield next(reader), line
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{path}, line {line}: not CSV ({_short(error)})") from error


def _cell(text: str) -> Any:
    """A cell as its number where it is one."""
    if re.fullmatch(r"0|-?[1-9]\d{0,17}", text):  # 007 is a name
        return int(text)
    if re.fullmatch(r"-?\d{0,18}\.\d{1,18}(e-?\d{1,2})?", text):
        return float(text)
    return text


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
