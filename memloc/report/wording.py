"""How a number is written and what a figure is called; the same words in HTML and in Markdown.

Numbers come as the report's JSON holds them: finite floats, or "inf", "-inf" and "nan" as strings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from memloc.report.glossary import FIGURES

MINUS = "−"
NONE = "—"
_THIN = " "
_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def value_of(number: Any) -> float | None:
    """A number of the report's JSON as a float; None for null and "nan"."""
    if number is None:
        return None
    value = float(number)
    return None if math.isnan(value) else value


def number(raw: Any, unit: str = "") -> str:
    """A number as a reader wants it: true minus, ∞, per cent for shares, counts of queries in powers of ten.

    A share never rounds to 0 % or 100 % unless it is exactly that.
    """
    value = value_of(raw)
    if value is None:
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    if unit == "share":
        return _percent(value)
    size = abs(value)
    if size != 0 and (size >= 1e6 or size < 1e-3):
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')} × 10{str(int(power)).translate(_RAISED)}".replace("-", MINUS)
    if unit == "queries" or (size >= 1000 and value == int(value)):
        return f"{value:,.0f}".replace(",", _THIN).replace("-", MINUS) if size >= 10 else _plain(value)
    return _plain(value)


def _plain(value: float) -> str:
    text = (
        f"{value:.{3 if abs(value) < 1 else 4}g}"
        if abs(value) < 1000
        else f"{value:,.1f}".replace(",", _THIN).removesuffix(".0")
    )
    return text.replace("-", MINUS) if value else "0"


def _percent(value: float) -> str:
    for digits in (1, 2, 3, 4, 5):
        text = f"{100 * value:.{digits}f}"
        if value in (0.0, 1.0, -1.0) or abs(float(text)) not in (0.0, 100.0):
            break
    text = text.removesuffix(".0") if "." in text else text
    return f"{text} %".replace("-", MINUS)


def signed(raw: Any, unit: str = "") -> str:
    """As `number`, with a plus where it rises."""
    value = value_of(raw)
    text = number(raw, unit)
    return f"+{text}" if value is not None and value > 0 else text


def cell(figure: Mapping[str, Any] | None) -> str:
    """A figure's value: "3 of 442 (0.7 %)" where it counts rows, else the number."""
    if figure is None:
        return NONE
    text = number(figure["value"], figure["unit"])
    return text if figure["hits"] is None else f"{figure['hits']} of {figure['n']} ({text})"


def interval(figure: Mapping[str, Any] | None) -> str:
    """A figure's own 95 % interval: "0.2 % to 2 %"; for none of n its upper bound, for all its lower."""
    if figure is None:
        return ""
    low, high = value_of(figure["low"]), value_of(figure["high"])
    if low is None or high is None or (math.isinf(low) and math.isinf(high) and low < high):
        return ""
    if figure["hits"] == 0 and figure["n"]:
        return f"at most {number(high, figure['unit'])}"
    if figure["hits"] is not None and figure["hits"] == figure["n"] and figure["n"]:
        return f"at least {number(low, figure['unit'])}"
    ends = number(low, figure["unit"]), number(high, figure["unit"])
    return f"{ends[0].removesuffix(' %')} to {ends[1]}"


def change(moved: Mapping[str, Any] | None) -> str:
    """What a change is called: points for shares, per cent for perplexity, a factor for queries, else a difference."""
    return NONE if moved is None else _moved(moved["value"], moved["kind"])


def change_interval(moved: Mapping[str, Any] | None) -> str:
    """The 95 % interval of a change, or a dash where none could be computed."""
    if moved is None or value_of(moved["low"]) is None or value_of(moved["high"]) is None:
        return NONE
    low, high = _moved(moved["low"], moved["kind"]), _moved(moved["high"], moved["kind"])
    return f"{low.removesuffix(' pp').removesuffix(' %')} to {high}"


def _moved(raw: Any, kind: str) -> str:
    value = value_of(raw)
    if value is None:
        return NONE
    if kind == "factor":
        return f"× {number(value)}"
    if kind == "points":
        text = _percent(value).removesuffix(" %") + " pp"
        return f"+{text}" if value > 0 else text
    return signed(value, "share" if kind == "relative" else "")


def p_value(raw: Any) -> str:
    """A p-value with two digits; tiny ones as a power of ten."""
    value = value_of(raw)
    return NONE if value is None else "1" if value == 1 else number(float(f"{value:.2g}"))


def label(figure: str) -> str:
    """The plain label of a figure; its own name where it is not known."""
    return FIGURES[figure].label if figure in FIGURES else figure


def direction(goal: str, better: str) -> str:
    """The mark of the good direction."""
    if goal == "keep":
        return "≈"
    return {"lower": "↓", "higher": "↑"}.get(better, "")


DIRECTIONS: Mapping[str, str] = {"↓": "lower is better", "↑": "higher is better", "≈": "should stay as it was"}


def short(digest: str) -> str:
    """The first twelve digits of a digest, enough to tell two apart."""
    return digest[:12] if len(digest) == 64 else digest


def scalar(value: Any) -> str:
    """Any JSON scalar as a reader wants it; lists joined; digests shortened."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", _THIN).replace("-", MINUS) if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return ", ".join(scalar(entry) for entry in value) or NONE
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {scalar(entry)}" for key, entry in value.items()) or NONE
    if value in ("inf", "-inf", "nan"):
        return number(value)
    text = str(value)
    return short(text) if len(text) == 64 and all(c in "0123456789abcdef" for c in text) else text
