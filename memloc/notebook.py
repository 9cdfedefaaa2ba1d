"""How memloc's types look: a card of HTML for notebooks, the same card's first line for a terminal.

A card is small and stands alone: no script, no outside reference, colours that read on a light and on a dark page. It
never holds the text of a passage or of a fact, nor their tokens: ids, lengths and digests only, as in a report.
"""

from __future__ import annotations

import html as escaping
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memloc import plots
from memloc.provenance import digest_json
from memloc.report.comparison import figure_cell
from memloc.report.texts import guarded
from memloc.report.wording import cell, interval, label, number, scalar, short
from memloc.results.profiles import chosen_by_layer, layer_profile
from memloc.sites import OUTSIDE, Kind, Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from memloc.measurement import Measurement
    from memloc.passages import Fact, Facts, Passage, Passages
    from memloc.report import Report
    from memloc.scores import Localization, Selection
    from memloc.view import ModelView

ROWS = 8
"""Rows of a table before it ends in "and more"."""

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


@dataclass(frozen=True)
class Card:
    """What is shown of one thing.

    Attributes:
        title: what kind of thing it is.
        line: the one line a terminal prints.
        body: pieces of HTML below it, made when asked for.
    """

    title: str
    line: str
    body: Callable[[], Iterable[str]]


def html(thing: Any) -> str:
    """The card of one of memloc's types, as HTML. Cost: milliseconds, and about 0.1 s where there is a picture."""
    card = _card(thing)
    head = f"<div><b>{text(card.title)}</b> {text(card.line)}</div>"
    return f'<div style="{_colours()};{_CARD}">{head}{"".join(card.body())}</div>'


def plain(thing: Any) -> str:
    """One line, for terminals and tracebacks."""
    card = _card(thing)
    return f"<{card.title}: {card.line}>"


def text(value: Any) -> str:
    """A value as HTML text."""
    return escaping.escape(str(value), quote=True)


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


# -- one function a type ----------------------------------------------------------------------------------------------


def _view(view: ModelView) -> Card:
    shape = f"{view.row.family}, {view.layers} layers, width {view.width}, {view.heads} heads, {view.neurons} neurons"

    def body() -> Iterable[str]:
        total = sum(parameter.numel() for parameter in view.model.parameters())
        yield facts_list([
            ("parameters", scalar(total)),
            ("stored as", f"{str(view.dtype).removeprefix('torch.')} on {view.device}"),
            ("vocabulary", scalar(view.vocab)),
            ("context", "" if view.context is None else f"{scalar(view.context)} tokens"),
            ("tokenizer", "none; passages must come as token ids" if view.tokenizer is None else ""),
        ])  # fmt: skip
        sites = [site for site in view.sites(*view.kinds) if site.layer == 0]
        rows = [(str(site.kind), _shape(view.weight(site).shape), view.place(site).parameter) for site in sites]
        yield table(("maps of a block", "[out, in]", "in block 0"), rows)

    return Card("ModelView", f"{view.name}: {shape}", body)


_MEANING = {
    Kind.ATTN_Q: "queries", Kind.ATTN_K: "keys", Kind.ATTN_V: "values",
    Kind.ATTN_OUT: "output of attention; its input holds the heads", Kind.MLP_GATE: "gate of the MLP",
    Kind.MLP_IN: "into the MLP", Kind.MLP_OUT: "out of the MLP; its input holds the neurons",
    Kind.EMBED: "token embedding", Kind.UNEMBED: "unembedding",
}  # fmt: skip


def _site(site: Site) -> Card:
    where = "" if site.layer == OUTSIDE else f" of block {site.layer}, counted from 0"
    what = f"{_MEANING.get(site.kind, str(site.kind))}{', the bias' if site.bias else ''}"
    return Card("Site", f"{site}: {what}{where}", lambda: ())


def _passages(items: Passages) -> Card:
    before, after = _range(len(item.prefix) for item in items), _range(len(item.suffix) for item in items)

    def row(item: Passage) -> Sequence[str]:
        return item.id, str(len(item.prefix)), str(len(item.suffix)), _tags(item.tags)

    return _set(
        "Passages", items, "passage", f"prefix {before}, suffix {after} tokens", ("id", "prefix", "suffix", "tags"), row
    )


def _facts(items: Facts) -> Card:
    others = sum(len(item.paraphrases) for item in items), sum(len(item.neighbors) for item in items)

    def row(item: Fact) -> Sequence[str]:
        return item.id, str(len(item.prompt.ids)), str(len(item.paraphrases)), str(len(item.neighbors))

    line = f"{scalar(others[0])} paraphrases, {scalar(others[1])} neighbours"
    return _set("Facts", items, "fact", line, ("id", "prompt tokens", "paraphrases", "neighbours"), row)


def _set(
    title: str, items: Any, noun: str, line: str, columns: Sequence[str], row: Callable[[Any], Sequence[str]]
) -> Card:
    def body() -> Iterable[str]:
        yield table(columns, [row(item) for item in items.items[:ROWS]], of=len(items))
        yield quiet(f"Texts are withheld. Digest {short(items.digest)}.")

    count = f"{scalar(len(items))} {noun}{'' if len(items) == 1 else 's'}"
    return Card(title, f"{count}{f' of {items.origin}' if items.origin else ''}" + (f"; {line}" if items else ""), body)


def _localization(found: Localization) -> Card:
    over = "one score a place" if found.passages is None else f"{scalar(len(found.passages))} passages"
    line = f"{found.provenance.method}, {scalar(found.count)} {_plural(found.grain, found.count)}, {over}"

    def body() -> Iterable[str]:
        profile = layer_profile(found)
        if len(profile["layers"]) > 1:
            said = "Share of the total absolute score held by each layer."
            yield picture(lambda ax: plots.layer_bars(ax, profile), said)
        rows = [(str(site), index, number(score)) for site, index, score in _best(found)]
        said = "best places" if found.passages is None else "best places on average"
        yield table((said, "index", "score"), rows, of=found.count)
        yield _origin(found.provenance.to_json(), found.notes)

    return Card("Localization", line, body)


def _selection(chosen: Selection) -> Card:
    total = sum(mask.numel() for mask in chosen.masks.values())
    line = f"{scalar(chosen.count)} of {scalar(total)} {_plural(chosen.grain, total)} by {chosen.provenance.method}"

    def body() -> Iterable[str]:
        by_layer = chosen_by_layer(chosen)
        if len(by_layer) > 1:
            points = [{"x": layer, "y": count, "low": None, "high": None} for layer, count in by_layer.items()]
            yield picture(lambda ax: plots.curve(ax, {"chosen": points}, x="layer", y="chosen", kind="bars"),
                          "How many are chosen in each layer.")  # fmt: skip
        sites = [(str(s), scalar(int(mask.sum())), scalar(mask.numel())) for s, mask in chosen.masks.items()]
        yield table(("site", "chosen", "of"), sites[:ROWS], of=len(sites))
        yield _origin(chosen.provenance.to_json(), {})

    return Card("Selection", f"{line} ({number(chosen.fraction, 'share')})", body)


def _measurement(found: Measurement) -> Card:
    def body() -> Iterable[str]:
        rows = []
        for name in found.figures:
            mine = figure_cell(found, name)
            beside = None if found.control is None else figure_cell(found.control, name)
            cells = (label(name), cell(mine), interval(mine), str(found.figures[name].n))
            rows.append(cells if found.control is None else (*cells, cell(beside)))
        columns = ("figure", "value", "95 % interval", "n")
        yield table(columns if found.control is None else (*columns, "never seen"), rows)
        yield _origin(found.provenance.to_json(), {})

    control = "" if found.control is None else f", beside {scalar(len(found.control.rows))} controls"
    return Card("Measurement", f"{found.measure} of {scalar(len(found.rows))} items{control}", body)


def _edit(edit: Any) -> Card:
    made = edit.summary()
    size = f"{scalar(made['entries'])} entries of {len(made['sites'])} {'map' if len(made['sites']) == 1 else 'maps'}"

    def body() -> Iterable[str]:
        rows = []
        for site, delta in edit.deltas.items():
            left = edit.survived.get(site)
            kept = ("—", "—") if left is None else (number(left.share, "share"), number(left.error, "share"))
            form = f"{type(delta).__name__} {_shape(delta.shape)}"
            rows.append((str(site), form, scalar(delta.touched), number(delta.norm()), *kept))
        columns = ("site", "delta", "entries", "norm", "changed in the dtype", "lost to rounding")
        yield table(columns, rows[:ROWS], of=len(rows))
        yield _origin(made["provenance"], made["notes"])
        yield quiet(
            f"Digest {short(made['digest'])}; "
            + ("undoes itself to the bit" if made["reversible"] else "has no way back until `rebased` on its model")
            + "."
        )

    return Card("Edit", f"{made['provenance']['method']}, {size} ({number(made['share'], 'share')})", body)


def _report(report: Report) -> Card:
    data = report.to_json()
    judged = [entry["holds"] for entry in data["verdicts"] if entry["holds"] is not None]

    def body() -> Iterable[str]:
        marks = {True: "holds", False: "does not hold", None: "—"}
        if report.summary:
            yield f"<p style='margin:.4em 0'>{text(report.summary)}</p>"
        rows = [(entry["text"], marks[entry["holds"]]) for entry in data["verdicts"]]
        yield table(("condition", ""), rows)
        figures = [(group["name"], figure) for group in data["comparisons"] for figure in group["figures"]
                   if figure["name"] in group["headline"]]  # fmt: skip
        rows_of = [
            (f"{name}: {label(f['name'])}", *(cell(f[arm]) for arm in ("before", "after", "random")))
            for name, f in figures
        ]
        yield table(("measured", "before", "after", "random control"), rows_of)
        yield quiet("The whole of it: save(folder) writes a page, its JSON and Markdown.")

    line = f"{report.title}; {judged.count(True)} of {len(judged)} conditions hold" if judged else report.title
    return Card("Report", line, body)


_CARDS: Mapping[str, Callable[[Any], Card]] = {
    "ModelView": _view, "Site": _site, "Passages": _passages, "Facts": _facts, "Localization": _localization,
    "Selection": _selection, "Measurement": _measurement, "Edit": _edit, "Report": _report,
}  # fmt: skip


def _card(thing: Any) -> Card:
    name = next(entry.__name__ for entry in type(thing).__mro__ if entry.__name__ in _CARDS)
    return _CARDS[name](thing)


def _colours() -> str:
    return ";".join(f"{name}:{value}" for name, value in _COLOURS.items())


# -- small words ------------------------------------------------------------------------------------------------------


def _best(found: Localization, count: int = 5) -> list[tuple[Site, str, float]]:
    """The best places of the model: site, index in it ("3", or "3, 7" for a weight), score."""
    best: list[tuple[Site, str, float]] = []
    for site, scores in sorted(found.mean().scores.items()):
        flat = scores.reshape(-1)
        values, places = flat.topk(min(count, len(flat)))
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            best.append((site, _index(place, scores.shape), value))
    return sorted(best, key=lambda entry: -entry[2])[:count]


def _index(place: int, shape: Sequence[int]) -> str:
    parts = []
    for size in reversed(shape):
        place, part = divmod(place, size)
        parts.append(str(part))
    return ", ".join(reversed(parts))


def _origin(provenance: Mapping[str, Any], notes: Mapping[str, Any]) -> str:
    """How it was made, in one folded list; strings that may quote a passage become their length and digest."""
    held = guarded({**provenance["settings"], **{f"{name} (digest)": d for name, d in provenance["inputs"].items()}},
                   show_text=False)  # fmt: skip
    pairs = [(name, scalar(value)) for name, value in held.items() if not _empty(value)]
    pairs += [("seed", scalar(provenance["seed"]))] if provenance["seed"] is not None else []
    pairs += [("notes", ", ".join(notes))] if notes else []
    if not pairs:
        return ""
    return f"<details><summary>made by {text(provenance['method'])}</summary>{facts_list(pairs)}</details>"


def _empty(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _tags(tags: Mapping[str, Any]) -> str:
    """Tags that are plain numbers or yes and no; any other may be a piece of the text."""
    return ", ".join(f"{key} {scalar(value)}" for key, value in tags.items() if isinstance(value, bool | int | float))


def _range(values: Iterable[int]) -> str:
    found = sorted(values)
    return "" if not found else str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def _plural(grain: Any, count: int) -> str:
    return f"{grain}{'' if count == 1 else 's'}"


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"
