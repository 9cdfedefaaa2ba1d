"""`memloc moments`: printed, saved, interrupted, in shards, in two processes, and taken by an editor."""

from __future__ import annotations

import json

import pytest
import torch
from test_processes import torchrun

from editors.base import Request
from editors.cli import main
from editors.rewriters.rome import Rome
from memloc import progress
from memloc.errors import InputError
from memloc.moments import Moments
from memloc.passages import Facts, read_jsonl
from memloc.sites import Kind, Site
from memloc.verbs.moments import layers_named
from memloc.view import ModelView


@pytest.fixture(scope="module")
def text(tiny_lab, tmp_path_factory):
    """Enough of the lab's text for one run, for all of it takes a second to read."""
    rows = [json.dumps(row) for _, row in read_jsonl(tiny_lab / "corpus.jsonl") if row["split"] == "train"]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(rows[:60]))
    return path


@pytest.fixture
def command(tiny_lab, text, tmp_path):
    """The words of a run on the lab; `out` is where it writes."""

    def command(*rest, out="m.safetensors"):
        given = ["--model", tiny_lab, "--text", text, "--out", tmp_path / out, *rest]
        return [str(word) for word in ("moments", *given)]

    return command


def same(one, other):
    assert (one.count, one.split.count) == (other.count, other.split.count)
    for site, entry in one.sums.items():
        torch.testing.assert_close(other.sums[site], entry, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.split.first[site], one.split.first[site], rtol=1e-5, atol=1e-5)


def test_one_run_sums_judges_shrinks_and_saves(command, tmp_path, capsys):
    assert main(command("--json", "--layers", "0")) == 0
    said = json.loads(capsys.readouterr().out)
    found = Moments.load(tmp_path / "m.safetensors")
    site = Site(0, Kind.MLP_OUT)
    assert list(found.sums) == [site]
    assert 10 * 256 <= found.count < 10 * 256 + 64
    row = said["sites"][str(site)]
    assert row["tokens"] == found.count and row["width"] == 256
    assert found.shrinkage[site] == pytest.approx(row["shrinkage"])
    assert 0 < row["excess"] < 5 and row["enough"] == (row["excess"] <= 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_the_table_says_what_is_missing(command, capsys):
    assert main(command("--tokens", "300")) == 0
    said = capsys.readouterr().out
    assert "L0.mlp.out" in said and "L1.mlp.out" in said
    assert "∞" in said  # fewer tokens than neurons
    assert "not enough everywhere: raise --multiplier, or give more text" in said


def test_facts_are_judged_by_their_own_keys(command, tiny_lab, capsys):
    rows = []
    for rest in ([], ["--facts", str(tiny_lab / "facts.jsonl")]):
        assert main(command("--json", "--layers", "0", *rest)) == 0
        rows.append(json.loads(capsys.readouterr().out)["sites"]["L0.mlp.out"])
    assert [row["probes"] for row in rows] == [32, 16]
    assert rows[0]["excess"] != rows[1]["excess"]
    assert rows[0]["shrinkage"] == rows[1]["shrinkage"]


def test_shares_can_be_chosen_and_halves_left_out(command, tmp_path, capsys):
    main(command("--shrink", "none", out="plain.safetensors"))
    main(command("--shrink", "0.5", "--no-halves", out="half.safetensors"))
    capsys.readouterr()
    plain, half = (Moments.load(tmp_path / f"{name}.safetensors") for name in ("plain", "half"))
    site = Site(0, Kind.MLP_OUT)
    assert (plain.shrinkage, half.split, half.shrinkage[site]) == ({}, None, 0.5)
    flat = torch.eye(256, dtype=torch.float64) * plain.mean(site).diagonal().mean()
    torch.testing.assert_close(half.mean(site), 0.5 * plain.mean(site) + 0.5 * flat, rtol=1e-5, atol=1e-5)


def test_shards_merge_to_what_one_run_makes(command, tmp_path, capsys):
    for number in (1, 2):
        assert main(command("--shard", f"{number}/2", out=f"{number}.safetensors")) == 0
    parts = [str(tmp_path / f"{number}.safetensors") for number in (1, 2)]
    assert main(["merge", *parts, "--out", str(tmp_path / "both.safetensors")]) == 0
    assert main(command(out="one.safetensors")) == 0
    both, one = (Moments.load(tmp_path / f"{name}.safetensors") for name in ("both", "one"))
    same(both, one)
    assert both.shrinkage == pytest.approx(one.shrinkage, rel=1e-4)
    capsys.readouterr()
    assert main(["merge", parts[0], parts[0], "--out", str(tmp_path / "no.safetensors")]) == 2
    assert "would count twice" in capsys.readouterr().err


def test_an_interrupted_run_says_so_and_goes_on(command, tmp_path, capsys, monkeypatch):
    from memloc import moment_pass

    words = ["--batch-tokens", "512"]
    main(command(*words, out="whole.safetensors"))
    quick = moment_pass.MomentPass.__init__
    monkeypatch.setattr(moment_pass.MomentPass, "__init__", lambda self, **given: quick(self, every=0, **given))

    def stop(label, done, total, note):
        if done == 2 and label == "second moments":
            raise KeyboardInterrupt

    monkeypatch.setattr("memloc.command.progress_shown", lambda: progress.listening(stop))
    assert main(command(*words)) == 130
    assert "what is summed so far is kept in" in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()
    monkeypatch.undo()
    assert main(command(*words)) == 0
    same(*(Moments.load(tmp_path / name) for name in ("m.safetensors", "whole.safetensors")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "whole.safetensors"]


def test_a_cache_is_read_by_the_next_run_whatever_its_out(command, tmp_path, capsys, monkeypatch):
    cache = ["--cache", str(tmp_path / "cache")]
    assert main(command(*cache)) == 0
    monkeypatch.setattr(ModelView, "hidden", lambda *_: pytest.fail("ran again"))
    assert main(command(*cache, "--shrink", "none", out="again.safetensors")) == 0
    same(*(Moments.load(tmp_path / name) for name in ("m.safetensors", "again.safetensors")))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    capsys.readouterr()


@pytest.mark.xdist_group("processes")
def test_two_processes_make_what_one_makes(command, tmp_path, capsys):
    done = torchrun("-m", "editors.cli", *command("--json", out="two.safetensors"))
    assert done.returncode == 0, done.stderr
    assert main(command("--json", out="one.safetensors")) == 0
    assert done.stdout.count('"tokens"') == capsys.readouterr().out.count('"tokens"')
    two, one = (Moments.load(tmp_path / f"{name}.safetensors") for name in ("two", "one"))
    same(two, one)
    assert two.provenance == one.provenance
    for site in one.sums:
        torch.testing.assert_close(two.split.probes[site], one.split.probes[site], rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


def test_an_editor_takes_the_file_and_its_shrinkage(command, tiny_lab, tmp_path, capsys):
    main(command())
    main(command("--shrink", "0.9", out="other.safetensors"))
    capsys.readouterr()
    view = ModelView.open(tiny_lab)
    facts = Facts.read(tiny_lab / "facts.jsonl", view.tokenizer)[:1]
    paths = [str(tmp_path / name) for name in ("m.safetensors", "other.safetensors")]
    settings = {"layer": 1, "token": "subject-last", "steps": 3, "namesakes": 0, "recalls": 0, "samples": 1}
    one, other = (Rome(moment=path, **settings)(view, Request(facts=facts)) for path in paths)
    digests = [edit.provenance.inputs["moment"] for edit in (one, other)]
    assert digests == [Moments.load(path).digest for path in paths]
    assert one.digest != other.digest


WRONG = {
    "text": (["--layers", "0-9"], "--layers 0-9: the model has layers 0 to 1"),
    "order": (["--layers", "first"], "--layers first: expected numbers such as 4-8 or 0,3,5"),
    "kinds": (["--kinds", "embed"], "this model's blocks have no embed"),
    "gate": (["--kinds", "mlp.gate"], "this model's blocks have no mlp.gate"),
    "shrink": (["--shrink", "much"], "--shrink much: expected auto, none, or a number from 0 to 1"),
    "share": (["--shrink", "1.5"], "--shrink 1.5: expected auto, none"),
    "multiplier": (["--multiplier", "0"], "multiplier is 0.0, expected above 0"),
    "shard": (["--shard", "3/2"], "--shard 3/2: expected NUMBER/COUNT"),
    "empty": (["--tokens", "1", "--shard", "1/2"], "shard 1/2 of 1 passages is empty"),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_flags_are_one_line_and_nothing_is_written(command, tmp_path, capsys, what):
    rest, said = WRONG[what]
    assert main(command(*rest)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_no_text_is_one_line(tiny_lab, tmp_path, capsys):
    assert main(["moments", "--model", str(tiny_lab), "--out", str(tmp_path / "m.safetensors")]) == 2
    assert "--text FILE is needed here" in capsys.readouterr().err


def test_layers_are_named_by_number_and_range():
    assert layers_named(None, 3) == (0, 1, 2)
    assert layers_named("4-6,1", 9) == (1, 4, 5, 6)
    with pytest.raises(InputError, match="--layers 2-1: the model has layers 0 to 8"):
        layers_named("2-1", 9)
