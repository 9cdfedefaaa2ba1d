"""The table method × world: trials are kept and resumed, failures are told, intervals know what a group is."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import zoo

from editors.cli import main
from memloc.errors import InputError
from memloc.methods import LOCALIZERS
from memloc.scores import selected
from memloc.sites import Grain, Kind
from memloc.truth import entrants, trials
from memloc.truth.table import Table, interval
from memloc.truth.worlds import Ground, Known, oracle
from memloc.view import ModelView

METHODS = ("value-norm", "activation", "random")


@dataclass(frozen=True, kw_only=True)
class Small:
    """Two known answers on a random model; neurons 3 and 5 of layer 1 are called gold."""

    broken: bool = False
    share: float = 0.1
    headline: str = "recall@1/ceiling"

    def names(self, ground):
        return ("a", "b")

    def make(self, ground, name):
        if self.broken:
            raise InputError(f"{name}: cannot be made")
        view = ModelView.open(zoo.build("gpt2", seed=ground.seed))
        sites = view.sites(Kind.MLP_OUT)
        gold = selected({sites[1]: [3, 5]}, dict.fromkeys(sites, view.neurons), Grain.NEURON)
        return Known(name, view, zoo.passages(2), gold=gold, notes={"loss": 0.5, "check": {"holds": name == "a"}})


@pytest.fixture
def calls(monkeypatch):
    """How often each method was run."""
    found: Counter[str] = Counter()
    real = trials.judge

    def judge(known, name, changes):
        found[name] += 1
        return real(known, name, changes)

    monkeypatch.setattr(trials, "judge", judge)
    return found


def run(out, methods=METHODS, seeds=2, **changes):
    grounds = [Ground("zoo", seed=seed) for seed in range(seeds)]
    return trials.run({"small": Small(**changes)}, grounds, methods, out)


def test_a_finished_table_is_read_and_nothing_is_run_again(tmp_path, calls):
    first = run(tmp_path)
    assert calls == {name: 4 for name in METHODS} and len(first.trials) == 12
    assert run(tmp_path) == first and sum(calls.values()) == 12
    run(tmp_path, methods=(*METHODS, "key-norm"))
    assert sum(calls.values()) == 16 and calls["key-norm"] == 4


@pytest.mark.parametrize("broken_at", [1, 4, 9])
def test_an_interrupt_loses_the_trial_it_hits_and_no_other(broken_at, tmp_path, calls, monkeypatch):
    whole = run(tmp_path / "whole")
    calls.clear()
    counted = trials.judge

    def interrupted(known, name, changes):
        if sum(calls.values()) == broken_at:
            raise KeyboardInterrupt
        return counted(known, name, changes)

    monkeypatch.setattr(trials, "judge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.setattr(trials, "judge", counted)
    rest = run(tmp_path / "cut")
    assert sum(calls.values()) == 12
    assert [(trial.known, trial.method, trial.figures) for trial in rest.trials] == [
        (trial.known, trial.method, trial.figures) for trial in whole.trials
    ]


def test_other_settings_other_models_and_a_rewritten_method_are_judged_anew(tmp_path, calls, monkeypatch):
    run(tmp_path, methods=("random",))
    run(tmp_path, methods=("random",), share=0.2)
    assert calls["random"] == 8
    trials.run({"small": Small()}, [Ground("zoo")], ("random",), tmp_path, settings={"random": {"seed": 4}})
    trials.run({"small": Small()}, [Ground("zoo", unknown=zoo.passages(2))], ("random",), tmp_path)
    assert calls["random"] == 12
    monkeypatch.setattr(trials, "source_digest", lambda name: "rewritten")
    run(tmp_path, methods=("random",))
    assert calls["random"] == 16
    monkeypatch.setattr(trials, "_code", lambda: "rewritten")
    run(tmp_path, methods=("random",))
    assert calls["random"] == 20


def test_a_trial_cut_short_on_disk_is_judged_again(tmp_path, calls):
    run(tmp_path, methods=("random",))
    path = next(iter(sorted((tmp_path / "trials").rglob("random-*.json"))))
    path.write_text(path.read_text()[:20])
    run(tmp_path, methods=("random",))
    assert calls["random"] == 5


def test_a_method_that_cannot_score_neurons_says_so_and_is_run_once(tmp_path, calls):
    found = run(tmp_path, methods=("prefix-perturbation", "layer-rewind", "random"))
    told = {trial.method: trial.failed for trial in found.trials}
    assert told["prefix-perturbation"] == "prefix-perturbation scores positions, and no neurons"
    assert told["layer-rewind"] == "layer-rewind scores places of layer, component, and no neurons"
    assert calls["prefix-perturbation"] == 1 and told["random"] == ""
    table = Table.of(found, {"small": "recall@1/ceiling"})
    assert next(row.method for row in table.ranked("small")) == "random"
    assert ["prefix-perturbation", "small", told["prefix-perturbation"]] in table.failures()


def test_an_error_nobody_raised_on_purpose_is_told_and_tried_again(tmp_path, calls, monkeypatch):
    def bad(*_, **__):
        raise ZeroDivisionError("of\n something")

    monkeypatch.setattr(entrants.ValueNorm, "__call__", bad)
    failed = [trial for trial in run(tmp_path).trials if trial.method == "value-norm"]
    assert {trial.failed for trial in failed} == {"ZeroDivisionError: of something"} and all(t.crashed for t in failed)
    monkeypatch.undo()
    assert not any(trial.failed for trial in run(tmp_path).trials)


def test_a_known_answer_that_cannot_be_made_fails_for_every_method(tmp_path):
    found = run(tmp_path, broken=True, seeds=1)
    assert {trial.failed for trial in found.trials} == {"a: cannot be made", "b: cannot be made"}
    table = Table.of(found, {"small": "recall@1/ceiling"})
    assert "2 of 2 could not be made: a: cannot be made" in table.remarks("small")
    assert table.rows[0].n == 0 and table.rows[0].failures == 2


def test_what_a_trial_took_is_counted(tmp_path):
    found = {trial.method: trial for trial in run(tmp_path, seeds=1, methods=("random", "activation")).trials}
    tokens = 3 * sum(len(row) for row in [item.ids for item in zoo.passages(2)])
    assert found["random"].forward == 0 and tokens <= found["activation"].forward <= 1.3 * tokens
    assert found["activation"].backward == 0 and found["activation"].seconds > 0


def test_an_entrant_scores_the_grain_that_is_asked_for():
    assert entrants.entrant("weight-gradient", Grain.HEAD, {}).grain == "head"
    assert entrants.entrant("random", Grain.NEURON, {"seed": 3}).seed == 3
    assert entrants.entrant("logit-lens", Grain.NEURON, {}).mode == "attribution"
    with pytest.raises(InputError, match="random has no setting 'rows'; it has grain, kinds, seed"):
        entrants.entrant("random", Grain.NEURON, {"rows": 3})
    with pytest.raises(InputError, match="no localizer called 'zero'"):
        entrants.entrant("zero", Grain.NEURON, {})
    assert set(LOCALIZERS) <= set(entrants.every_name()) and "value-norm" in entrants.every_name()
    assert all(name in entrants.every_name() or name in ("outlier-set", "curvature") for name in entrants.CONTRAST)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_baselines_are_norms_of_weights(family, view_of):
    view = view_of(family)
    values, keys = entrants.ValueNorm()(view, zoo.passages(1)), entrants.KeyNorm()(view, zoo.passages(1))
    heads = entrants.ValueNorm(grain="head")(view, zoo.passages(1))
    for layer, site in enumerate(view.sites(Kind.MLP_OUT)):
        weight = view.weight(site).detach()
        assert float(values.scores[site][5]) == pytest.approx(float(weight[:, 5].norm()), rel=1e-5)
        into = [view.weight(dataclasses.replace(site, kind=kind)).detach()[5] for kind in (Kind.MLP_GATE, Kind.MLP_IN)
                if kind in view.kinds]  # fmt: skip
        assert float(keys.scores[site][5]) == pytest.approx(float(torch.cat(into).norm()), rel=1e-5)
        out = view.sites(Kind.ATTN_OUT)[layer]
        part = view.weight(out).detach()[:, view.head_width : 2 * view.head_width]
        assert float(heads.scores[out][1]) == pytest.approx(float(part.norm()), rel=1e-5)


def test_intervals_resample_models_before_answers():
    """Values that differ between models only are as uncertain as few models are."""
    between = interval([0.0] * 20 + [0.5] * 20 + [1.0] * 20, ["a"] * 20 + ["b"] * 20 + ["c"] * 20)
    plain = interval([0.0] * 20 + [0.5] * 20 + [1.0] * 20, ["a"] * 60)
    assert between.value == plain.value == 0.5
    assert between.high - between.low > 2 * (plain.high - plain.low) > 0
    within = interval([0.0, 0.5, 1.0] * 20, ["a"] * 30 + ["b"] * 30)
    assert within.high - within.low < 0.5
    assert interval([1.0] * 4, [0, 0, 1, 1], rate=True).low < 0.6 and interval([1.0] * 4, [0, 0, 1, 1]).low == 1
    assert str(interval([0.25], [0])) == "0.25"


def test_the_table_is_written_as_csv_markdown_and_json(tmp_path):
    found = run(tmp_path)
    table = Table.of(found, {"small": "recall@1/ceiling"})
    table.write(tmp_path)
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text(encoding="utf8").splitlines()))
    recalls = {row["method"]: row for row in rows if row["figure"] == "recall@1"}
    assert set(recalls) == set(METHODS) and all(float(row["low"]) <= float(row["mean"]) for row in recalls.values())
    markdown = (tmp_path / "table.md").read_text(encoding="utf8")
    assert "| method | small: recall@1/ceiling | CPU s |" in markdown and "check: holds in 2 of 4" in markdown
    read = json.loads((tmp_path / "table.json").read_text(encoding="utf8"))
    assert read["kind"] == "truth" and len(read["rows"]) == 3
    mean = sum(trial.figures["recall@1"] for trial in found.trials if trial.method == "activation") / 4
    assert float(recalls["activation"]["mean"]) == pytest.approx(mean)
    assert "loss: median 0.5, 0.5 to 0.5" in table.remarks("small")


def test_a_perfect_method_stands_at_one():
    known = Small().make(Ground("zoo"), "a")
    assert known.judge(known, oracle(known.gold))["recall@1/ceiling"] == 1


# -- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--worlds", "planet"], "no world called 'planet'; did you mean 'planted'?"),
        (["--methods", "activations"], "no localizer called 'activations'; did you mean 'activation'?"),
        (["--worlds", ","], "--worlds ',': expected names with commas between"),
        (["--seeds", "0"], "--seeds 0: expected at least 1"),
        (["--setting", "random=3"], "--setting 'random=3': expected METHOD.FIELD=VALUE"),
        (["--setting", "slimming.steps=3", "--methods", "random"], "with a method that is judged"),
        (["--worlds", "inj", "--sequences", "0"], "expected at least 1, 1, 2"),
        (["--worlds", "inj"], "needs a trained model"),
        (["--model", "nowhere/here"], "nowhere/here"),
        (["--model", "one", "--lab", "tiny"], "give one"),
    ],
)
def test_what_cannot_be_judged_is_told_in_one_line(flags, line, tmp_path, capsys):
    worlds = [] if "--worlds" in flags or "--model" in flags else ["--worlds", "planted"]
    assert main(["truth", *flags, *worlds, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert line in said.err and said.err.count("\n") == 1 and said.out == ""


def test_results_that_cannot_be_written_are_told_before_anything_is_judged(tmp_path, capsys, calls):
    (tmp_path / "file").write_text("here")
    assert main(["truth", "--worlds", "planted", "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err and not calls


def test_two_folders_of_one_name_are_two_models(tmp_path, view_of):
    for seed, part in enumerate(("one", "two")):
        zoo.build("gpt2", seed=seed).save_pretrained(tmp_path / part / "model")
    models = [str(tmp_path / part / "model") for part in ("one", "two")]
    flags = ["--source", "random", "--tokens", "9", "--sequences", "1", "--methods", "random", "--seeds", "1"]
    assert main(["truth", "--worlds", "inj", "--model", *models, *flags, "--out", str(tmp_path / "out")]) == 0
    table = json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf8"))
    assert len({(known["ground"], known["known"]) for known in table["known"]}) == 2
    assert {row["n"] for row in table["rows"]} == {2}


def test_one_command_prints_the_table(tmp_path, capsys):
    flags = ["--worlds", "planted", "--seeds", "2", "--methods", "random,activation", "--setting", "random.seed=7"]
    assert main(["truth", *flags, "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["activation"]["figures"]["hit@1"]["mean"] == 1 and rows["activation"]["n"] == 10
    assert 0.7 < rows["activation"]["figures"]["hit@1"]["low"] < 1
    assert rows["random"]["figures"]["hit@1"]["mean"] < 0.4
    assert main(["truth", *flags, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "planted: hit@1" in said and "planted: chance: hit@1 0.003" in said
