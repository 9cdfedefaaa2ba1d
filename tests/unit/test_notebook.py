"""Cards of the types: well-formed, small, escaped, without text of passages and without anything fetched."""

from html.parser import HTMLParser

import pytest
import torch
from tiny_models import view_of

from editors.deltas import LowRank
from editors.edit import Edit
from memloc.lazy import resolve
from memloc.measurement import Figure, Measurement
from memloc.notebook import html, plain
from memloc.notebook.markup import table
from memloc.passages import Fact, Facts, Neighbor, Passage, Passages, Prompt
from memloc.provenance import Provenance
from memloc.report import Comparison, Condition, Report
from memloc.scores import Localization
from memloc.sites import OUTSIDE, Grain, Kind, Site

HOSTILE = '<img src=x onerror="alert(1)">'
SECRET = "Wilhelmina lives at 7 Orchard Lane"
VOID = {"br", "img", "path", "use", "rect", "hr"}


class Reader(HTMLParser):
    """Refuses tags that do not close, and keeps what a browser would fetch or run."""

    def __init__(self):
        super().__init__()
        self.open, self.bad, self.ids, self.said = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag in ("script", "link", "iframe", "img", "object", "style"):
            self.bad.append(tag)
        for name, value in attrs:
            if name.startswith("on") or (name in ("src", "href", "xlink:href") and not (value or "").startswith("#")):
                self.bad.append(f"{name}={value}")
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        self.said += data


def read(markup):
    reader = Reader()
    reader.feed(markup)
    reader.close()
    assert not reader.open, f"left open: {reader.open}"
    return reader


def localization(passages=("a", "b"), name="method", **more):
    scores = {Site(layer, Kind.MLP_OUT): torch.arange(5.0) + layer for layer in range(3)}
    stacked = {site: entry.expand(len(passages), 5) for site, entry in scores.items()} if passages else scores
    return Localization(Grain.NEURON, stacked, Provenance(name, **more), passages)


def measurement(**more):
    figure = Figure("strict rate", 0.5, 2, 0.1, 0.9, better="lower")
    rows = ({"id": HOSTILE, "strict": True}, {"id": "b", "strict": False})
    return Measurement("extraction", {"strict rate": figure}, rows, Provenance("extraction", **more))


def things():
    passages = Passages((Passage(HOSTILE, (31, 32, 33), (34, 35), {"text": SECRET, "dose": 3}),), HOSTILE)
    prompt = Prompt((31, 32, 33), (0, 1), SECRET)
    fact = Fact(HOSTILE, "{} lives", SECRET, prompt, (4,), (5,), SECRET, SECRET, (prompt,), (Neighbor(prompt, (5,)),))
    view = view_of("gpt2")
    view.name = HOSTILE
    site = Site(1, Kind.MLP_OUT)
    width, inputs = view.weight(site).shape
    edit = Edit.of(
        view, {site: LowRank(torch.ones(width, 1), torch.ones(1, inputs))}, Provenance(HOSTILE, {"prompt": SECRET})
    )
    before = measurement(settings={"said": SECRET})
    found = localization(name=HOSTILE, settings={"prompt": SECRET})
    report = Report(
        title=HOSTILE,
        summary=HOSTILE,
        comparisons=(Comparison(name=HOSTILE, before=before, after=before, goal="forget"),),
        verdicts=(Condition(text=HOSTILE, group=HOSTILE, figure="strict rate", at_most=0.1),),
    )
    return {
        "view": view,
        "site": site,
        "passages": passages,
        "facts": Facts((fact,), HOSTILE),
        "localization": found,
        "selection": found.top(4),
        "measurement": before.with_control(before),
        "edit": edit,
        "report": report,
    }


NAMES = ("view", "site", "passages", "facts", "localization", "selection", "measurement", "edit", "report")


@pytest.fixture(scope="module")
def shown():
    return things()


@pytest.mark.parametrize("name", NAMES)
def test_a_card_is_small_and_well_formed_and_fetches_nothing(name, shown):
    markup = shown[name]._repr_html_()
    reader = read(markup)
    assert reader.bad == [] and len(markup) < 40_000
    assert HOSTILE not in markup
    assert type(shown[name]).__name__ in reader.said


@pytest.mark.parametrize("name", NAMES)
def test_no_card_and_no_line_holds_a_text(name, shown):
    """Not even where a method's settings quote it, or the ids of its tokens."""
    for written in (read(shown[name]._repr_html_()).said, repr(shown[name])):
        assert SECRET not in written and "Orchard" not in written
        assert "31, 32" not in written and "34, 35" not in written


@pytest.mark.parametrize("name", [name for name in NAMES if name != "site"])
def test_a_line_is_one_short_line(name, shown):
    assert len(repr(shown[name])) < 200 and "\n" not in repr(shown[name])


def test_the_reader_of_cards_can_fail():
    assert read("<p>x<script>1</script></p>").bad == ["script"]
    assert read(f"<div>{HOSTILE}</img></div>").bad == ["img", "src=x", "onerror=alert(1)"]
    with pytest.raises(AssertionError, match="closes another"):
        read("<b><i></b></i>")


def test_pictures_of_different_data_share_no_id():
    one, other = localization(), localization()
    other.scores[Site(0, Kind.MLP_OUT)] = torch.full((2, 5), 9.0)
    ids = [set(read(html(found)).ids) for found in (one, other)]
    assert all(ids) and not ids[0] & ids[1]
    assert set(read(html(one)).ids) == ids[0]


def test_the_best_places_are_the_highest_scores_with_their_indices():
    scores = {Site(0, Kind.MLP_IN): torch.tensor([[1.0, 2.0, 3.0], [9.0, -50.0, 4.0]])}
    scores[Site(1, Kind.MLP_IN)] = torch.tensor([[8.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    said = read(html(Localization(Grain.WEIGHT, scores, Provenance("m")))).said
    assert "L0.mlp.in1, 09L1.mlp.in0, 08.5L0.mlp.in1, 24" in said


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_scores_of_any_shape_are_shown(shape):
    scores = {Site(0, Kind.MLP_OUT): torch.ones(shape), Site(OUTSIDE, Kind.EMBED): torch.zeros(shape)}
    assert "best places" in read(html(Localization(Grain.LAYER, scores, Provenance("m")))).said


def test_nothing_to_show_is_shown_too():
    for empty in (Passages(()), Facts(()), localization(None), Measurement("m", {}, (), Provenance("m"))):
        read(html(empty))
    assert plain(Passages(())) == "<Passages: 0 passages>"


def test_long_sets_end_in_how_many_more_there_are():
    many = Passages(tuple(Passage(f"p{n}", (1,), (2,)) for n in range(11)), "set.jsonl")
    assert "and 3 more" in read(html(many)).said
    assert repr(many) == "<Passages: 11 passages of set.jsonl; prefix 1, suffix 1 tokens>"


def test_columns_of_numbers_stand_to_the_right():
    assert table(("a", "b"), [("x", "1"), ("y", "—")]).count("text-align:right") == 3


def test_names_given_as_text_are_resolved():
    assert resolve("memloc.notebook:plain") is plain
