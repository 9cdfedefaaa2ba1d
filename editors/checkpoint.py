"""Surgery on checkpoint folders: only the touched tensors are read and rewritten; the target is whole or absent.

The files are copied into a fresh folder (cloned where the file system can), and the bytes of the touched tensors are
patched in the copy. The source is never written: models that run may be mapped onto it. No model is built, so this
also serves checkpoints that do not fit in memory.

What is carried: every other file of the folder, and subfolders without weights. What is not, each with its reason in
the report: pickles and other files of weights beside the safetensors (they hold the unedited weights), subfolders with
weights (training snapshots), hidden folders, links to folders.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editors.binding import Found, Touched
from editors.edit import Edit
from editors.patch import DTYPES, Survival
from editors.shards import INDEX, PICKLES, Entry, Weights, open_weights
from memloc.errors import CheckpointError, MismatchError
from memloc.provenance import digest_raw
from memloc.sites import Kind, Site
from memloc.store import fresh_folder

MANIFEST = "memloc_edit.json"
"""Which edits a folder holds; written by `apply_edit`, taken out by `undo_edit`."""

_WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".ot", ".tflite")

_CLONE = 0x40049409
"""Linux: make a file share another's blocks until one is written (FICLONE)."""

_CANNOT = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.ENOTTY, errno.EBADF, errno.EPERM}
"""What a file system says that cannot clone or copy in the kernel; anything else is a real error."""


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        folder: the new checkpoint.
        tensors: tensor name on disk to the sites changed in it.
        survived: what one cast left of each delta; empty for an undo.
        copied: files copied as they are.
        linked: weight files that share their bytes with the source by a hard link.
        dropped: what was not carried, and why.
    """

    folder: Path
    tensors: Mapping[str, tuple[Site, ...]]
    survived: Mapping[Site, Survival] = field(default_factory=dict)
    copied: tuple[str, ...] = ()
    linked: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "folder": str(self.folder),
            "tensors": {name: [str(site) for site in sites] for name, sites in self.tensors.items()},
            "survived": {str(site): entry.to_json() for site, entry in self.survived.items()},
            "copied": list(self.copied),
            "linked": list(self.linked),
            "dropped": dict(self.dropped),
        }


def apply_edit(edit: Edit, model: str | Path, out: str | Path, *, link: bool = False) -> Written:
    """Write the checkpoint folder `out`: `model` with `edit` in it.

    Memory: twice the largest touched tensor, and some megabytes. Time: that of copying the folder.

    Args:
        edit: made for these weights (its digests decide).
        model: a checkpoint folder with safetensors, one file or sharded.
        out: a new or empty folder.
        link: hard-link untouched weight files instead of copying them: fast, but they share fate with whatever
            writes into them in place.

    Raises:
        CheckpointError: the folder cannot be read safely, or lacks a tensor.
        MismatchError: the weights are not those the edit was made for, or the edit is already applied.
        ModelError: a weight would not be finite.
        TargetError: `out` is occupied, or cannot be written. Nothing is left behind in any of these cases.
    """
    job = _Job(edit, Path(model), Path(out), link)
    survived: dict[Site, Survival] = {}

    def forward(stored: Tensor, sites: list[Site]) -> None:
        survived.update(edit.change(stored, sites))

    listed = _read_manifest(job.source)
    for name, sites in job.tensors.items():
        job.check(name, sites, Touched.expect_before)
    return job.write(forward, Touched.expect_result, lambda: [*listed, _record(job, survived)], survived)


def undo_edit(edit: Edit, model: str | Path, out: str | Path, *, link: bool = False) -> Written:
    """Write the checkpoint folder `out`: `model` with `edit` taken out of it, every byte as before.

    Args:
        edit: as it was applied; with a way back (a sum of edits has none until rebased).
        model: a folder that `apply_edit` wrote, or any whose touched weights are as the edit left them.
        out: a new or empty folder.
        link: as for `apply_edit`.

    Raises:
        CheckpointError: the folder cannot be read safely, or lacks a tensor.
        MismatchError: the edit is not in these weights, or has no way back.
        TargetError: `out` is occupied, or cannot be written. Nothing is left behind in any of these cases.
    """
    job = _Job(edit, Path(model), Path(out), link)

    listed = _read_manifest(job.source)
    left = list(listed)
    for place in reversed(range(len(listed))):
        if listed[place]["edit"] == edit.digest:
            del left[place]
            break
    for name, sites in job.tensors.items():
        job.check(name, sites, Touched.expect_after)
    return job.write(edit.change_back, Touched.expect_restored, lambda: left, {})


class _Job:
    """One reading and writing of a folder."""

    def __init__(self, edit: Edit, source: Path, out: Path, link: bool) -> None:
        self.edit, self.source, self.out, self.link = edit, source, out, link
        self.weights = open_weights(source)
        self.tensors = {self.weights.resolve(parameter): sites for parameter, sites in edit.parameters.items()}
        for name, sites in self.tensors.items():
            self._check_kind(name, sites)

    def check(self, name: str, sites: list[Site], expect: Callable[[Touched, Site, Found], None]) -> None:
        """Whether the stored tensor is as `expect`, a check of the binding's, wants it."""
        entry = self.weights.entries[name]
        data = entry.read(self.source)
        where = str(self.source / entry.file)
        found = Found(entry.dtype, entry.shape, digest_raw(entry.dtype, entry.shape, memoryview(data)), where)
        try:
            expect(self.edit.touched[sites[0]], sites[0], found)
        except MismatchError:
            if not bool(torch.isfinite(_tensor(data, entry)).all()):
                why = "holds values that are not finite (NaN or infinite); the checkpoint is damaged"
                raise CheckpointError(f"{where}: {name} {why}; nothing was written") from None
            raise

    def write(
        self,
        change: Callable[[Tensor, list[Site]], Any],
        expect: Callable[[Touched, Site, str], None],
        manifest: Callable[[], list[dict[str, Any]]],
        survived: Mapping[Site, Survival],
    ) -> Written:
        """Copy everything, change the touched tensors in the copy, write the manifest."""
        carried, dropped = _sort_out(self.weights)
        touched = {self.weights.entries[name].file for name in self.tensors}
        linked: list[str] = []
        with fresh_folder(self.out) as part:
            for name in carried:
                if self.link and name in self.weights.files and name not in touched and _link(self.source, part, name):
                    linked.append(name)
                else:
                    _copy(self.source / name, part / name)
            for name, sites in self.tensors.items():
                entry = self.weights.entries[name]
                data = entry.read(part)
                change(_tensor(data, entry), sites)
                digest = digest_raw(entry.dtype, entry.shape, memoryview(data))
                expect(self.edit.touched[sites[0]], sites[0], digest)
                _put(part / entry.file, entry.start, data)
            listed = manifest()
            if listed:
                text = json.dumps({"format": 1, "edits": listed}, indent=1, sort_keys=True, ensure_ascii=False)
                (part / MANIFEST).write_text(text + "\n", encoding="utf8")
        copied = tuple(name for name in carried if name not in touched and name not in linked)
        tensors = {name: tuple(sites) for name, sites in self.tensors.items()}
        return Written(self.out, tensors, dict(survived), copied, tuple(linked), dropped)

    def _check_kind(self, name: str, sites: list[Site]) -> None:
        entry = self.weights.entries[name]
        where = self.source / entry.file
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{sites[0]}: {where} holds {name} as {entry.dtype}, quantised; edit a full-precision checkpoint"
            )
        outside = [site for site in sites if site.kind in (Kind.EMBED, Kind.UNEMBED) and not site.bias]
        if outside and _tied(self.weights, entry):
            raise CheckpointError(f"{outside[0]}: {name} is also the other embedding, tied; nothing was written")


def _tied(weights: Weights, entry: Entry) -> bool:
    """Whether the model ties its embeddings: as its config says, else whether no second tensor has that shape."""
    try:
        config = json.loads((weights.folder / "config.json").read_bytes())
        said = config.get("tie_word_embeddings")
    except (OSError, ValueError, AttributeError):
        said = None
    if isinstance(said, bool):
        return said
    return sum(other.shape == entry.shape for other in weights.entries.values()) < 2


def _tensor(data: bytearray, entry: Entry) -> Tensor:
    """The stored tensor on the memory of `data`."""
    if not data:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(entry.shape)


def _sort_out(weights: Weights) -> tuple[list[str], dict[str, str]]:
    """Files to carry, as paths relative to the folder, and what is left out, with the reason."""
    carried, dropped = list(weights.files), {}
    for path in sorted(weights.folder.iterdir()):
        name = path.name
        if name in weights.files or name == MANIFEST:
            continue
        if path.is_dir():
            inside = [] if path.is_symlink() else sorted(path.rglob("*"))
            if path.is_symlink() or name.startswith("."):
                dropped[name] = "a hidden folder or a link to a folder"
            elif any(entry.suffix in _WEIGHTS for entry in inside):
                dropped[name] = "a folder with weights of its own"
            else:
                carried += [str(entry.relative_to(weights.folder)) for entry in inside if entry.is_file()]
        elif not path.is_file():
            dropped[name] = "not a plain file"
        elif path.suffix in _WEIGHTS:
            dropped[name] = "may hold the unedited weights"
        elif name.endswith(".index.json") and not (weights.sharded and name == INDEX):
            dropped[name] = "an index of weight files that are not carried"
        else:
            carried.append(name)
    return carried, dropped


def _copy(source: Path, target: Path) -> None:
    """Copy a file: blocks shared where the file system can, else inside the kernel, else through memory."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as old, target.open("wb") as new:
        if sys.platform == "linux":
            for way in (_clone, _copy_in_kernel):
                try:
                    way(old.fileno(), new.fileno())
                except OSError as error:
                    if error.errno not in _CANNOT:
                        raise
                if os.fstat(new.fileno()).st_size == os.fstat(old.fileno()).st_size:
                    return
                new.truncate(0)
        old.seek(0)
        new.seek(0)
        shutil.copyfileobj(old, new, 1 << 20)


def _clone(old: int, new: int) -> None:
    fcntl.ioctl(new, _CLONE, old)


def _copy_in_kernel(old: int, new: int) -> None:
    left, place = os.fstat(old).st_size, 0
    while left > 0:
        done = os.copy_file_range(old, new, min(left, 1 << 30), place, place)
        if not done:
            return
        left, place = left - done, place + done


def _link(source: Path, part: Path, name: str) -> bool:
    """Hard-link an untouched file; False where the file system cannot."""
    try:
        (part / name).hardlink_to((source / name).resolve())
    except OSError as error:
        if error.errno not in _CANNOT | {errno.EMLINK, errno.EACCES}:
            raise
        return False
    return True


def _put(path: Path, start: int, data: bytearray) -> None:
    view, done = memoryview(data), 0
    with path.open("r+b", buffering=0) as file:
        file.seek(start)
        while done < len(data):
            done += file.write(view[done:])


def _record(job: _Job, survived: Mapping[Site, Survival]) -> dict[str, Any]:
    edit = job.edit
    tensors = {
        name: {
            "parameter": edit.touched[sites[0]].parameter,
            "sites": [str(site) for site in sites],
            "before": edit.touched[sites[0]].before,
            "after": edit.touched[sites[0]].after,
        }
        for name, sites in job.tensors.items()
    }
    return {
        "edit": edit.digest,
        "provenance": edit.provenance.to_json(),
        "rounding": edit.rounding,
        "rounding_seed": edit.rounding_seed,
        "survived": {str(site): entry.to_json() for site, entry in survived.items()},
        "tensors": tensors,
    }


def _read_manifest(folder: Path) -> list[dict[str, Any]]:
    path = folder / MANIFEST
    if not path.exists():
        return []
    try:
        listed = json.loads(path.read_text(encoding="utf8"))["edits"]
        if not isinstance(listed, list) or not all(isinstance(entry["edit"], str) for entry in listed):
            raise TypeError("edits is not a list of edits")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; move it away to go on") from error
    found: list[dict[str, Any]] = listed
    return found
