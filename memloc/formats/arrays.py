"""Arrays, tensors and parquet from strangers: mapped, checked against the size of their file, never run."""

from __future__ import annotations

import importlib
import pickletools
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memloc.errors import InputError
from memloc.formats.content import LIMIT, Content, filled, short

if TYPE_CHECKING:
    import numpy as np

PICKLE_LIMIT = 2**16
"""Bytes of the largest description of tensors in a .pt file; one of a single matrix takes a few hundred."""
NAMED = re.compile(
    r"torch\._utils _rebuild_tensor_v[23]|collections OrderedDict|torch\.storage UntypedStorage|"
    r"torch (\w+Storage|u?int\d+|b?float\d+|complex\d+|bool)"
)
"""What the pickle of a tensor names."""


def read_npy(path: Path) -> Content:
    """A numpy array of token ids, mapped.

    Raises:
        InputError: objects in it, a header that lies, another kind or shape.
    """
    import numpy as np

    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, OverflowError, MemoryError, TypeError) as error:
        raise InputError(f"{path}: not a plain array of numbers ({short(error)}); nothing in it was run") from error
    return Content(path, "npy", matrix=_ids(path, found))


def read_pt(path: Path) -> Content:
    """One tensor of token ids that torch.save wrote, mapped, through torch's loader of weights only.

    Raises:
        InputError: anything else in it, an archive that grows, a tensor larger than its file.
    """
    _check_archive(path)
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler of an untrusted file may raise anything
        raise InputError(f"{path}: not a plain tensor ({short(error)}); nothing in it was run") from error
    if not isinstance(found, torch.Tensor):
        raise InputError(f"{path}: found {type(found).__name__}, expected one tensor [n, t] of token ids")
    kind = str(found.dtype).removeprefix("torch.")
    if found.layout != torch.strided or found.is_quantized or found.is_floating_point() or found.is_complex():
        raise InputError(f"{path}: a tensor of {kind}; expected token ids, [n, t] of an integer kind")
    if found.numel() * found.element_size() > path.stat().st_size:
        raise InputError(f"{path}: a tensor of shape {list(found.shape)} claims more than the file holds")
    return Content(path, "pt", matrix=_ids(path, found.numpy()))


def _check_archive(path: Path) -> None:
    """Refuse archives that grow when read, and pickles that are long or name what no tensor needs, before torch reads.

    Raises:
        InputError: not an archive torch wrote, a compressed entry, an entry longer than the file, such a pickle.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(path, entries)
            _check_names(path, archive.read(_pickle_of(entries)))
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, RuntimeError) as error:
        raise InputError(f"{path}: an archive that cannot be read ({short(error)})") from error


def _pickle_of(entries: list[zipfile.ZipInfo]) -> zipfile.ZipInfo:
    return next(entry for entry in entries if entry.filename.endswith("/data.pkl"))


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    if sum(entry.filename.endswith("/data.pkl") for entry in entries) != 1:
        names = ", ".join(entry.filename for entry in entries[:4])
        raise InputError(f"{path}: an archive of {names or 'nothing'}; expected a tensor that torch.save wrote")
    grown = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if grown or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise InputError(f"{path}: {(grown or ['its content'])[0]} grows when unpacked; torch.save does not compress")
    size = _pickle_of(entries).file_size
    if size > PICKLE_LIMIT:
        raise InputError(f"{path}: {size} bytes describe its tensors, at most {PICKLE_LIMIT} are read; expected one")


def _check_names(path: Path, raw: bytes) -> None:
    """Refuse a pickle that names anything but what a tensor is made of; it is listed, not run."""
    for code, argument, _ in pickletools.genops(raw):
        if code.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise InputError(f"{path}: not a plain tensor (its pickle has {code.name}); nothing in it was run")
        if code.name == "GLOBAL" and not NAMED.fullmatch(str(argument)):
            raise InputError(f"{path}: not a plain tensor (it names {argument}); nothing in it was run")


def _ids(path: Path, found: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if found.dtype.kind not in "iu":
        raise InputError(f"{path}: values of {found.dtype}; expected token ids, [n, t] of an integer kind")
    if found.ndim != 2 or not found.size:
        raise InputError(f"{path}: shape {list(found.shape)}; expected [n, t], rows of token ids")
    return found


def read_parquet(path: Path) -> Content:
    """Rows of a parquet file, where pyarrow is installed.

    Raises:
        InputError: it is not installed, or cannot read the file, or the file unpacks to more than `LIMIT`.
    """
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
        raise InputError(f"{path}: parquet that cannot be read ({short(error)})") from error
    return filled(Content(path, "parquet", tuple((f"row {index}", row) for index, row in enumerate(records))))
