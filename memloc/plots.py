"""Figures on a given axis: pure functions of data, no pyplot, no global state; matplotlib is imported when drawing.

Every function takes a `matplotlib.axes.Axes` and either the object or its plain numbers (`results.profiles`), labels
what it draws, and leaves legends to whoever owns the figure. `svg` turns a drawing into markup that can stand in a
page: text as paths, no outside reference, equal bytes for equal data.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memloc.results import profiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from memloc.scores import Localization, Selection

INK, MUTED, GRID = "#1b1f24", "#6a727c", "#dfe3e8"
SERIES = ("#2a62a6", "#c7671f", "#5f8f3a", "#8a5aa8", "#a8324a")
PAPER = "#fdfdfb"

VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--rule", PAPER: "--paper"} | {
    colour: f"--series-{place}" for place, colour in enumerate(SERIES)
}
"""Colours to the names a page may give them, so that one drawing serves a light and a dark page."""

Series = Mapping[str, Sequence[Mapping[str, Any]]]


def layer_bars(ax: Axes, localization: Localization | Mapping[str, Any], control: Localization | None = None) -> None:
    """Share of the total score held by each layer, memorized passages beside controls.

    Args:
        ax: where.
        localization: a localization, or what `profiles.layer_profile` made of one (then `control` is in it).
        control: the same method on the controls.
    """
    data = localization if isinstance(localization, Mapping) else profiles.layer_profile(localization, control)
    layers = data["layers"]
    sides = [("share", "memorized")]
    if layers and layers[0]["control_share"] is not None:
        sides.append(("control_share", "controls"))
    width = 0.8 / len(sides)
    for place, (key, name) in enumerate(sides):
        left = [entry["layer"] + (place - (len(sides) - 1) / 2) * width for entry in layers]
        heights = [100 * entry[key] for entry in layers]
        ax.bar(left, heights, width * 0.94, color=SERIES[place], label=name, linewidth=0)
    style_axis(ax, "layer", "share of the score, %")
    _whole_ticks(ax, [entry["layer"] for entry in layers])


def layer_component_map(
    ax: Axes, localization: Localization | Mapping[str, Any], control: Localization | None = None
) -> None:
    """Layer by component, the darker the larger its share of the total score; per cent in each cell.

    Args:
        ax: where.
        localization: a localization, or what `profiles.component_profile` made of one.
        control: if given as a localization (or in the data), its share stands below in each cell, in brackets.
    """
    from matplotlib.patches import Rectangle

    data = localization if isinstance(localization, Mapping) else profiles.component_profile(localization, control)
    rows, others = data["shares"], data["control_shares"]
    most = max((share for row in rows for share in row if share is not None), default=0.0) or 1.0
    for y, row in enumerate(rows):
        for x, share in enumerate(row):
            if share is None:
                continue
            depth = 0.06 + 0.84 * share / most
            ax.add_patch(Rectangle((x + 0.03, y + 0.04), 0.94, 0.92, facecolor=SERIES[0], alpha=depth, linewidth=0))
            text = f"{100 * share:.1f}"
            if others is not None:
                text += f"\n({100 * others[y][x]:.1f})"
            if len(rows) <= 16:
                ink = PAPER if depth > 0.5 else INK
                ax.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7.5, color=ink, linespacing=1.3)
    ax.set_xlim(0, max(1, len(data["kinds"])))
    ax.set_ylim(0, max(1, len(rows)))
    style_axis(ax, "", "layer")
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    step = max(1, math.ceil(len(rows) / 16))
    ax.set_xticks([x + 0.5 for x in range(len(data["kinds"]))], data["kinds"])
    ax.set_yticks(
        [y + 0.5 for y in range(0, len(rows), step)], [str(data["layers"][y]) for y in range(0, len(rows), step)]
    )


def head_map(ax: Axes, data: Mapping[str, Any]) -> None:
    """Layer by head: the deeper the colour the larger the score; negative ones in the second colour.

    Args:
        ax: where.
        data: what `maps.head_map` made; the controls' scores stand below in each cell, in brackets, chosen heads have a
            frame.
    """
    rows, others, chosen = data["scores"], data["control_scores"], data["chosen"]
    small = len(rows) <= 16 and max(map(len, rows), default=0) <= 16
    notes = None
    if small:
        notes = [
            [_signed(score) + ("" if others is None else f"\n({_signed(others[y][x])})") for x, score in enumerate(row)]
            for y, row in enumerate(rows)
        ]
    _grid(ax, rows, notes=notes, framed=chosen)
    style_axis(ax, "head", "layer")
    _grid_ticks(ax, [str(x) for x in range(max(map(len, rows), default=0))], [str(layer) for layer in data["layers"]])


def position_map(ax: Axes, data: Mapping[str, Any], *, prefix: int | None = None) -> None:
    """Layer by token of one passage; one row alone is drawn as bars. A line stands where the suffix begins.

    Args:
        ax: where.
        data: one of the `maps` that `maps.position_maps` made.
        prefix: tokens of the prefix.
    """
    rows = data["scores"]
    length = max(map(len, rows), default=0)
    if len(rows) == 1:
        colours = [SERIES[0] if score >= 0 else SERIES[1] for score in rows[0]]
        ax.bar([x + 0.5 for x in range(length)], rows[0], 0.86, color=colours, linewidth=0)
        ax.set_xlim(0, max(1, length))
        style_axis(ax, "token", "score")
        ax.grid(False, axis="x")
    else:
        _grid(ax, rows, gap=0.0)
        style_axis(ax, "token", "layer")
        _grid_ticks(ax, None, [str(layer) for layer in data["layers"]])
    step = max(1, math.ceil(length / 16))
    ax.set_xticks([x + 0.5 for x in range(0, length, step)], [str(x) for x in range(0, length, step)])
    if prefix is not None and 0 < prefix < length:
        ax.axvline(prefix, color=INK, linewidth=0.9, linestyle=(0, (3, 2)))


def neuron_strip(ax: Axes, localization: Localization | Mapping[str, Any], selection: Selection | None = None) -> None:
    """One line a layer: the spread of all scores as a bar (5 to 95 %), the best-scored as dots, chosen ones marked.

    Args:
        ax: where.
        localization: a localization with a row of scores a site, or what `profiles.neuron_profile` made of one.
        selection: what was chosen from it.
    """
    data = localization if isinstance(localization, Mapping) else profiles.neuron_profile(localization, selection)
    named: set[str] = set()

    def once(label: str) -> str:
        first = label not in named
        named.add(label)
        return label if first else "_" + label

    for y, site in enumerate(data["sites"]):
        spread = site["quantiles"]
        if not spread:
            continue
        ax.plot([spread[0], spread[6]], [y, y], color=GRID, linewidth=1, zorder=1, label=once("_range"))
        ax.plot([spread[1], spread[5]], [y, y], color=MUTED, linewidth=4, alpha=0.5, zorder=2, solid_capstyle="butt",
                label=once("5 to 95 % of all"))  # fmt: skip
        for chosen, colour, size, label in ((False, SERIES[0], 7, "best-scored"), (True, SERIES[1], 16, "chosen")):
            dots = [score for _, score, picked in site["best"] if picked == chosen and (chosen or score > spread[5])]
            if dots:
                height = [y + (0.16 if chosen else 0.0)] * len(dots)
                ax.scatter(dots, height, s=size, color=colour, alpha=0.75, linewidths=0, zorder=3 + chosen,
                           label=once(label))  # fmt: skip
    style_axis(ax, "score (larger is more responsible)", "layer")
    ax.grid(False, axis="y")
    ax.set_ylim(-0.6, max(0.6, len(data["sites"]) - 0.4))
    step = max(1, math.ceil(len(data["sites"]) / 16))
    ticks = range(0, len(data["sites"]), step)
    ax.set_yticks(list(ticks), [str(data["sites"][y]["layer"]) for y in ticks])


def dose_curve(ax: Axes, series: Series) -> None:
    """Share extracted against how often a passage stood in the training text, with Wilson intervals.

    Args:
        ax: where.
        series: name to points `{"x": duplicates, "y": share, "low", "high"}`, as `profiles`-like data hold them.
    """
    curve(ax, series, x="times seen in training", y="recited word for word, %", scale=100.0, log=True)
    ax.set_ylim(-4, 104)


def curve(
    ax: Axes, series: Series, *, x: str, y: str, kind: str = "line", scale: float = 1.0, log: bool = False
) -> None:
    """Small lines or bars with intervals.

    Args:
        ax: where.
        series: name to points `{"x", "y", "low", "high"}`; ends may be None; infinite values are left out.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        kind: "line" or "bars".
        scale: what values are multiplied by (100 for per cent).
        log: whether the horizontal axis counts doublings; zero stays where it is.
    """
    all_x = sorted({point["x"] for points in series.values() for point in points})
    place = {value: index for index, value in enumerate(all_x)}
    for number, (name, points) in enumerate(series.items()):
        shown = [point for point in points if math.isfinite(float(point["y"]))]
        shift = (number - (len(series) - 1) / 2) * (0.8 / max(1, len(series)) if kind == "bars" else 0.06)
        across = [place[p["x"]] + shift if kind == "bars" or log else p["x"] for p in shown]
        heights = [scale * float(p["y"]) for p in shown]
        colour = SERIES[number % len(SERIES)]
        if kind == "bars":
            ax.bar(across, heights, 0.75 / len(series), color=colour, label=name, linewidth=0)
        else:
            ax.plot(across, heights, color=colour, label=name, marker="o", markersize=4.5, linewidth=1.6)
        for left, point in zip(across, shown, strict=True):
            if point.get("low") is not None and point.get("high") is not None:
                ends = [scale * float(point["low"]), scale * float(point["high"])]
                if all(math.isfinite(end) for end in ends):
                    ax.plot([left, left], ends, color=INK if kind == "bars" else colour, linewidth=1.1, alpha=0.55,
                            label="_interval")  # fmt: skip
    style_axis(ax, x, y)
    if kind == "bars":
        ax.grid(False, axis="x")
    if kind == "bars" or log:
        ax.set_xticks(
            list(place.values()), [f"{value:g}" if isinstance(value, float) else str(value) for value in place]
        )


def svg(draw: Callable[[Axes], None], *, name: str, width: float = 6.4, height: float = 3.0) -> str:
    """A drawing as an inline `<svg>`: text as paths, colours as the page's variables, no id shared with another.

    Args:
        draw: called with an empty axis.
        name: letters and digits; every id in the markup starts with it.
        width: in inches.
        height: in inches.

    Returns:
        Markup without declaration, comment, metadata or link; the same for the same data and matplotlib.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {
        "svg.hashsalt": name, "svg.fonttype": "path", "text.parse_math": False, "font.family": ["DejaVu Sans"],
        "font.size": 9, "text.color": INK, "path.simplify": True, "axes.unicode_minus": True,
    }  # fmt: skip
    target = io.StringIO()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(target.getvalue(), name)


def _inline(text: str, name: str) -> str:
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text[text.index("<svg") :]
    text = re.sub(r'\sxmlns(?::\w+)?="[^"]*"', "", text)
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )
    text = text.replace("xlink:href=", "href=").replace('href="#', f'href="#{name}-')
    text = re.sub(r'\bid="', f'id="{name}-', text).replace("url(#", f"url(#{name}-")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _grid(
    ax: Axes,
    rows: Sequence[Sequence[float]],
    *,
    notes: Sequence[Sequence[str]] | None = None,
    framed: Sequence[Sequence[bool]] | None = None,
    gap: float = 0.03,
) -> None:
    """Cells coloured by size, the second colour for negative ones, with a few letters in each."""
    from matplotlib.patches import Rectangle

    most = max((abs(score) for row in rows for score in row), default=0.0) or 1.0
    for y, row in enumerate(rows):
        for x, score in enumerate(row):
            depth = 0.04 + 0.86 * abs(score) / most
            corner, side = (x + gap, y + gap), 1 - 2 * gap
            colour = SERIES[0] if score >= 0 else SERIES[1]
            ax.add_patch(Rectangle(corner, side, side, facecolor=colour, alpha=depth, linewidth=0))
            if framed is not None and framed[y][x]:
                ax.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=INK, linewidth=1.2))
            if notes is not None:
                ink = PAPER if depth > 0.5 else INK
                ax.text(x + 0.5, y + 0.5, notes[y][x], ha="center", va="center", fontsize=7, color=ink, linespacing=1.3)
    ax.set_xlim(0, max(1, max(map(len, rows), default=0)))
    ax.set_ylim(0, max(1, len(rows)))


def _grid_ticks(ax: Axes, across: Sequence[str] | None, up: Sequence[str]) -> None:
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    if across is not None:
        step = max(1, math.ceil(len(across) / 24))
        ax.set_xticks([x + 0.5 for x in range(0, len(across), step)], list(across)[::step])
    step = max(1, math.ceil(len(up) / 16))
    ax.set_yticks([y + 0.5 for y in range(0, len(up), step)], list(up)[::step])


def _signed(value: float) -> str:
    """Two significant digits, no leading zero before the point, a real minus."""
    text = f"{abs(value):.2g}"
    text = text[1:] if text.startswith("0.") else text
    return "−" + text if value < 0 else text


def style_axis(ax: Axes, x: str, y: str) -> None:
    """Labels, spines, ticks and grid as every figure of memloc has them."""
    ax.set_xlabel(x, color=MUTED)
    ax.set_ylabel(y, color=MUTED)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    ax.spines[["left", "bottom"]].set_linewidth(0.7)
    ax.tick_params(colors=MUTED, labelcolor=INK, width=0.7, length=3)
    ax.grid(True, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)


def _whole_ticks(ax: Axes, values: Sequence[int]) -> None:
    step = max(1, math.ceil(len(values) / 24))
    ax.set_xticks(list(values)[::step], [str(value) for value in list(values)[::step]])
    ax.grid(False, axis="x")
