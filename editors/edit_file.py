"""Deltas and their bindings as the tensors and the header of `edit.safetensors`, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from editors.binding import Touched
from editors.deltas import Delta, Sparse, from_tensors
from editors.packing import pack_index, unpack_index
from editors.patch import Survival
from memloc.architectures import Place
from memloc.sites import Site


def to_file(
    deltas: Mapping[Site, Delta], touched: Mapping[Site, Touched]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors by name (`L3.mlp.out/left`), and one JSON entry a site."""
    tensors: dict[str, Tensor] = {}
    sites: dict[str, dict[str, Any]] = {}
    for site, delta in deltas.items():
        bound, held = touched[site], delta.tensors()
        entry: dict[str, Any] = {"delta": type(delta).__name__.lower(), "delta_shape": list(delta.shape)}
        if isinstance(delta, Sparse):
            entry["index"], packed = pack_index(delta.index, math.prod(delta.shape))
            held["index"] = _from_bytes(packed)
        if bound.way_back is not None:
            held["way_back"] = _from_bytes(bound.way_back)
        if bound.exact is not None:
            held["exact"] = _from_bytes(bound.exact)
        tensors |= {f"{site}/{name}": tensor for name, tensor in held.items()}
        entry |= {"place": bound.place.to_json(), "dtype": bound.dtype, "shape": list(bound.shape)}
        entry |= {"before": bound.before, "after": bound.after}
        if bound.shared:
            entry["shared"] = True
        entry["survived"] = None if bound.survived is None else bound.survived.to_json()
        sites[str(site)] = entry
    return tensors, sites


def from_file(
    tensors: Mapping[str, Tensor], sites: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[Site, Delta], dict[Site, Touched]]:
    """Back from `to_file`.

    Raises:
        ArtifactError, InputError, KeyError, TypeError, ValueError, AttributeError: the content is not what `to_file`
            gives; the caller names the file.
    """
    entries = {Site.parse(name): entry for name, entry in sites.items()}
    deltas = {site: _delta(site, entry, tensors) for site, entry in entries.items()}
    return deltas, {site: _touched(site, entry, tensors) for site, entry in entries.items()}


def _delta(site: Site, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Delta:
    shape = tuple(int(size) for size in entry["delta_shape"])
    held = {name.rpartition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{site}/")}
    if entry["delta"] == "sparse":
        data, count = held["index"].numpy().tobytes(), len(held["values"])
        held["index"] = unpack_index(entry["index"], data, count, math.prod(shape), f"{site}: positions")
    return from_tensors(entry["delta"], shape, held)


def _touched(site: Site, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Touched:
    back, exact = tensors.get(f"{site}/way_back"), tensors.get(f"{site}/exact")
    return Touched(
        Place.from_json(entry["place"]),
        str(entry["dtype"]),
        tuple(int(size) for size in entry["shape"]),
        str(entry["before"]),
        None if entry["after"] is None else str(entry["after"]),
        None if back is None else back.numpy().tobytes(),
        None if entry["survived"] is None else Survival(**entry["survived"]),
        None if exact is None else exact.numpy().tobytes(),
        bool(entry.get("shared", False)),
    )


def _from_bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
