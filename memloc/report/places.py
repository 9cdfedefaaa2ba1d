"""The located and the changed part of a report: where scores lie, and what an edit touched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from memloc.report import wording
from memloc.report.blocks import Block, Cell, Heading, Marked, Picture, Prose, Table, entries_of, pairs_table
from memloc.report.wording import NONE, scalar


def located(entry: Mapping[str, Any]) -> Iterator[Block]:
    """One localization: shares by layer and component, the best places, settings and notes."""
    yield Heading(3, entry["title"])
    made, selection = entry["provenance"], entry["selection"]
    stands = f", on {entry['n']} passages" if entry["n"] is not None else ""
    chosen = (
        f"; {scalar(selection['count'])} chosen ({wording.number(selection['fraction'], 'share')})" if selection else ""
    )
    yield Prose(f"Method {made['method']}: {scalar(entry['count'])} {entry['grain']} scores{stands}{chosen}.")
    if entry["text"]:
        yield Prose(entry["text"])
    layers, half = entry["layers"]["layers"], entry["layers"]["lower_half"]
    both = bool(layers) and layers[0]["control_share"] is not None
    if len(layers) > 1:
        yield Prose(_lower_half(half))
    if layers:
        legend = ("memorized", "controls") if both else ("memorized",)
        yield Picture("layers", entry["layers"], "Share of the total absolute score held by each layer.", legend)
        yield _layer_table(layers, both, selection)
    components = entry["components"]
    if len(components["kinds"]) > 1:
        brackets = "; controls in brackets" if components["control_shares"] else ""
        yield Picture("components", components, f"Share of the score by layer and component, per cent{brackets}.")
        yield _component_table(components)
    if entry["heads"] is not None:
        yield from _heads(entry["heads"])
    for found in entry["positions"] or ():
        yield from _positions(found)
    if entry["neurons"] is not None:
        yield from _neurons(entry["neurons"])
    notes = dict(entry["notes"])
    readings = notes.pop("readings", None)
    if isinstance(readings, list) and readings:
        yield _readings(readings)
    settings = [
        *made["settings"].items(),
        ("seed", made["seed"]),
        *((key, _brief(value)) for key, value in notes.items()),
    ]
    yield pairs_table(settings, f"{entry['title']}: settings and notes")


def _lower_half(half: Mapping[str, Any]) -> str:
    said = f"The lower half of the layers holds {wording.number(half['share'], 'share')} of the score"
    if half["control"] is None:
        return said + "."
    said += f" on memorized passages and {wording.number(half['control'], 'share')} on controls."
    found = half["difference"]
    if found is None:
        return said
    ends = f"{_points(found['low'])} to {_points(found['high'])}"
    counts = " and ".join(str(count) for count in found["n"])
    return f"{said} Passage by passage the difference is {_points(found['value'])} (95 %: {ends}; n = {counts})."


def _points(value: Any) -> str:
    return wording.change({"value": value, "kind": "points"})


def _layer_table(layers: Sequence[Mapping[str, Any]], both: bool, selection: Mapping[str, Any] | None) -> Table:
    counts = dict(selection["by_layer"]) if selection else {}
    columns = ["layer", "share, memorized", "score, memorized"]
    columns += ["share, controls", "score, controls"] if both else []
    columns += ["chosen"] if selection else []
    rows = []
    for entry in layers:
        cells = [Cell(str(entry["layer"])), Cell(wording.number(entry["share"], "share")), Cell(scalar(entry["score"]))]
        if both:
            cells += [Cell(wording.number(entry["control_share"], "share")), Cell(scalar(entry["control_score"]))]
        cells += [Cell(scalar(counts.get(entry["layer"], 0)))] if selection else []
        rows.append(tuple(cells))
    return Table(tuple(columns), tuple(rows), "Layer by layer", fold=len(rows) > 6)


def _component_table(components: Mapping[str, Any]) -> Table:
    rows = []
    for y, layer in enumerate(components["layers"]):
        cells = [Cell(str(layer))]
        for x, share in enumerate(components["shares"][y]):
            other = components["control_shares"][y][x] if components["control_shares"] else None
            below = f"controls {wording.number(other, 'share')}" if other is not None else ""
            cells.append(Cell(NONE if share is None else wording.number(share, "share"), below))
        rows.append(tuple(cells))
    return Table(("layer", *components["kinds"]), tuple(rows), "Layer by component", fold=True)


def _neurons(data: Mapping[str, Any]) -> Iterator[Block]:
    marked = ("best-scored", "chosen") if data["selected"] else ("best-scored",)
    spread = "thin line: the whole range; grey bar: 5 to 95 % of all; dots: the best twentieth, 60 at most"
    if data["grain"] != "head":  # heads have a map of their own
        yield Picture("neurons", data, f"Scores of {data['grain']}s by layer; {spread}.", marked)
    rows = tuple(
        (
            Cell(str(place)), Cell(entry["site"], "", "code"), Cell(str(entry["index"])), Cell(scalar(entry["score"])),
            Cell(wording.number(entry["share"], "share")), Cell("yes" if entry["chosen"] else "no"),
        )
        for place, entry in enumerate(data["top"], 1)
    )  # fmt: skip
    columns = ("rank", "site", data["grain"], "score", "share of the total", "chosen")
    yield Table(columns, rows, f"The {len(rows)} best-scored of {scalar(data['count'])}", fold=len(rows) > 8)


def _heads(data: Mapping[str, Any]) -> Iterator[Block]:
    beside = "; controls in brackets" if data["control_scores"] else ""
    framed = "; chosen heads are framed" if data["chosen"] else ""
    yield Picture("heads", data, f"Score of every head; negative ones in the second colour{beside}{framed}.")
    rows = []
    for y, layer in enumerate(data["layers"]):
        cells = [Cell(str(layer))]
        for x, score in enumerate(data["scores"][y]):
            other = data["control_scores"][y][x] if data["control_scores"] else None
            cells.append(Cell(scalar(score), "" if other is None else f"controls {scalar(other)}"))
        rows.append(tuple(cells))
    columns = ("layer", *(f"head {x}" for x in range(len(data["scores"][0]))))
    yield Table(columns, tuple(rows), "Layer by head", fold=True)


def _positions(found: Mapping[str, Any]) -> Iterator[Block]:
    """One passage: its text coloured where it may be shown, a map of layers by token, and the best tokens."""
    yield Heading(4, found["id"])
    for entry in found["maps"]:
        outside = entry["layers"] == [None]
        where = "the embeddings" if outside else f"{entry['kind']} of every layer"
        totals = [sum(column) for column in zip(*entry["scores"], strict=True)]
        if found["tokens"] is not None:
            caption = f"Each token coloured by its score at {where}{'' if outside else ', layers summed'}."
            yield Marked(tuple(found["tokens"]), tuple(totals), caption, found["prefix"])
        line = "; the dashed line is where the suffix begins" if found["prefix"] else ""
        data = {**entry, "prefix": found["prefix"]}
        yield Picture("positions", data, f"Score of every token at {where}{line}.")
        yield _best_tokens(totals, found["tokens"], where)


def _best_tokens(totals: Sequence[float], tokens: Sequence[str] | None, where: str) -> Table:
    order = sorted(range(len(totals)), key=lambda place: -totals[place])[:8]
    rows = []
    for place in order:
        spoken = [Cell(repr(tokens[place])[1:-1], "", "code")] if tokens is not None else []
        rows.append((Cell(str(place)), *spoken, Cell(scalar(totals[place]))))
    columns = ("token", *(("text",) if tokens is not None else ()), "score")
    return Table(columns, tuple(rows), f"The {len(rows)} best-scored tokens at {where}", fold=True)


def _readings(readings: Sequence[Mapping[str, Any]]) -> Table:
    """Neurons as memories: what opens each, and what it then says."""
    rows = []
    for entry in readings:
        triggers = [_trigger(found) for found in entry.get("triggers", ())[:5]]
        promotes, suppresses = (
            " · ".join(str(token).strip() or "␠" for token in entry.get(key, ())[:8])
            for key in ("promotes", "suppresses")
        )
        agreement = entry.get("agreement")
        rows.append((
            Cell(f"{entry['site']}[{entry['index']}]", f"score {scalar(entry.get('score'))}", "code"),
            Cell(triggers[0] if triggers else NONE, "\n".join(triggers[1:]), "text"),
            Cell(promotes or NONE, f"suppresses {suppresses}" if suppresses else "", "text"),
            Cell(NONE if agreement is None else wording.number(float(agreement), "share")),
        ))  # fmt: skip
    columns = ("neuron", "what opens it most (→ next token)", "what it promotes", "agreement")
    return Table(columns, tuple(rows), "The neurons as key and value")


def _tokens(tokens: Sequence[Any]) -> str:
    return " · ".join(str(token).strip() or "␠" for token in tokens[:8])


def _trigger(found: Mapping[str, Any]) -> str:
    said = " ".join(str(found.get("text", "")).split())
    said = "…" + said[-60:] if len(said) > 60 else said
    return f"{said} → {str(found.get('next', '')).strip()} ({scalar(found.get('score'))})"


def _brief(value: Any) -> Any:
    """Long lists and tables of a method's notes as their size: they are whole in the JSON."""
    if isinstance(value, list | Mapping) and len(value) > 8:
        return f"{len(value)} entries (in the JSON)"
    if isinstance(value, Mapping):
        return {key: _brief(entry) for key, entry in value.items()}
    return value


def edit(entry: Mapping[str, Any]) -> Iterator[Block]:
    """One edit: its settings, and a table for everything in its header that is told site by site."""
    yield Heading(3, entry["name"])
    if entry["text"]:
        yield Prose(entry["text"])
    header = dict(entry["header"])
    made = header.pop("provenance", None)
    pairs: list[tuple[str, Any]] = []
    if isinstance(made, Mapping):
        pairs += [("method", made.get("method")), *entries_of(made.get("settings", {})), ("seed", made.get("seed"))]
    if entry["bytes"] is not None:
        pairs.append(("size of the edit's file", f"{scalar(entry['bytes'])} bytes"))
    tables = {"": entry["sites"]} if entry["sites"] else {}
    for key, value in header.items():
        if _is_table(value):
            tables[key] = value
        elif isinstance(value, Mapping):
            pairs += [(f"{key}: {inner}", found) for inner, found in entries_of(value)]
        else:
            pairs.append((key, value))
    if pairs:
        yield pairs_table(pairs, f"{entry['name']}: settings")
    for key, table in tables.items():
        yield _mapping_table(table, f"{entry['name']}: {key or 'sites touched'}")


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(entry, Mapping) for entry in value.values())


def _mapping_table(table: Mapping[str, Mapping[str, Any]], caption: str) -> Table:
    columns = list(dict.fromkeys(key for entry in table.values() for key in entry))
    rows = tuple(
        (Cell(name, "", "code"), *(Cell(_entry(key, entry.get(key))) for key in columns))
        for name, entry in table.items()
    )
    return Table(("", *columns), rows, caption, fold=len(rows) > 12)


def _entry(key: str, value: Any) -> str:
    """A number of a header; one that its name calls a share, in per cent."""
    if (
        isinstance(value, float)
        and re.search(r"\b(share|fraction|survived)\b", key.replace("_", " "))
        and 0 <= value <= 1
    ):
        return wording.number(value, "share")
    return scalar(value)
