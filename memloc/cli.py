"""The table of verbs that look. `memloc` itself starts in `editors/cli.py`, which joins these with its own."""

from __future__ import annotations

from collections.abc import Sequence

from memloc.command import Verb
from memloc.errors import InputError
from memloc.methods import LOCALIZERS, MEASURES
from memloc.registry import Registry
from memloc.terminal import Terminal
from memloc.verbs import (
    ablate,
    check,
    compare,
    convert,
    lab,
    localize,
    measure,
    merge,
    moments,
    report,
    show,
    significant,
    truth,
    validate,
)


def list_methods(tables: Sequence[Registry], terminal: Terminal, only: str | None) -> None:
    """Print every method of `tables` with its first docstring line."""
    found = {}
    for table in tables:
        if only in (None, table.noun, table.noun + "s"):
            rows = [(name, table.summary(name)) for name in sorted(table)]
            terminal.table(f"{table.noun}s", ["name", "what it does"], rows)
            found[table.noun + "s"] = dict(rows)
    if not found:
        nouns = ", ".join(table.noun + "s" for table in tables)
        raise InputError(f"nothing called {only!r} to list; known: {nouns}")
    terminal.result(found)


def verbs() -> tuple[Verb, ...]:
    """The verbs of this package, in the order of the loop; the report, which ends it, comes last."""
    return (
        Verb("check", "prove that memloc understands a model; print its map", check.flags, check.run),
        Verb("lab", "train a small model here whose memories are known", lab.flags, lab.run),
        Verb("validate", "what a data file is, and which of its records cannot be used", validate.flags, validate.run),
        Verb("convert", "a data file as JSON lines, or a measurement as others' results", convert.flags, convert.run),
        Verb("measure", "what is memorized, beside its controls", measure.flags, measure.run, MEASURES),
        Verb("localize", "where it is kept", localize.flags, localize.run, LOCALIZERS, shared=True),
        Verb("merge", "localizations of shards, or second moments, as one", merge.flags, merge.run),
        Verb("moments", "what ordinary text sends into the maps, for editors", moments.flags, moments.run, shared=True),
        Verb("ablate", "what happens without it: a grid of ablations as one table", ablate.flags, ablate.run),
        Verb("compare", "do localizations agree, and how stable is each", compare.flags, compare.run),
        Verb("significant", "which places count, against controls", significant.flags, significant.run),
        Verb("truth", "which localizers find what is known to be there", truth.flags, truth.run),
        Verb("show", "print what is in a localization, an edit or a measurement", show.flags, show.run),
        Verb("report", "one page of evidence from measurements, localizations and edits", report.flags, report.run),
    )
