"""Figures: the numbers drawn are the numbers given, nothing global is touched, the markup is clean."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure
from report_samples import gradient, localization

from memloc import plots
from memloc.errors import InputError, MismatchError
from memloc.provenance import Provenance
from memloc.results import profiles
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site


@pytest.fixture
def ax():
    return Figure().add_subplot()


def by_hand(values, kind=Kind.MLP_OUT, passages=None, grain=Grain.NEURON):
    scores = {Site(layer, kind): torch.tensor(row) for layer, row in enumerate(values)}
    return Localization(grain, scores, Provenance("by hand"), passages)


def test_bars_are_as_high_as_the_layers_share(ax):
    plots.layer_bars(ax, by_hand([[1.0, -2.0], [1.0, 0.0]]), by_hand([[0.0, 1.0], [1.0, 2.0]]))
    heights = [patch.get_height() for patch in ax.patches]
    assert heights == pytest.approx([75, 25, 25, 75])
    assert ax.get_legend_handles_labels()[1] == ["memorized", "controls"]


def _call(draw, data, ax):
    draw(ax, data)


def test_a_plot_draws_the_same_from_an_object_and_from_its_numbers():
    for draw, numbers in (
        (plots.layer_bars, profiles.layer_profile),
        (plots.layer_component_map, profiles.component_profile),
        (plots.neuron_strip, profiles.neuron_profile),
    ):
        found = localization()
        drawn = [
            plots.svg(lambda ax, data=data, draw=draw: draw(ax, data), name="x") for data in (found, numbers(found))
        ]
        assert drawn[0] == drawn[1]


def test_the_map_says_every_share_once(ax):
    found = gradient()
    plots.layer_component_map(ax, found)
    written = [float(text.get_text()) for text in ax.texts]
    assert len(written) == 24 and sum(written) == pytest.approx(100, abs=1.2)


def test_the_strip_marks_what_was_chosen(ax):
    found = localization()
    chosen = found.top(5)
    plots.neuron_strip(ax, found, chosen)
    names = ax.get_legend_handles_labels()[1]
    assert "chosen" in names
    dots = sum(len(c.get_offsets()) for c in ax.collections if c.get_facecolor()[0][:3].tolist() ==
               pytest.approx(list(matplotlib.colors.to_rgb(plots.SERIES[1]))))  # fmt: skip
    assert dots == 5


def test_the_dose_curve_leaves_out_what_is_not_finite(ax):
    points = [
        {"x": 1, "y": 0.0, "low": 0.0, "high": 0.3},
        {"x": 4, "y": "inf"},
        {"x": 64, "y": 1.0, "low": 0.7, "high": 1.0},
    ]
    plots.dose_curve(ax, {"before": points})
    line = next(line for line in ax.lines if line.get_label() == "before")
    assert line.get_ydata().tolist() == [0, 100]


def test_passages_speak_alike_however_large_their_scores():
    """One passage with scores a thousand times larger must not decide the shares of all."""
    rows = [[[1000.0], [1.0], [1.0]], [[0.0], [1.0], [1.0]]]
    layers = profiles.layer_profile(by_hand(rows, passages=("a", "b", "c")))["layers"]
    assert [layer["share"] for layer in layers] == pytest.approx([2 / 3, 1 / 3])


def test_the_lower_half_splits_a_middle_layer():
    halves = profiles.layer_profile(by_hand([[1.0], [2.0], [1.0]]))["lower_half"]
    assert halves == {"share": 0.5, "control": None, "difference": None}


def test_the_difference_between_passages_and_controls_has_an_interval():
    memorized = by_hand([[[3.0], [4.0], [5.0]], [[1.0], [1.0], [1.0]]], passages=("a", "b", "c"))
    control = by_hand([[[1.0], [2.0]], [[1.0], [2.0]]], passages=("x", "y"))
    found = profiles.layer_profile(memorized, control)["lower_half"]["difference"]
    assert found["n"] == [3, 2] and found["low"] <= found["value"] <= found["high"]
    assert found["value"] == pytest.approx((3 / 4 + 4 / 5 + 5 / 6) / 3 - 0.5)


def test_scores_of_other_places_do_not_compare():
    with pytest.raises(MismatchError, match="at other sites"):
        profiles.layer_profile(localization(), gradient())
    with pytest.raises(InputError, match="no row of neurons"):
        profiles.neuron_profile(gradient())


def test_best_neurons_are_listed_in_order_and_chosen_ones_never_dropped():
    found = by_hand([[0.5, 9.0, 0.1], [3.0, 0.2, 0.3]])
    data = profiles.neuron_profile(found, found.top(2), per_layer=1, top=3)
    assert [(entry["site"], entry["index"], entry["chosen"]) for entry in data["top"]] == [
        ("L0.mlp.out", 1, True), ("L1.mlp.out", 0, True), ("L0.mlp.out", 0, False)
    ]  # fmt: skip
    lowest = profiles.neuron_profile(found, found.top(6), per_layer=1)
    assert all(len(site["best"]) == 2 for site in lowest["sites"])


def test_markup_is_reproducible_and_stands_alone():
    def draw(ax):
        plots.layer_component_map(ax, gradient(), gradient(5))

    one, other = plots.svg(draw, name="a"), plots.svg(draw, name="a")
    assert one == other
    assert not re.search(r"<!--|<metadata|<\?xml|<!DOCTYPE|http|xlink|<text", one)
    assert all(found.startswith("a-") for found in re.findall(r'\bid="([^"]*)"', one))
    assert "#2a62a6" not in one and "var(--series-0)" in one


def test_text_given_by_users_cannot_break_a_drawing():
    hostile = "$\\frac{ <script> --> $"
    drawn = plots.svg(lambda ax: plots.curve(ax, {"s": [{"x": 1, "y": 2.0}]}, x=hostile, y="y"), name="b")
    assert "script" not in drawn


def test_drawing_leaves_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    plots.svg(lambda ax: plots.layer_bars(ax, localization()), name="c")
    assert dict(matplotlib.rcParams) == before


def test_drawing_needs_no_pyplot_and_importing_needs_no_matplotlib_or_torch():
    script = """
import sys
import memloc.plots, memloc.report
assert "matplotlib" not in sys.modules and "torch" not in sys.modules
memloc.plots.svg(lambda ax: memloc.plots.curve(ax, {"s": [{"x": 1, "y": 2.0}]}, x="x", y="y"), name="a")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
