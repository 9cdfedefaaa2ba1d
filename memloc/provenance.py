"""Digests of tensors and texts; who made an artifact, from what, with what.

A digest covers dtype, shape and bytes, so two tensors share one exactly when they are equal to the bit. Nothing here
records a time or a path: the same inputs give the same provenance.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from memloc.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def digest_bytes(*parts: bytes) -> str:
    """sha256 over length-prefixed parts, as 64 hex digits."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()


def digest_json(value: Any) -> str:
    """Digest of a JSON-able value, whatever the order of its keys."""
    return digest_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode())


def digest_ids(rows: Iterable[Iterable[int]]) -> str:
    """Digest of token ids, row by row."""
    return digest_json([list(row) for row in rows])


def digest_raw(dtype: str, shape: Iterable[int], data: bytes | memoryview) -> str:
    """Digest of a stored tensor: safetensors dtype name (`F32`, `BF16`, ...), shape, little-endian bytes."""
    return digest_parts(dtype, shape, [data])


def digest_parts(dtype: str, shape: Iterable[int], parts: Iterable[bytes | memoryview]) -> str:
    """`digest_raw` of bytes that come in parts."""
    total = hashlib.sha256(f"{dtype}{list(shape)}".encode())
    for part in parts:
        total.update(part)
    return total.hexdigest()


DTYPE_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""torch's dtype names to safetensors'."""


def digest_tensor(tensor: Tensor) -> str:
    """Digest of a tensor as it would be stored: dtype, shape, bytes. Equal to `digest_raw` of its safetensors entry."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else None
    data = b"" if flat is None else flat.numpy().data
    name = str(tensor.dtype).removeprefix("torch.")
    return digest_raw(DTYPE_NAMES.get(name, name), tensor.shape, data)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a number can depend on."""
    found = {"python": platform.python_version()}
    for name in ("memloc", *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def settings_of(method: Any) -> dict[str, Any]:
    """The fields of a method (a frozen dataclass) as JSON values; tensors become their digests."""
    return {item.name: _plain(getattr(method, item.name)) for item in dataclasses.fields(method)}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value if not isinstance(value, str) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    if hasattr(value, "detach"):
        return digest_tensor(value)
    return getattr(value, "digest", None) or str(value)


@dataclass(frozen=True)
class Provenance:
    """Who made an artifact, from what, with what.

    Attributes:
        method: the method's name in its table.
        settings: the method's fields, as JSON values.
        seed: the seed that was used, or None where nothing is random.
        inputs: name of an input (`model`, `passages`, ...) to its digest.
        versions: package to version.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "method": self.method,
            "settings": dict(self.settings),
            "seed": self.seed,
            "inputs": dict(self.inputs),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Provenance:
        """Back from `to_json`.

        Raises:
            ArtifactError: an entry is missing or of another kind.
        """
        try:
            return cls(value["method"], value["settings"], value["seed"], value["inputs"], value["versions"])
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"provenance lacks {error}; the file was not written by memloc, or was cut") from error
