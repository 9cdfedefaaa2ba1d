"""The report as a list of blocks, made from its JSON alone; HTML and Markdown both write it, so they cannot differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memloc.report import wording
from memloc.report.wording import NONE, scalar

ITEMS_SHOWN, IDS_SHOWN = 200, 40


@dataclass(frozen=True)
class Cell:
    """A table's cell: its text, a smaller line below, how it is set, and a share to draw as a bar."""

    text: str
    below: str = ""
    kind: str = "number"  # number | text | code
    tone: str = ""  # good | bad | quiet
    share: float | None = None


@dataclass(frozen=True)
class Table:
    """Columns, rows and a caption; role "headline" is the first screen's, `fold` hides it behind its caption."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    role: str = ""
    fold: bool = False


@dataclass(frozen=True)
class Heading:
    """A heading of level 2 to 4."""

    level: int
    text: str


@dataclass(frozen=True)
class Prose:
    """A paragraph; `quiet` for remarks."""

    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure by its kind and numbers; HTML draws it, Markdown leaves it to the table beside it."""

    kind: str
    data: Any
    caption: str
    legend: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdicts:
    """The sentences of the result."""

    entries: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Passage:
    """A passage's text and its continuations, shown."""

    row: Mapping[str, Any]


@dataclass(frozen=True)
class Code:
    """Lines to be typed."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Terms:
    """Words and what they mean."""

    entries: tuple[tuple[str, str], ...]


Block = Table | Heading | Prose | Picture | Verdicts | Passage | Code | Terms

ARM_NAMES = {"before": "before", "after": "after", "random": "random control", "control": "never seen",
             "control_before": "never seen, before"}  # fmt: skip


def outline(data: Mapping[str, Any]) -> list[Block]:
    """All blocks below the title, in reading order."""
    blocks: list[Block] = [Heading(2, "Result")]
    if data["verdicts"]:
        blocks.append(Verdicts(tuple(data["verdicts"])))
    blocks += _headline(data["comparisons"])
    for title, part in (
        ("Findings", _notes(data["notes"])),
        ("How it grows", _curves(data["curves"])),
        ("The figures in full", [block for entry in data["comparisons"] for block in _comparison(entry)]),
        ("Where it was found", [block for entry in data["localizations"] for block in _located(entry)]),
        ("What was changed", [block for entry in data["edits"] for block in _edit(entry)]),
        ("The passages", _texts(data)),
        ("Where the numbers come from", _provenance(data)),
        ("Words used here", [_glossary(data)]),
    ):
        if part:
            blocks += [Heading(2, title), *part]
    return blocks


def overall(verdicts: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The line above the verdicts and its tone: how many of the conditions hold."""
    judged = [entry["holds"] for entry in verdicts if entry["holds"] is not None]
    failed = judged.count(False)
    if not judged:
        return "", ""
    if not failed:
        return ("The condition holds" if len(judged) == 1 else f"All {len(judged)} conditions hold"), "good"
    return f"{failed} of {len(judged)} conditions {'does' if failed == 1 else 'do'} not hold", "bad"


def _headline(comparisons: Sequence[Mapping[str, Any]]) -> list[Block]:
    rows = [
        (entry, f) for entry in comparisons for name in entry["headline"] for f in entry["figures"] if f["name"] == name
    ]
    if not rows:
        return [Prose("Nothing was measured.", quiet=True)]
    edited = any(figure["after"] for _, figure in rows)
    columns = ("", "before", "after", "random control of equal size", "never-seen controls")
    keys = ("before", "after", "random", "control") if edited else ("before", "control")
    shown = columns if edited else ("", "measured", "never-seen controls")
    made = tuple((_named(e, f), *(_value(f, key, e["goal"], absent=True) for key in keys)) for e, f in rows)
    blocks: list[Block] = [Table(shown, made, role="headline")]
    if edited and any(figure["random"] is None for _, figure in rows):
        blocks.append(Prose("Where the random control is “not run”, nothing separates the choice of places from mere "
                            "damage of that size.", quiet=True))  # fmt: skip
    return blocks


def _named(entry: Mapping[str, Any], figure: Mapping[str, Any]) -> Cell:
    mark = wording.direction(entry["goal"], figure["better"])
    meaning = f" ({mark} {wording.DIRECTIONS[mark]})" if mark else ""
    return Cell(entry["name"], wording.label(figure["name"]) + meaning, "text")


def _value(figure: Mapping[str, Any], arm: str, goal: str, *, absent: bool = False) -> Cell:
    found = figure[arm]
    if found is None:
        return Cell("not run" if absent else NONE, tone="quiet")
    ends = wording.interval(found)
    share = wording.value_of(found["value"]) if found["unit"] == "share" else None
    tone = _tone(figure["change"], goal, figure["better"]) if arm == "after" else ""
    return Cell(wording.cell(found), f"95 %: {ends}" if ends else "", tone=tone, share=share)


def _tone(moved: Mapping[str, Any] | None, goal: str, better: str) -> str:
    """Good or bad when the change has a side and its interval leaves out zero; else nothing."""
    value = None if moved is None else wording.value_of(moved["value"])
    if moved is None or value is None or not better or goal not in ("forget", "learn"):
        return ""
    zero = 1.0 if moved["kind"] == "factor" else 0.0
    ends = [wording.value_of(moved[end]) for end in ("low", "high")]
    if value == zero or (all(end is not None for end in ends) and ends[0] <= zero <= ends[1]):  # type: ignore[operator]
        return ""
    return "good" if (value < zero) == (better == "lower") else "bad"


def _notes(notes: Sequence[Mapping[str, str]]) -> list[Block]:
    blocks: list[Block] = []
    for note in notes:
        blocks.append(Heading(3, note["heading"]))
        blocks += [Prose(" ".join(part.split())) for part in note["text"].split("\n\n") if part.strip()]
    return blocks


def _curves(curves: Sequence[Mapping[str, Any]]) -> list[Block]:
    blocks: list[Block] = []
    for entry in curves:
        blocks += [Heading(3, entry["title"])]
        blocks += [Prose(entry["text"])] if entry["text"] else []
        names = tuple(entry["series"])
        blocks.append(Picture("curve", entry, f"{entry['y']} against {entry['x']}; bars are 95 % intervals.", names))
        places = sorted({point["x"] for points in entry["series"].values() for point in points}, key=float)
        points = {(name, point["x"]): point for name in names for point in entry["series"][name]}
        rows = tuple(
            (Cell(scalar(x)), *(_point(points.get((name, x)), entry["unit"]) for name in names)) for x in places
        )
        blocks.append(Table((entry["x"], *names), rows))
    return blocks


def _point(point: Mapping[str, Any] | None, unit: str) -> Cell:
    if point is None:
        return Cell(NONE, tone="quiet")
    made = {"value": point["y"], "low": point.get("low"), "high": point.get("high"), "unit": unit}
    made |= {"hits": point.get("hits"), "n": point.get("n")}
    ends = wording.interval(made)
    return Cell(wording.cell(made), f"95 %: {ends}" if ends else "")


_GOALS = {
    "forget": "Meant to be forgotten.",
    "keep": "Meant to stay as it was: the closer to “before”, the better.",
    "learn": "Meant to be learnt.",
}


def _comparison(entry: Mapping[str, Any]) -> Iterator[Block]:
    yield Heading(3, entry["name"])
    said = " ".join(part for part in (entry["explanation"], _GOALS.get(entry["goal"], "")) if part)
    if said:
        yield Prose(said)
    edited = any(figure["after"] for figure in entry["figures"])
    columns: tuple[str, ...] = ("figure", "measured", "never-seen controls", "n")
    if edited:
        columns = (
            "figure",
            "before",
            "after",
            "change",
            "95 % of the change",
            "random control of equal size",
            *columns[2:],
        )
    rows = tuple(_full_row(entry, figure, edited) for figure in entry["figures"])
    yield Table(columns, rows, f"{entry['name']}, measure “{entry['measure']}”")
    hows = sorted({f["change"]["how"] for f in entry["figures"] if f["change"] and f["change"]["how"]})
    if hows:
        yield Prose(f"Intervals of changes: {'; '.join(hows)}.", quiet=True)
    yield from _flips(entry)
    yield from _items(entry)


def _full_row(entry: Mapping[str, Any], figure: Mapping[str, Any], edited: bool) -> tuple[Cell, ...]:
    goal = entry["goal"]
    mark = wording.direction(goal, figure["better"])
    known = wording.label(figure["name"])
    name = Cell(f"{known} {mark}".strip(), figure["name"] if known != figure["name"] else "", "text")
    counts = {figure[arm]["n"] for arm in ("before", "after", "random") if figure[arm]}
    n = Cell(" / ".join(scalar(count) for count in sorted(counts)) or NONE)
    if not edited:
        return name, _value(figure, "before", goal), _never_seen(figure), n
    moved = figure["change_random"]
    control = _value(figure, "random", goal)
    if moved is not None:
        control = Cell(control.text, " · ".join(x for x in (f"change {wording.change(moved)}", control.below) if x))
    change = Cell(wording.change(figure["change"]), tone=_tone(figure["change"], goal, figure["better"]))
    ends = Cell(wording.change_interval(figure["change"]))
    return (
        name,
        _value(figure, "before", goal),
        _value(figure, "after", goal),
        change,
        ends,
        control,
        _never_seen(figure),
        n,
    )


def _never_seen(figure: Mapping[str, Any]) -> Cell:
    now, then = figure["control"], figure["control_before"]
    shown = _value(figure, "control", "")
    old = wording.cell(then)
    notes = [shown.below] if shown.below else []
    if now is not None and then is not None and old != shown.text:
        notes.append(f"before the edit: {old}")
    if now is not None:
        notes.append(f"n = {now['n']}")
    return Cell(shown.text, " · ".join(notes), tone=shown.tone)


def _flips(entry: Mapping[str, Any]) -> Iterator[Block]:
    if not entry["flips"]:
        return
    rows = []
    for flip in entry["flips"]:
        against = "before the edit" if flip["against"] == "before" else "random control"
        lost, gained = (Cell(scalar(len(flip[way])), _ids(flip[way]), "code") for way in ("lost", "gained"))
        same = flip["n"] - len(flip["lost"]) - len(flip["gained"])
        said = f"“{flip['verdict']}”: after against {against}"
        cells = Cell(said, "", "text"), lost, gained, Cell(scalar(flip["kept"])), Cell(scalar(same))
        rows.append((*cells, Cell(wording.p_value(flip["p"]))))
    columns = (
        "verdict",
        "held there, not after",
        "holds only after",
        "holds in both",
        "same verdict",
        "McNemar exact p",
    )
    yield Table(columns, tuple(rows), f"{entry['name']}: flips, by id")


def _ids(names: Sequence[str]) -> str:
    more = len(names) - IDS_SHOWN
    return ", ".join(names[:IDS_SHOWN]) + (f" and {more} more in the JSON" if more > 0 else "")


_ITEM_KEYS = ("strict", "first_miss", "log_pz", "queries", "efficacy success", "efficacy accuracy",
              "paraphrase success", "neighbour success", "nll", "tokens")  # fmt: skip


def _items(entry: Mapping[str, Any]) -> Iterator[Block]:
    arms = [arm for arm in ("before", "after", "random") if arm in entry["rows"]]
    first = entry["rows"]["before"]
    if not first:
        yield Prose("No items.", quiet=True)
        return
    usual = [key for key in _ITEM_KEYS if key in first[0]][:4]
    keys = (
        usual or [key for key, value in first[0].items() if key != "id" and isinstance(value, bool | int | float)][:3]
    )
    by_id = {arm: {str(row["id"]): row for row in entry["rows"][arm]} for arm in arms}
    rows = []
    for row in first[:ITEMS_SHOWN]:
        name = str(row["id"])
        cells = (Cell(_item(by_id[arm].get(name, {}).get(key))) for key in keys for arm in arms)
        rows.append((Cell(name, "", "code"), *cells))
    columns = ("id", *(f"{key}, {ARM_NAMES[arm]}" if len(arms) > 1 else key for key in keys for arm in arms))
    more = f", first {ITEMS_SHOWN} of {len(first)}; all in the JSON" if len(first) > ITEMS_SHOWN else ""
    yield Table(columns, tuple(rows), f"{entry['name']}, item by item{more}", fold=True)


def _item(value: Any) -> str:
    return wording.number(value) if isinstance(value, int | float) and not isinstance(value, bool) else scalar(value)


def _located(entry: Mapping[str, Any]) -> Iterator[Block]:
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
    if entry["neurons"] is not None:
        yield from _neurons(entry["neurons"])
    settings = [*made["settings"].items(), ("seed", made["seed"]), *entry["notes"].items()]
    yield _pairs(settings, f"{entry['title']}: settings and notes")


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
    spread = "thin line: the whole range; grey bar: 5 to 95 % of all"
    yield Picture("neurons", data, f"Scores by layer, one dot a {data['grain']}; {spread}.", marked)
    rows = tuple(
        (
            Cell(str(place)), Cell(entry["site"], "", "code"), Cell(str(entry["index"])), Cell(scalar(entry["score"])),
            Cell(wording.number(entry["share"], "share")), Cell("yes" if entry["chosen"] else "no"),
        )
        for place, entry in enumerate(data["top"], 1)
    )  # fmt: skip
    columns = ("rank", "site", data["grain"], "score", "share of the total", "chosen")
    yield Table(columns, rows, f"The {len(rows)} best-scored of {scalar(data['count'])}", fold=len(rows) > 8)


def _edit(entry: Mapping[str, Any]) -> Iterator[Block]:
    yield Heading(3, entry["name"])
    if entry["text"]:
        yield Prose(entry["text"])
    header = dict(entry["header"])
    made = header.pop("provenance", None)
    pairs: list[tuple[str, Any]] = []
    if isinstance(made, Mapping):
        pairs += [("method", made.get("method")), *_flat(made.get("settings", {})), ("seed", made.get("seed"))]
    if entry["bytes"] is not None:
        pairs.append(("size of the edit's file", f"{scalar(entry['bytes'])} bytes"))
    tables = {"": entry["sites"]} if entry["sites"] else {}
    for key, value in header.items():
        if _is_table(value):
            tables[key] = value
        elif isinstance(value, Mapping):
            pairs += [(f"{key}: {inner}", found) for inner, found in _flat(value)]
        else:
            pairs.append((key, value))
    if pairs:
        yield _pairs(pairs, f"{entry['name']}: settings")
    for key, table in tables.items():
        yield _mapping_table(table, f"{entry['name']}: {key or 'sites touched'}")


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(entry, Mapping) for entry in value.values())


def _mapping_table(table: Mapping[str, Mapping[str, Any]], caption: str) -> Table:
    columns = list(dict.fromkeys(key for entry in table.values() for key in entry))
    rows = tuple(
        (Cell(name, "", "code"), *(Cell(scalar(entry.get(key))) for key in columns)) for name, entry in table.items()
    )
    return Table(("", *columns), rows, caption, fold=len(rows) > 12)


def _flat(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _pairs(pairs: Iterable[tuple[str, Any]], caption: str) -> Table:
    rows = tuple((Cell(str(key), "", "text"), Cell(scalar(value), "", "text")) for key, value in pairs)
    return Table(("", ""), rows, caption, role="pairs", fold=len(rows) > 4)


def _texts(data: Mapping[str, Any]) -> list[Block]:
    if not data["texts"]:
        return []
    arms = [arm for arm in ("before", "after", "random") if any(arm in row["arms"] for row in data["texts"])]
    blocks: list[Block] = []
    if data["text_shown"]:
        blocks.append(Prose("Recited pieces, the true one at its place, are marked; differing ones are not."))
        blocks += [Passage(row) for row in data["texts"]]
    else:
        blocks.append(Prose("Texts are withheld: this page would otherwise give away what was to be forgotten. Each "
                            "passage is named by its id, length and digest; a continuation by how much of the truth "
                            "it holds."))  # fmt: skip
    rows = []
    for row in data["texts"]:
        cells = [Cell(row["id"], "", "code"), Cell(f"{row['prefix_length']} + {row['truth_length']} {row['unit']}")]
        cells += [_agreed(row, arm) for arm in arms]
        rows.append((*cells, Cell(wording.short(row["digest"]), "", "code")))
    columns = ("id", "prefix + suffix", *(f"recited {ARM_NAMES[arm]}" for arm in arms), "digest")
    blocks.append(Table(columns, tuple(rows), "How much of each passage is recited"))
    return blocks


def _agreed(row: Mapping[str, Any], arm: str) -> Cell:
    found = row["arms"].get(arm)
    if found is None:
        return Cell(NONE, tone="quiet")
    return Cell(f"{found['matching']} of {row['truth_length']}", f"longest run {found['longest_run']}")


def _provenance(data: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    rows = []
    for entry in data["comparisons"]:
        for arm, made in entry["provenance"].items():
            inputs = "; ".join(
                f"{key} {wording.short(value)}" for key, value in made["inputs"].items() if key != "model"
            )
            model = wording.short(made["inputs"].get("model", NONE))
            settings = "; ".join(f"{key} {scalar(value)}" for key, value in made["settings"].items())
            rows.append((
                Cell(entry["name"], ARM_NAMES[arm], "text"), Cell(made["method"], "", "text"), Cell(model, "", "code"),
                Cell(inputs or NONE, "", "code"), Cell(settings or NONE, "", "text"), Cell(scalar(made["seed"])),
            ))  # fmt: skip
    if rows:
        columns = ("measured", "measure", "model", "data", "settings", "seed")
        blocks.append(Table(columns, tuple(rows), "Measurements", fold=len(rows) > 8))
    pairs: list[tuple[str, Any]] = []
    for key, value in data["provenance"].items():
        pairs += [(f"{key}: {inner}", found) for inner, found in _flat(value)] or [(key, value)]
    pairs += [(f"version of {name}", version) for name, version in _versions(data).items()]
    if pairs:
        rows_of = _pairs(pairs, "Versions and origins")
        blocks.append(Table(rows_of.columns, rows_of.rows, rows_of.caption, rows_of.role))
    if data["commands"]:
        blocks += [Heading(3, "Commands"), Code(tuple(data["commands"]))]
    return blocks


def _versions(data: Mapping[str, Any]) -> dict[str, str]:
    """Versions of all measurements and localizations; several of one package are all named."""
    found: dict[str, list[str]] = {}
    made = [entry for comparison in data["comparisons"] for entry in comparison["provenance"].values()]
    made += [entry["provenance"] for entry in data["localizations"]]
    for entry in made:
        for name, version in entry["versions"].items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: " and ".join(versions) for name, versions in found.items()}


def _glossary(data: Mapping[str, Any]) -> Terms:
    present = {figure["name"] for entry in data["comparisons"] for figure in entry["figures"]}
    figures = [(f"{known.label} ({name})", known.meaning) for name, known in wording.FIGURES.items() if name in present]
    return Terms((*figures, *wording.TERMS.items()))
