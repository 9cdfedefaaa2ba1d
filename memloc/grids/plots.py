"""Pictures of a table of ablations: one for every set and measure, of the kind the set asks for.

Layers become bars, sublayers and heads maps, growing sets and growing factors dose curves; each beside the range of its
random controls. Every drawing is a pure function of rows on a given axis.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memloc.plots import INK, MUTED, PAPER, SERIES, style_axis
from memloc.store import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from memloc.grids.table import Row

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
    size: tuple[float, float] = (6.8, 3.2)

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
        figure = mine[0].figure if measure == mine[0].figure else f"{mine[0].figure} ({measure})"
        title = ": ".join([*parts, name]) + f"\n{figure} of {data}"
        yield _slug("-".join([*parts, name, measure, data])), _picture(title, mine)


def _picture(title: str, rows: Rows) -> Picture:
    own = [row for row in rows if not row.control]
    ways = list(dict.fromkeys(_way(row) for row in own))
    if len({row.count for row in own}) > 1 and all(row.label.startswith("top ") for row in own):
        return Picture(title, (("", lambda ax: dose_curve(ax, rows)),))
    if len({row.factor for row in own}) > 2 and len({row.label for row in own}) == 1:
        return Picture(title, (("", lambda ax: dose_curve(ax, rows, across="factor")),))
    if all(row.count == 1 for row in own) and own[0].grain in ("head", "component") and all(map(_place, own)):
        places = [place for row in own if (place := _place(row))]
        wide = max(3.4, 1.4 + 0.62 * len({column for _, column in places}))
        high = max(2.8, 1.4 + 0.42 * len({layer for layer, _ in places}))
        return Picture(title, tuple((way, _panel(effect_map, rows, way)) for way in ways), (wide, high))
    if own[0].grain == "layer":
        return Picture(title, (("", lambda ax: effect_bars(ax, rows)),))
    high = 1.5 + 0.26 * min(24, len({row.label for row in own}))
    return Picture(title, tuple((way, _panel(effect_list, rows, way)) for way in ways), (5.2, high))


def _panel(drawing: Callable[[Axes, Rows], None], rows: Rows, way: str) -> Callable[[Axes], None]:
    mine = [row for row in rows if _way(row) == way]
    return lambda ax: drawing(ax, mine)


@dataclass(frozen=True)
class _Effect:
    """The change under one set and one way, all seeds together; shares and relative changes as on the axis."""

    label: str
    way: str
    place: tuple[int, str] | None
    change: float
    ends: tuple[float, float] | None
    random: tuple[float, ...]

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out what no change would be."""
        return self.ends is not None and not self.ends[0] <= 0 <= self.ends[1]


@dataclass(frozen=True)
class _Axis:
    """How changes of a figure stand on an axis."""

    label: str
    scale: float
    ratio: bool

    @classmethod
    def of(cls, row: Row) -> _Axis:
        if row.change == "points":
            return cls(f"change of {row.figure}, points", 100.0, False)
        if row.change in ("relative", "factor"):
            return cls(f"{row.figure}, times the untouched", 1.0, True)
        return cls(f"change of {row.figure}, {row.unit}", 1.0, False)

    def placed(self, row: Row, value: float | None) -> float | None:
        """A change as it is drawn: ratios as powers of two, so that halves and doubles are as far from nothing."""
        if value is None or not math.isfinite(value):
            return None
        if not self.ratio:
            return self.scale * value
        ratio = value + 1 if row.change == "relative" else value
        return math.log2(ratio) if ratio > 0 else None

    def written(self, place: float) -> str:
        """A change as text."""
        if not self.ratio:
            digits = ".0f" if abs(place) >= 10 else ".1f" if abs(place) >= 0.05 or place == 0 else ".2g"
            return f"{place:+{digits}}"
        ratio = 2.0**place
        return f"×{ratio:.0f}" if ratio >= 10 else f"×{ratio:.1f}" if ratio >= 1.5 else f"×{ratio:.2f}"

    def ticks(self, ax: Axes, *, across: bool = False) -> None:
        """Ratios are written as ratios."""
        if self.ratio:
            from matplotlib.ticker import FuncFormatter, MaxNLocator

            axis = ax.xaxis if across else ax.yaxis
            axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
            axis.set_major_formatter(FuncFormatter(lambda place, _: self.written(place)))


def _effects(rows: Rows) -> tuple[list[_Effect], _Axis]:
    """One effect a set and way, in the order of the rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.label, _way(row)), []).append(row)
    axis = _Axis.of(next(row for row in rows if not row.control))
    found = []
    for (label, way), group in groups.items():
        own = [row for row in group if not row.control]
        twins = [axis.placed(row, row.difference) for row in group if row.control]
        changes, lows, highs, random = (
            [entry for entry in entries if entry is not None]
            for entries in (
                [axis.placed(row, row.difference) for row in own],
                [axis.placed(row, row.difference_low) for row in own],
                [axis.placed(row, row.difference_high) for row in own],
                twins,
            )
        )
        if changes:
            ends = (min(lows), max(highs)) if lows and highs else None
            found.append(_Effect(label, way, _place(own[0]), sum(changes) / len(changes), ends, tuple(random)))
    return found, axis


def effect_bars(ax: Axes, rows: Rows) -> None:
    """Change by layer (or window of layers), a bar a way of ablating; intervals, and the random controls' range."""
    effects, axis = _effects(rows)
    labels = list(dict.fromkeys(effect.label for effect in effects))
    ways = list(dict.fromkeys(effect.way for effect in effects))
    thick, named = 0.8 / len(ways), set[str]()
    for effect in effects:
        number = ways.index(effect.way)
        left = labels.index(effect.label) + (number - (len(ways) - 1) / 2) * thick
        ax.bar(left, effect.change, thick * 0.94, color=SERIES[number % len(SERIES)], linewidth=0,
               label=_once(effect.way, named))  # fmt: skip
        if effect.ends is not None:
            ax.plot([left, left], effect.ends, color=INK, linewidth=1, alpha=0.6)
        if effect.random:
            ends, mean = [left - thick / 2, left + thick / 2], sum(effect.random) / len(effect.random)
            ax.fill_between(ends, min(effect.random), max(effect.random), color=MUTED, alpha=0.4, linewidth=0)
            ax.plot(ends, [mean] * 2, color=MUTED, linewidth=1.6, label=_once("random controls", named))
    style_axis(ax, "layer" if not any("-" in label for label in labels) else "layers", axis.label)
    axis.ticks(ax)
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.set_xticks(range(len(labels)), labels, rotation=45 if len(labels) > 12 else 0)
    ax.grid(False, axis="x")
    _legend(ax)


def effect_map(ax: Axes, rows: Rows) -> None:
    """Layer by head (or by sublayer): the change in each cell, darker for larger; ∗ where its interval leaves out none.

    The range of the random controls stands below.
    """
    from matplotlib.patches import Rectangle

    effects, axis = _effects(rows)
    placed = {effect.place: effect for effect in effects if effect.place}
    layers = sorted({place[0] for place in placed})
    columns = sorted({place[1] for place in placed}, key=_column)
    most = max((abs(effect.change) for effect in placed.values()), default=0.0) or 1.0
    for (layer, column), effect in placed.items():
        y, x = layers.index(layer), columns.index(column)
        depth = 0.05 + 0.85 * min(1.0, abs(effect.change) / most)
        colour = LOSS if effect.change < 0 else GAIN
        ax.add_patch(Rectangle((x + 0.03, y + 0.04), 0.94, 0.92, facecolor=colour, alpha=depth, linewidth=0))
        if len(placed) <= 400:
            text = axis.written(effect.change) + ("∗" if effect.sure else "")
            ax.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7.5, color=PAPER if depth > 0.5 else INK)
    ax.set_xlim(0, max(1, len(columns)))
    ax.set_ylim(0, max(1, len(layers)))
    lines = ["head"] if all(column.isdigit() for column in columns) else []
    random = [change for effect in effects for change in effect.random]
    lines += [axis.label]
    lines += [f"random controls: {axis.written(min(random))} to {axis.written(max(random))}"] if random else []
    style_axis(ax, "\n".join(lines), "layer")
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    ax.set_xticks([x + 0.5 for x in range(len(columns))], columns)
    ax.set_yticks([y + 0.5 for y in range(len(layers))], [str(layer) for layer in layers])


def effect_list(ax: Axes, rows: Rows, most: int = 24) -> None:
    """Change by set, the largest on top, with intervals; a grey bar spans the set's random controls."""
    effects, axis = _effects(rows)
    shown = sorted(effects, key=lambda effect: -abs(effect.change))[:most][::-1]
    named: set[str] = set()
    for y, effect in enumerate(shown):
        ax.barh(y, effect.change, 0.62, color=LOSS if effect.change < 0 else GAIN, linewidth=0)
        if effect.ends is not None:
            ax.plot(effect.ends, [y, y], color=INK, linewidth=1, alpha=0.6)
        if effect.random:
            ends = [min(effect.random), max(effect.random)]
            ax.plot(ends, [y - 0.38] * 2, color=MUTED, linewidth=3.5, marker="|", markersize=5,
                    label=_once("random controls", named))  # fmt: skip
    style_axis(ax, axis.label, "")
    axis.ticks(ax, across=True)
    ax.axvline(0, color=INK, linewidth=0.8)
    ax.grid(False, axis="y")
    ax.set_yticks(range(len(shown)), [effect.label for effect in shown])
    _legend(ax, least=1)


def dose_curve(ax: Axes, rows: Rows, *, across: str = "count") -> None:
    """Value against how much is ablated, a line a way of ablating, with intervals; bands span the random controls.

    Args:
        ax: where.
        rows: of one figure.
        across: "count" (components) or "factor".
    """
    first = next(row for row in rows if not row.control)
    scale = 100.0 if first.unit == "share" else 1.0
    ways = list(dict.fromkeys(_way(row, across) for row in rows if not row.control))
    doses = sorted({_dose(row, across) for row in rows})
    # Doses usually grow by factors; equal steps keep them apart.
    place = {dose: index for index, dose in enumerate(doses)}
    for number, way in enumerate(ways):
        colour, shift = SERIES[number % len(SERIES)], (number - (len(ways) - 1) / 2) * 0.03
        for control in (True, False):
            mine: dict[float, list[Row]] = {}
            for row in rows:
                if _way(row, across) == way and bool(row.control) == control and math.isfinite(row.value):
                    mine.setdefault(_dose(row, across), []).append(row)
            points = [(place[dose] + shift, mine[dose]) for dose in sorted(mine)]
            (_random_band if control else _dose_line)(ax, points, scale, colour, way)
    ax.axhline(scale * first.baseline, color=INK, linewidth=0.9, linestyle=":", label="untouched")
    unit = "%" if scale == 100 else first.unit
    style_axis(ax, "factor" if across == "factor" else f"{first.grain}s ablated",
          first.figure if unit == first.figure else f"{first.figure}, {unit}")  # fmt: skip
    values = [row.value for row in rows if math.isfinite(row.value)]
    if first.unit == "share":
        ax.set_ylim(-4, 104)
    elif min(values) > 0 and max(values) > 5 * min(values):
        ax.set_yscale("log")
    ax.set_xticks(list(place.values()), [f"{dose:g}" for dose in place])
    _legend(ax)


Points = Sequence[tuple[float, "Rows"]]


def _dose_line(ax: Axes, points: Points, scale: float, colour: str, way: str) -> None:
    """Means over seeds, and the widest interval at each dose."""
    means = [sum(scale * row.value for row in group) / len(group) for _, group in points]
    ax.plot([x for x, _ in points], means, color=colour, linewidth=1.7, marker="o", markersize=4.5, label=way)
    for x, group in points:
        ends = [(row.low, row.high) for row in group if row.low is not None and row.high is not None]
        if ends:
            whole = [scale * min(end[0] for end in ends), scale * max(end[1] for end in ends)]
            ax.plot([x, x], whole, color=colour, linewidth=1, alpha=0.5)


def _random_band(ax: Axes, points: Points, scale: float, colour: str, way: str) -> None:
    """Mean and range of the random controls at each dose."""
    if points:
        x, groups = [x for x, _ in points], [[scale * row.value for row in group] for _, group in points]
        means = [sum(group) / len(group) for group in groups]
        ax.plot(x, means, color=colour, linewidth=1.2, linestyle=(0, (4, 2)), label=f"{way}, random")
        ax.fill_between(x, [min(group) for group in groups], [max(group) for group in groups], color=colour,
                        alpha=0.16, linewidth=0)  # fmt: skip


def _dose(row: Row, across: str) -> float:
    return float(row.count if across == "count" else row.factor or 0.0)


def _way(row: Row, across: str = "count") -> str:
    """How a row was ablated, in words."""
    if row.factor is None or across == "factor":
        return row.how
    return f"{row.how} × {row.factor:g}" if row.how == "scale" else f"{row.how} {row.factor:g} std"


def _place(row: Row) -> tuple[int, str] | None:
    """Layer, and head or sublayer; None for other sets."""
    found = re.fullmatch(r"L(\d+)(?:H(\d+)|\.([a-z.]+))", row.label)
    return (int(found[1]), found[2] or found[3]) if found else None


def _column(name: str) -> tuple[int, int, str]:
    """Heads by number; attention before the MLP."""
    return (0, int(name), "") if name.isdigit() else (1, int(name.startswith("mlp")), name)


def _once(label: str, named: set[str]) -> str:
    """A label the first time, and one that no legend shows from then on."""
    shown = label if label not in named else f"_{label}"
    named.add(label)
    return shown


def _legend(ax: Axes, least: int = 2) -> None:
    if len(ax.get_legend_handles_labels()[1]) >= least:
        ax.legend(frameon=False, fontsize=7.5, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()
