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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editors.binding import Found, Touched
from editors.disk.disk_names import locate
from editors.disk.edit_record import MANIFEST, read_record, record_of, write_record
from editors.disk.shards import INDEX, PICKLES, Entry, Weights, open_weights
from editors.disk.stored_matrix import Matrix, stored_matrix
from editors.edit import Edit
from editors.patch import DTYPES, Survival
from editors.shipping import model_card
from memloc.errors import CheckpointError, MismatchError
from memloc.provenance import digest_raw
from memloc.sites import Kind, Site
from memloc.store import fresh_folder

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


def apply_edit(
    edit: Edit,
    model: str | Path,
    out: str | Path,
    *,
    link: bool = False,
    card: bool = False,
    evidence: Sequence[Mapping[str, Any]] = (),
) -> Written:
    """Write the checkpoint folder `out`: `model` with `edit` in it.

    Memory: the largest touched tensor, and some megabytes. Time: that of copying the folder.

    Args:
        edit: made for these weights (its digests decide).
        model: a checkpoint folder with safetensors, one file or sharded.
        out: a new or empty folder.
        link: hard-link untouched weight files instead of copying them: fast, but they share fate with whatever
            writes into them in place.
        card: say in the model card (README.md) what was changed; a card that says so already is kept true anyway.
        evidence: rows of figures for record and card, as `model_card.evidence` gives them.

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

    listed = read_record(job.source)
    job.check(Touched.expect_before)

    def told() -> list[dict[str, Any]]:
        return [*listed, record_of(edit, job.tensors, survived, evidence)]

    return job.write(forward, Touched.expect_result, told, survived, card=card)


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

    listed = read_record(job.source)
    left = list(listed)
    for place in reversed(range(len(listed))):
        if listed[place]["edit"] == edit.digest:
            del left[place]
            break
    job.check(Touched.expect_after)
    return job.write(edit.change_back, Touched.expect_restored, lambda: left, {})


def expect_base(edit: Edit, model: str | Path) -> None:
    """See that the folder `model` holds the weights `edit` was made for; nothing is written. Memory: some megabytes.

    Raises:
        CheckpointError: the folder cannot be read safely, or lacks a tensor.
        MismatchError: the weights are not those the edit was made for, or the edit is already applied.
    """
    _Job(edit, Path(model), Path(model), link=False).check(Touched.expect_before)


class _Job:
    """One reading and writing of a folder."""

    def __init__(self, edit: Edit, source: Path, out: Path, link: bool) -> None:
        self.edit, self.source, self.out, self.link = edit, source, out, link
        self.weights = open_weights(source)
        places = {unit: edit.touched[sites[0]].place for unit, sites in edit.parameters.items()}
        kept = locate(self.weights, dict.fromkeys(place.parameter for place in places.values()))
        self.matrices = {
            unit: stored_matrix(self.weights, kept[place.parameter], place) for unit, place in places.items()
        }
        self.tensors: dict[str, list[Site]] = {}
        for unit, matrix in self.matrices.items():
            for site in edit.parameters[unit]:
                for name in matrix.within(edit.touched[site].place.rows):
                    self.tensors.setdefault(name, []).append(site)
            self._check_kind(matrix, edit.parameters[unit])

    def check(self, expect: Callable[[Touched, Site, Found], None]) -> None:
        """Whether every stored matrix is as `expect`, a check of the binding's, wants it."""
        for unit, matrix in self.matrices.items():
            site = self.edit.parameters[unit][0]
            where = str(self.source / matrix.files)
            found = Found(matrix.dtype, matrix.shape, matrix.digest(self.source), where)
            try:
                expect(self.edit.touched[site], site, found)
            except MismatchError:
                if not bool(torch.isfinite(_tensor(matrix.read(self.source), matrix)).all()):
                    why = "holds values that are not finite (NaN or infinite); the checkpoint is damaged"
                    raise CheckpointError(f"{where}: {' and '.join(matrix.parts)} {why}; nothing was written") from None
                raise

    def write(
        self,
        change: Callable[[Tensor, list[Site]], Any],
        expect: Callable[[Touched, Site, str], None],
        manifest: Callable[[], list[dict[str, Any]]],
        survived: Mapping[Site, Survival],
        *,
        card: bool = False,
    ) -> Written:
        """Copy everything, change the touched tensors in the copy, write the record (and the card, where asked)."""
        carried, dropped = _sort_out(self.weights)
        touched = {part.file for m in self.matrices.values() for name, part in m.parts.items() if name in self.tensors}
        linked: list[str] = []
        with fresh_folder(self.out) as part:
            for name in carried:
                if self.link and name in self.weights.files and name not in touched and _link(self.source, part, name):
                    linked.append(name)
                else:
                    _copy(self.source / name, part / name)
            for unit in self.matrices:
                self._change(part, unit, change, expect)
            listed = manifest()
            if listed:
                write_record(part, listed)
            _write_card(part, self.source, listed, card)
        copied = tuple(name for name in carried if name not in touched and name not in linked)
        tensors = {name: tuple(sites) for name, sites in self.tensors.items()}
        return Written(self.out, tensors, dict(survived), copied, tuple(linked), dropped)

    def _change(
        self,
        part: Path,
        unit: str,
        change: Callable[[Tensor, list[Site]], Any],
        expect: Callable[[Touched, Site, str], None],
    ) -> None:
        """Change one matrix in the copy. Its own function, so that its bytes are freed before the next one is read."""
        matrix, sites = self.matrices[unit], self.edit.parameters[unit]
        data = matrix.read(part)
        change(_tensor(data, matrix), sites)
        expect(self.edit.touched[sites[0]], sites[0], digest_raw(matrix.dtype, matrix.shape, memoryview(data)))
        for name, entry, own in matrix.cut(data):
            if name in self.tensors:
                _put(part / entry.file, entry.start, own)

    def _check_kind(self, matrix: Matrix, sites: list[Site]) -> None:
        name, entry = next(iter(matrix.parts.items()))
        where = self.source / entry.file
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{sites[0]}: {where} holds {name} as {entry.dtype}, quantised; edit a full-precision checkpoint"
            )
        outside = [site for site in sites if site.kind in (Kind.EMBED, Kind.UNEMBED) and not site.bias]
        outside = [site for site in outside if not self.edit.touched[site].shared]
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


def _tensor(data: bytearray, entry: Matrix) -> Tensor:
    """The stored matrix on the memory of `data`."""
    if not data:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(entry.shape)


def _write_card(part: Path, source: Path, edits: list[dict[str, Any]], wanted: bool) -> None:
    """Put the section on `edits` into the model card of `part`, where it is wanted or there was one."""
    path = part / model_card.CARD
    old = path.read_bytes().decode("utf8", "surrogateescape") if path.is_file() else ""
    if not wanted and model_card.BEGIN not in old:
        return
    new = model_card.put(old or model_card.fresh(source.name), edits)
    if model_card.is_fresh(new):
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(new.encode("utf8", "surrogateescape"))


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
    """Copy what is written in a file and leave its holes as holes."""
    size, place = os.fstat(old).st_size, 0
    os.ftruncate(new, size)
    while place < size:
        try:
            place = os.lseek(old, place, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        stop = os.lseek(old, place, os.SEEK_HOLE)
        while place < stop:
            done = os.copy_file_range(old, new, min(stop - place, 1 << 30), place, place)
            if not done:
                os.ftruncate(new, place)  # short: the caller sees it by the size
                return
            place += done


def _link(source: Path, part: Path, name: str) -> bool:
    """Hard-link an untouched file; False where the file system cannot."""
    try:
        (part / name).hardlink_to((source / name).resolve())
    except OSError as error:
        if error.errno not in _CANNOT | {errno.EMLINK, errno.EACCES}:
            raise
        return False
    return True


def _put(path: Path, start: int, data: memoryview) -> None:
    done = 0
    with path.open("r+b", buffering=0) as file:
        file.seek(start)
        while done < len(data):
            done += file.write(data[done:])
