"""The report: escaped, withheld, refused, reproducible, and the same numbers three times."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser

import pytest
from report_samples import SECRET, extraction, facts, full_report, gradient, groups, localization, perplexity

from memloc.errors import InputError, MismatchError, TargetError
from memloc.measurement import Figure
from memloc.report import (
    Comparison,
    Condition,
    Curve,
    EditSummary,
    Located,
    Note,
    Report,
    TextRow,
    Verdict,
    dose_curve,
    render_html,
    render_markdown,
    wording,
)  # fmt: skip
from memloc.report.blocks import Table
from memloc.report.outline import outline
from memloc.report.texts import agreement, guarded

HOSTILE = """<script>alert(1)</script><img src=x onerror=alert(2)>" ' | ` * _ [a](http://x.test) --> ]]> $x$ \\"""


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would find them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "path", "use"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "br", "path", "use"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


@cache
def whole(show_text=False):
    """JSON, page and Markdown of the whole sample report; drawn once."""
    return three(full_report(show_text=show_text))


def three(report):
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    return json.dumps(data, ensure_ascii=False), render_html(data), render_markdown(data)


def hostile_report(**more):
    """Every free text a user can give holds markup."""
    one, other = extraction([HOSTILE, "b"], [-0.1, -40.0]), extraction([HOSTILE, "b"], [-80.0, -50.0], model=HOSTILE)
    curve = Curve(title=HOSTILE, x=HOSTILE, y=HOSTILE, series={HOSTILE: [{"x": 1, "y": 0.5}, {"x": 2, "y": 1.0}]})
    scores = localization()
    scores = replace(scores, provenance=replace(scores.provenance, method=HOSTILE), notes={HOSTILE: HOSTILE})
    settings = dict(
        title=HOSTILE, model=HOSTILE, model_digest=HOSTILE, summary=HOSTILE,
        verdicts=(Verdict(HOSTILE, True, HOSTILE),),
        comparisons=(Comparison(name=HOSTILE, explanation=HOSTILE, before=one, after=other, goal="forget"),),
        curves=(curve,), localizations=(Located(localization=scores, title=HOSTILE, text=HOSTILE),),
        edits=(EditSummary(name=HOSTILE, header={HOSTILE: HOSTILE}, sites={HOSTILE: {HOSTILE: 1}}, text=HOSTILE),),
        texts=(TextRow(HOSTILE, HOSTILE, HOSTILE, HOSTILE, "said", HOSTILE),), notes=(Note(HOSTILE, HOSTILE),),
        provenance={HOSTILE: HOSTILE}, commands=(HOSTILE,), show_text=True,
    )  # fmt: skip
    return Report(**(settings | more))


def test_markup_in_any_text_is_shown_and_never_obeyed():
    _, page, text = three(hostile_report())
    found = Page(page)
    assert not {"script", "img", "a:"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in "".join(found.words), "escaped, not removed"
    assert found.open == [], "no text closed or opened a tag"
    outside_code = re.sub(r"(?ms)^(`{3,})\n.*?\n\1$", "", text)
    assert "<script" not in outside_code and "<img" not in outside_code
    assert not re.search(r"(?<!\\)\]\(http", outside_code)
    assert "&lt;script&gt;" in outside_code


def test_the_parser_used_above_would_notice_markup():
    assert "script" in Page("<p><script>alert(1)</script></p>").tags


def test_a_table_row_of_markdown_has_as_many_cells_whatever_an_id_holds():
    _, _, text = three(hostile_report())
    for block in re.findall(r"(?m)(?:^\|.*\|$\n?)+", text):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.strip().split("\n")}
        assert len(widths) == 1


def test_nothing_on_the_page_comes_from_elsewhere():
    for page in (whole()[1], whole(True)[1], three(hostile_report())[1]):
        found = Page(page)
        links = [value for name, value in found.attributes if name in ("src", "href", "action", "data", "srcset")]
        assert links and all(value.startswith("#") for value in links)
        assert not {"script", "link", "iframe", "object", "embed", "base", "form", "img", "image"} & set(found.tags)
        style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
        assert "url(" not in style and "@import" not in style
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
        assert "default-src 'none'" in page


def test_ids_on_the_page_are_unique_and_links_lead_to_one():
    found = Page(whole()[1])
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for name, value in found.attributes if name == "href"}
    assert targets and targets <= set(ids)


def test_no_word_of_a_text_is_anywhere_unless_asked_for():
    for written in whole():
        for word in ("vault", "alert(", "nowhere", "Remember", "keep the"):
            assert word not in written and word not in html.unescape(written)
    for written in whole(True):
        assert "vault" in written and "nowhere" in written


def test_withheld_texts_still_tell_length_digest_and_how_much_is_recited():
    row = full_report().to_json()["texts"][0]
    assert set(row) == {"id", "unit", "prefix_length", "truth_length", "digest", "arms"}
    assert row["arms"]["before"] == {"length": 8, "matching": 8, "first_miss": 8, "longest_run": 8}
    assert row["arms"]["after"]["longest_run"] == 2
    assert len(row["digest"]) == 64


def test_free_text_in_rows_settings_and_notes_is_withheld_too():
    one = extraction(["a"], [-0.1], prompt="say " + SECRET)
    one = replace(one, rows=({**one.rows[0], "said": SECRET},))
    report = Report(title="t", comparisons=(Comparison(name="g", before=one),))
    assert all("vault" not in written for written in three(report))
    assert any("vault" in written for written in three(replace(report, show_text=True)))
    assert guarded({"how": "max", "rule": ["gauss-legendre"], "n": 3}, show_text=False)["how"] == "max"


def cells_of_page(page):
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [[_plain(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows]


def _plain(cell):
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", cell)).split())


def cells_of_markdown(text):
    lines = [line for line in text.split("\n") if line.startswith("| ") and not re.fullmatch(r"[| :-]+", line)]
    found = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[re.sub(r"\\(.)", r"\1", _plain(cell)) for cell in row] for row in found]


@pytest.mark.parametrize("show_text", [False, True])
def test_the_three_files_say_the_same_numbers(show_text):
    written, page, text = whole(show_text)
    data, on_page, in_text = json.loads(written), cells_of_page(page), cells_of_markdown(text)
    on_page = [row for row in on_page if any(row)]
    in_text = [row for row in in_text if any(row)]
    assert on_page == in_text
    targets = data["comparisons"][0]
    strict = targets["figures"][0]
    row = next(row for row in on_page if row[0] == "Recited word for word ↓ strict rate")
    assert strict["after"] == {**strict["after"], "value": 0.0, "hits": 0, "n": 5}
    assert row[1].startswith("5 of 5 (100 %)") and row[2].startswith("0 of 5 (0 %)")
    assert f"at most {wording.number(strict['after']['high'], 'share')}" in row[2]
    assert row[2].endswith("at most 45.1 %") and row[3].startswith("−100 pp")


def test_a_changed_number_changes_all_three():
    first = full_report().to_json()
    second = json.loads(json.dumps(first))
    second["comparisons"][3]["figures"][0]["after"]["value"] = 77.77
    for render in (render_html, render_markdown):
        assert "77.77" in render(second) and "77.77" not in render(first)


def test_equal_reports_give_equal_bytes(tmp_path):
    few = full_report(show_text=True)
    few = replace(few, comparisons=few.comparisons[:1], verdicts=(), localizations=few.localizations[:1])
    for name in ("a", "b"):
        replace(few).save(tmp_path / name)
    for file in ("report.html", "report.json", "report.md"):
        first = (tmp_path / "a" / file).read_bytes()
        assert first == (tmp_path / "b" / file).read_bytes() and first
    assert json.loads((tmp_path / "a" / "report.json").read_text())["schema"] == "memloc.report/1"


def test_the_page_and_the_markdown_are_functions_of_the_json(tmp_path):
    report = replace(full_report(), localizations=())
    page, written, text = report.save(tmp_path, stem="evidence")
    data = json.loads(written.read_text())
    assert page.read_text() == render_html(data) and text.read_text() == render_markdown(data)


@pytest.mark.parametrize("arm", ["after", "random"])
def test_refuses_to_compare_other_data(arm):
    before, other = extraction(["a", "b"], [-1, -2]), extraction(["a", "b"], [-1, -2], data="another file")
    with pytest.raises(MismatchError, match=r"targets: passages \w{12} before but \w{12} for .*nothing was written"):
        Comparison(name="targets", before=before, **{arm: other})
    Comparison(name="targets", before=before, **{arm: extraction(["a", "b"], [-9, -9])})


def test_refuses_other_settings_measures_and_items():
    before = extraction(["a", "b"], [-1, -2], temperature=1.0)
    with pytest.raises(MismatchError, match=r"temperature=1.0 before but 0.7 for after"):
        Comparison(name="g", before=before, after=extraction(["a", "b"], [-1, -2], temperature=0.7))
    with pytest.raises(MismatchError, match="extraction before but perplexity for after"):
        Comparison(name="g", before=before, after=perplexity([4.0, 5.0]))
    with pytest.raises(MismatchError, match="2 items before, 1 for after"):
        Comparison(name="g", before=before, after=extraction(["a"], [-1], data=["a", "b"], temperature=1.0))


def test_refuses_controls_that_differ():
    one = extraction(["a"], [-1]).with_control(extraction(["x"], [-99]))
    other = extraction(["a"], [-80]).with_control(extraction(["x"], [-99], data="other controls"))
    with pytest.raises(MismatchError, match="never-seen controls: passages"):
        Comparison(name="g", before=one, after=other)


def test_order_of_rows_does_not_matter():
    one, other = extraction(["a", "b", "c"], [-0.1, -50, -0.2]), extraction(["a", "b", "c"], [-60, -0.3, -0.1])
    turned = replace(other, rows=other.rows[::-1])
    assert (
        Comparison(name="g", before=one, after=other).to_json()["figures"]
        == (Comparison(name="g", before=one, after=turned).to_json()["figures"])
    )


def test_flips_are_listed_by_id_both_ways():
    before, after = extraction(["a", "b", "c"], [-0.1, -50, -0.2]), extraction(["a", "b", "c"], [-60, -0.3, -0.1])
    flips = Comparison(name="g", before=before, after=after).to_json()["flips"]
    assert flips == [
        {"verdict": "strict", "against": "before", "n": 3, "kept": 1, "lost": ["a"], "gained": ["b"], "p": 1.0}
    ]


def test_an_interval_of_a_change_holds_it_and_is_paired():
    """Rows spread far more than they move: only a paired interval is narrow."""
    nlls = [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    moved = [value + 0.01 * (place % 3) for place, value in enumerate(nlls)]
    after = perplexity(moved, model="after")
    figure = Comparison(name="g", before=perplexity(nlls), after=after).to_json()["figures"][0]
    change = figure["change"]
    assert change["kind"] == "relative" and change["low"] <= change["value"] <= change["high"]
    assert change["value"] == pytest.approx(math.exp(0.01) - 1)
    assert 0 < change["high"] - change["low"] < 0.02
    assert figure["before"]["high"] - figure["before"]["low"] > 50


def test_a_change_has_no_interval_where_rows_cannot_make_the_figure():
    before, after = perplexity([3.0, 4.0]), perplexity([3.1, 4.1], model="after")
    wrong = Figure("perplexity", 99.0, 2, unit="perplexity", better="lower")
    figure = Comparison(name="g", before=before, after=replace(after, figures={"perplexity": wrong}))
    change = figure.to_json()["figures"][0]["change"]
    assert change["low"] is None and change["high"] is None and wording.change_interval(change) == "—"


def test_shares_that_all_change_alike_keep_a_width():
    rows = tuple({"id": f"f{i}", "paraphrase success": 0.0} for i in range(9))
    figure = Figure("paraphrase success", 0.0, 9, 0.0, 0.2, "share", "higher")
    before = replace(facts(9, 0.0), figures={figure.name: figure}, rows=rows)
    full = tuple({**row, "paraphrase success": 1.0} for row in rows)
    after = replace(before, figures={figure.name: replace(figure, value=1.0)}, rows=full)
    change = Comparison(name="g", before=before, after=after).to_json()["figures"][0]["change"]
    assert change["value"] == 1.0 == change["high"]
    assert change["low"] == pytest.approx(1 - 2 * (1 - 0.05 ** (1 / 9)))


def test_infinite_numbers_are_written_and_the_json_stays_strict():
    never = extraction(["a", "b"], [-math.inf, -math.inf], model="after")
    report = Report(
        title="t", comparisons=(Comparison(name="g", before=extraction(["a", "b"], [-0.1, -9]), after=never),)
    )
    written, page, text = three(report)
    assert "Infinity" not in written and "NaN" not in written
    for rendered in (page, text):
        assert "∞" in rendered and "−∞" in rendered
        assert not re.search(r"\b(nan|inf|None)\b", rendered)


def test_empty_sections_render():
    for report in (
        Report(title="nothing"),
        Report(title="t", comparisons=(Comparison(name="g", before=extraction([], [])),)),
        Report(title="t", texts=(TextRow("a", "", "", "", ""),), notes=(Note("h", ""),), show_text=True),
        Report(title="t", edits=(EditSummary(name="e"),), curves=(Curve(title="c", x="x", y="y", series={}),)),
        Report(title="t", verdicts=(Verdict("only told"),), comparisons=(Comparison(name="g", before=facts(3, 1.0)),)),
    ):
        _, page, text = three(report)
        assert Page(page).open == [] and text.startswith("# ")


def test_a_missing_random_control_is_said_and_not_skipped():
    before, after = extraction(["a"], [-0.1]), extraction(["a"], [-80])
    _, page, text = three(Report(title="t", comparisons=(Comparison(name="g", before=before, after=after),)))
    assert "not run" in page and "not run" in text


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ({"figure": "strict rate", "at_most": 0.0}, True),
        ({"figure": "strict rate", "at_least": 0.5}, False),
        ({"figure": "median log p_z", "within_controls": "log_pz"}, True),
        ({"figure": "median log p_z", "within_controls": "log_pz", "arm": "random"}, False),
        ({"figure": "first miss", "at_most": -0.5, "relative": True}, True),
    ],
)
def test_conditions_are_judged_by_the_numbers(condition, holds):
    report = Report(title="t", comparisons=groups()[:1], verdicts=(Condition(text="c", group="targets", **condition),))
    assert report.verdicts[0].holds is holds and report.passed is holds
    assert report.verdicts[0].measured


def test_a_condition_on_what_is_not_there_is_refused():
    with pytest.raises(InputError, match="'strict rte' of 'targets'"):
        Report(
            title="t", comparisons=groups()[:1], verdicts=(Condition(text="c", group="targets", figure="strict rte"),)
        )
    with pytest.raises(InputError, match="two groups are called 'g'"):
        Report(title="t", comparisons=(Comparison(name="g", before=facts(2, 1.0)),) * 2)


def test_a_folder_that_is_a_file_is_refused_and_kept(tmp_path):
    taken = tmp_path / "report"
    taken.write_text("mine")
    with pytest.raises(TargetError, match="is a file; name a folder"):
        full_report().save(taken)
    assert taken.read_text() == "mine"


def test_doses_become_a_curve_with_wilson_intervals():
    measured = extraction(list("abcdef"), [-90, -80, -70, -0.1, -0.1, -60], doses=[1, 1, 1, 8, 8, 8])
    points = dose_curve({"before": measured}).series["before"]
    assert [(point["x"], point["hits"], point["n"]) for point in points] == [(1, 0, 3), (8, 2, 3)]
    assert points[0]["high"] == pytest.approx(1 - 0.05 ** (1 / 3))
    with pytest.raises(InputError, match="no row has a dose"):
        dose_curve({"before": extraction(["a"], [-1])})


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "share", "0 %"),
        (1.0, "share", "100 %"),
        (0.9999, "share", "99.99 %"),
        (0.0004, "share", "0.04 %"),
        (-0.993, "share", "−99.3 %"),
        ("inf", "queries", "∞"),
        ("-inf", "nats", "−∞"),
        (None, "nats", "—"),
        (-142.31, "nats", "−142.3"),
        (2.1e12, "queries", "2.1 × 10¹²"),
        (12345.0, "queries", "12 345"),
        (-0.0, "nats", "0"),
    ],
)
def test_numbers_as_a_reader_wants_them(value, unit, text):
    assert wording.number(value, unit) == text


def test_a_shifted_recital_is_seen_by_its_longest_run():
    truth = ("a", "b", "c", "d", "e")
    assert agreement(truth, ("x", "a", "b", "c", "d")) == {
        "length": 5,
        "matching": 0,
        "first_miss": 0,
        "longest_run": 4,
    }
    assert agreement(truth, ("a", "b", "x", "d")) == {"length": 4, "matching": 3, "first_miss": 2, "longest_run": 2}


def test_every_table_is_rectangular():
    for report in (full_report(), full_report(show_text=True), hostile_report()):
        for block in outline(report.to_json()):
            if isinstance(block, Table):
                assert {len(row) for row in block.rows} <= {len(block.columns)}


def test_localizations_show_settings_notes_and_the_verdict_on_lower_layers():
    passages = tuple("abcdefgh")
    shown = Located(localization=gradient(0, passages=passages), control=gradient(5, slope=0.5, passages=passages))
    _, page, text = three(Report(title="t", localizations=(shown,)))
    for rendered in (page, text):
        assert "The lower half of the layers holds" in rendered and "n = 8 and 8" in rendered
        assert "0.018" in rendered and "weight-gradient" in rendered
    assert page.count("<svg") == 2


def test_versions_are_named_once_and_all_of_them_where_they_differ():
    comparison = Comparison(name="g", before=extraction(["a"], [-1]))
    given = {"versions": {"torch": "2.12.0", "python": "3.11.2"}}
    text = three(Report(title="t", comparisons=(comparison,), provenance=given))[2]
    assert text.count("version of python | 3.11.2 ") == 1
    assert "version of torch | 2.13.0 and 2.12.0 " in text
