"""The report: measures before, after and under the random control, as JSON and, from that JSON, HTML and Markdown."""

from memloc.report.comparison import Comparison, Goal
from memloc.report.contents import (
    Condition,
    Curve,
    EditSummary,
    Located,
    Note,
    Verdict,
    dose_curve,
)
from memloc.report.markdown import render_markdown
from memloc.report.page import render_html
from memloc.report.sheets import Entry, Sheet
from memloc.report.texts import TextRow
from memloc.report.whole import Report

__all__ = [
    "Comparison", "Condition", "Curve", "EditSummary", "Entry", "Goal", "Located", "Note", "Report", "Sheet",
    "TextRow", "Verdict", "dose_curve", "render_html", "render_markdown",
]  # fmt: skip
