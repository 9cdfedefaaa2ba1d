"""Rows found in the order of a model's calls, and module paths named by the caller."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
import zoo
from torch.testing import assert_close

from memloc import architectures, view
from memloc.call_order import rows_by_call_order
from memloc.checks import hands_off
from memloc.errors import InputError, ModelError
from memloc.localizers.zero_out import ZeroOut
from memloc.sites import Kind, Site
from memloc.view import ModelView

GPT2 = {
    "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
    "layer_module_tmp": "transformer.h.{}",
    "mlp_module_tmp": "transformer.h.{}.mlp",
    "attn_module_tmp": "transformer.h.{}.attn",
    "ln_f_module": "transformer.ln_f",
    "lm_head_module": "transformer.wte",
}


@pytest.fixture
def no_table(monkeypatch):
    monkeypatch.setattr(view, "row_in_table", lambda config: None)


@pytest.mark.parametrize("family", [family for family in zoo.CONFIGS if family not in zoo.MIXTURES])
def test_a_row_found_by_call_order_is_the_tables(family, no_table):
    model = zoo.build(family)
    known = architectures.row_for(model.config)
    with hands_off(ModelView(model, known)):
        found = ModelView.open(model)
    assert found.row.found and not known.found
    for name in ("blocks", "final_norm", "embed", "unembed", "norm_offset", "stored_in_out"):
        assert getattr(found.row, name) == getattr(known, name), name
    expected = ModelView(model, known)
    assert found.kinds == expected.kinds
    assert dict(found.row.added) == dict(known.added)
    assert dict(found.row.norms) == {kind: path for kind, path in known.norms.items() if kind in expected.kinds}
    for site in expected.sites(*expected.kinds):
        assert found.place(site) == expected.place(site), site


def other(kind, **changes):
    """A random model of a family the table does not have."""
    config = {
        "vocab_size": 53, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
        "pad_token_id": 0, **changes,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(kind(**config)).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", ["StableLm", "Starcoder2", "Glm4", "Nemotron", "Persimmon", "Olmo3"])
def test_a_family_without_a_row_is_looked_at_all_the_same(kind):
    """Silencing by the found row is silencing by hand: a column of `mlp.out` set to 0 in a copy."""
    model = other(getattr(transformers, f"{kind}Config"))
    found, passages = ModelView.open(model), zoo.passages(1)
    assert found.row.found and found.row.family.endswith("by call order")
    scores = ZeroOut()(found, passages).scores[Site(1, Kind.MLP_OUT)][0]
    clean, neuron = _nll(model, passages[0]), int(scores.abs().argmax())
    with torch.no_grad():
        found.parameter(Site(1, Kind.MLP_OUT))[:, neuron] = 0
    assert_close(float(scores[neuron]), _nll(model, passages[0]) - clean, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def _nll(model, item):
    logs = model(torch.tensor([item.ids])).logits[0].log_softmax(-1)
    start = len(item.prefix)
    return -float(logs[start - 1 : -1].gather(1, torch.tensor(item.suffix)[:, None]).mean())


@pytest.mark.parametrize(
    "kind, changes, says",
    [
        ("Cohere", {"logit_scale": 0.5}, r"'cohere', and none that its calls suggest is true: unembed: the logits"),
        ("Granite", {"residual_multiplier": 0.5}, r"'granite', .* L0: the block's output differs"),
        ("GptOss", {"num_local_experts": 5, "num_experts_per_tok": 2}, r"'gpt_oss', .* "),
        ("Mamba", {}, r"'mamba', .* no linear map of attention puts out"),
    ],
)  # fmt: skip
def test_a_model_that_no_row_describes_is_refused_with_the_reason(kind, changes, says):
    with pytest.raises(ModelError, match=says) as caught:
        ModelView.open(other(getattr(transformers, f"{kind}Config"), **changes))
    assert "--paths" in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_guess_does_not_pass():
    """The order of calls alone would take either map for the gate; the arithmetic tells which it is."""
    model = zoo.build("llama")
    rows = list(rows_by_call_order(model))
    gates = {row.maps[Kind.MLP_GATE] for row in rows}
    assert gates == {"mlp.gate_proj", "mlp.up_proj"}
    assert ModelView.open(model).row.maps[Kind.MLP_GATE] == "mlp.gate_proj"


# -- paths of editing configurations -------------------------------------------------------------------------------


def written(folder, form):
    lines = {
        "yaml": "\n".join(f'{key}: "{value}"  # of a configuration' for key, value in GPT2.items()) + "\nlayers: [3]\n",
        "toml": "\n".join(f'{key} = "{value}"' for key, value in GPT2.items()),
        "json": json.dumps({**GPT2, "layers": [3]}),
    }[form]
    (folder / f"paths.{form}").write_text(lines)
    return folder / f"paths.{form}"


@pytest.mark.parametrize("form", ["yaml", "toml", "json"])
@pytest.mark.parametrize("table", [True, False])
def test_paths_of_an_editing_configuration_are_taken(form, table, tmp_path, monkeypatch):
    if not table:
        monkeypatch.setattr(view, "row_in_table", lambda config: None)
    model = zoo.build("gpt2")
    plain, found = ModelView(model, architectures.row_for(model.config)), ModelView.open(model, paths=GPT2)
    same = ModelView.open(model, paths=written(tmp_path, form))
    for site in plain.sites(*plain.kinds, Kind.UNEMBED):
        assert found.place(site) == same.place(site) == plain.place(site), site


def test_paths_help_where_the_calls_say_too_little():
    """Attention whose module is not called so: the calls alone cannot tell it from the MLP."""

    class Renamed(type(zoo.build("llama").model.layers[0])):
        def __getattr__(self, name):
            return super().__getattr__("mixer" if name == "self_attn" else name)

    model = zoo.build("llama")
    model.config.model_type = "no such family"
    for block in model.model.layers:
        block.mixer = block._modules.pop("self_attn")
        block.__class__ = Renamed
    with pytest.raises(ModelError, match="no linear map of attention puts out"):
        ModelView.open(model)
    paths = {"layer_module_tmp": "model.layers.{}", "attn_module_tmp": "model.layers.{}.mixer"}
    assert ModelView.open(model, paths=paths).row.maps[Kind.ATTN_OUT] == "mixer.o_proj"


@pytest.mark.parametrize(
    "changes, error, says",
    [
        ({"ln_f_module": "transformer.h.0.ln_1"}, ModelError, r"unembed: the logits differs"),
        ({"ln_f_module": "model.norm"}, ModelError, r"paths: ln_f_module names model\.norm, which the model has not"),
        ({"attn_module_tmp": "transformer.h.{}.mlp"}, ModelError, r"attn_module_tmp names mlp, but attn\.out of GPT-2"),
        ({"rewrite_module_tmp": "transformer.h.3.mlp"}, InputError, r"expected one \{\} for the number of the block"),
        ({"rewrite_module_tmp": "x.{}.mlp.c_proj"}, (InputError, ModelError), r"rewrite_module_tmp"),
        ({"lm_head_module": 3}, InputError, r"lm_head_module is 3; expected a module path"),
    ],
)  # fmt: skip
def test_wrong_paths_are_one_line(changes, error, says):
    with pytest.raises(error, match=says):
        ModelView.open(zoo.build("gpt2"), paths={**GPT2, **changes})


def test_a_file_without_paths_is_one_line(tmp_path):
    (tmp_path / "x.yaml").write_text("alg_name: ROME\n")
    with pytest.raises(InputError, match=r"x\.yaml: none of the keys rewrite_module_tmp"):
        ModelView.open(zoo.build("gpt2"), paths=tmp_path / "x.yaml")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match=r"x\.json is not JSON"):
        ModelView.open(zoo.build("gpt2"), paths=tmp_path / "x.json")
    with pytest.raises(InputError, match=r"none\.yaml cannot be read"):
        ModelView.open(zoo.build("gpt2"), paths=tmp_path / "none.yaml")
