import pytest
import torch
from safetensors.torch import save_file

from memloc.errors import ArtifactError
from memloc.measurement import Figure, Measurement
from memloc.provenance import Provenance, digest_ids, digest_json, digest_raw, digest_tensor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_a_live_tensor_and_its_bytes_on_disk_share_a_digest(tmp_path, dtype):
    from safetensors import safe_open

    tensor = torch.arange(21).view(3, 7).to(dtype)
    save_file({"a": tensor}, tmp_path / "x.safetensors")
    with safe_open(str(tmp_path / "x.safetensors"), framework="pt") as file:
        part = file.get_slice("a")
        name, shape = part.get_dtype(), part.get_shape()
    data = (tmp_path / "x.safetensors").read_bytes()[-tensor.numel() * tensor.element_size() :]
    assert digest_raw(name, shape, data) == digest_tensor(tensor)


def test_a_digest_sees_layout_free_content():
    tensor = torch.randn(4, 6)
    assert digest_tensor(tensor.T) == digest_tensor(tensor.T.contiguous()) != digest_tensor(tensor)


@pytest.mark.parametrize("change", [lambda t: t + 1e-6, lambda t: t.view(6, 4), lambda t: t.double(), lambda t: -t])
def test_a_digest_notices_value_shape_dtype_and_sign(change):
    tensor = torch.ones(4, 6)
    assert digest_tensor(tensor) != digest_tensor(change(tensor))


def test_signed_zeros_differ():
    assert digest_tensor(torch.tensor([0.0])) != digest_tensor(torch.tensor([-0.0]))


def test_digests_of_text_ignore_the_order_of_keys_and_nothing_else():
    assert digest_json({"a": 1, "b": 2}) == digest_json({"b": 2, "a": 1}) != digest_json({"a": 2, "b": 1})
    assert digest_ids([[1, 2], [3]]) != digest_ids([[1], [2, 3]])


def test_provenance_survives_json():
    made = Provenance("rome", {"layer": 3}, 7, {"model": "abc"})
    assert Provenance.from_json(made.to_json()) == made
    with pytest.raises(ArtifactError, match="provenance lacks 'method'"):
        Provenance.from_json({})


def test_a_measurement_survives_the_disk_with_infinities(tmp_path):
    figures = {"queries": Figure("queries", float("inf"), 3, 1.0, float("inf"), "queries", "higher")}
    rows = ({"id": "nan", "queries": float("inf"), "strict": True},)
    made = Measurement("extraction", figures, rows, Provenance("extraction"))
    made = made.with_control(made)
    made.save(tmp_path / "m.json")
    assert Measurement.load(tmp_path / "m.json") == made


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "other/1"}'])
def test_a_file_that_is_no_measurement_is_refused(tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"m\.json"):
        Measurement.load(tmp_path / "m.json")
