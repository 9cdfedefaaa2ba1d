"""The report as one HTML page that asks the network for nothing: no script, no font, figures drawn inline."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memloc import plots
from memloc.report.blocks import (
    ARM_NAMES,
    Block,
    Cell,
    Code,
    Heading,
    Marked,
    Passage,
    Picture,
    Prose,
    Table,
    Terms,
    Verdicts,
)
from memloc.report.outline import outline, overall
from memloc.report.style import CSS
from memloc.report.texts import runs
from memloc.report.wording import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Nothing on the page may run or be fetched, whatever a passage holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def render_html(data: Mapping[str, Any]) -> str:
    """The whole page, from the JSON of `Report.to_json` alone; everything given by users is escaped.

    The same data and the same matplotlib give the same bytes. Cost: about 0.1 s a figure.
    """
    blocks = outline(data)
    sections = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<a href="#part-{place}">{text(name)}</a>' for place, name in enumerate(sections) if place)
    body, part, pictures = [], -1, 0
    for place, block in enumerate(blocks):
        if isinstance(block, Heading) and block.level == 2:
            part += 1
            body.append(f'{"</section>" if part else ""}<section id="part-{part}"{"" if part else " class=first"}>')
        if isinstance(block, Picture):
            pictures += 1
        written = _block(block, f"figure{pictures}")
        if isinstance(block, Table) and not block.fold and place and isinstance(blocks[place - 1], Picture):
            written = f'<div class="beside">{body.pop()}{written}</div>'
        body.append(written)
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{text(data['title'])}</title>",
            f"<style>{CSS}</style></head>",
            f"<body><main>{_masthead(data)}<nav aria-label=Contents>{links}</nav>",
            *body,
            "</section></main></body></html>\n",
        )
    )


def text(raw: Any) -> str:
    """Text with nothing in it that HTML would act on."""
    return html.escape(str(raw), quote=True)


def _masthead(data: Mapping[str, Any]) -> str:
    model = data["model"]
    digest = f" · digest <code>{text(short(model['digest']))}</code>" if model["digest"] else ""
    byline = f'<p class="byline">Model {text(model["name"])}{digest}</p>' if model["name"] else ""
    lead = f'<p class="lead">{text(data["summary"])}</p>' if data["summary"] else ""
    return f"<header>{byline}<h1>{text(data['title'])}</h1>{lead}</header>"


def _block(block: Block, name: str) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{text(block.text)}</h{block.level}>"
        case Prose():
            return f"<p{' class=quiet' if block.quiet else ''}>{text(block.text)}</p>"
        case Verdicts():
            return _verdicts(block)
        case Table():
            return _table(block)
        case Picture():
            return _picture(block, name)
        case Marked():
            return _marked(block)
        case Passage():
            return _passage(block.row)
        case Code():
            return f"<pre>{text(chr(10).join(block.lines))}</pre>"
        case Terms():
            return f"<dl>{''.join(f'<dt>{text(term)}</dt><dd>{text(said)}</dd>' for term, said in block.entries)}</dl>"


def _verdicts(block: Verdicts) -> str:
    line, tone = overall(block.entries)
    marks = {True: '<b class="good" aria-label="holds">✓</b>', False: '<b class="bad" aria-label="does not hold">✗</b>',
             None: "<b>·</b>"}  # fmt: skip
    items = []
    for entry in block.entries:
        measured = f'<span class="below">{text(entry["measured"])}</span>' if entry["measured"] else ""
        items.append(f"<li>{marks[entry['holds']]}<span>{text(entry['text'])}{measured}</span></li>")
    head = f"<p>{text(line)}</p>" if line else ""
    return f'<div class="verdicts {tone}">{head}<ul>{"".join(items)}</ul></div>'


def _table(block: Table) -> str:
    if not block.rows:
        return f'<p class="quiet">{text(block.caption)}: none.</p>' if block.caption else ""
    kinds = [cell.kind for cell in block.rows[0]]
    titles = "".join(
        f'<th scope="col" class="{"number" if kind == "number" else "text"}">{text(t)}</th>'
        for t, kind in zip(block.columns, kinds, strict=True)
    )
    head = f"<thead><tr>{titles}</tr></thead>" if any(block.columns) else ""
    rows = []
    for row in block.rows:
        cells = [
            _cell(cell, label, first=not place)
            for place, (cell, label) in enumerate(zip(row, block.columns, strict=True))
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = f"<caption>{text(block.caption)}</caption>" if block.caption and not block.fold else ""
    role = f' class="{block.role}"' if block.role else ""
    table = f'<div class="scroll"><table{role}>{caption}{head}<tbody>{chr(10).join(rows)}</tbody></table></div>'
    return f"<details><summary>{text(block.caption)}</summary>{table}</details>" if block.fold else table


def _cell(cell: Cell, label: str, *, first: bool) -> str:
    kind = f"{cell.kind} {cell.tone}".strip()
    bar = (
        ""
        if cell.share is None
        else f'<span class="bar"><i style="width:{100 * min(1.0, max(0.0, cell.share)):.2f}%"></i></span>'
    )
    below = "".join(f'<span class="below">{text(line)}</span>' for line in cell.below.splitlines())
    if first:
        return f'<th scope="row" class="{kind}">{text(cell.text)}{below}</th>'
    return f'<td class="{kind}" data-label="{text(label)}"><span>{text(cell.text)}{bar}{below}</span></td>'


def _picture(block: Picture, name: str) -> str:
    data, width, height = block.data, 6.6, 2.7

    def draw(ax: Axes) -> None:
        if block.kind == "layers":
            plots.layer_bars(ax, data)
        elif block.kind == "components":
            plots.layer_component_map(ax, data)
        elif block.kind == "neurons":
            plots.neuron_strip(ax, data)
        elif block.kind == "heads":
            plots.head_map(ax, data)
        elif block.kind == "positions":
            plots.position_map(ax, data, prefix=data["prefix"])
        elif data["kind"] == "dose":
            plots.dose_curve(ax, data["series"])
        else:
            scale, unit = (100.0, ", %") if data["unit"] == "share" else (1.0, "")
            plots.curve(ax, data["series"], x=data["x"], y=data["y"] + unit, kind=data["kind"], scale=scale)

    if block.kind == "components":
        height = 0.8 + 0.46 * min(16, len(data["layers"]))
    if block.kind == "heads":
        height = 0.8 + 0.42 * min(20, len(data["layers"]))
    if block.kind == "positions":
        height = 2.1 if len(data["scores"]) == 1 else 0.9 + 0.26 * min(24, len(data["layers"]))
    if block.kind == "neurons":
        height = 0.9 + 0.34 * min(24, len(data["sites"]))
    drawn = plots.svg(draw, name=name, width=width, height=height)
    keys = "".join(
        f'<span><i class="s{place % 5}"></i>{text(entry)}</span>' for place, entry in enumerate(block.legend)
    )
    legend = f'<div class="legend">{keys}</div>' if len(block.legend) > 1 else ""
    picture = drawn.replace("<svg", f'<svg role="img" aria-label="{text(block.caption)}"', 1)
    return f"<figure>{legend}{picture}<figcaption>{text(block.caption)}</figcaption></figure>"


def _marked(block: Marked) -> str:
    most = max((abs(score) for score in block.scores), default=0.0) or 1.0
    spans = []
    for place, (piece, score) in enumerate(zip(block.pieces, block.scores, strict=True)):
        share, kind = abs(score) / most, "against" if score < 0 else "for"
        begins = " begins" if block.prefix and place == block.prefix else ""
        title = f"token {place}: {score:.3g}"
        style = f"--share:{100 * share:.0f}%"
        spans.append(f'<span class="{kind}{begins}" style="{style}" title="{title}">{text(piece)}</span>')
    return f'<figure><p class="strip">{"".join(spans)}</p><figcaption>{text(block.caption)}</figcaption></figure>'


def _passage(row: Mapping[str, Any]) -> str:
    columns = [f"<div><b>true continuation</b><p>{text(''.join(row['truth']))}</p></div>"]
    for arm, found in row["arms"].items():
        pieces = runs(row["truth"], found["text"])
        marked = "".join(
            f"<mark>{text(p)}</mark>" if same else f'<span class="differs">{text(p)}</span>' for same, p in pieces
        )
        nothing = '<span class="differs">(nothing)</span>'
        columns.append(f"<div><b>{text(ARM_NAMES[arm])}</b><p>{marked or nothing}</p></div>")
    given = f'<p class="given">{text(row["prefix"])}</p>'
    said = f'<div class="said">{"".join(columns)}</div>'
    return f'<article class="passage"><h4>{text(row["id"])}</h4>{given}{said}</article>'
