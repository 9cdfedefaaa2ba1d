"""Where parameters lie on disk: by name, by prefix, and by what loading would rename."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import bits, contents
from zoo import CONFIGS, MIXTURES, build

from editors.binding import Touched
from editors.deltas import Dense
from editors.disk import disk_names
from editors.disk.disk_names import Stored, by_loading, locate
from editors.disk.shards import SINGLE, open_weights
from editors.edit import Edit
from editors.shipping.checkpoint import apply_edit, undo_edit
from memloc.architectures import Place
from memloc.errors import CheckpointError
from memloc.provenance import Provenance, digest_tensor
from memloc.sites import Kind, Site

ROUTER = "model.layers.0.mlp.gate.weight"
EXPERTS = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A family whose names on disk are another generation's, and whose experts are put side by side on load."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=31, hidden_size=12, intermediate_size=10, num_hidden_layers=2, num_attention_heads=3,
            num_key_value_heads=1, num_local_experts=5,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mixture") / "model"
    model.save_pretrained(folder)
    return folder, model


def by_hand(parameter: str, stored: torch.Tensor) -> Edit:
    """An edit of a parameter that no site speaks of, as an engineer of another family would bind it."""
    site = Site(0, Kind.MLP_OUT)
    touched = Touched(Place(parameter), "F32", tuple(stored.shape), digest_tensor(stored))
    return Edit({site: Dense(torch.ones(stored.shape))}, {site: touched}, Provenance("by hand"))


@pytest.mark.parametrize("family", CONFIGS)
def test_what_loading_renames_agrees_with_the_names_themselves(tmp_path, family):
    """Two ways that know nothing of each other; a tied unembedding has no tensor of its own in either."""
    model = build(family)
    model.save_pretrained(tmp_path)
    weights, names = open_weights(tmp_path), [name for name, _ in model.named_parameters()]
    assert {name: by_loading(weights)[name] for name in names} == locate(weights, names)
    stored = locate(weights, names).values()
    assert sorted(name for entry in stored for name in entry.names) == sorted(weights.entries)
    assert any(entry.experts for entry in stored) is (family in MIXTURES)


def test_files_without_the_prefix_are_found_both_ways(tmp_path):
    model = build("gpt2")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    save_file({name.removeprefix("transformer."): part.clone() for name, part in tensors.items()}, tmp_path / SINGLE)
    names = [name for name, _ in model.named_parameters()]
    found = by_loading(open_weights(tmp_path))
    assert {name: found[name] for name in names} == locate(open_weights(tmp_path), names)
    assert found["transformer.wte.weight"] == Stored(("wte.weight",))


def test_a_renamed_tensor_is_edited_and_restored(mixture, tmp_path):
    from transformers import MixtralForCausalLM

    folder, model = mixture
    assert ROUTER not in open_weights(folder).entries
    edit = by_hand(ROUTER, model.get_parameter(ROUTER))
    written = apply_edit(edit, folder, tmp_path / "out")
    assert list(written.tensors) == ["model.layers.0.block_sparse_moe.gate.weight"]
    wanted = bits(model)
    changed = bits(MixtralForCausalLM.from_pretrained(tmp_path / "out"))
    assert {name for name in wanted if changed[name] != wanted[name]} == {ROUTER}
    with pytest.raises(Exception, match="no way back"):
        undo_edit(edit, tmp_path / "out", tmp_path / "back")


def test_a_parameter_computed_from_several_tensors_is_told_and_refused(mixture, tmp_path):
    folder, model = mixture
    before = contents(folder)
    stored = by_loading(open_weights(folder))[EXPERTS]
    assert stored.converted
    assert stored.names == tuple(f"model.layers.1.block_sparse_moe.experts.{number}.w2.weight" for number in range(5))
    edit = by_hand(EXPERTS, model.get_parameter(EXPERTS)[0])
    with pytest.raises(CheckpointError, match=r"down_proj is computed on load from 5 stored tensors, .*experts\.0\.w2"):
        apply_edit(edit, folder, tmp_path / "out")
    assert contents(folder) == before and not (tmp_path / "out").exists()


def test_without_the_tables_the_names_must_agree(mixture, tmp_path, monkeypatch):
    """They are transformers' own business and may go; what is found then is what the names alone say."""
    folder, model = mixture
    monkeypatch.setattr(disk_names, "_by_loading", lambda *args: (_ for _ in ()).throw(ImportError("gone")))
    with pytest.raises(CheckpointError, match=rf"{ROUTER} is in none of its weight files"):
        apply_edit(by_hand(ROUTER, model.get_parameter(ROUTER)), folder, tmp_path / "out")
