"""Flags of the editors of facts: second moments from a file, blocks and token by measurement."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from editors.base import Request
from editors.edit import Edit
from editors.methods import EDITORS
from editors.rewriters.memit import Memit
from memloc.errors import MismatchError
from memloc.moments import Moments
from memloc.passages import Facts
from memloc.provenance import Provenance
from memloc.view import ModelView

pytestmark = pytest.mark.lab

QUICK = ["--steps", 2, "--namesakes", 0, "--recalls", 0, "--samples", 1, "--sentences", 4]
EXTRA = {"alphaedit": ["--layers", 1, "--threshold", 2.0], "rome": ["--layer", 1, "--token", "prompt-last"]}


@pytest.fixture
def collected(tiny_lab, command):
    """`memloc moments` on the lab's own text, written to m.safetensors."""
    text = f"{tiny_lab / 'corpus.jsonl'}#split=held-out"
    code, _, err = command("moments", "--model", tiny_lab, "--text", text, "--tokens", 600, "--out", "m.safetensors")
    assert code == 0, err
    return Path("m.safetensors")


def edit(command, name, model, moment, *rest, facts, out="e.safetensors"):
    more = EXTRA.get(name, ["--layers", 1])
    words = ["edit", name, "--model", model, "--facts", facts, "--moment", moment, *QUICK, *more, *rest]
    return command(*words, "--out", out)


@pytest.fixture
def facts(tiny_lab):
    """The first fact of the lab, and the second."""
    ids = [json.loads(line)["id"] for line in (tiny_lab / "facts.jsonl").read_text().splitlines()[:2]]
    return [f"{tiny_lab / 'facts.jsonl'}#id={name}" for name in ids]


@pytest.mark.parametrize("name", ["memit", "emmet", "alphaedit", "pmet", "rome"])
def test_every_editor_of_facts_takes_the_file(name, tiny_lab, command, collected, facts):
    code, _, err = edit(command, name, tiny_lab, collected, facts=facts[0])
    assert code == 0, err
    made, digest = Edit.load("e.safetensors"), Moments.load(collected).digest
    assert made.provenance.inputs["moment"] == made.provenance.settings["moment"] == digest
    view = ModelView.open(tiny_lab)
    asked = Facts.read(tiny_lab / "facts.jsonl", view.tokenizer)[:1]
    settings = {key: value for key, value in made.provenance.settings.items() if key != "moment"}
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    again = EDITORS[name](**settings, moment=Moments.load(collected))(view, Request(facts=asked))
    for site, delta in made.deltas.items():
        torch.testing.assert_close(again.deltas[site].dense(), delta.dense(), rtol=0, atol=0)


def test_a_file_that_is_none_is_one_line(tiny_lab, command, collected, facts):
    Path("cut.safetensors").write_bytes(collected.read_bytes()[:5000])
    command(
        "localize", "random", "--model", tiny_lab, "--passages", tiny_lab / "passages.jsonl", "--out", "l.safetensors"
    )
    for path, said in [("none.safetensors", "no such file"), ("cut.safetensors", "cut.safetensors"),
                       ("l.safetensors", "l.safetensors")]:  # fmt: skip
        for name in ("memit", "rome"):
            code, out, err = edit(command, name, tiny_lab, path, facts=facts[0])
            assert (code, out, err.count("\n")) == (2, "", 1) and said in err, err
    assert not Path("e.safetensors").exists()


def test_a_layer_that_was_not_collected_is_named(tiny_lab, command, facts):
    text = f"{tiny_lab / 'corpus.jsonl'}#split=held-out"
    command("moments", "--model", tiny_lab, "--text", text, "--tokens", 600, "--layers", 0, "--out", "m.safetensors")
    code, _, err = edit(command, "memit", tiny_lab, "m.safetensors", facts=facts[0])
    assert (code, err.count("\n")) == (2, 1) and "no second moment of L1.mlp.out; there are those of L0.mlp.out" in err


def test_moments_of_another_model_are_refused_but_for_the_edits_it_holds(tiny_lab, command, collected, facts):
    """An edited checkpoint is another model; told which edit it holds, its moments before that edit will do."""
    assert edit(command, "memit", tiny_lab, collected, facts=facts[0])[0] == 0
    assert command("apply", "e.safetensors", "--model", tiny_lab, "--out", "edited")[0] == 0
    for name in ("memit", "rome"):
        code, out, err = edit(command, name, Path("edited"), collected, facts=facts[1], out="next.safetensors")
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert f"{name}: m.safetensors was collected on another model (" in err
    past = ["--past", "e.safetensors"]
    code, _, err = edit(command, "memit", Path("edited"), collected, *past, facts=facts[1], out="next.safetensors")
    assert code == 0, err


def test_python_refuses_them_too_unless_they_name_no_model(tiny_lab, collected):
    view = ModelView.open(tiny_lab)
    request = Request(facts=Facts.read(tiny_lab / "facts.jsonl", view.tokenizer)[:1])
    editor = Memit(layers=(1,), steps=2, namesakes=0, recalls=0, samples=1, sentences=4)
    mine = Moments.load(collected)
    theirs = replace(mine, provenance=Provenance("moments", {}, None, {"model": "f" * 64, "text": "x"}))
    with pytest.raises(MismatchError, match=r"^memit: the second moment given was collected on another model \(ffff"):
        replace(editor, moment=theirs)(view, request)
    made_elsewhere = replace(mine, provenance=Provenance("by hand"))
    one, other = (replace(editor, moment=given)(view, request) for given in (mine, made_elsewhere))
    assert one.digest == other.digest


def test_blocks_and_token_are_measured_by_flags(tiny_lab, command, collected, facts):
    rest = ["--measured", "--token", "measured", "--trials", 1, "--json"]
    words = ["edit", "memit", "--model", tiny_lab, "--facts", facts[0], "--moment", collected, *QUICK, *rest]
    code, out, err = command(*words, "--out", "e.safetensors")
    assert code == 0, err
    notes = Edit.load("e.safetensors").notes
    assert {(row["token"], tuple(row["layers"])) for row in notes["tried"]} == {
        (token, layers) for token in ("prompt-last", "subject-last") for layers in ((0, 1), (1,), (0,))
    }
    assert sorted(json.loads(out)["edit"]["sites"]) == [f"L{layer}.mlp.out" for layer in notes["chosen"]["layers"]]
    code, out, err = command(*words, "--layers", 1, "--out", "other.safetensors")
    assert (code, out, err.count("\n")) == (2, "", 1) and "layers are (1,) and are to be measured" in err
