"""Printing: tables, notes and progress. Rich on a terminal, plain text when piped, JSON when asked. No torch here.

Results go to stdout; progress and errors go to stderr, so that a pipe holds results only.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from memloc import progress


class Terminal:
    """Where a verb puts its results.

    Args:
        as_json: print one JSON document and nothing else on stdout.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.rich = not as_json and sys.stdout.isatty()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; silent with --json."""
        if self.as_json:
            return
        text = [[cell(entry) for entry in row] for row in rows]
        if self.rich:
            from rich.console import Console

            console = Console()
            # A number that does not fit must never be cut short, for the rest would read as another number.
            table = _rich_table(title, columns, rows, text, whole=True)
            if console.measure(table, options=console.options.update(max_width=10_000)).maximum > console.width:
                table = _rich_table(title, columns, rows, text, whole=False)
            console.print(table)
            return
        widths = [max(len(str(part)) for part in column) for column in zip(columns, *text, strict=True)]
        lines = [title, *("  ".join(part.ljust(width) for part, width in zip(row, widths, strict=True)).rstrip()
                          for row in [list(columns), *text])]  # fmt: skip
        sys.stdout.write("\n".join(lines) + "\n\n")

    def note(self, text: str) -> None:
        """One line; silent with --json."""
        if not self.as_json:
            sys.stdout.write(text + "\n")

    def result(self, value: Mapping[str, Any]) -> None:
        """The machine-readable result; printed only with --json."""
        if self.as_json:
            sys.stdout.write(json.dumps(_strict(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _rich_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], text: Sequence[Sequence[str]], *, whole: bool
) -> Any:
    """A rich table; `whole`: short cells are not broken over lines."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False}
    table = Table(title=escape(title), title_justify="left", header_style="bold", **style)
    for index, column in enumerate(columns):
        justify: Any = "right" if _numeric(rows, index) else "left"
        short = all(len(row[index]) <= 26 for row in text)
        table.add_column(escape(column), justify=justify, overflow="fold", no_wrap=whole and short)
    for row in text:
        table.add_row(*map(escape, row))
    return table


def complain(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(" ".join(text.split()) + "\n")


def cell(value: Any) -> str:
    """A value as a person reads it: four significant digits, ∞, an empty cell for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if math.isinf(value):
            return "∞" if value > 0 else "−∞"
        if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
            return f"{value:.3g}"
        return f"{value:.4g}"
    return str(value)


def time_left(seconds: float | None) -> str:
    """Such as ", 3 min left"; nothing where it is not known."""
    if seconds is None:
        return ""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f", {seconds / length:.0f} {unit} left"
    return f", {seconds:.0f} s left"


@contextlib.contextmanager
def progress_shown() -> Iterator[None]:
    """Draw the progress of everything inside the block: bars on a terminal, a line now and then elsewhere."""
    if sys.stderr.isatty():
        with _bars() as listener, progress.listening(listener):
            yield
    else:
        with progress.listening(_lines()):
            yield


@contextlib.contextmanager
def _bars() -> Iterator[progress.Listener]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[note]}"))  # fmt: skip
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        def listener(label: str, done: int, total: int | None, note: str) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(escape(label), total=total, note="")
            bars.update(tasks[label], completed=done, total=total, note=escape(note))
            if total is not None and done >= total:
                bars.remove_task(tasks.pop(label))

        yield listener


def _lines(every: float = 10.0) -> progress.Listener:
    last: dict[str, float] = {}
    begun: dict[str, tuple[float, int]] = {}

    def listener(label: str, done: int, total: int | None, note: str) -> None:
        now = time.monotonic()
        if done == 0 or label not in begun:
            # Work that goes on where it was interrupted does not begin at 0.
            last[label], begun[label] = now, (now, done)
        elif now - last[label] >= every:
            last[label] = now
            since, first = begun[label]
            left = None if total is None or done <= first else (now - since) / (done - first) * (total - done)
            complain(f"{label}: {done}{'' if total is None else f' of {total}'}{time_left(left)} {note}")

    return listener


def _numeric(rows: Sequence[Sequence[Any]], index: int) -> bool:
    return bool(rows) and all(
        entry is None or (isinstance(entry, int | float) and not isinstance(entry, bool))
        for entry in (row[index] for row in rows)
    )


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
