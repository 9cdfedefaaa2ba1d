"""Maps of heads and of positions: numbers, pictures, pages, and what is withheld."""

from __future__ import annotations

import json

import pytest
import torch

from memloc import plots
from memloc.errors import InputError, MismatchError
from memloc.provenance import Provenance
from memloc.report import Located, Report
from memloc.report.page import render_html
from memloc.results.maps import head_map, position_maps
from memloc.scores import Localization, selected
from memloc.sites import OUTSIDE, Grain, Kind, Site

HEADS = (Site(0, Kind.ATTN_OUT), Site(2, Kind.ATTN_OUT))
MLP = (Site(0, Kind.MLP_OUT), Site(1, Kind.MLP_OUT))


def heads(scale=1.0):
    scores = {HEADS[1]: torch.tensor([4.0, 0.5, 0.0]) * scale, HEADS[0]: torch.tensor([1.0, -2.0, 0.25]) * scale}
    return Localization(Grain.HEAD, scores, Provenance("by hand"))


def positions():
    scores = {MLP[0]: torch.tensor([[1.0, 2, 3], [4, 5, 0]]), MLP[1]: torch.tensor([[0.0, -1, 7], [1, 1, 0]])}
    scores[Site(OUTSIDE, Kind.EMBED)] = torch.tensor([[1.0, 0, 0], [0, 9, 0]])
    return Localization(Grain.POSITION, scores, Provenance("by hand"), ("a", "b"), lengths=(3, 2))


def test_a_map_of_heads_has_a_row_a_layer():
    chosen = selected({HEADS[0]: [1]}, {site: 3 for site in HEADS}, Grain.HEAD)
    found = head_map(heads(), heads(0.5), chosen)
    assert found["layers"] == [0, 2] and found["scores"] == [[1.0, -2.0, 0.25], [4.0, 0.5, 0.0]]
    assert found["control_scores"][1] == [2.0, 0.25, 0.0]
    assert found["chosen"] == [[False, True, False], [False] * 3]
    with pytest.raises(InputError, match="position scores make no map of heads"):
        head_map(positions())
    other = Localization(Grain.HEAD, {HEADS[0]: torch.ones(3)}, Provenance("by hand"))
    with pytest.raises(MismatchError, match="the control scores other heads"):
        head_map(heads(), other)


def test_maps_of_positions_end_where_their_passage_does():
    first, second = position_maps(positions(), tokens={"b": ["x", "y"]}, prefixes={"a": 2})
    assert (first["id"], first["length"], first["prefix"], first["tokens"]) == ("a", 3, 2, None)
    assert (second["length"], second["tokens"]) == (2, ["x", "y"])
    kinds = {entry["kind"]: entry for entry in second["maps"]}
    assert kinds["mlp.out"]["scores"] == [[4.0, 5.0], [1.0, 1.0]] and kinds["mlp.out"]["layers"] == [0, 1]
    assert kinds["embed"] == {"kind": "embed", "layers": [None], "scores": [[0.0, 9.0]]}
    assert len(position_maps(positions(), most=1)) == 1
    assert position_maps(positions().mean())[0]["id"] == "mean of all passages"
    with pytest.raises(InputError, match="a: 1 tokens, but 3 positions are scored"):
        position_maps(positions(), tokens={"a": ["x"]})


def test_pictures_show_every_cell_and_the_sign():
    drawn = []
    svg = plots.svg(lambda ax: (plots.head_map(ax, head_map(heads())), drawn.append(ax)), name="heads")
    colours = [patch.get_facecolor()[:3] for patch in drawn[0].patches]
    assert len(colours) == 6 and len(set(colours)) == 2 and "<svg" in svg
    (first, *_) = position_maps(positions(), prefixes={"a": 2})
    plots.svg(lambda ax: (plots.position_map(ax, first["maps"][1], prefix=2), drawn.append(ax)), name="tokens")
    assert len(drawn[1].patches) == 6 and drawn[1].lines[0].get_xdata()[0] == 2
    plots.svg(lambda ax: (plots.position_map(ax, first["maps"][0]), drawn.append(ax)), name="bars")
    assert [bar.get_height() for bar in drawn[2].patches] == [1.0, 0.0, 0.0]


def page(show_text):
    spoken = {"a": ["Secret", " <b>", "word"]}
    shown = Located(localization=positions(), tokens=spoken, prefixes={"a": 1})
    return Report(title="t", localizations=(shown, Located(localization=heads())), show_text=show_text)


def test_a_page_colours_the_text_only_where_it_may_be_shown():
    html = render_html(page(True).to_json())
    assert "Secret" in html and "&lt;b&gt;" in html and 'class="for begins"' in html
    withheld = page(False).to_json()
    assert "Secret" not in json.dumps(withheld) and "Secret" not in render_html(withheld)
    assert "Nothing was measured" not in html


def test_readings_of_neurons_stand_in_a_table_of_their_own():
    readings = [{
        "site": "L1.mlp.out", "index": 7, "score": 0.5, "agreement": 0.25, "promotes": [" home", " away"],
        "suppresses": ["x"], "triggers": [{"text": "they went", "next": " home", "score": 3.0}],
    }]  # fmt: skip
    made = Localization(Grain.NEURON, {MLP[0]: torch.rand(9)}, Provenance("by hand"), None, {"readings": readings})
    html = render_html(Report(title="t", localizations=(Located(localization=made),), show_text=True).to_json())
    assert "L1.mlp.out[7]" in html and "they went → home (3)" in html and "home · away" in html and "25" in html
    hidden = Report(title="t", localizations=(Located(localization=made),)).to_json()
    assert "they went" not in json.dumps(hidden) and "they went" not in render_html(hidden)
