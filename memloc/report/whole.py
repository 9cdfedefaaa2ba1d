"""The whole report: one JSON structure, from which the page and the Markdown are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memloc.errors import InputError, TargetError
from memloc.lazy import method
from memloc.report.comparison import Comparison
from memloc.report.contents import Condition, Curve, EditSummary, Located, Note, Verdict, jsonable
from memloc.report.markdown import render_markdown
from memloc.report.page import render_html
from memloc.report.sheets import Sheet
from memloc.report.texts import TextRow, guarded
from memloc.store import write_text

SCHEMA = "memloc.report/1"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that was found, with its controls and origins; renders to JSON, and from it to HTML and Markdown.

    Attributes:
        title: of the page.
        model: name of the model.
        model_digest: its digest.
        summary: one or two sentences for someone who reads nothing else.
        verdicts: sentences, and conditions to be judged, in order.
        comparisons: groups measured before, after and under the random control.
        curves: dose curves and others.
        localizations: where it was found.
        edits: what was changed.
        texts: passages and continuations; redacted unless `show_text`.
        notes: findings in prose.
        sheets: tables of findings of another kind.
        provenance: further origins: name to JSON value (seeds, versions, recipe).
        commands: what was run.
        show_text: whether passages may appear. Without it no passage's text is in any of the three files: texts are
            counts and digests, and strings of several words in settings and notes of methods are replaced too. Ids,
            titles, notes and commands are shown as given.

    Raises:
        InputError: two groups have one name, or a condition names what is not there.
        MismatchError: from the comparisons, when data that do not belong together were given.
    """

    title: str
    model: str = ""
    model_digest: str = ""
    summary: str = ""
    verdicts: tuple[Verdict | Condition, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    curves: tuple[Curve, ...] = ()
    localizations: tuple[Located, ...] = ()
    edits: tuple[EditSummary, ...] = ()
    texts: tuple[TextRow, ...] = ()
    notes: tuple[Note, ...] = ()
    sheets: tuple[Sheet, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    commands: tuple[str, ...] = ()
    show_text: bool = False

    __repr__ = method("memloc.notebook:plain")
    _repr_html_ = method("memloc.notebook:html")

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.comparisons]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"two groups are called {twice[0]!r}; give each its own name")
        judged = tuple(e.judge(self.comparisons) if isinstance(e, Condition) else e for e in self.verdicts)
        object.__setattr__(self, "verdicts", judged)

    @property
    def passed(self) -> bool:
        """Whether no verdict failed (those that only inform do not count)."""
        return all(verdict.holds is not False for verdict in self.verdicts if isinstance(verdict, Verdict))

    def to_json(self) -> dict[str, Any]:
        """The one structure, schema memloc.report/1; infinite numbers are "inf" and "-inf", missing ones null."""
        show = self.show_text
        return {
            "schema": SCHEMA,
            "title": self.title,
            "model": {"name": self.model, "digest": self.model_digest},
            "summary": self.summary,
            "text_shown": show,
            "verdicts": [verdict.to_json() for verdict in self.verdicts if isinstance(verdict, Verdict)],
            "comparisons": [_guarded_rows(entry.to_json(), show) for entry in self.comparisons],
            "curves": [entry.to_json() for entry in self.curves],
            "localizations": [entry.to_json(show_text=show) for entry in self.localizations],
            "edits": [entry.to_json(show_text=show) for entry in self.edits],
            "texts": [entry.to_json(show_text=show) for entry in self.texts],
            "notes": [entry.to_json() for entry in self.notes],
            "sheets": [entry.to_json() for entry in self.sheets],
            "provenance": jsonable(self.provenance),
            "commands": list(self.commands),
        }

    def save(self, folder: str | Path, *, stem: str = "report") -> tuple[Path, Path, Path]:
        """Write `report.html`, `report.json` and `report.md`, each atomically; everything is rendered first.

        Args:
            folder: where; made if missing.
            stem: of the three file names.

        Returns:
            The paths of page, JSON and Markdown.

        Raises:
            TargetError: the folder cannot be written, or is a file; existing files of those names are untouched.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise TargetError(f"{folder} is a file; name a folder for the report; nothing was written")
        data = self.to_json()
        written = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        page, text = render_html(data), render_markdown(data)
        paths = folder / f"{stem}.html", folder / f"{stem}.json", folder / f"{stem}.md"
        for path, content in zip(paths, (page, written, text), strict=True):
            write_text(path, content)
        return paths


def _guarded_rows(comparison: dict[str, Any], show_text: bool) -> dict[str, Any]:
    rows = {
        arm: [
            {key: value if key == "id" else guarded(value, show_text=show_text) for key, value in row.items()}
            for row in rows
        ]
        for arm, rows in comparison["rows"].items()
    }
    return {**comparison, "rows": rows, "provenance": guarded(comparison["provenance"], show_text=show_text)}
