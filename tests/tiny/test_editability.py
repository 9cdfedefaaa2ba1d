"""The Hase check: known answers where scores and edits are written by hand; sweeps of real edits on the lab."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import zoo

from editors.base import Request
from editors.cli import main
from editors.facts.editability import correlation, explained, layer_scores, predict
from editors.facts.layer_choice import Sweep, sweep, usual_layer, usual_layers
from editors.rewriters.rome import Rome
from editors.rewriters.sparse_fine_tune import SparseFineTune
from memloc.errors import InputError, MismatchError
from memloc.measures.facts import FactRecall
from memloc.moments import Moments, second_moments
from memloc.passages import Facts, Passages
from memloc.provenance import Provenance
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView

FACTS, LAYERS = 9, 5


def located(scores, grain=Grain.LAYER, method="by-hand"):
    scores = torch.as_tensor(scores, dtype=torch.float32)
    table = {Site(layer, Kind.MLP_OUT): scores[:, layer] for layer in range(scores.shape[1])}
    return Localization(grain, table, Provenance(method), tuple(f"f{row}" for row in range(len(scores))))


def swept(rewrites):
    rows = tuple(tuple({"rewrite": float(value)} for value in row) for row in rewrites)
    return Sweep(tuple(f"f{row}" for row in range(len(rewrites))), tuple(range(len(rewrites[0]))), rows)


@pytest.fixture
def noise():
    rng = np.random.default_rng(3)
    return rng.normal(size=(FACTS, LAYERS)), rng.normal(size=(FACTS, LAYERS)), rng.normal(size=LAYERS)


def test_variance_explained_is_that_of_a_least_squares_fit_with_a_constant_a_layer(noise):
    scores, edits, _ = noise
    layers = np.tile(np.eye(LAYERS), (FACTS, 1))
    total = ((edits - edits.mean()) ** 2).sum()
    expected = []
    for columns in (layers, np.column_stack([layers, scores.ravel()])):
        fit = columns @ np.linalg.lstsq(columns, edits.ravel(), rcond=None)[0]
        expected.append(1 - ((edits.ravel() - fit) ** 2).sum() / total)
    assert explained(scores, edits) == pytest.approx(tuple(expected), rel=1e-10)


def test_scores_that_say_which_fact_can_be_edited_where_are_found(noise):
    scores, other, layer = noise
    told = predict(swept(scores + 0.3 * other + layer), located(scores), draws=300)
    assert told.gain > 0.3
    assert told.p < 0.01
    assert told.within > 0.5
    assert told.gain_interval[0] > 0.1
    assert told.chance < 0.1


def test_scores_that_know_the_layer_only_tell_nothing_more(noise):
    """Hase's case: score and edit both follow the layer, so they correlate, and the score adds nothing."""
    scores, other, layer = noise
    layer = 5 * layer
    told = predict(swept(other + layer), located(scores + layer), draws=300)
    assert told.pooled > 0.8 and told.within > 0.8
    assert told.layer > 0.8
    assert told.gain < 0.05
    assert told.p > 0.05


def test_chance_is_the_gain_of_facts_that_swap_their_scores(noise):
    scores, other, _ = noise
    told = predict(swept(other), located(scores), draws=400)
    rng = np.random.default_rng(11)
    gains = [np.diff(explained(scores[rng.permutation(FACTS)], other))[0] for _ in range(400)]
    assert told.chance == pytest.approx(np.mean(gains), rel=0.25)


def test_the_best_layer_is_counted_with_ties_and_beside_a_random_one():
    edits = [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    scores = [[9, 0, 0, 0], [9, 0, 0, 0], [0, 0, 0, 9]]
    told = predict(swept(edits), located(scores), draws=10)
    assert told.best == pytest.approx(2 / 3)
    assert told.best_chance == pytest.approx(4 / 12)


def test_what_does_not_vary_correlates_with_nothing():
    flat = np.ones((3, 4))
    assert correlation(flat[0], np.arange(4.0)) is None
    assert explained(flat, flat) == (1.0, 1.0)
    assert explained(flat, np.arange(12.0).reshape(3, 4))[1] <= 1
    told = predict(swept(flat), located(flat), draws=5)
    assert (told.within, told.pooled, told.gain) == (None, None, 0)


def test_scores_of_any_grain_become_scores_of_layers():
    raw = torch.arange(24.0).view(2, 3, 4) - 11
    sites = {Site(layer, Kind.MLP_OUT): raw[:, layer] for layer in range(3)}
    names = ("f0", "f1")
    neurons = Localization(Grain.NEURON, sites, Provenance("n"), names)
    assert layer_scores(neurons, names, (0, 2)).tolist() == [
        [float(raw[fact, layer].abs().sum()) for layer in (0, 2)] for fact in range(2)
    ]
    both = {**sites, Site(1, Kind.ATTN_OUT): torch.full((2, 4), 50.0)}
    positions = Localization(Grain.POSITION, both, Provenance("p"), names, lengths=(4, 4))
    assert layer_scores(positions, ("f1", "f0"), (0, 1)).tolist() == [[float(raw[1, 0].max()), 50.0],
                                                                      [float(raw[0, 0].max()), 50.0]]  # fmt: skip
    parts = {Site(1, kind): torch.tensor([-3.0, 2.0]) for kind in (Kind.MLP_OUT, Kind.ATTN_OUT)}
    components = Localization(Grain.COMPONENT, parts, Provenance("c"), names)
    assert layer_scores(components, names, (1,)).tolist() == [[-6.0], [4.0]]


def test_what_does_not_belong_together_is_one_line(noise):
    scores, edits, _ = noise
    table = swept(edits)
    with pytest.raises(MismatchError, match="by-hand holds no fact 'f5'; localize with these facts"):
        predict(table, located(scores[:5]))
    with pytest.raises(InputError, match="by-hand: one score for all facts"):
        predict(table, located(scores).mean())
    with pytest.raises(InputError, match="by-hand scores nothing in layer 4"):
        predict(table, located(scores[:, :4]))
    with pytest.raises(InputError, match="9 facts at 1 layers correlate with nothing"):
        predict(swept(edits[:, :1]), located(scores))
    with pytest.raises(InputError, match="no 'paraphrase accuracy' of every fact; there are rewrite"):
        predict(table, located(scores), figure="paraphrase accuracy")


# -- layers by depth --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "layers", "usual", "last"), [
    ("gpt2", 48, 16, 17), ("gpt2", 24, 8, 8), ("llama", 32, 5, 8), ("gpt_neox", 44, 15, 15), ("gpt2", 1, 0, 0),
])  # fmt: skip
def test_the_usual_layers_are_those_of_the_papers_by_relative_depth(family, layers, usual, last):
    """GPT-2 XL is edited at 17 of 48; a third of the way is 16. All others are met."""
    changes = {"n_layer": layers} if family == "gpt2" else {"num_hidden_layers": layers}
    view = ModelView.open(zoo.build(family, **changes), prove=False)
    assert usual_layer(view) == usual
    assert usual_layers(view) == tuple(range(max(0, last - 4), last + 1))
    with pytest.raises(InputError, match="0 layers to spread"):
        usual_layers(view, 0)


# -- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tiny_lab):
    view = ModelView.open(tiny_lab)
    text = Passages.from_texts(["the quick brown fox " * 40, "a lazy dog sleeps " * 40], view.tokenizer, window=24)
    editor = Rome(token="subject-last", steps=4, namesakes=0, recalls=0, samples=1, damping=0.05,
                  moment=second_moments(view, text, view.sites(Kind.MLP_OUT)))  # fmt: skip
    return view, Facts.read(tiny_lab / "facts.jsonl", view.tokenizer)[:2], editor


def test_a_sweep_edits_each_fact_alone_at_each_layer_and_leaves_the_model(lab):
    view, facts, editor = lab
    digest = view.digest
    found = sweep(view, facts, editor, Request())
    assert view.digest == digest
    assert (found.facts, found.layers) == (facts.ids, (0, 1))
    (before,) = FactRecall()(view, facts[1:2]).rows
    made = Rome(**{**vars(editor), "layer": 1})(view, Request(facts=facts[1:2]))
    with made.apply(view):
        (after,) = FactRecall()(view, facts[1:2]).rows
    p0, p = (np.exp(-row["nll_new"] * len(facts[1].target)) for row in (before, after))
    assert found.rows[1][1]["rewrite"] == pytest.approx((p - p0) / (1 - p0), rel=1e-6)
    assert found.means("rewrite")[1] == pytest.approx((found.rows[0][1]["rewrite"] + found.rows[1][1]["rewrite"]) / 2)
    assert found.best(["rewrite"]) == max((0, 1), key=lambda layer: found.means("rewrite")[layer])


def test_an_interrupted_sweep_goes_on_where_it_was(lab, tmp_path, monkeypatch):
    view, facts, editor = lab
    whole = sweep(view, facts, editor, Request())
    calls = []
    real = Rome.__call__

    def counted(self, view, request):
        calls.append(self.layer)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, view, request)

    monkeypatch.setattr(Rome, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep(view, facts, editor, Request(), folder=tmp_path)
    assert sweep(view, facts, editor, Request(), folder=tmp_path) == whole
    assert len(calls) == 5  # two, the one that was stopped, and the two that were left
    sweep(view, facts, Rome(**{**vars(editor), "steps": 3}), Request(), [0], folder=tmp_path)
    assert len(calls) == 7  # other settings are other edits


def test_the_best_layer_weighs_all_figures_and_prefers_the_lower_of_equals():
    cells = [{"rewrite": 1.0, "neighbour accuracy": 0.1}, {"rewrite": 0.9, "neighbour accuracy": 0.9},
             {"rewrite": 0.9, "neighbour accuracy": 0.9}]  # fmt: skip
    found = Sweep(("a",), (2, 4, 6), (tuple(cells),))
    assert found.best() == 4
    assert found.best(["rewrite"]) == 2


def test_editors_without_a_layer_and_empty_sweeps_are_refused(lab):
    view, facts, editor = lab
    with pytest.raises(InputError, match="SparseFineTune has no setting `layer`"):
        sweep(view, facts, SparseFineTune(), Request())
    with pytest.raises(InputError, match="a sweep of 0 facts over 2 layers"):
        sweep(view, facts[:0], editor, Request())


def test_the_command_prints_writes_and_goes_on(lab, tiny_lab, tmp_path, capsys):
    view, facts, editor = lab
    located([[0.1, 0.2], [0.3, 0.1]], method="one").save(tmp_path / "other.safetensors")
    scores = located([[0.1, 0.2], [0.3, 0.1]], method="one")
    named = Localization(Grain.LAYER, scores.scores, scores.provenance, facts.ids)
    named.save(tmp_path / "one.safetensors")
    assert isinstance(editor.moment, Moments)
    editor.moment.save(tmp_path / "moments.safetensors")
    chosen = f"{tiny_lab}/facts.jsonl#id={','.join(facts.ids)}"
    rome = [
        "--token",
        "subject-last",
        "--steps",
        "4",
        "--namesakes",
        "0",
        "--recalls",
        "0",
        "--samples",
        "1",
        "--damping",
        "0.05",
        "--draws",
        "50",
    ]
    data = ["--model", tiny_lab, "--facts", chosen, "--moments", tmp_path / "moments.safetensors"]
    given = [*data, *rome, "--out", tmp_path / "out"]
    words = ["editability", "rome", *map(str, given), "--localizations"]
    assert main([*words, str(tmp_path / "one.safetensors"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    whole = sweep(view, facts, editor, Request())
    assert said["facts"][facts.ids[0]][1]["rewrite"] == pytest.approx(whole.rows[0][1]["rewrite"], rel=1e-4, abs=1e-6)
    (row,) = said["predictions"]
    assert row["name"] == "one" and row["facts"] == 2 and 0 <= row["layer"] <= row["both"] <= 1
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"edits", "editability.html", "editability.json", "editability.md"}
    assert "Hase et al. 2023" in (tmp_path / "out" / "editability.md").read_text()
    assert main([*words, str(tmp_path / "other.safetensors")]) == 2
    assert "holds no fact" in capsys.readouterr().err
