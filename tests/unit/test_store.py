import errno
import json

import pytest
import torch

from memloc import store
from memloc.errors import ArtifactError, TargetError


def test_an_artifact_survives_the_disk(tmp_path):
    tensors = {"a": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), "b": torch.arange(7)}
    store.save(tmp_path / "x", "thing", tensors, {"deep": {"list": [1, None, "é"]}})
    found, header = store.load(tmp_path / "x", "thing")
    assert header["deep"] == {"list": [1, None, "é"]}
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_equal_content_gives_equal_bytes(tmp_path):
    for name in ("x", "y"):
        store.save(tmp_path / name, "thing", {"a": torch.ones(3)}, {"p": 1, "q": 2})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_another_kind_is_refused(tmp_path):
    store.save(tmp_path / "x", "edit", {"a": torch.ones(1)}, {})
    with pytest.raises(ArtifactError, match="holds edit, expected localization"):
        store.load(tmp_path / "x", "localization")


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store, "FORMAT_VERSION", 99)
        store.save(tmp_path / "x", "edit", {"a": torch.ones(1)}, {})
    with pytest.raises(ArtifactError, match="format 99"):
        store.load(tmp_path / "x", "edit")


@pytest.mark.parametrize("keep", [0, 5, 40, -4])
def test_a_cut_file_is_refused_in_one_line(tmp_path, keep):
    store.save(tmp_path / "x", "edit", {"a": torch.ones(100)}, {})
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:keep])
    with pytest.raises(ArtifactError) as caught:
        store.load(tmp_path / "x", "edit")
    assert "\n" not in str(caught.value)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "x")
    with pytest.raises(ArtifactError, match="not written by memloc"):
        store.header_of(tmp_path / "x")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, stop):
    target = tmp_path / "x"
    target.write_text("old")
    with pytest.raises(stop), store.atomic_file(target) as part:
        part.write_text("half")
        raise stop
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and target.read_text() == "old"


def test_a_full_disk_is_one_line_and_changes_nothing(tmp_path):
    with (
        pytest.raises(TargetError, match="disk is full; nothing was changed"),
        store.fresh_folder(tmp_path / "x") as part,
    ):
        (part / "a").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").write_text("1")
    with pytest.raises(TargetError, match="not an empty folder"), store.fresh_folder(tmp_path / "x"):
        pass
    assert (tmp_path / "x" / "precious").read_text() == "1"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "x").mkdir()
    with store.fresh_folder(tmp_path / "x") as part:
        (part / "a").write_text("1")
    assert (tmp_path / "x" / "a").read_text() == "1"


def test_text_is_written_as_utf8(tmp_path):
    store.write_text(tmp_path / "x.json", json.dumps("é", ensure_ascii=False))
    assert (tmp_path / "x.json").read_bytes() == '"é"'.encode()


def test_a_target_is_checked_before_the_work(tmp_path):
    store.check_target(tmp_path / "new" / "file.safetensors")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(TargetError, match=r"x cannot be written: No such file or directory; nothing was changed"):
        store.check_target("/proc/none/x")
    with pytest.raises(TargetError, match="a folder of that name is there"):
        store.check_target(tmp_path / "new")
