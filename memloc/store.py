"""Tensors and a JSON header in one safetensors file, written atomically; and folders that are whole or absent.

Every artifact of memloc is one of these files. The header travels in safetensors' `__metadata__` under the key
`memloc`, as JSON with the artifact's kind and format version, so any safetensors reader can open it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memloc.errors import ArtifactError, TargetError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write to; it takes the name `path` only when the block ends without an error.

    Yields:
        The path to write to.

    Raises:
        TargetError: the folder is missing or unwritable, or the disk is full; `path` is as it was.
    """
    path = Path(path)
    with _target_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
    part = Path(name)
    try:
        with _target_errors(path):
            yield part
            _sync(part)
            part.chmod(0o666 & ~_umask())
            part.replace(path)
            _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def fresh_folder(path: str | Path) -> Iterator[Path]:
    """A temporary sibling folder that becomes `path` when the block ends without an error; else nothing is left.

    Yields:
        The folder to fill.

    Raises:
        TargetError: `path` is a file or a folder with something in it, or cannot be written; nothing was changed.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise TargetError(f"{path} exists and is not an empty folder; name another --out; nothing was written")
    with _target_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        with _target_errors(path):
            yield part
            for entry in part.rglob("*"):
                # A hard link shares a file that was there, and safe, before.
                if entry.is_file() and entry.stat().st_nlink == 1:
                    _sync(entry)
            part.chmod(0o777 & ~_umask())
            if path.exists():
                path.rmdir()
            part.replace(path)
            _sync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_target(path: str | Path) -> None:
    """See that a file can be written at `path`, before the work whose result it is to hold; its folder is made.

    Raises:
        TargetError: it cannot.
    """
    path = Path(path)
    with _target_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder of that name is there")


def save(path: str | Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write an artifact atomically; equal content gives equal bytes.

    Args:
        path: where; an existing file is replaced.
        kind: what it is, such as "localization"; `load` asks for it again.
        tensors: name to tensor; each is made contiguous on the CPU.
        header: JSON values.

    Raises:
        TargetError: it cannot be written; an existing file is untouched.
    """
    from safetensors.torch import save_file

    content = {"kind": kind, "format": FORMAT_VERSION, **header}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as part:
        save_file(plain, part, metadata={"memloc": text})


def load(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of an artifact that `save` wrote.

    Raises:
        ArtifactError: no such file, cut off, not ours, of another kind, or of a newer format.
    """
    from safetensors import SafetensorError, safe_open

    header = header_of(path)
    if header["kind"] != kind:
        raise ArtifactError(f"{path} holds {header['kind']}, expected {kind}")
    try:
        with safe_open(str(path), framework="pt") as file:
            # Copies: a view on a file that is later replaced or truncated would change or fault under the reader.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, header  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def header_of(path: str | Path) -> dict[str, Any]:
    """The header alone (no tensor is read, torch is not needed): its `kind` and `format` and what `save` was given.

    Raises:
        ArtifactError: as `load`.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            text = json.loads(file.read(size))["__metadata__"]["memloc"]
        header: dict[str, Any] = json.loads(text)
        version = header["format"]
        header["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} was not written by memloc, or was cut: {error}") from error
    if version > FORMAT_VERSION:
        raise ArtifactError(f"{path} has format {version}, this memloc reads up to {FORMAT_VERSION}; upgrade memloc")
    return header


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, as UTF-8.

    Raises:
        TargetError: it cannot be written; an existing file is untouched.
    """
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf8")


@contextlib.contextmanager
def _target_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        said = {errno.ENOSPC: "the disk is full", errno.EACCES: "permission denied", errno.EROFS: "read-only"}
        why = said.get(error.errno or 0, error.strerror or str(error))
        raise TargetError(f"{path} cannot be written: {why}; nothing was changed") from error
    except Exception as error:
        # safetensors reports a full disk as its own error.
        if type(error).__name__ == "SafetensorError" and ("space" in str(error) or "code: 28" in str(error)):
            raise TargetError(f"{path} cannot be written: the disk is full; nothing was changed") from error
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
