"""The section of a model card (README.md) that says which edits a folder holds; put in, replaced and taken out whole.

Everything outside the two marks is the owner's and keeps every byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memloc.errors import ArtifactError, CheckpointError

CARD = "README.md"

BEGIN = "<!-- memloc: edits of this model. Written by memloc; changes in here are lost. -->"
END = "<!-- memloc: end -->"

_FRONT = "# The front matter was written by memloc.\n"
_SECTION = re.compile("\n\n" + re.escape(BEGIN) + "\n.*?" + re.escape(END) + "\n", re.DOTALL)


def put(card: str, edits: Sequence[Mapping[str, Any]]) -> str:
    """`card` with one section on `edits` (as the record beside the weights lists them), or none where none is left.

    Raises:
        CheckpointError: a mark stands alone, or the section stands twice.
    """
    if card.count(BEGIN) != card.count(END) or card.count(BEGIN) > 1:
        raise CheckpointError(f"{CARD}: memloc's marks stand alone or twice; mend the card; nothing was written")
    bare = _SECTION.sub("", card, count=1)
    return bare + "\n\n" + section(edits) if edits else bare


def fresh(base: str, *, library: str = "transformers") -> str:
    """A card for a folder that had none: front matter only."""
    name = f"base_model: {json.dumps(base)}\n" if base else ""
    return f"---\n{_FRONT}{name}library_name: {library}\ntags:\n- memloc\n---\n"


def is_fresh(card: str) -> bool:
    """Whether nothing in `card` is anyone's but memloc's."""
    return card.startswith(f"---\n{_FRONT}") and card.count("\n---\n") == 1 and card.endswith("\n---\n")


def section(edits: Sequence[Mapping[str, Any]]) -> str:
    """Marks and what stands between them."""
    parts = [BEGIN, "## Edits", ""]
    parts.append(
        "The weights of this model were changed after training, by "
        + ("one edit." if len(edits) == 1 else f"{len(edits)} edits, in this order.")
    )
    for number, edit in enumerate(edits, 1):
        parts += ["", *_edit(number, edit)]
    return "\n".join([*parts, END, ""])


def evidence(path: str | Path) -> list[dict[str, Any]]:
    """The headline figures of a `report.json`, one entry a figure.

    Raises:
        ArtifactError: not a report.
    """
    try:
        groups = json.loads(Path(path).read_text(encoding="utf8"))["comparisons"]
        return [
            {"group": group["name"], "figure": figure["name"], "unit": figure["unit"]}
            | {arm: figure.get(arm) and figure[arm]["value"] for arm in ("before", "after", "random")}
            | {"n": figure["before"] and figure["before"].get("n")}
            for group in groups
            for figure in group["figures"]
            if figure["name"] in group["headline"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is no report.json of memloc: {error}") from error


def _edit(number: int, edit: Mapping[str, Any]) -> list[str]:
    made = edit["provenance"]
    lines = [f"### {number}. {_plain(made['method'])}", ""]
    lines += ["| what | value |", "|---|---|", f"| edit | `{edit['edit']}` |"]
    facts = {"settings": made["settings"], "seed": made["seed"], "rounding": edit["rounding"]}
    facts |= {f"digest of {name}": digest for name, digest in sorted(made["inputs"].items())}
    facts |= {f"version of {name}": version for name, version in sorted(made["versions"].items())}
    lines += [f"| {_plain(name)} | {_plain(value)} |" for name, value in facts.items() if value not in (None, {})]
    lines += ["", "| changed tensor | at | digest before | after |", "|---|---|---|---|"]
    for name, tensor in sorted(edit["tensors"].items()):
        after = str(tensor["after"] or "not recorded")[:12]
        lines.append(f"| {_plain(name)} | {', '.join(tensor['sites'])} | {tensor['before'][:12]} | {after} |")
    shown = edit.get("evidence") or []
    if shown:
        lines += ["", "| measured | before | after | random edit of equal size | n |", "|---|---|---|---|---|"]
    for row in shown:
        cells = [_number(row.get(arm)) for arm in ("before", "after", "random")]
        cells.append("" if row.get("n") is None else str(row["n"]))
        lines.append(
            f"| {_plain(row['group'])}: {_plain(row['figure'])} ({_plain(row['unit'])}) | {' | '.join(cells)} |"
        )
    return lines


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | int) else _plain("" if value is None else value)


def _plain(value: Any) -> str:
    """One cell: no mark, row or HTML can be made of it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("\n", " ")
