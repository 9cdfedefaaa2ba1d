"""Pieces of a card: escaped text, tables, drawings; no script, no outside reference, colours for light and dark."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memloc import plots
from memloc.provenance import digest_json
from memloc.report.wording import scalar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "--ink": "currentColor", "--muted": "#858d96", "--rule": "rgba(133,141,150,.3)", "--paper": "#fff",
    "--series-0": "#4483cc", "--series-1": "#d67a2f", "--series-2": "#6a9f43", "--series-3": "#9d70bd",
    "--series-4": "#cc5468",
}  # fmt: skip
"""Mid-tones: at least 3 : 1 against white and against the dark pages of notebooks. Text takes the page's own colour."""

_CARD = "max-width:46em;margin:.3em 0;padding:.5em .8em;border:1px solid var(--rule);border-radius:4px;line-height:1.4"
_NUMBERS = "0123456789−—"
"""What a number begins with; so does an empty cell, for the empty text is in every text."""

_CELL = "padding:.1em 1em .1em 0;border:0;background:none;vertical-align:top"


def framed(title: str, line: str, body: Iterable[str]) -> str:
    """A card: its title, its line, and pieces of HTML below."""
    head = f"<div><b>{text(title)}</b> {text(line)}</div>"
    return f'<div style="{_colours()};{_CARD}">{head}{"".join(body)}</div>'


def text(value: Any) -> str:
    """A value as HTML text."""
    return html.escape(str(value), quote=True)


def facts_list(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values, one line each; pairs without a value are left out."""
    return table((), [(name, value) for name, value in pairs if value])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, of: int | None = None) -> str:
    """A table, columns of numbers to the right; `of` rows in truth, of which these are shown."""
    if not rows:
        return ""
    numeric = [bool(columns) and all(row[place][:1] in _NUMBERS for row in rows) for place in range(len(rows[0]))]
    aligned = [f"{_CELL};text-align:{'right' if right else 'left'}" for right in numeric]
    head = "".join(f'<th style="{style}">{text(name)}</th>' for name, style in zip(columns, aligned, strict=False))
    lines = [
        "".join(f'<td style="{style}">{text(entry)}</td>' for entry, style in zip(row, aligned, strict=True))
        for row in rows
    ]
    body = "".join(f'<tr style="background:none">{line}</tr>' for line in ([head] if columns else []) + lines)
    more = (of or 0) - len(rows)
    rest = quiet(f"and {scalar(more)} more") if more > 0 else ""
    style = "border-collapse:collapse;border:0;margin:.4em 0;font-size:92%"
    return f'<table style="{style}">{body}</table>{rest}'


def quiet(sentence: str) -> str:
    """A remark."""
    return f'<div style="opacity:.7;font-size:92%">{text(sentence)}</div>'


def picture(draw: Callable[[Axes], None], caption: str, *, width: float = 5.6, height: float = 1.9) -> str:
    """A drawing and what it shows; two drawings on one page share no id unless they are equal."""
    drawn = plots.svg(draw, name="drawing", width=width, height=height)
    drawn = drawn.replace("drawing-", f"m{digest_json(drawn)[:12]}-")
    # matplotlib's own style sheet would speak to every drawing of the notebook.
    drawn = re.sub(r"<style.*?</style>", "", drawn, flags=re.DOTALL)
    how = f"max-width:{6.4 * width:.0f}em;stroke-linejoin:round;stroke-linecap:butt"
    drawn = drawn.replace("<svg", f'<svg role="img" aria-label="{text(caption)}" style="{how}"', 1)
    return f"<div>{drawn}</div>{quiet(caption)}"


@dataclass(frozen=True)
class Drawing:
    """Any function that draws on an axis, as something a notebook shows: `Drawing(lambda ax: plots.curve(ax, …))`.

    Attributes:
        draw: called with an empty axis.
        caption: what it shows.
        width: in inches.
        height: in inches.
    """

    draw: Callable[[Axes], None]
    caption: str
    width: float = 5.6
    height: float = 2.6

    def _repr_html_(self) -> str:
        drawn = picture(self.draw, self.caption, width=self.width, height=self.height)
        return f'<div style="{_colours()}">{drawn}</div>'


def _colours() -> str:
    return ";".join(f"{name}:{value}" for name, value in _COLOURS.items())
