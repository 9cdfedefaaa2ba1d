"""`memloc sweep` on a lab model: tables and pictures, resumed and in parts, refused methods told."""

from __future__ import annotations

import csv
import json

import pytest

from editors.cli import main

PLAN = """
model = "{lab}"
[data]
targets = "{lab}/passages.jsonl#dose=96"
targets_limit = 4
controls = "{lab}/controls.jsonl"
held_out = "{lab}/corpus.jsonl#split=held-out"
prefix = 32
suffix = 32
[data.memorized]
others = "{lab}/passages.jsonl#dose=96"
[[localize]]
name = "activation"
[[localize]]
name = "prefix-perturbation"
alternatives = 1
[[edit]]
name = "neuron-dropout"
[budgets]
shares = [0.005, 0.05]
"""


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN)
    return tmp_path / "plan.toml"


def sweep(plan, lab, out, *more, capsys):
    code = main(["sweep", str(plan), "--with", f"lab={lab}", "--out", str(out), "--json", *more])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else said.err


def test_a_sweep_is_made_once_in_parts_and_told(plan, tiny_lab, tmp_path, capsys):
    out = tmp_path / "out"
    code, half = sweep(plan, tiny_lab, out, "--part", "1/2", "--no-plots", capsys=capsys)
    assert code == 0 and half["edits"] == half["wanted"] / 2
    made = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    code, whole = sweep(plan, tiny_lab, out, capsys=capsys)
    assert code == 0 and whole["edits"] == whole["wanted"] == 12
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    curves = {entry["where"]: entry for entry in whole["areas"]}
    assert 0 <= curves["activation"]["low"] <= curves["activation"]["area"] <= curves["activation"]["high"] <= 1
    assert curves["activation"]["random"] is not None and curves["activation"]["magnitude"] is not None
    # Scores of tokens name no weights: the sweep goes on and says why.
    assert curves["prefix-perturbation"]["area"] is None
    assert "names no set of weights" in curves["prefix-perturbation"]["refused"]["why"]
    rows = list(csv.DictReader((out / "edits.csv").read_text().splitlines()))
    assert len(rows) == 13 and float(rows[0]["memorized"]) == float(rows[0]["utility"]) == 1
    largest = max(rows[1:7], key=lambda row: float(row["budget"]))
    assert float(largest["weights"]) > 0 and float(largest["memorized"]) < 1
    assert (out / "plots" / "trade-off-1.png").stat().st_size > 5000


def test_a_sweep_of_what_is_not_recited_is_refused(plan, tiny_lab, tmp_path, capsys):
    plan.write_text(PLAN.replace('passages.jsonl#dose=96"\ntargets_limit', 'controls.jsonl"\ntargets_limit'))
    code, said = sweep(plan, tiny_lab, tmp_path / "out", capsys=capsys)
    assert code == 2 and "no target is recited by the model as it is" in said and not (tmp_path / "out").exists()
    code, said = sweep(plan, tiny_lab, tmp_path / "out", "--part", "3/2", capsys=capsys)
    assert code == 2


def test_the_edits_of_a_plan_are_told_without_a_model(plan, tmp_path, capsys):
    (tmp_path / "lab").mkdir()
    for name in ("passages", "controls", "corpus"):
        (tmp_path / "lab" / f"{name}.jsonl").write_text("{}\n")
    told = ["sweep", str(plan), "--with", f"lab={tmp_path / 'lab'}"]
    assert main([*told, "--cells", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 12
    assert main(told) == 2 and "--out FOLDER is needed" in capsys.readouterr().err
