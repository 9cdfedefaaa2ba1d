from __future__ import annotations

import json
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import DTYPES, FORMS, OUT, bits, build, contents, deltas_for, look

from editors.deltas import Dense
from editors.disk.shards import INDEX, SINGLE, open_weights, read_header
from editors.edit import Edit
from editors.shipping.checkpoint import MANIFEST, apply_edit, undo_edit
from memloc.errors import CheckpointError, MismatchError, TargetError
from memloc.provenance import Provenance, digest_raw, digest_tensor
from memloc.sites import OUTSIDE, Kind, Site

BY = Provenance("by hand")
QUERY = Site(0, Kind.ATTN_Q)


def make(folder, family="gpt2", dtype=torch.float32, *, shard: str | None = None, tied=True):
    model = build(family, dtype, tied=tied)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    return look(model)


def reloaded(folder, dtype):
    from transformers import AutoModelForCausalLM

    return bits(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family, shard", [("gpt2", None), ("neox", "5KB"), ("llama", "4KB")])
def test_the_folder_holds_the_edited_model_and_undo_every_original_byte(tmp_path, family, shard, dtype, form):
    view = make(tmp_path / "model", family, dtype, shard=shard)
    assert (tmp_path / "model" / INDEX).exists() == (shard is not None)
    original = contents(tmp_path / "model")
    rounding = "stochastic" if form == "dense" else "nearest"
    edit = Edit.of(view, deltas_for(view, OUT, QUERY, form=form), BY, rounding=rounding)
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")

    written = apply_edit(loaded, tmp_path / "model", tmp_path / "out")
    with edit.apply(view):
        assert reloaded(tmp_path / "out", dtype) == bits(view.model)
    assert dict(written.survived) == edit.survived
    changed = {name for name, data in contents(tmp_path / "out").items() if data != original.get(name)}
    touched = {open_weights(tmp_path / "model").entries[name].file for name in written.tensors}
    assert changed == touched | {MANIFEST}
    assert contents(tmp_path / "model") == original

    undo_edit(loaded, tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == original


def test_only_the_bytes_of_the_touched_tensor_change(tmp_path):
    view = make(tmp_path / "model")
    apply_edit(Edit.of(view, deltas_for(view, OUT), BY), tmp_path / "model", tmp_path / "out")
    old, new = (tmp_path / folder / SINGLE for folder in ("model", "out"))
    entry = read_header(old)["transformer.h.1.mlp.c_proj.weight"]
    assert (entry.start, entry.stop, entry.dtype) == (entry.start, entry.start + 4 * 15 * 22, "F32")
    before, after = old.read_bytes(), new.read_bytes()
    assert len(before) == len(after)
    assert before[: entry.start] + before[entry.stop :] == after[: entry.start] + after[entry.stop :]
    assert before[entry.start : entry.stop] != after[entry.start : entry.stop]


def test_headers_agree_with_the_safetensors_library(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.zeros(0, 4),
        "d": torch.tensor(2.0).half(),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    for name, entry in read_header(tmp_path / "x.safetensors").items():
        data = entry.read(tmp_path)
        assert entry.shape == tuple(tensors[name].shape)
        assert digest_raw(entry.dtype, entry.shape, memoryview(data)) == digest_tensor(tensors[name])


def test_files_of_the_hub_without_the_base_prefix_are_understood(tmp_path):
    view = make(tmp_path / "model")
    path = tmp_path / "model" / SINGLE
    bare = {name.removeprefix("transformer."): tensor.clone() for name, tensor in load_file(path).items()}
    save_file(bare, path, metadata={"format": "pt"})
    edit = Edit.of(view, deltas_for(view, OUT), BY)
    written = apply_edit(edit, tmp_path / "model", tmp_path / "out")
    assert list(written.tensors) == ["h.1.mlp.c_proj.weight"]
    with edit.apply(view):
        assert reloaded(tmp_path / "out", torch.float32) == bits(view.model)


def test_an_unembedding_under_its_other_name_is_found(tmp_path):
    view = make(tmp_path / "model", "neox", tied=False)
    names = set(open_weights(tmp_path / "model").entries)
    assert "embed_out.weight" in names
    site = Site(OUTSIDE, Kind.UNEMBED)
    edit = Edit.of(view, deltas_for(view, site), BY)
    apply_edit(edit, tmp_path / "model", tmp_path / "out")
    with edit.apply(view):
        assert reloaded(tmp_path / "out", torch.float32) == bits(view.model)


def test_a_name_that_two_tensors_could_have_is_refused(tmp_path):
    view = make(tmp_path / "model")
    path = tmp_path / "model" / SINGLE
    tensors = {
        f"{base}.{name}": part.clone() for name, part in load_file(path).items() for base in ("model", "backbone")
    }
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"could be backbone\.transformer.* or model\.transformer"):
        apply_edit(Edit.of(view, deltas_for(view, OUT), BY), tmp_path / "model", tmp_path / "out")


def test_other_files_are_carried_and_unedited_weights_are_not(tmp_path):
    folder = tmp_path / "model"
    view = make(folder)
    (folder / "README.md").write_text("hello")
    (folder / "modeling_own.py").write_text("print('never run')")
    (folder / "extra").mkdir()
    (folder / "extra" / "merges.txt").write_text("a b")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "pytorch_model.bin.index.json", "model.gguf"):
        (folder / name).write_bytes(b"old weights")
    (folder / "snapshots" / "step-1").mkdir(parents=True)
    (folder / "snapshots" / "step-1" / SINGLE).write_bytes(b"older weights")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    (folder / "elsewhere").symlink_to(tmp_path)
    written = apply_edit(Edit.of(view, deltas_for(view, OUT), BY), folder, tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {
        "config.json", "generation_config.json", SINGLE, MANIFEST, "README.md", "modeling_own.py", "extra/merges.txt",
    }  # fmt: skip
    assert set(written.dropped) == {
        "pytorch_model.bin", "consolidated.safetensors", "pytorch_model.bin.index.json", "model.gguf", "snapshots",
        ".cache", "elsewhere",
    }  # fmt: skip
    assert written.dropped["snapshots"] == "a folder with weights of its own"


def test_a_folder_of_links_is_copied_as_contents(tmp_path):
    """The hub's cache holds links into a store of blobs, which must not be written or shared."""
    view = make(tmp_path / "blobs")
    (tmp_path / "model").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    before = contents(tmp_path / "blobs")
    apply_edit(Edit.of(view, deltas_for(view, OUT), BY), tmp_path / "model", tmp_path / "out", link=True)
    assert contents(tmp_path / "blobs") == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_links_are_made_for_untouched_shards_only_and_only_on_request(tmp_path):
    view = make(tmp_path / "model", "neox", shard="5KB")
    before = contents(tmp_path / "model")
    edit = Edit.of(view, deltas_for(view, OUT), BY)
    plain = apply_edit(edit, tmp_path / "model", tmp_path / "plain")
    linked = apply_edit(edit, tmp_path / "model", tmp_path / "linked", link=True)
    weights = open_weights(tmp_path / "model")
    touched = {weights.entries[name].file for name in linked.tensors}
    assert plain.linked == ()
    assert set(linked.linked) == set(weights.files) - touched != set()
    for name in weights.files:
        same = (tmp_path / "model" / name).samefile(tmp_path / "linked" / name)
        assert same == (name not in touched)
    assert contents(tmp_path / "linked") == contents(tmp_path / "plain")
    assert contents(tmp_path / "model") == before


def test_the_manifest_tells_what_was_done_and_edits_stack(tmp_path):
    view = make(tmp_path / "0")
    first = Edit.of(view, deltas_for(view, OUT), BY)
    apply_edit(first, tmp_path / "0", tmp_path / "1")
    listed = json.loads((tmp_path / "1" / MANIFEST).read_text())["edits"]
    assert [entry["edit"] for entry in listed] == [first.digest]
    assert listed[0]["provenance"]["method"] == "by hand"
    assert listed[0]["survived"][str(OUT)]["asked"] == 330
    assert listed[0]["tensors"]["transformer.h.1.mlp.c_proj.weight"]["sites"] == [str(OUT)]
    with first.apply(view):
        second = Edit.of(view, deltas_for(view, OUT, QUERY, seed=4), BY)
    apply_edit(second, tmp_path / "1", tmp_path / "2")
    listed = json.loads((tmp_path / "2" / MANIFEST).read_text())["edits"]
    assert [entry["edit"] for entry in listed] == [first.digest, second.digest]
    with pytest.raises(MismatchError, match="undo what came after it first"):
        undo_edit(first, tmp_path / "2", tmp_path / "x")
    undo_edit(second, tmp_path / "2", tmp_path / "back1")
    assert contents(tmp_path / "back1") == contents(tmp_path / "1")
    undo_edit(first, tmp_path / "back1", tmp_path / "back0")
    assert contents(tmp_path / "back0") == contents(tmp_path / "0")


def test_applying_twice_elsewhere_or_over_something_is_refused(tmp_path):
    view = make(tmp_path / "model")
    edit = Edit.of(view, deltas_for(view, OUT), BY)
    apply_edit(edit, tmp_path / "model", tmp_path / "out")
    held = contents(tmp_path)
    with pytest.raises(MismatchError, match=r"L1\.mlp\.out: this edit is already applied to .*model\.safetensors"):
        apply_edit(edit, tmp_path / "out", tmp_path / "again")
    with pytest.raises(MismatchError, match=r"L1\.mlp\.out: this edit is not applied to"):
        undo_edit(edit, tmp_path / "model", tmp_path / "again")
    with pytest.raises(TargetError, match="not an empty folder"):
        apply_edit(edit, tmp_path / "model", tmp_path / "out")
    with pytest.raises(TargetError, match="not an empty folder"):
        apply_edit(edit, tmp_path / "model", tmp_path / "model")
    assert contents(tmp_path) == held
    build(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(
        MismatchError, match=r"L1\.mlp\.out: .* holds transformer\.h\.1\.mlp\.c_proj\.weight with digest"
    ):
        apply_edit(edit, tmp_path / "other", tmp_path / "again")
    build(dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    with pytest.raises(MismatchError, match="as BF16"):
        apply_edit(edit, tmp_path / "half", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_an_empty_folder_is_filled_and_one_inside_the_model_too(tmp_path):
    view = make(tmp_path / "model")
    (tmp_path / "out").mkdir()
    edit = Edit.of(view, deltas_for(view, OUT), BY)
    apply_edit(edit, tmp_path / "model", tmp_path / "out")
    apply_edit(edit, tmp_path / "model", tmp_path / "model" / "edited")
    assert contents(tmp_path / "out") == contents(tmp_path / "model" / "edited")


def test_a_sum_is_applied_from_its_file_and_not_undone_until_rebased(tmp_path):
    view = make(tmp_path / "model")
    both = Edit.of(view, deltas_for(view, OUT), BY) + Edit.of(view, deltas_for(view, OUT, seed=3), BY)
    apply_edit(both, tmp_path / "model", tmp_path / "out")
    with pytest.raises(MismatchError, match="no way back of its own"):
        undo_edit(both, tmp_path / "out", tmp_path / "back")
    undo_edit(both.rebased(view), tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "model")


@pytest.mark.parametrize("said", [True, None])
def test_an_embedding_that_the_folder_ties_is_refused(tmp_path, said):
    view = make(tmp_path / "model", tied=False)
    edit = Edit.of(view, {Site(OUTSIDE, Kind.EMBED): Dense(torch.ones(37, 15))}, BY)
    apply_edit(edit, tmp_path / "model", tmp_path / "fine")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config.pop("tie_word_embeddings")
    if said:
        config["tie_word_embeddings"] = True
    else:
        path = tmp_path / "model" / SINGLE
        save_file({name: part.clone() for name, part in load_file(path).items() if name != "lm_head.weight"}, path)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="also the other embedding, tied"):
        apply_edit(edit, tmp_path / "model", tmp_path / "out")


def test_no_model_library_is_needed(tmp_path):
    view = make(tmp_path / "model")
    Edit.of(view, deltas_for(view, OUT), BY).save(tmp_path / "e.safetensors")
    paths = [str(tmp_path / name) for name in ("e.safetensors", "model", "out")]
    code = (
        "import sys; from editors.edit import Edit; from editors.shipping.checkpoint import apply_edit; "
        "edit, *rest = sys.argv[1:]; "
        "apply_edit(Edit.load(edit), *rest); print('transformers' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
    assert (tmp_path / "out" / MANIFEST).exists()


def test_the_layout_is_the_published_one(tmp_path):
    """Pinned on bytes: length, header, tensors, nothing else."""
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.0, 2.0))
    entry = read_header(tmp_path / "a.safetensors")["a"]
    assert (entry.start, entry.stop, struct.unpack("<2f", entry.read(tmp_path))) == (62, 70, (1.0, 2.0))
