"""Where every tensor of a checkpoint folder lies, from the headers alone; read strictly, because files are untrusted.

The layout is safetensors': eight bytes with the header's length, a JSON header, then the tensors with no hole and no
overlap. Only headers are read here, and single tensors on request; torch is not needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memloc.errors import CheckpointError
from memloc.provenance import digest_parts

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

HEADER_LIMIT = 100_000_000
"""Bytes; safetensors' own limit. An index of shards is held to it too."""

CHUNK = 1 << 22
"""Bytes read at a time where a tensor need not be in memory whole."""

BASES = ("transformer", "model", "gpt_neox", "backbone")
"""What a family calls its model without the head; files on the hub leave it out, or put it before."""

ALIASES = {"lm_head.weight": "embed_out.weight"}
"""Parameters whose name on disk is another (GPT-NeoX)."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One stored tensor.

    Attributes:
        file: that holds it, a name in the folder.
        dtype: safetensors' name.
        shape: as stored.
        start: first byte in the file.
        stop: one past its last byte.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self, folder: Path) -> bytearray:
        """Its bytes, from the file of this name in `folder`.

        Raises:
            CheckpointError: the file ends before the tensor does, or cannot be read.
        """
        data = bytearray(self.stop - self.start)
        for _ in self._fill(folder, data, len(data)):
            pass
        return data

    def digest(self, folder: Path) -> str:
        """Its digest, as `provenance.digest_raw` of its bytes; they are read some at a time.

        Raises:
            CheckpointError: as `read`.
        """
        return digest_parts(self.dtype, self.shape, self.chunks(folder))

    def chunks(self, folder: Path) -> Iterator[memoryview]:
        """Its bytes, some at a time; each piece is overwritten by the next.

        Raises:
            CheckpointError: as `read`.
        """
        yield from self._fill(folder, bytearray(min(CHUNK, self.stop - self.start)), self.stop - self.start)

    def _fill(self, folder: Path, buffer: bytearray, size: int) -> Iterator[memoryview]:
        """Read `size` bytes through `buffer`, from its start again each time it is full; yields what it holds."""
        path = folder / self.file
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(self.start)
                while size > 0:
                    part, done = memoryview(buffer)[: min(size, len(buffer))], 0
                    while done < len(part):
                        got = file.readinto(part[done:])
                        if not got:
                            raise CheckpointError(f"{path} ends inside a tensor; nothing was written")
                        done += got
                    size -= done
                    yield part
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}; nothing was written") from error


@dataclass(frozen=True)
class Weights:
    """All stored tensors of a folder.

    Attributes:
        folder: the checkpoint folder.
        files: the weight files, in order.
        entries: name on disk to where it lies.
        sharded: whether an index file names the files.
    """

    folder: Path
    files: tuple[str, ...]
    entries: Mapping[str, Entry]
    sharded: bool

    def resolve(self, parameter: str) -> str:
        """The name on disk of a live model's parameter.

        The same name; or the one name that differs by the family's base prefix (`transformer.`, `model.`, ...), or
        by a known alias.

        Raises:
            CheckpointError: no such tensor, or several could be meant.
        """
        if parameter in self.entries:
            return parameter
        known = {f"{base}.{parameter}" for base in BASES} | {ALIASES.get(parameter, "")}
        known |= {parameter.removeprefix(f"{base}.") for base in BASES}
        found = sorted(known & self.entries.keys())
        if len(found) == 1:
            return found[0]
        which = f"could be {' or '.join(found)}" if found else "is in none of its weight files"
        raise CheckpointError(f"{self.folder}: {parameter} {which}; nothing was written")


def open_weights(folder: Path) -> Weights:
    """Find and check the weight files of a folder: `model.safetensors`, else the shards its index names.

    Raises:
        CheckpointError: no folder, no safetensors, only pickles, a header that lies, an index that does not agree
            with the shards or names a file outside the folder.
    """
    if not folder.is_dir():
        what = "is a file; name the checkpoint's folder" if folder.exists() else "no such folder"
        raise CheckpointError(f"{folder}: {what}")
    if (folder / SINGLE).is_file():
        return Weights(folder, (SINGLE,), read_header(folder / SINGLE), sharded=False)
    if (folder / INDEX).is_file():
        return _open_shards(folder)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise CheckpointError(f"{folder} holds only pickles ({pickles[0]}), which can run code; convert to safetensors")
    raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def read_header(path: Path) -> dict[str, Entry]:
    """Name to place of every tensor in one safetensors file, checked against the file's size.

    Raises:
        CheckpointError: truncated, not safetensors, or a header that contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(HEADER_LIMIT, size - 8):
                raise CheckpointError(f"{path} is cut off or not safetensors: {size} bytes, header of {length}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    header = read_json(path, text)
    header.pop("__metadata__", None)
    found = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    reached = 8 + length
    for name, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != reached:
            raise CheckpointError(f"{path}: {name} starts at byte {entry.start}, expected {reached}; the header lies")
        reached = entry.stop
    if reached != size:
        raise CheckpointError(f"{path} has {size} bytes, its header speaks of {reached}; it is cut off or padded")
    return found


def _entry(path: Path, name: str, value: Any, base: int) -> Entry:
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, start, stop]
        if set(value) != {"dtype", "shape", "data_offsets"} or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("expected dtype, shape and data_offsets, whole numbers from 0")
        if dtype not in _BITS:
            raise ValueError(f"dtype {dtype!r} is not known")
        wanted = math.prod(shape) * _BITS[dtype]
        if wanted != 8 * (stop - start):
            raise ValueError(f"{dtype} {shape} takes {wanted // 8} bytes, its range has {stop - start}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header's entry of {name!r} cannot be right: {error}") from error
    return Entry(path.name, dtype, tuple(shape), base + start, base + stop)


def _open_shards(folder: Path) -> Weights:
    path = folder / INDEX
    try:
        size = path.stat().st_size
        if size > HEADER_LIMIT:
            raise CheckpointError(f"{path} has {size} bytes, more than an index can need ({HEADER_LIMIT})")
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    table = read_json(path, text).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{path} has no weight_map of tensor names to file names")
    files = tuple(sorted(set(table.values())))
    for name in files:
        if name != Path(name).name or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise CheckpointError(f"{path} names {name!r}, outside its folder; nothing was read or written")
        if not (folder / name).is_file():
            raise CheckpointError(f"{path} names {name}, which is not there")
    entries: dict[str, Entry] = {}
    for name in files:
        for tensor, entry in read_header(folder / name).items():
            if table.get(tensor) != name:
                raise CheckpointError(f"{folder / name} holds {tensor}, which the index puts in {table.get(tensor)}")
            entries[tensor] = entry
    absent = sorted(table.keys() - entries.keys())
    if absent:
        raise CheckpointError(f"{path} puts {absent[0]} in {table[absent[0]]}, which does not hold it")
    return Weights(folder, files, entries, sharded=True)


def read_json(path: Path, text: bytes) -> dict[str, Any]:
    """The JSON object `text`, read from `path`, in which no key stands twice.

    Raises:
        CheckpointError: it is none.
    """
    try:
        found = json.loads(text.decode("utf8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not the JSON it should hold ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not the JSON object it should hold")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found
