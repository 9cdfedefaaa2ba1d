"""Whatever goes wrong, one line says so, the target is absent, the source is as it was."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import OUT, build, contents, deltas_for, look

from editors.disk.shards import INDEX, SINGLE, read_header
from editors.edit import Edit
from editors.shipping import checkpoint
from editors.shipping.checkpoint import MANIFEST, apply_edit, undo_edit
from memloc.errors import CheckpointError, MemlocError, TargetError
from memloc.provenance import Provenance

NAME = "transformer.h.1.mlp.c_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A single-file folder, a sharded one, and an edit for both."""
    base = tmp_path_factory.mktemp("good")
    model = build()
    model.save_pretrained(base / "single")
    model.save_pretrained(base / "sharded", max_shard_size="5KB")
    view = look(model)
    Edit.of(view, deltas_for(view, OUT), Provenance("by hand")).save(base / "edit.safetensors")
    return base


@pytest.fixture
def here(good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    return tmp_path


def edit_of(here: Path) -> Edit:
    return Edit.load(here / "edit.safetensors")


def refuse(here: Path, folder: str, said: str, error: type[MemlocError] = CheckpointError) -> None:
    before = contents(here)
    with pytest.raises(error, match=said) as caught:
        apply_edit(edit_of(here), here / folder, here / "out")
    assert "\n" not in str(caught.value)
    assert contents(here) == before
    assert not (here / "out").exists()
    assert not list(here.glob(".*.part"))


def test_the_good_folders_are_good(here):
    """The control of everything below."""
    for folder in ("single", "sharded"):
        apply_edit(edit_of(here), here / folder, here / f"out-{folder}")


def test_missing_folder_file_for_a_folder_and_no_weights(here):
    refuse(here, "absent", "absent: no such folder")
    refuse(here, "edit.safetensors", "is a file; name the checkpoint's folder")
    (here / "single" / SINGLE).unlink()
    refuse(here, "single", "holds neither model.safetensors nor")


def test_a_folder_of_pickles_is_not_opened(here):
    (here / "single" / SINGLE).unlink()
    (here / "single" / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    refuse(here, "single", r"only pickles \(pytorch_model.bin\), which can run code; convert to safetensors")


@pytest.mark.parametrize("keep", [0, 3, 8, 200, -1])
def test_truncated_weights(here, keep):
    path = here / "single" / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    refuse(here, "single", "cut off")


def raw(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


TWICE = b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)


@pytest.mark.parametrize(
    "content, said",
    [
        (raw(b"{nonsense"), "not the JSON"),
        (raw(b"[1]"), "not the JSON object"),
        (raw(b"[" * 200_000), "not the JSON"),
        (raw(b"\xff\xfe"), "not the JSON"),
        (struct.pack("<Q", 1 << 62) + b"{}", "cut off or not safetensors"),
        (raw(TWICE, bytes(8)), "stands twice"),
        (raw(json.dumps({"a": 3}).encode()), "cannot be right"),
        (raw(json.dumps({"a": entry(dtype="F33")}).encode(), bytes(8)), "'F33' is not known"),
        (raw(json.dumps({"a": entry(dtype=["F32"])}).encode(), bytes(8)), "cannot be right"),
        (raw(json.dumps({"a": entry(shape=(3,))}).encode(), bytes(8)), r"takes 12 bytes, its range has 8"),
        (raw(json.dumps({"a": entry(shape=(-2,))}).encode(), bytes(8)), "whole numbers"),
        (raw(json.dumps({"a": entry(shape=(True, 2))}).encode(), bytes(8)), "whole numbers"),
        (raw(json.dumps({"a": entry(offsets=(8, 0))}).encode(), bytes(8)), "cannot be right"),
        (raw(json.dumps({"a": entry(more=1)}).encode(), bytes(8)), "expected dtype, shape and data_offsets"),
        (raw(json.dumps({"a": entry(), "b": entry(offsets=(4, 12))}).encode(), bytes(12)), "the header lies"),
        (raw(json.dumps({"a": entry(), "b": entry(offsets=(12, 20))}).encode(), bytes(20)), "the header lies"),
        (raw(json.dumps({"a": entry()}).encode(), bytes(9)), "cut off or padded"),
        (raw(json.dumps({"a": entry(shape=(1 << 60,), offsets=(0, 1 << 62))}).encode(), bytes(8)), "cut off"),
    ],
)
def test_a_header_that_lies(here, content, said):
    (here / "single" / SINGLE).write_bytes(content)
    refuse(here, "single", said)


def index_of(here: Path) -> dict:
    return json.loads((here / "sharded" / INDEX).read_text())


@pytest.mark.parametrize(
    "shard", ["../single/model.safetensors", "/etc/passwd", "..", "a/b.safetensors", "a\\b", "x\0y"]
)
def test_an_index_that_leaves_its_folder(here, shard):
    index = index_of(here)
    index["weight_map"][NAME] = shard
    (here / "sharded" / INDEX).write_text(json.dumps(index))
    refuse(here, "sharded", "outside its folder; nothing was read or written")


def test_an_index_that_disagrees_with_the_shards(here):
    index = index_of(here)
    path = here / "sharded" / INDEX
    shard = index["weight_map"].pop(NAME)
    path.write_text(json.dumps(index))
    refuse(here, "sharded", f"holds {NAME}, which the index puts in None")
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], NAME: shard, "ghost": shard}}))
    refuse(here, "sharded", "puts ghost in .*, which does not hold it")
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], NAME: "absent.safetensors"}}))
    refuse(here, "sharded", "names absent.safetensors, which is not there")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', '{"weight_map": [1]}']
)
def test_an_empty_or_malformed_index(here, text):
    (here / "sharded" / INDEX).write_text(text)
    refuse(here, "sharded", "index.json.*(not the JSON|no weight_map)")


def test_a_missing_shard(here):
    sorted((here / "sharded").glob("*.safetensors"))[0].unlink()
    refuse(here, "sharded", "which is not there")


def test_a_tensor_that_is_not_there(here):
    path = here / "single" / SINGLE
    save_file({name: part.clone() for name, part in load_file(path).items() if name != NAME}, path)
    refuse(here, "single", f"{NAME} is in none of its weight files")


def test_values_that_are_not_finite_in_a_touched_tensor(here):
    path = here / "single" / SINGLE
    tensors = {name: part.clone() for name, part in load_file(path).items()}
    tensors[NAME][0, 0] = float("nan")
    save_file(tensors, path)
    refuse(here, "single", f"{NAME} holds values that are not finite")


def test_a_quantised_tensor(here):
    path = here / "single" / SINGLE
    tensors = {name: part.clone() for name, part in load_file(path).items()}
    tensors[NAME] = tensors[NAME].to(torch.int8)
    save_file(tensors, path)
    refuse(here, "single", f"holds {NAME} as I8, quantised")


@pytest.mark.parametrize("text", ["", "{}", '{"edits": 3}', '{"edits": [{}]}', "[]"])
def test_a_manifest_that_is_not_ours(here, text):
    (here / "single" / MANIFEST).write_text(text)
    refuse(here, "single", f"{MANIFEST} cannot be read")


@pytest.mark.parametrize("place", ["_copy", "_put"])
@pytest.mark.parametrize("folder", ["single", "sharded"])
def test_a_full_disk_leaves_nothing(here, monkeypatch, place, folder):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, place, full)
    refuse(here, folder, "out cannot be written: the disk is full; nothing was changed", TargetError)


@pytest.mark.parametrize("place", ["_copy", "_put", "record_of"])
def test_an_interrupt_leaves_nothing(here, monkeypatch, place):
    before = contents(here)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, place, stop)
    with pytest.raises(KeyboardInterrupt):
        apply_edit(edit_of(here), here / "single", here / "out")
    assert contents(here) == before
    assert not list(here.glob("*out*"))
    assert not list(here.glob(".*"))


def test_a_full_disk_while_undoing_leaves_nothing(here, monkeypatch):
    apply_edit(edit_of(here), here / "single", here / "edited")
    before = contents(here)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_put", full)
    with pytest.raises(TargetError, match="the disk is full"):
        undo_edit(edit_of(here), here / "edited", here / "out")
    assert contents(here) == before
    assert not (here / "out").exists()


def test_a_real_limit_of_the_system_stops_a_copy_and_leaves_nothing(here):
    """No stand-in: the process may not write files beyond 4 KiB, the kernel refuses the copy."""
    code = (
        "import sys; from editors.edit import Edit; from editors.shipping.checkpoint import apply_edit; "
        "from memloc.errors import TargetError\n"
        "try: apply_edit(Edit.load(sys.argv[1]), *sys.argv[2:])\n"
        "except TargetError as error: print(error)"
    )

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    before = contents(here)
    names = [str(here / name) for name in ("edit.safetensors", "single", "out")]
    found = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=True, preexec_fn=limit
    )
    assert "out cannot be written: File too large; nothing was changed" in found.stdout
    assert contents(here) == before
    assert not list(here.glob("*out*"))
    assert not list(here.glob(".*"))


@pytest.mark.parametrize("missing", [("_clone",), ("_clone", "_copy_in_kernel")])
def test_a_file_system_without_cloning_still_copies(here, monkeypatch, missing):
    def unable(*args):
        raise OSError(errno.EOPNOTSUPP, "not here")

    apply_edit(edit_of(here), here / "single", here / "usual")
    for name in missing:
        monkeypatch.setattr(checkpoint, name, unable)
    apply_edit(edit_of(here), here / "single", here / "plain")
    assert contents(here / "usual") == contents(here / "plain")


def test_a_copy_that_stops_short_is_done_again(here, monkeypatch):
    """Some file systems answer a copy in the kernel with nothing."""
    monkeypatch.setattr(checkpoint, "_clone", lambda old, new: os.write(new, b"junk"))
    monkeypatch.setattr(checkpoint, "_copy_in_kernel", lambda old, new: None)
    apply_edit(edit_of(here), here / "single", here / "out")
    assert read_header(here / "out" / SINGLE) == read_header(here / "single" / SINGLE)
