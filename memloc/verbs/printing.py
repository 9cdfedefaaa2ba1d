"""Measurements and localizations as tables and JSON: what `measure`, `localize` and `show` print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memloc.terminal import Terminal, cell

if TYPE_CHECKING:
    from memloc.measurement import Measurement
    from memloc.scores import Localization


def print_measurement(measured: Measurement, terminal: Terminal) -> None:
    """Figures with n and interval, the controls beside them."""
    control = measured.control
    rows = []
    for name, figure in measured.figures.items():
        beside = control.figures.get(name) if control else None
        ends = None if figure.low is None else f"{cell(figure.low)} to {cell(figure.high)}"
        rows.append([name, figure.value, ends, figure.n, figure.unit, beside.value if beside else None])
    columns = ["figure", "value", "95 % interval", "n", "unit"]
    if control is None:
        rows = [row[:-1] for row in rows]
    else:
        columns.append("controls")
    beside_n = f" (controls: n = {len(control.rows)})" if control else ""
    terminal.table(measured.measure + beside_n, columns, rows)
    if control is None and measured.measure == "extraction":
        terminal.note("no --controls were given: a rate says little without the same figure on text never trained on")


def best_places(found: Localization, top: int, beside: Localization | None = None) -> list[list[Any]]:
    """The best `top` places as rows: place, index, score, the controls' score, share of all positive scores."""
    mean = found.mean()
    other = beside.mean() if beside is not None else None
    total = sum(float(scores.clamp(min=0).sum()) for scores in mean.scores.values()) or 1.0
    chosen = mean.top(min(top, mean.count)).indices()
    rows = []
    for site, entries in chosen.items():
        scores = mean.scores[site]
        for entry in entries:
            score = float(scores.reshape(-1)[entry])
            control = None if other is None else float(other.scores[site].reshape(-1)[entry])
            shape = scores.shape
            index = None if not shape else entry if len(shape) == 1 else list(divmod(entry, shape[1]))
            place = f"L{site.layer}" if mean.grain == "layer" else str(site)
            rows.append([place, index, score, control, max(score, 0.0) / total])
    return sorted(rows, key=lambda row: -row[2])


def print_localization(found: Localization, terminal: Terminal, top: int, beside: Localization | None = None) -> None:
    """The best places and what the method noted."""
    rows = best_places(found, top, beside)
    columns = ["place", "index", "score", "controls", "share"]
    if beside is None:
        rows, columns = [row[:3] + row[4:] for row in rows], ["place", "index", "score", "share"]
    title = f"{found.provenance.method}: best {len(rows)} of {found.count} {found.grain} scores"
    terminal.table(title, columns, rows)
    if found.grain == "head":
        _print_heads(found, terminal, beside)
    if found.grain == "position" and found.passages is not None:
        _print_positions(found, terminal, top)
    notes = dict(found.notes)
    _print_readings(notes.pop("readings", None), terminal, top)
    for key, value in notes.items():
        terminal.note(f"{key}: {_short(value)}")


def _print_heads(found: Localization, terminal: Terminal, beside: Localization | None) -> None:
    """Layer by head, the controls' scores in brackets."""
    from memloc.results.maps import head_map

    data = head_map(found, beside)
    rows = []
    for y, layer in enumerate(data["layers"]):
        others = data["control_scores"][y] if data["control_scores"] else [None] * len(data["scores"][y])
        cells = [cell(score) + ("" if other is None else f" ({cell(other)})")
                 for score, other in zip(data["scores"][y], others, strict=True)]  # fmt: skip
        rows.append([f"L{layer}", *cells])
    columns = ["layer", *(f"head {x}" for x in range(max(len(row) for row in rows) - 1))]
    terminal.table("layer by head" + (" (controls)" if beside is not None else ""), columns, rows)


def _print_positions(found: Localization, terminal: Terminal, top: int) -> None:
    """The best tokens of the first passages, by number: the text is not at hand here (see --out)."""
    from memloc.results.maps import position_maps

    rows = []
    for passage in position_maps(found):
        for entry in passage["maps"]:
            totals = [sum(column) for column in zip(*entry["scores"], strict=True)]
            best = sorted(range(len(totals)), key=lambda place: (-totals[place], place))[: min(5, top)]
            rows.append([passage["id"], entry["kind"], ", ".join(f"{place} ({cell(totals[place])})" for place in best)])
    terminal.table("best tokens of the first passages, layers summed", ["passage", "at", "token (score)"], rows)


def _print_readings(readings: Any, terminal: Terminal, top: int) -> None:
    """Neurons as key and value: what opens each, and what it promotes."""
    if not isinstance(readings, list) or not readings:
        return
    rows = []
    for entry in readings[:top]:
        first: dict[str, Any] = next(iter(entry.get("triggers", ())), {})
        said = " ".join(str(first.get("text", "")).split())[-40:]
        promotes = " · ".join(str(token).strip() for token in entry.get("promotes", ())[:5])
        rows.append([f"{entry['site']}[{entry['index']}]", entry.get("score"),
                     f"…{said} → {str(first.get('next', '')).strip()}", promotes, entry.get("agreement")])  # fmt: skip
    terminal.table("the neurons as key and value", ["neuron", "score", "opened most by", "promotes", "agreement"], rows)


def _short(value: Any, width: int = 160) -> str:
    """A note on one line; the whole of it is in the file."""
    text = cell(value) if isinstance(value, float) else str(value)
    if len(text) <= width:
        return text
    size = f"{len(value)} entries, " if isinstance(value, list | dict) else ""
    return f"{size}{text[:width]}…"


def localization_json(found: Localization, top: int, beside: Localization | None) -> dict[str, Any]:
    """The best places and everything noted, as JSON values."""
    keys = ["site", "index", "score", "controls", "share"]
    return {
        "kind": "localization", "grain": str(found.grain), "count": found.count, "notes": dict(found.notes),
        "provenance": found.provenance.to_json(),
        "top": [dict(zip(keys, row, strict=True)) for row in best_places(found, top, beside)],
    }  # fmt: skip
