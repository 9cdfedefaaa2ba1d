"""The table of methods for the README, from the tables themselves: `python scripts/method_table.py`."""

from __future__ import annotations

from editors.methods import EDITORS
from memloc.methods import LOCALIZERS, MEASURES


def table() -> str:
    """Every measure, localizer and editor with the first line of its docstring, as Markdown."""
    lines = ["| kind | name | what it does |", "|---|---|---|"]
    for methods in (MEASURES, LOCALIZERS, EDITORS):
        lines += [f"| {methods.noun} | `{name}` | {methods.summary(name)} |" for name in sorted(methods)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
