"""Sharded folders that are not what their index or the edit says: one line, nothing written; as for whole folders."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import OUT, build, contents, deltas_for, look
from transformers import AutoModelForCausalLM

from editors.disk import shards
from editors.disk.shards import INDEX
from editors.edit import Edit
from editors.shipping.export import export_adapter, export_checkpoint
from memloc.errors import CheckpointError, MemlocError, MismatchError
from memloc.provenance import Provenance

NAME = "transformer.h.1.mlp.c_proj.weight"
FORMS = pytest.mark.parametrize("export", [export_adapter, export_checkpoint], ids=["adapter", "checkpoint"])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    base = tmp_path_factory.mktemp("good")
    model = build()
    model.save_pretrained(base / "model", max_shard_size="5KB")
    view = look(model)
    Edit.of(view, deltas_for(view, OUT), Provenance("by hand")).save(base / "edit.safetensors")
    return base


@pytest.fixture
def here(good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    return tmp_path


def shard_of(here, name):
    return here / "model" / json.loads((here / "model" / INDEX).read_text())["weight_map"][name]


def refuse(export, here, said, error: type[MemlocError] = CheckpointError):
    before = contents(here)
    with pytest.raises(error, match=said) as caught:
        export(Edit.load(here / "edit.safetensors"), here / "model", here / "out")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert contents(here) == before and not (here / "out").exists() and not list(here.glob(".*.part"))


@FORMS
def test_the_good_folder_is_good(here, export):
    """The control of everything below."""
    export(Edit.load(here / "edit.safetensors"), here / "model", here / "out")


@FORMS
def test_a_truncated_shard(here, export):
    path = shard_of(here, NAME)
    path.write_bytes(path.read_bytes()[:-1])
    refuse(export, here, r"-of-.*\.safetensors has .* bytes, its header speaks of .*; it is cut off or padded")


@FORMS
def test_a_shard_that_is_not_there_although_the_edit_does_not_touch_it(here, export):
    path = next(path for path in sorted((here / "model").glob("*.safetensors")) if path != shard_of(here, NAME))
    path.unlink()
    refuse(export, here, f"names {path.name}, which is not there")


@FORMS
def test_a_tensor_in_two_shards(here, export):
    other = next(path for path in sorted((here / "model").glob("*.safetensors")) if path != shard_of(here, NAME))
    save_file({**load_file(other), NAME: torch.zeros(3)}, other)
    refuse(export, here, f"{other.name} holds {NAME}, which the index puts in {shard_of(here, NAME).name}")


@FORMS
def test_an_index_in_which_a_name_stands_twice(here, export):
    text = (here / "model" / INDEX).read_text()
    shard = shard_of(here, NAME).name
    (here / "model" / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{NAME}": "{shard}",', 1))
    refuse(export, here, "a key stands twice")


@FORMS
def test_a_shard_name_that_leaves_the_folder(here, export):
    index = json.loads((here / "model" / INDEX).read_text())
    index["weight_map"][NAME] = "../model/" + index["weight_map"][NAME]
    (here / "model" / INDEX).write_text(json.dumps(index))
    refuse(export, here, "outside its folder; nothing was read or written")


@FORMS
def test_a_header_and_an_index_too_large_to_be_honest(here, export, monkeypatch):
    path = shard_of(here, NAME)
    data = path.read_bytes()
    with path.open("wb") as file:  # a hole of 200 MB that claims to be a header
        file.write((200_000_000 - 8).to_bytes(8, "little"))
        file.truncate(200_000_000)
    refuse(export, here, "is cut off or not safetensors: 200000000 bytes, header of 199999992")
    path.write_bytes(data)
    monkeypatch.setattr(shards, "HEADER_LIMIT", 5_000)
    (here / "model" / INDEX).write_text((here / "model" / INDEX).read_text() + " " * 5_000)
    refuse(export, here, "index.json has .* bytes, more than an index can need")


@FORMS
@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "BF16"), (torch.float64, "F64")])
def test_a_folder_in_another_dtype(here, export, dtype, name):
    model = AutoModelForCausalLM.from_pretrained(here / "model", dtype=dtype)
    shutil.rmtree(here / "model")
    model.save_pretrained(here / "model", max_shard_size="5KB")
    refuse(export, here, rf"L1.mlp.out: .* as {name} \[22, 15\], the edit was made for F32 \[22, 15\]", MismatchError)


@FORMS
def test_a_folder_that_holds_the_edit_already(here, export):
    export_checkpoint(Edit.load(here / "edit.safetensors"), here / "model", here / "edited")
    shutil.rmtree(here / "model")
    (here / "edited").rename(here / "model")
    # The edit was bound to the folder's weights by its own run, so the digest after it is known.
    refuse(export, here, "this edit is already applied to .*; nothing was changed", MismatchError)
