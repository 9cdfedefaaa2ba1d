"""The record beside weights of which edits they hold: `memloc_edit.json` of checkpoint and adapter folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editors.disk.shards import read_json
from editors.patch import Survival
from memloc.errors import CheckpointError
from memloc.sites import Site

if TYPE_CHECKING:
    from editors.edit import Edit

MANIFEST = "memloc_edit.json"
"""Which edits a folder holds; written by `apply_edit`, taken out by `undo_edit`."""

_NEEDED = {"edit": str, "provenance": dict, "rounding": str, "tensors": dict}


def record_of(
    edit: Edit,
    tensors: Mapping[str, Sequence[Site]],
    survived: Mapping[Site, Survival],
    evidence: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What is told of one edit; `tensors` are names on disk with the sites changed in them."""
    shown = {"evidence": [dict(row) for row in evidence]} if evidence else {}
    return {
        "edit": edit.digest,
        "provenance": edit.provenance.to_json(),
        "rounding": edit.rounding,
        "rounding_seed": edit.rounding_seed,
        "survived": {str(site): entry.to_json() for site, entry in survived.items()},
        "tensors": {
            name: {
                "parameter": edit.touched[sites[0]].parameter,
                "sites": [str(site) for site in sites],
                "before": edit.touched[sites[0]].before,
                "after": edit.touched[sites[0]].after,
            }
            for name, sites in tensors.items()
        },
        **shown,
    }


def write_record(folder: Path, edits: Sequence[Mapping[str, Any]]) -> None:
    """Write the record into `folder`."""
    text = json.dumps({"format": 1, "edits": list(edits)}, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf8")


def read_record(folder: Path) -> list[dict[str, Any]]:
    """The edits a folder holds, in the order they were made; none where there is no record.

    Raises:
        CheckpointError: the record is not ours, or was altered.
    """
    path = folder / MANIFEST
    if not path.exists():
        return []
    try:
        listed = read_json(path, path.read_bytes())["edits"]
        if not isinstance(listed, list) or not all(_whole(entry) for entry in listed):
            raise TypeError("edits is not a list of edits")
    except (OSError, KeyError, TypeError, CheckpointError) as error:
        said = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(f"{path} cannot be read: {said}; move it away to go on") from error
    found: list[dict[str, Any]] = listed
    return found


def _whole(entry: Any) -> bool:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), kind) for name, kind in _NEEDED.items()):
        return False
    tensors = all(
        isinstance(tensor, dict)
        and isinstance(tensor.get("parameter"), str)
        and isinstance(tensor.get("before"), str)
        and isinstance(tensor.get("sites"), list)
        and isinstance(tensor.get("after", 0), str | None)
        for tensor in entry["tensors"].values()
    )
    return tensors and {"method", "settings", "seed", "inputs", "versions"} <= entry["provenance"].keys()
