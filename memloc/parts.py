"""Long localizations in parts: group by group, each kept as it is finished, so that an interrupt loses one group.

Exact for methods that score every passage by itself, which the battery holds them to; they say so with
`in_parts = True`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memloc.errors import ArtifactError, InputError, TargetError
from memloc.passages import Passages
from memloc.progress import steps, tell
from memloc.provenance import digest_json, settings_of
from memloc.scores import Localization
from memloc.view import ModelView


def in_parts(
    localizer: Any,
    view: ModelView,
    passages: Passages,
    folder: str | Path,
    *,
    contrast: Passages | None = None,
    size: int = 16,
) -> Localization:
    """The same scores as `localizer(view, passages)`, `size` passages at a time; what was finished before is read.

    Args:
        localizer: one that scores every passage by itself (`in_parts = True`).
        view: the model.
        passages: what to localize.
        folder: where parts are kept, under a name made of the digests of method, settings, model and data, so that
            parts of another run are never read. It stays when the work is done; see `discard`.
        contrast: as the localizer takes it.
        size: passages a part.

    Returns:
        Scores along the passages given. Notes are joined: what all parts say alike stays; a number becomes its least,
        mean (by passages) and most; one value a passage is strung together; the rest is listed part by part.

    Raises:
        InputError: the localizer scores the passages together, or there are none.
        TargetError: the folder cannot be made.
    """
    if not getattr(localizer, "in_parts", False):
        raise InputError(f"{type(localizer).__name__} scores all passages together; it cannot be run in parts")
    if not passages:
        raise InputError("no passages given")
    folder = Path(folder) / _name(localizer, view, passages, contrast, size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(f"{folder} cannot be made: {error.strerror}; nothing was run") from error
    starts = range(0, len(passages), size)
    found = []
    for index, start in enumerate(steps(starts, "parts")):
        path = folder / f"part-{index:05d}.safetensors"
        part = _read(path)
        if part is None:
            part = localizer(view, passages[start : start + size], contrast=contrast)
            part.save(path)
        else:
            tell("parts", index + 1, len(starts), "found")
        found.append(part)
    inputs = {**found[0].provenance.inputs, "passages": passages.digest}
    return joined(found, replace(found[0].provenance, inputs=inputs))


def finished(folder: str | Path) -> int:
    """Parts that lie in `folder`, of whatever run."""
    return len(list(Path(folder).glob("*/part-*.safetensors")))


def discard(folder: str | Path) -> None:
    """Remove the parts, once their whole is safe."""
    shutil.rmtree(folder, ignore_errors=True)


def joined(parts: Sequence[Localization], provenance: Any) -> Localization:
    """Localizations of several groups of passages as one; see `in_parts` for their notes."""
    ids = tuple(name for part in parts for name in part.passages or ())
    rows = [len(part.passages or ()) for part in parts]
    scores = {site: torch.cat(_of_one_width(part.scores[site] for part in parts)) for site in parts[0].scores}
    lengths = tuple(length for part in parts for length in part.lengths or ()) or None
    notes = _joined_notes([part.notes for part in parts], rows)
    return Localization(parts[0].grain, scores, provenance, ids, notes, lengths)


def _of_one_width(rows: Iterable[Tensor]) -> list[Tensor]:
    """Scores of positions reach as far as their part's longest passage; zeros fill them up."""
    rows = list(rows)
    width = max(row.shape[-1] for row in rows)
    return [row if row.dim() < 2 else torch.nn.functional.pad(row, (0, width - row.shape[-1])) for row in rows]


def _joined_notes(notes: Sequence[Mapping[str, Any]], rows: Sequence[int]) -> dict[str, Any]:
    keys = dict.fromkeys(key for part in notes for key in part)
    return {key: _joined([part.get(key) for part in notes], rows) for key in keys}


def _joined(values: Sequence[Any], rows: Sequence[int]) -> Any:
    if all(value == values[0] and type(value) is type(values[0]) for value in values):
        return values[0]
    spreads = [_spread(value) for value in values]
    if all(spreads):
        least, mean, most = zip(*(spread for spread in spreads if spread), strict=True)
        middle = sum(value * count for value, count in zip(mean, rows, strict=True)) / sum(rows)
        return {"least": min(least), "mean": middle, "most": max(most)}
    if all(isinstance(value, Mapping) for value in values):
        return _joined_notes(values, rows)
    if all(isinstance(value, list) and len(value) == count for value, count in zip(values, rows, strict=True)):
        return [entry for value in values for entry in value]
    return list(values)


def _spread(value: Any) -> tuple[float, float, float] | None:
    """Least, mean and most of a number, or of what was joined from numbers before; None of anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value, value, value
    if isinstance(value, Mapping) and set(value) == {"least", "mean", "most"}:
        return value["least"], value["mean"], value["most"]
    return None


def _name(localizer: Any, view: ModelView, passages: Passages, contrast: Passages | None, size: int) -> str:
    inputs = [view.digest, passages.digest, None if contrast is None else contrast.digest]
    return digest_json([type(localizer).__qualname__, settings_of(localizer), *inputs, size])[:24]


def _read(path: Path) -> Localization | None:
    """A finished part, or None where there is none or it cannot be read (it is made again)."""
    try:
        return Localization.load(path)
    except ArtifactError:
        return None
