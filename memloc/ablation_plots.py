"""Pictures of a table of ablations: one for every set and measure, of the kind the set asks for.

Layers become bars, sublayers and heads maps, growing sets and growing factors dose curves; each beside the range of its
random controls. Every drawing is a pure function of rows on a given axis.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memloc.plots import INK, MUTED, PAPER, SERIES, _axis
from memloc.store import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from memloc.sweep.table import Row

LOSS, GAIN = SERIES[1], SERIES[0]
"""Colours of a change for the less and for the more."""

Rows = Sequence["Row"]


@dataclass(frozen=True)
class Picture:
    """A figure, ready to be drawn.

    Attributes:
        title: one line above it.
        panels: name above each axis, and what draws on it.
        size: of one panel, in inches.
    """

    title: str
    panels: tuple[tuple[str, Callable[[Axes], None]], ...]
    size: tuple[float, float] = (6.0, 3.2)

    def save(self, path: str | Path) -> None:
        """Write `path`.png and `path`.svg, atomically; the same bytes for the same rows and matplotlib."""
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        path, count = Path(path), len(self.panels)
        with matplotlib.rc_context({"font.size": 9, "text.color": INK, "svg.hashsalt": path.name}):
            figure = Figure(figsize=(self.size[0] * count, self.size[1]), layout="constrained", facecolor=PAPER)
            FigureCanvasAgg(figure)
            for ax, (name, panel) in zip(figure.subplots(1, count, squeeze=False)[0], self.panels, strict=True):
                ax.set_facecolor(PAPER)
                panel(ax)
                if count > 1:
                    ax.set_title(name, fontsize=9, color=MUTED, loc="left")
            figure.suptitle(self.title, fontsize=10, x=0.01, ha="left")
            for suffix, metadata in ((".png", None), (".svg", {"Date": None})):
                with atomic_file(path.with_name(path.name + suffix)) as part:
                    figure.savefig(part, format=suffix[1:], dpi=144, metadata=metadata)


def draw(rows: Rows) -> Iterator[tuple[str, Picture]]:
    """The pictures of a table, each with a name for its file: of each set and measure, the first figure."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if row.set:
            groups.setdefault((row.model, row.set, row.measure, row.data), []).append(row)
    several = len({model for model, *_ in groups}) > 1
    for (model, name, measure, data), group in groups.items():
        mine = [row for row in group if row.figure == group[0].figure]
        parts = [Path(model).name] if several else []
        title = ": ".join([*parts, name, f"{mine[0].figure} ({measure} of {data})"])
        yield _slug("-".join([*parts, name, measure, data])), _picture(title, mine)


def _picture(title: str, rows: Rows) -> Picture:
    own = [row for row in rows if not row.control]
    ways = list(dict.fromkeys(_way(row) for row in own))
    single = all(row.count == 1 for row in own)
    if len({row.count for row in own}) > 1 and all(row.label.startswith("top ") for row in own):
        return Picture(title, (("", lambda ax: dose_curve(ax, rows)),))
    if len({row.factor for row in own}) > 2 and len({row.label for row in own}) == 1:
        return Picture(title, (("", lambda ax: dose_curve(ax, rows, across="factor")),))
    if single and own[0].grain in ("head", "component") and all(_place(row) for row in own):
        wide = max(3.2, 1.4 + 0.62 * len({_place(row)[1] for row in own}))
        high = max(2.6, 1.2 + 0.42 * len({_place(row)[0] for row in own}))
        panels = tuple((way, _panel(effect_map, [row for row in rows if _way(row) == way])) for way in ways)
        return Picture(title, panels, (wide, high))
    if own[0].grain == "layer":
        return Picture(title, (("", lambda ax: effect_bars(ax, rows)),))
    panels = tuple((way, _panel(effect_list, [row for row in rows if _way(row) == way])) for way in ways)
    return Picture(title, panels, (5.2, 1.3 + 0.24 * min(24, len({row.label for row in own}))))


def _panel(drawing: Callable[[Axes, Rows], None], rows: Rows) -> Callable[[Axes], None]:
    return lambda ax: drawing(ax, rows)


def effect_bars(ax: Axes, rows: Rows) -> None:
    """Change by layer (or by window, at its place), a bar a way of ablating, with intervals and the controls' range."""
    own = [row for row in rows if not row.control]
    labels = list(dict.fromkeys(row.label for row in own))
    ways = list(dict.fromkeys(_way(row) for row in own))
    scale, label = _scale(own[0])
    thick = 0.8 / len(ways)
    for number, way in enumerate(ways):
        colour = SERIES[number % len(SERIES)]
        for row in (row for row in own if _way(row) == way):
            left = labels.index(row.label) + (number - (len(ways) - 1) / 2) * thick
            first = row.label == labels[0]
            ax.bar(left, scale * (row.difference or 0.0), thick * 0.94, color=colour, linewidth=0,
                   label=way if first else f"_{way}")  # fmt: skip
            _whisker(ax, left, row, scale)
            beside = _changes([twin for twin in rows if twin.control and twin.label == row.label and _way(twin) == way])
            if beside:
                first_band = "random control" if number == 0 and row.label == labels[0] else "_band"
                low, high = scale * min(beside), scale * max(beside)
                ax.plot([left - thick / 2, left + thick / 2], [low, low], color=MUTED, linewidth=1.4, label=first_band)
                ax.fill_between([left - thick / 2, left + thick / 2], low, high, color=MUTED, alpha=0.35, linewidth=0)
    _axis(ax, "layers" if any("-" in entry for entry in labels) else "layer", label)
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.set_xticks(range(len(labels)), labels, rotation=45 if len(labels) > 12 else 0)
    ax.grid(False, axis="x")
    _legend(ax)


def effect_map(ax: Axes, rows: Rows) -> None:
    """Layer by head (or by sublayer): the change in each cell, the darker the larger; an ∗ where its interval is off 0.

    The range of the random controls stands below.
    """
    from matplotlib.patches import Rectangle

    own = [row for row in rows if not row.control]
    places = {_place(row): row for row in own}
    layers = sorted({place[0] for place in places})
    columns = sorted({place[1] for place in places}, key=lambda name: (len(name), name))
    scale, label = _scale(own[0])
    most = max((abs(row.difference or 0.0) for row in own), default=0.0) or 1.0
    for (layer, column), row in places.items():
        y, x, change = layers.index(layer), columns.index(column), row.difference or 0.0
        depth = 0.05 + 0.85 * min(1.0, abs(change) / most)
        colour = LOSS if change < 0 else GAIN
        ax.add_patch(Rectangle((x + 0.03, y + 0.04), 0.94, 0.92, facecolor=colour, alpha=depth, linewidth=0))
        if len(layers) * len(columns) <= 400:
            sure = row.difference_low is not None and row.difference_high is not None and (
                row.difference_low > 0 or row.difference_high < 0)  # fmt: skip
            text = _short(scale * change) + ("∗" if sure else "")
            ax.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7.5, color=PAPER if depth > 0.5 else INK)
    ax.set_xlim(0, len(columns))
    ax.set_ylim(0, len(layers))
    beside = _changes([row for row in rows if row.control])
    below = "head" if own[0].grain == "head" else ""
    if beside:
        below += f"\nrandom controls: {_short(scale * min(beside))} to {_short(scale * max(beside))}"
    _axis(ax, f"{below}\n{label}".strip(), "layer")
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    ax.set_xticks([x + 0.5 for x in range(len(columns))], columns)
    ax.set_yticks([y + 0.5 for y in range(len(layers))], [str(layer) for layer in layers])


def effect_list(ax: Axes, rows: Rows, most: int = 24) -> None:
    """Change by set, the largest first, with intervals; a grey bar spans the set's random controls."""
    own = sorted((row for row in rows if not row.control), key=lambda row: -abs(row.difference or 0.0))
    shown = own[:most][::-1]
    scale, label = _scale(own[0])
    for y, row in enumerate(shown):
        change = scale * (row.difference or 0.0)
        ax.barh(y, change, 0.62, color=LOSS if change < 0 else GAIN, linewidth=0)
        if row.difference_low is not None and row.difference_high is not None:
            ax.plot(
                [scale * row.difference_low, scale * row.difference_high], [y, y], color=INK, linewidth=1, alpha=0.6
            )
        beside = _changes([twin for twin in rows if twin.control and twin.label == row.label])
        if beside:
            ends = [scale * min(beside), scale * max(beside)]
            ax.plot(ends, [y - 0.4, y - 0.4], color=MUTED, linewidth=4, solid_capstyle="butt",
                    label="random control" if y == 0 else "_")  # fmt: skip
    _axis(ax, label, "")
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.grid(False, axis="y")
    ax.set_yticks(range(len(shown)), [row.label for row in shown])
    _legend(ax)


def dose_curve(ax: Axes, rows: Rows, *, across: str = "count") -> None:
    """Value against how much is ablated, a line a way of ablating, with intervals; bands span the random controls.

    Args:
        ax: where.
        rows: of one figure.
        across: "count" (components) or "factor".
    """
    own = [row for row in rows if not row.control]
    scale = 100.0 if own[0].unit == "share" else 1.0
    ways = list(dict.fromkeys(_way(row, across) for row in own))
    everywhere = sorted({float(getattr(row, across) or 0) for row in own})
    # Doses usually grow by factors; equal steps keep them apart.
    place = {value: index for index, value in enumerate(everywhere)}
    for number, way in enumerate(ways):
        colour = SERIES[number % len(SERIES)]
        for control in (False, True):
            mine: dict[float, list[Row]] = {}
            for row in rows:
                if _way(row, across) == way and bool(row.control) == control:
                    mine.setdefault(float(getattr(row, across) or 0), []).append(row)
            points = sorted(mine.items())
            x = [place[value] for value, _ in points]
            heights = [[scale * row.value for row in group] for _, group in points]
            means = [sum(entries) / len(entries) for entries in heights]
            if not points:
                continue
            if control:
                ax.plot(x, means, color=colour, linewidth=1.2, linestyle=(0, (4, 2)), label=f"{way}, random")
                low, high = [min(entries) for entries in heights], [max(entries) for entries in heights]
                ax.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
            else:
                ax.plot(x, means, color=colour, linewidth=1.7, marker="o", markersize=4.5, label=way)
                for left, (_, group) in zip(x, points, strict=True):
                    lows = [row.low for row in group if row.low is not None]
                    highs = [row.high for row in group if row.high is not None]
                    if lows and highs:
                        ax.plot([left, left], [scale * min(lows), scale * max(highs)], color=colour, linewidth=1,
                                alpha=0.5)  # fmt: skip
    ax.axhline(scale * own[0].baseline, color=INK, linewidth=0.9, linestyle=":", label="untouched")
    named = own[0].figure + (", %" if scale == 100 else f", {own[0].unit}" if own[0].unit not in own[0].figure else "")
    what = "factor" if across == "factor" else f"{own[0].grain}s ablated"
    _axis(ax, what, named)
    if own[0].unit == "share":
        ax.set_ylim(-4, 104)
    elif max(row.value for row in rows) > 20 * max(own[0].baseline, 1e-9) > 0:
        ax.set_yscale("log")
    ax.set_xticks(list(place.values()), [f"{value:g}" for value in place])
    _legend(ax)


def _changes(rows: Rows) -> list[float]:
    return [row.difference for row in rows if row.difference is not None]


def _way(row: Row, across: str = "count") -> str:
    """How a row was ablated, in words."""
    if row.factor is None or across == "factor":
        return row.how
    return f"{row.how} × {row.factor:g}" if row.how == "scale" else f"{row.how} {row.factor:g} std"


def _place(row: Row) -> tuple[int, str]:
    """Layer, and head or sublayer."""
    found = re.fullmatch(r"L(\d+)(?:H(\d+)|\.([a-z.]+))", row.label)
    return (int(found[1]), found[2] or found[3]) if found else ()  # type: ignore[return-value]


def _scale(row: Row) -> tuple[float, str]:
    """What changes are multiplied by, and how the axis is called."""
    if row.change == "points":
        return 100.0, f"change of {row.figure}, points"
    if row.change == "relative":
        return 100.0, f"change of {row.figure}, %"
    if row.change == "factor":
        return 1.0, f"{row.figure}, times the untouched"
    return 1.0, f"change of {row.figure}, {row.unit}"


def _short(value: float) -> str:
    digits = ".0f" if abs(value) >= 10 else ".1f" if abs(value) >= 0.05 or value == 0 else ".2g"
    return f"{value:+{digits}}"


def _whisker(ax: Axes, left: float, row: Row, scale: float) -> None:
    if row.difference_low is not None and row.difference_high is not None:
        ends = [scale * row.difference_low, scale * row.difference_high]
        ax.plot([left, left], ends, color=INK, linewidth=1, alpha=0.6)


def _legend(ax: Axes) -> None:
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend(frameon=False, fontsize=7.5, labelcolor=INK, loc="best")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()
