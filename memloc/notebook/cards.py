"""What is shown of each type: one function a type, and the words they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memloc import plots
from memloc.notebook.markup import facts_list, picture, quiet, table, text
from memloc.report.comparison import figure_cell
from memloc.report.texts import guarded
from memloc.report.wording import cell, interval, label, number, scalar, short
from memloc.results.profiles import chosen_by_layer, layer_profile
from memloc.sites import OUTSIDE, Kind, Site

if TYPE_CHECKING:
    from memloc.measurement import Measurement
    from memloc.passages import Fact, Facts, Passage, Passages
    from memloc.report import Report
    from memloc.scores import Localization, Selection
    from memloc.view import ModelView

ROWS = 8
"""Rows of a table before it ends in "and more"."""


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


def _view(view: ModelView) -> Card:
    shape = (
        f"{view.row.family}, {view.layers} layers, width {view.width}, {view.heads} heads, {view.told_neurons} neurons"
    )

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
    Kind.MLP_ROUTER: "what chooses among the experts",
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


def card_of(thing: Any) -> Card:
    """The card of one of memloc's types."""
    name = next(entry.__name__ for entry in type(thing).__mro__ if entry.__name__ in _CARDS)
    return _CARDS[name](thing)


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
