"""Curves of memorization against utility, one panel an editor, the controls behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from editors.trade_offs.fronts import Judged, Point
from editors.trade_offs.plan import LARGEST, OWN, RANDOM
from editors.trade_offs.work import Outcome
from memloc.grids.plots import Picture
from memloc.plots import INK, MUTED, SERIES, style_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACROSS = 3
"""Panels of a picture."""


def pictures(outcomes: Sequence[Outcome], before: Judged) -> list[tuple[str, Picture]]:
    """Name and picture of every `ACROSS` editors."""
    panels = []
    for how in dict.fromkeys(entry.cell.how for entry in outcomes if entry.judged is not None):
        panels.append((how, _panel([entry for entry in outcomes if entry.cell.how == how], before)))
    title = "What is kept against what is still recited; up and to the left is better"
    return [
        (f"trade-off-{start // ACROSS + 1}", Picture(title, tuple(panels[start : start + ACROSS]), (4.2, 3.6)))
        for start in range(0, len(panels), ACROSS)
    ]


def _panel(entries: Sequence[Outcome], before: Judged) -> Callable[[Axes], None]:
    def draw(ax: Axes) -> None:
        labels = list(dict.fromkeys(entry.cell.where for entry in entries))
        for place, where in enumerate(labels):
            colour = SERIES[place % len(SERIES)]
            mine = [entry for entry in entries if entry.cell.where == where]
            _dots(ax, mine, before, RANDOM, colour, "x", None)
            _dots(ax, mine, before, LARGEST, colour, "+", None)
            _dots(ax, mine, before, OWN, colour, "o", where or "alone")
        start = before.point(before)
        ax.plot([100 * start.memorized], [100 * start.utility], marker="s", color=INK, markersize=5, linestyle="")
        ax.annotate("before", (100 * start.memorized, 100 * start.utility), xytext=(-4, -11),
                    textcoords="offset points", fontsize=7, color=MUTED, ha="right")  # fmt: skip
        style_axis(ax, "targets still recited, %", "utility kept, %")
        ax.set_xlim(-4, 104)
        ax.set_ylim(-4, 106)
        ax.legend(fontsize=7, frameon=False, loc="lower right", title="× random, + largest", title_fontsize=7)

    return draw


def _dots(
    ax: Axes, entries: Sequence[Outcome], before: Judged, side: str, colour: str, marker: str, label: str | None
) -> None:
    chosen = [entry for entry in entries if entry.cell.control == side and entry.judged is not None]
    found: list[Point] = [entry.judged.point(before) for entry in chosen if entry.judged is not None]
    if not found:
        return
    line = "-" if side == OWN and len({entry.cell.seed for entry in chosen}) == 1 else ""
    ax.plot([100 * p.memorized for p in found], [100 * p.utility for p in found], marker=marker, linestyle=line,
            color=colour, alpha=1.0 if side == OWN else 0.55, markersize=5, linewidth=1.2,
            label=label or "_control")  # fmt: skip
