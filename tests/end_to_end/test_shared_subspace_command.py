"""`memloc shared-subspace` on a lab model: figures, files, resumed splits, and what it refuses."""

from __future__ import annotations

import json

import pytest

from editors.cli import main
from editors.methods import EDITORS, PRUNERS
from editors.pruners.durable import Durable


@pytest.fixture
def ask(tiny_lab, tmp_path, capsys):
    """Run the verb on the tiny lab; returns (exit code, JSON result or message)."""

    def run(*words, passages="passages.jsonl#dose=96", controls="controls.jsonl", out=tmp_path / "out"):
        data = ["--passages", f"{tiny_lab}/{passages}", "--controls", f"{tiny_lab}/{controls}"]
        code = main(["shared-subspace", *words, "--model", str(tiny_lab), *data, "--out", str(out), "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else said.err

    return run


def test_masks_of_halves_and_of_controls_are_compared_and_told(ask, tiny_lab, tmp_path):
    held_out = f"{tiny_lab}/corpus.jsonl#split=held-out"
    words = ["durable", "--share", "0.2", "--among", "model", "--half", "3", "--splits", "2", "--held-out", held_out]
    code, found = ask(*words)
    assert code == 0 and len(found["splits"]) == 2 and found["half"] == 3
    for row in found["splits"]:
        assert 0 < row["chance"] < row["halves"] < 1 and row["before"] == 1
        assert row["pruned"] == row["pruned_controls"] > 0
        assert row["harm_halves"] > row["harm_before"]
    mean = found["mean"]["halves"]
    assert mean == pytest.approx(sum(row["halves"] for row in found["splits"]) / 2)
    others = ("chance", "controls", "between_controls")
    assert found["overlaps"] is all(row["halves"] > max(row[name] for name in others) for row in found["splits"])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"splits", "shared-subspace.html", "shared-subspace.json", "shared-subspace.md"}
    written = (tmp_path / "out" / "shared-subspace.md").read_text()
    assert "Chavhan et al. 2024" in written and "Nothing was measured" not in written
    assert found["splits"][0] == json.loads((tmp_path / "out" / "shared-subspace.json").read_text())[
        "provenance"]["split 1"]  # fmt: skip


def test_the_same_masks_for_all_passages_share_no_more_than_controls(ask):
    """Magnitude looks at no passage: halves overlap wholly, and so does everything; that must not count as sharing."""
    code, found = ask("magnitude", "--share", "0.3", "--splits", "1")
    assert code == 0 and found["mean"]["halves"] == found["mean"]["controls"] == 1
    assert found["overlaps"] is False and not found["transfers"]


def test_finished_splits_are_read_and_other_settings_are_other_splits(ask, tmp_path, monkeypatch):
    words = ["durable", "--share", "0.1", "--half", "2", "--figure", "exact memorization"]
    calls, real = [], Durable.__call__

    def counted(self, view, request):
        calls.append(request.forget.ids)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, view, request)

    monkeypatch.setattr(Durable, "__call__", counted)
    code, _ = ask(*words, "--splits", "2")
    assert code == 130 and len(list((tmp_path / "out" / "splits").iterdir())) == 1
    assert not (tmp_path / "out" / "shared-subspace.json").exists()
    code, whole = ask(*words, "--splits", "2")
    assert code == 0 and len(calls) == 6 + 4
    assert ask(*words, "--splits", "2") == (0, whole) and len(calls) == 10
    assert all(len(set(rows)) == 2 for rows in calls) and not set(calls[0]) & set(calls[1])
    code, _ = ask(*words, "--splits", "1", "--seed", "1")
    assert code == 0 and len(calls) == 14


def test_a_localizer_says_where_each_half_may_be_pruned(ask):
    words = ["magnitude", "--share", "1", "--localizer", "activation", "--splits", "1", "--half", "3"]
    code, found = ask(*words, "--fraction", "0.1")
    assert code == 0 and found["pruner"] == "magnitude where activation points"
    (row,) = found["splits"]
    assert row["pruned"] == row["pruned_controls"] and row["halves"] > row["chance"]
    assert ask(*words)[0] == 2


@pytest.mark.parametrize(("words", "files", "message"), [
    (["durable", "--half", "9"], {}, "8 passages; two halves of 9 need 18"),
    (["durable", "--splits", "0"], {}, "0 splits of halves of None: expected at least 1"),
    (["durable"], {"passages": "controls.jsonl", "controls": "passages.jsonl"}, "before anything is pruned; name some"),
    (["durable"], {"controls": "passages.jsonl#dose=96"}, "the same text; masks would overlap"),
    (["durable", "--fraction", "0.1"], {}, "chooses from what a --localizer finds"),
    (["durable", "--localizer", "activation"], {}, "--localizer needs --fraction or --count"),
    (["durable", "--localizer", "activatio"], {}, "no localizer called 'activatio'; did you mean 'activation'"),
    (["svd"], {}, "of low rank and picks no weights"),
    (["rome"], {}, "no pruner called 'rome'"),
])  # fmt: skip
def test_what_cannot_be_asked_is_one_line_and_leaves_no_report(ask, tmp_path, words, files, message):
    code, said = ask(*words, **files)
    assert code == 2 and message in said and said.count("\n") == 1
    assert not [path for path in tmp_path.glob("out/**/*") if path.is_file()]


def test_a_folder_that_is_a_file_and_missing_data_are_told_before_the_model_is_opened(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    words = ["shared-subspace", "durable", "--model", "nowhere", "--out", str(tmp_path / "taken")]
    assert main(words) == 2 and "needs --passages FILE" in capsys.readouterr().err
    assert main([*words, "--passages", "a", "--controls", "b"]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


def test_pruners_are_the_editors_that_only_take_away():
    assert {"durable", "obs", "subspace"} < set(PRUNERS) < set(EDITORS) and "memit" not in PRUNERS
