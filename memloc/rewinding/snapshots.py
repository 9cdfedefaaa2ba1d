"""Checkpoint folders as sources of single tensors: one is read when it is asked for, and never a whole model.

Only safetensors are read, one file or shards with an index; shard names never leave their folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memloc.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

BASES = ("transformer", "model", "gpt_neox", "backbone")
"""What a family calls its model without the head; files on the hub leave it out, or put it before."""

ALIASES = {"lm_head.weight": "embed_out.weight", "embed_out.weight": "lm_head.weight"}
"""Parameters whose name on disk is another (GPT-NeoX)."""

STACKS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Parameters that hold all experts' maps, and what is stored of each expert in their stead: one above the other."""


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint folder whose tensors are read one at a time. Made by `Snapshot.open`.

    Attributes:
        folder: where it lies.
        files: name on disk of every tensor to the file that holds it.
    """

    folder: Path
    files: Mapping[str, str]

    @property
    def name(self) -> str:
        """What to call it: the last part of its path."""
        return self.folder.resolve().name

    @classmethod
    def open(cls, folder: str | Path) -> Snapshot:
        """Read a folder's tensor names; no tensor is read.

        Raises:
            CheckpointError: no such folder, no safetensors in it, only pickles, an index that names files outside the
                folder or that are not there, or a file that is damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; an earlier checkpoint is named by its folder")
        if (folder / SINGLE).is_file():
            return cls(folder, dict.fromkeys(_names(folder / SINGLE), SINGLE))
        if (folder / INDEX).is_file():
            return cls(folder, _sharded(folder))
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"only pickles ({pickles[0]}), which can run code" if pickles else f"neither {SINGLE} nor {INDEX}"
        raise CheckpointError(f"{folder} holds {found}; save it as safetensors")

    def resolve(self, parameter: str) -> str:
        """The name on disk of a live model's parameter: the same, or one that differs by the family's base prefix.

        Raises:
            CheckpointError: no such tensor, or several could be meant.
        """
        if parameter in self.files:
            return parameter
        known = {f"{base}.{parameter}" for base in BASES} | {ALIASES.get(parameter, "")}
        known |= {parameter.removeprefix(f"{base}.") for base in BASES}
        known |= {parameter.replace(".mlp.", ".block_sparse_moe.")}  # Mixtral's router
        found = sorted(known & self.files.keys())
        if len(found) == 1:
            return found[0]
        which = f"could be {' or '.join(found)}" if found else "is in none of its weight files"
        raise CheckpointError(f"{self.folder}: {parameter} {which}; the checkpoint is of another architecture")

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Shape of a live model's parameter as it is stored here, from the header alone."""
        from safetensors import safe_open

        stack = self._stack(parameter)
        if stack:
            shapes = [self.shape(name) for name in stack[0]]
            return (len(stack), sum(shape[0] for shape in shapes), *shapes[0][1:])
        stored = self.resolve(parameter)
        with safe_open(str(self.folder / self.files[stored]), framework="pt") as file:
            return tuple(file.get_slice(stored).get_shape())

    def tensor(self, parameter: str) -> Tensor:
        """One tensor, read from its file now, in its stored dtype.

        Raises:
            CheckpointError: it is not there, or its file cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        stack = self._stack(parameter)
        if stack:
            import torch

            try:
                return torch.stack([torch.cat([self.tensor(name) for name in names]) for names in stack])
            except RuntimeError as error:
                raise CheckpointError(f"{self.folder}: the experts of {parameter} are of several shapes") from error
        stored = self.resolve(parameter)
        path = self.folder / self.files[stored]
        try:
            with safe_open(str(path), framework="pt") as file:
                found: Tensor = file.get_tensor(stored)
                return found
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def _stack(self, parameter: str) -> tuple[tuple[str, ...], ...]:
        """Of a parameter that is stored expert by expert, the names of each one's matrices; else nothing."""
        start, _, last = parameter.rpartition(".")
        if parameter in self.files or not start.endswith(".experts"):
            return ()
        for names in STACKS.get(last, ()):
            for place in (start, start.replace(".mlp.", ".block_sparse_moe.")):
                found: list[tuple[str, ...]] = []
                while all(f"{place}.{len(found)}.{name}.weight" in self.files for name in names):
                    found.append(tuple(f"{place}.{len(found)}.{name}.weight" for name in names))
                if found:
                    return tuple(found)
        return ()


def series(earlier: str | Path) -> tuple[Snapshot, ...]:
    """The checkpoints that are meant by one folder, a folder of checkpoint folders, or a list with commas between.

    Those inside one folder come in the order of the last number in their names, so that step-900 precedes step-1000;
    those of a list come as listed.

    Raises:
        CheckpointError: nothing is named, or no checkpoint lies there.
    """
    named = [part.strip() for part in str(earlier).split(",") if part.strip()]
    if not named:
        raise CheckpointError("no earlier checkpoint is named; give a folder, or several with commas between")
    return tuple(found for part in named for found in _one_or_many(Path(part)))


def names_apart(snapshots: Sequence[Snapshot]) -> list[str]:
    """What to call each, so that no two share a name: those that occur again are numbered."""
    names = [snapshot.name for snapshot in snapshots]
    return [name if names.count(name) == 1 else f"{name}#{index}" for index, name in enumerate(names)]


def _one_or_many(folder: Path) -> list[Snapshot]:
    is_one = any((folder / name).exists() for name in (SINGLE, INDEX, CONFIG))
    if is_one or not folder.is_dir():
        return [Snapshot.open(folder)]
    inside = [path for path in folder.iterdir() if any((path / name).is_file() for name in (SINGLE, INDEX))]
    if not inside:
        return [Snapshot.open(folder)]
    return [Snapshot.open(path) for path in sorted(inside, key=_order)]


def _order(path: Path) -> tuple[int, str]:
    numbers = re.findall(r"\d+", path.name)
    return (int(numbers[-1]) if numbers else -1, path.name)


def _names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is cut off or not safetensors: {error}") from error


def _sharded(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    try:
        table = json.loads(path.read_text(encoding="utf8"))["weight_map"]
        files = {str(tensor): str(file) for tensor, file in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has no weight_map of tensor names to file names") from error
    for name in sorted(set(files.values())):
        if name != Path(name).name or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise CheckpointError(f"{path} names {name!r}, outside its folder; nothing was read")
        if not (folder / name).is_file():
            raise CheckpointError(f"{path} names {name}, which is not there")
        held = set(_names(folder / name))
        absent = sorted(tensor for tensor, file in files.items() if file == name and tensor not in held)
        if absent:
            raise CheckpointError(f"{path} puts {absent[0]} in {name}, which does not hold it")
    return files
