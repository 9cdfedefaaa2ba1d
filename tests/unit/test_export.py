"""Checkpoints with their card; edits stacked on files and taken out again; the verb."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from small_models import OUT, bits, build, contents, delta_for, look
from transformers import AutoModelForCausalLM, GenerationConfig

from editors.cli import main
from editors.edit import Edit
from editors.shipping import model_card
from editors.shipping.checkpoint import MANIFEST, apply_edit, undo_edit
from editors.shipping.export import export_checkpoint
from memloc.errors import ArtifactError, CheckpointError, MismatchError
from memloc.provenance import Provenance
from memloc.sites import Kind, Site
from memloc.view import ModelView

BY = Provenance("by hand", {"strength": 2, "note": "a|b <i>"}, 7, {"passages": "c0ffee"})
QUERY, VALUE, IN = Site(0, Kind.ATTN_Q), Site(0, Kind.ATTN_V), Site(0, Kind.MLP_IN)
OWN = "---\nlicense: mit\n---\n# Mine\n\nNo line of this may change, and it ends without a newline"


def edit_of(view, site, seed=0):
    return Edit.of(view, {site: delta_for(tuple(view.weight(site).shape), "low-rank", seed=seed)}, BY)


@pytest.fixture
def folder(tmp_path):
    model = build("neox")
    model.save_pretrained(tmp_path / "model", max_shard_size="5KB")
    GenerationConfig(max_new_tokens=3).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "custom_code.py").write_text("# kept, never run")
    return tmp_path / "model"


def chain(folder, sites, base="model"):
    """Edits of `sites`, each made for the folder the one before gave; folders and edits in order."""
    folders, edits = [folder], []
    for number, site in enumerate(sites):
        edits.append(edit_of(look(AutoModelForCausalLM.from_pretrained(folders[-1])), site, seed=number))
        folders.append(folder.parent / f"{base}-{number}")
        export_checkpoint(edits[-1], folders[-2], folders[-1])
    return folders, edits


def test_three_edits_of_one_weight_come_out_in_reverse_and_in_no_other_order(folder):
    (folder / "README.md").write_text(OWN)
    folders, edits = chain(folder, [OUT, OUT, OUT])
    last = folders[-1]
    for early in edits[:2]:
        with pytest.raises(MismatchError, match="undo what came after it first; nothing was changed"):
            undo_edit(early, last, folder.parent / "never")
    for number in (2, 1, 0):
        back = folder.parent / f"back-{number}"
        undo_edit(edits[number], last, back)
        assert contents(back) == contents(folders[number])
        last = back
    assert contents(last) == contents(folder)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_three_edits_of_different_weights_come_out_in_any_order(folder, order):
    folders, edits = chain(folder, [OUT, IN, QUERY])
    last, left = folders[-1], [edit.digest for edit in edits]
    for step, number in enumerate(order):
        back = folder.parent / f"back-{step}"
        undo_edit(edits[number], last, back)
        left.remove(edits[number].digest)
        record = back / MANIFEST
        assert ([entry["edit"] for entry in json.loads(record.read_text())["edits"]] if left else []) == left
        assert record.exists() == bool(left)
        last = back
    assert contents(last) == contents(folder)


def test_rows_of_one_fused_matrix_are_one_stored_tensor_and_come_out_in_reverse(folder):
    """Query and value share no row, but the digest that makes undoing safe is of the whole stored matrix."""
    folders, edits = chain(folder, [QUERY, VALUE])
    with pytest.raises(MismatchError, match="undo what came after it first"):
        undo_edit(edits[0], folders[-1], folder.parent / "never")
    undo_edit(edits[1], folders[-1], folder.parent / "one")
    undo_edit(edits[0], folder.parent / "one", folder.parent / "none")
    assert contents(folder.parent / "none") == contents(folder)


def test_a_sum_gives_in_one_step_what_the_parts_give_in_two_where_they_are_apart(folder):
    view = look(AutoModelForCausalLM.from_pretrained(folder))
    first, second = edit_of(view, OUT), edit_of(view, IN, seed=1)
    apply_edit(first + second, folder, folder.parent / "sum")
    apply_edit(first, folder, folder.parent / "one")
    apply_edit(second, folder.parent / "one", folder.parent / "two")
    loaded = [bits(AutoModelForCausalLM.from_pretrained(folder.parent / name)) for name in ("sum", "two")]
    assert loaded[0] == loaded[1]
    undo_edit((first + second).rebased(view), folder.parent / "sum", folder.parent / "back")
    assert contents(folder.parent / "back") == contents(folder)


def test_the_card_tells_what_was_done_and_leaves_the_owner_s_words(folder):
    (folder / "README.md").write_text(OWN)
    folders, edits = chain(folder, [OUT, IN])
    card = (folders[2] / "README.md").read_text()
    assert card.startswith(OWN + "\n\n" + model_card.BEGIN) and card.count(model_card.BEGIN) == 1
    for edit in edits:
        assert f"`{edit.digest}`" in card
    assert "2 edits, in this order" in card and "### 2. by hand" in card and "c0ffee" in card
    assert "a&#124;b &lt;i>" in card  # no cell and no tag is made of a setting
    for touched in edits[0].touched.values():
        assert touched.before[:12] in card and touched.after[:12] in card
    assert "gpt_neox.layers.1.mlp.dense_4h_to_h.weight" in card


def test_a_folder_without_a_card_gets_one_and_loses_it_with_the_edit(folder):
    folders, edits = chain(folder, [OUT])
    card = (folders[1] / "README.md").read_text()
    assert card.startswith("---\n# ") and 'base_model: "model"' in card
    undo_edit(edits[0], folders[1], folder.parent / "back")
    assert contents(folder.parent / "back") == contents(folder)


def test_applying_without_a_card_writes_none_but_keeps_one_true(folder):
    folders, edits = chain(folder, [OUT])
    view = look(AutoModelForCausalLM.from_pretrained(folder))
    apply_edit(edits[0], folder, folder.parent / "plain")
    assert not (folder.parent / "plain" / "README.md").exists()
    apply_edit(edit_of(view, IN), folders[1], folder.parent / "both")
    assert "2 edits" in (folder.parent / "both" / "README.md").read_text()


@pytest.mark.parametrize("card", [model_card.BEGIN, model_card.END, 2 * f"{model_card.BEGIN}\n{model_card.END}"])
def test_a_card_whose_marks_are_broken_is_refused(folder, card):
    (folder / "README.md").write_text(card)
    edit = edit_of(look(AutoModelForCausalLM.from_pretrained(folder)), OUT)
    with pytest.raises(CheckpointError, match="marks stand alone or twice; mend the card; nothing was written"):
        export_checkpoint(edit, folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()


def test_the_written_folder_is_a_checkpoint_like_any_other(folder):
    """What lm-eval and vLLM open: config, tokenizer, generation settings, an index that agrees with its shards."""
    folders, edits = chain(folder, [OUT])
    out = folders[1]
    assert {"config.json", "generation_config.json", "tokenizer.json", "custom_code.py"} <= set(contents(out))
    assert contents(out)["model.safetensors.index.json"] == contents(folder)["model.safetensors.index.json"]
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and loaded.generation_config.max_new_tokens == 3
    view = look(AutoModelForCausalLM.from_pretrained(folder))
    with edits[0].apply(view):
        assert bits(loaded) == bits(view.model)


REPORT = {
    "comparisons": [
        {
            "name": "forget", "headline": ["strict rate"],
            "figures": [
                {"name": "strict rate", "unit": "share", "before": {"value": 0.75, "n": 12},
                 "after": {"value": 0.0625, "n": 12}, "random": None},
                {"name": "not shown", "unit": "nats", "before": {"value": 1.5}, "after": None, "random": None},
            ],
        }
    ]
}  # fmt: skip


def test_the_verb_writes_both_and_shows_the_evidence_of_a_report(folder, tmp_path, capsys):
    view = ModelView.open(folder)
    edit_of(view, OUT).save(tmp_path / "edit.safetensors")
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    for form, more in (("adapter", ["--dtype", "bfloat16"]), ("checkpoint", ["--link"])):
        words = ["export", str(tmp_path / "edit.safetensors"), "--as", form, "--model", str(folder), *more]
        words += ["--out", str(tmp_path / form), "--report", str(tmp_path / "report.json")]
        assert main([*words, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["folder"] == str(tmp_path / form)
        card = (tmp_path / form / "README.md").read_text()
        assert "| forget: strict rate (share) | 0.75 | 0.0625 |  | 12 |" in card and "not shown" not in card
    found = Edit.from_adapter(view, tmp_path / "adapter").deltas[OUT].dense()
    wanted = Edit.load(tmp_path / "edit.safetensors").deltas[OUT].dense()
    torch.testing.assert_close(found, wanted, rtol=0, atol=2**-7 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    "words, said",
    [
        (["--as", "adapter", "--link"], "--link means nothing --as adapter"),
        (["--as", "checkpoint", "--rank", "3"], "--rank means nothing --as checkpoint"),
        (["--as", "adapter", "--report", "EDIT"], "is no report.json of memloc"),
    ],
)
def test_the_verb_refuses_in_one_line(folder, tmp_path, capsys, words, said):
    path = tmp_path / "edit.safetensors"
    edit_of(look(AutoModelForCausalLM.from_pretrained(folder)), OUT).save(path)
    words = [str(path) if word == "EDIT" else word for word in words]
    capsys.readouterr()
    assert main(["export", str(path), *words, "--model", str(folder), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_evidence_is_read_from_reports_only(tmp_path):
    with pytest.raises(ArtifactError, match=r"is no report\.json"):
        model_card.evidence(tmp_path / "absent.json")
