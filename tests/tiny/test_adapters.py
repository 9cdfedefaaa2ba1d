"""An exported adapter does what the edit does, wherever it is loaded; and comes back as the same edit."""

from __future__ import annotations

import copy
import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import CONFIGS, MIXTURES, VOCAB, build

from editors.deltas import Dense, LowRank, Sparse
from editors.disk.adapters import CONFIG, TENSORS
from editors.edit import Edit
from editors.shipping.checkpoint import apply_edit
from editors.shipping.export import export_adapter, export_checkpoint
from memloc.errors import CheckpointError, InputError, MismatchError, ModelError, TargetError
from memloc.provenance import Provenance
from memloc.sites import OUTSIDE, Kind, Site
from memloc.view import ModelView

DENSE = tuple(family for family in CONFIGS if family not in MIXTURES)
"""An expert's maps are adapted as parameters: tests/tiny/test_experts.py."""
BY = Provenance("by hand", {"strength": 2})
IDS = torch.randint(VOCAB, (2, 11), generator=torch.Generator().manual_seed(5))


def random_delta(shape, rank, seed, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        scale * torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
    )


def edit_everywhere(view: ModelView) -> Edit:
    """Every kind of map, in two layers, of ranks 1 to 5: several sites of a fused matrix, several modules of a name."""
    sites = [site for site in view.sites(*view.kinds) if site.layer != 1]
    deltas = {site: random_delta(view.weight(site).shape, 1 + number % 5, number) for number, site in enumerate(sites)}
    return Edit.of(view, deltas, BY)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.double()


def edited_logits(view, edit):
    with edit.apply(view):
        return logits(view.model)


def exported(tmp_path, family="llama", edit=edit_everywhere, **how):
    """A saved base, a view on it, an edit of it, and the edit's adapter in `tmp_path / "adapter"`."""
    build(family).save_pretrained(tmp_path / "base")
    view = ModelView.open(tmp_path / "base")
    made = edit(view)
    told = export_adapter(made, tmp_path / "base", tmp_path / "adapter", **how)
    return view, made, told


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", DENSE)
def test_peft_and_transformers_compute_with_the_adapter_what_the_edited_model_does(tmp_path, family):
    from peft import PeftModel

    view, edit, told = exported(tmp_path, family)
    plain, wanted = logits(view.model), edited_logits(view, edit)
    assert float((plain - wanted).abs().max()) > 0.01 * float(plain.abs().max())  # else nothing was asked
    assert {entry.rounded for entry in told.modules.values()} == {0.0}
    model = PeftModel.from_pretrained(copy.deepcopy(view.model), tmp_path / "adapter").eval()
    close(logits(model), wanted)
    assert {name for name, part in model.named_modules() if hasattr(part, "lora_A")} == {
        f"base_model.model.{name}" for name in told.modules
    }
    merged = model.merge_and_unload()
    close(logits(merged), wanted)
    with edit.apply(view):
        for name, parameter in view.model.named_parameters():
            torch.testing.assert_close(merged.get_parameter(name), parameter, atol=2e-6, rtol=1e-6)
    native = copy.deepcopy(view.model)
    native.load_adapter(str(tmp_path / "adapter"))
    close(logits(native), wanted)


@pytest.mark.parametrize("family", DENSE)
def test_an_adapter_comes_back_as_the_same_edit(tmp_path, family):
    view, edit, _ = exported(tmp_path, family)
    back = Edit.from_adapter(view, tmp_path / "adapter")
    assert back.digest == edit.digest
    assert back.provenance.method == "peft-adapter" and back.notes["made by"][0]["method"] == "by hand"


def test_without_its_pattern_of_alphas_an_adapter_is_another_one(tmp_path):
    """The pitfall: PEFT would scale a smaller rank by the largest alpha. A check that cannot fail checks nothing."""
    from peft import PeftModel

    view, edit, _ = exported(tmp_path)
    path = tmp_path / "adapter" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "alpha_pattern": {}}))
    found = logits(PeftModel.from_pretrained(copy.deepcopy(view.model), tmp_path / "adapter").eval())
    with pytest.raises(AssertionError, match="not close"):
        close(found, edited_logits(view, edit))


def test_an_adapter_of_peft_itself_is_read_with_its_scales_and_patterns(tmp_path):
    """Short names, patterns over them, rank-stabilised scale: whatever PEFT computes, the edit does."""
    from peft import LoraConfig, PeftModel, get_peft_model

    build("qwen2").save_pretrained(tmp_path / "base")
    view = ModelView.open(tmp_path / "base")
    config = LoraConfig(
        r=3, lora_alpha=7, use_rslora=True, target_modules=["down_proj", "q_proj"], rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.1.mlp.down_proj": 5}, init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(3)
    get_peft_model(copy.deepcopy(view.model), config).save_pretrained(tmp_path / "adapter")
    edit = Edit.from_adapter(view, tmp_path / "adapter")
    assert {delta.rank for delta in edit.deltas.values()} == {2, 3}
    model = PeftModel.from_pretrained(copy.deepcopy(view.model), tmp_path / "adapter").eval()
    close(edited_logits(view, edit), logits(model))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_embeddings_travel_too(tmp_path, family):
    from peft import PeftModel

    build(family, tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    view = ModelView.open(tmp_path / "base")
    sites = [Site(OUTSIDE, Kind.EMBED), Site(OUTSIDE, Kind.UNEMBED), Site(1, Kind.MLP_OUT)]
    edit = Edit.of(
        view, {site: random_delta(view.weight(site).shape, rank + 1, rank) for rank, site in enumerate(sites)}, BY
    )
    export_adapter(edit, tmp_path / "base", tmp_path / "adapter")
    wanted = edited_logits(view, edit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT remarks on a Conv1D beside plain maps, and does the right thing
        model = PeftModel.from_pretrained(copy.deepcopy(view.model), tmp_path / "adapter").eval()
    close(logits(model), wanted)
    assert Edit.from_adapter(view, tmp_path / "adapter").digest == edit.digest


@pytest.mark.parametrize("dtype, least, most", [("float16", 1e-5, 1e-3), ("bfloat16", 1e-4, 1e-2)])
def test_rounded_factors_say_what_they_lost(tmp_path, dtype, least, most):
    view, edit, told = exported(tmp_path, dtype=dtype)
    back = Edit.from_adapter(view, tmp_path / "adapter")
    for name, entry in told.modules.items():
        site = Site.parse(entry.sites[0])
        off = float((back.deltas[site].dense().double() - edit.deltas[site].dense().double()).norm())
        assert least < entry.rounded < most, name
        torch.testing.assert_close(entry.rounded, off / edit.deltas[site].norm(), rtol=1e-4, atol=0)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter" / TENSORS).values()} == {getattr(torch, dtype)}


def test_a_factor_that_does_not_fit_is_refused(tmp_path):
    def large(view):
        delta = random_delta(view.weight(Site(1, Kind.MLP_OUT)).shape, 1, 0)
        return Edit.of(view, {Site(1, Kind.MLP_OUT): LowRank(delta.left * 1e-6, delta.right * 1e6)}, BY)

    with pytest.raises(ModelError, match=r"mlp.down_proj: a factor does not fit float16"):
        exported(tmp_path, edit=large, dtype="float16")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_deltas_without_factors_are_refused_or_cut_on_request_and_the_loss_is_told(tmp_path, form):
    site, generator = Site(0, Kind.MLP_OUT), torch.Generator().manual_seed(2)

    def change(view):
        values = 0.1 * torch.randn(view.weight(site).shape, generator=generator)
        return Edit.of(view, {site: Dense(values) if form == "dense" else Sparse.of(values, values > 0.1)}, BY)

    with pytest.raises(InputError, match=rf"L0.mlp.out: a {form} delta holds no factors.*--as checkpoint"):
        exported(tmp_path, edit=change)
    shutil.rmtree(tmp_path / "base")
    view, edit, told = exported(tmp_path, edit=change, rank=4)
    whole = edit.deltas[site].dense().double()
    sizes = torch.linalg.svdvals(whole)
    entry = next(iter(told.modules.values()))
    assert entry.rank == 4
    torch.testing.assert_close(entry.cut, float(sizes[4:].norm() / sizes.norm()), rtol=1e-5, atol=0)
    back = Edit.from_adapter(view, tmp_path / "adapter").deltas[site].dense().double()
    torch.testing.assert_close(float((back - whole).norm() / whole.norm()), entry.cut, rtol=1e-4, atol=0)


def test_a_bias_is_refused(tmp_path):
    def biased(view):
        site = Site(1, Kind.MLP_OUT, bias=True)
        return Edit.of(view, {site: Dense(torch.ones(view.weight(site).shape))}, BY)

    with pytest.raises(InputError, match=r"L1.mlp.out.bias: a LoRA adapter holds no change of a bias.*checkpoint"):
        exported(tmp_path, "gpt2", edit=biased)
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_folder_is_laid_out_as_its_readers_expect(tmp_path):
    """vLLM: r and lora_alpha give every module's scale; r bounds every rank. lm-eval: config, tensors, base's name."""
    build("gpt2").save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (tmp_path / "base" / name).write_text("{}")
    view = ModelView.open(tmp_path / "base")
    export_adapter(edit_everywhere(view), tmp_path / "base", tmp_path / "adapter", base="org/base")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert config["base_model_name_or_path"] == "org/base" and config["fan_in_fan_out"]
    assert config["r"] == config["lora_alpha"] and config["rank_pattern"] == config["alpha_pattern"] != {}
    ranks = {name: config["rank_pattern"].get(name, config["r"]) for name in config["target_modules"]}
    for name, rank in ranks.items():
        weight = view.model.get_parameter(f"{name}.weight")  # Conv1D: [in, out]
        assert tensors.pop(f"base_model.model.{name}.lora_A.weight").shape == (rank, weight.shape[0])
        assert tensors.pop(f"base_model.model.{name}.lora_B.weight").shape == (weight.shape[1], rank)
    assert not tensors and max(ranks.values()) == config["r"]
    assert {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "README.md"} <= {
        path.name for path in (tmp_path / "adapter").iterdir()
    }
    assert not list((tmp_path / "adapter").glob("model*"))


def test_transformers_opens_the_folder_by_itself(tmp_path):
    from transformers import AutoModelForCausalLM

    view, edit, _ = exported(tmp_path)
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), edited_logits(view, edit))


def test_the_adapter_of_a_stored_bfloat16_model_adds_the_unrounded_edit(tmp_path):
    """What rounding takes from an edit in the weights, an adapter keeps: it is the closer of the two."""
    from peft import PeftModel

    build("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    view = ModelView.open(tmp_path / "base")
    edit = edit_everywhere(view)
    export_adapter(edit, tmp_path / "base", tmp_path / "adapter")
    wide = ModelView.open(tmp_path / "base", dtype=torch.float64)
    wanted = edited_logits(wide, Edit.of(wide, edit.deltas, BY))
    model = PeftModel.from_pretrained(
        ModelView.open(tmp_path / "base", dtype=torch.float32).model, tmp_path / "adapter"
    )
    close(logits(model.eval()), wanted)
    apply_edit(edit, tmp_path / "base", tmp_path / "out")
    in_weights = logits(ModelView.open(tmp_path / "out", dtype=torch.float32).model)
    assert float((in_weights - wanted).abs().max()) > 1e-5 * float(wanted.abs().max())


def refuse(view, folder, error, said, **how):
    before = {name: parameter.clone() for name, parameter in view.model.named_parameters()}
    with pytest.raises(error, match=said) as caught:
        Edit.from_adapter(view, folder, **how)
    assert "\n" not in str(caught.value)
    torch.testing.assert_close(dict(view.model.named_parameters()), before, atol=0, rtol=0)


def test_an_adapter_that_is_merged_already_is_refused(tmp_path):
    view, edit, _ = exported(tmp_path)
    with edit.apply(view):
        refuse(view, tmp_path / "adapter", MismatchError, "holds the adapter already, merged")
    Edit.from_adapter(view, tmp_path / "adapter")
    (tmp_path / "adapter" / "memloc_edit.json").unlink()
    with edit.apply(view):
        refuse(view, tmp_path / "adapter", MismatchError, "holds the adapter already, merged")
    native = copy.deepcopy(view.model)
    native.load_adapter(str(tmp_path / "adapter"))
    with pytest.raises((MismatchError, ModelError, InputError)):
        Edit.from_adapter(ModelView(native, view.row), tmp_path / "adapter")
    (tmp_path / "adapter" / TENSORS).rename(tmp_path / "adapter" / "model.safetensors")
    refuse(view, tmp_path / "adapter", CheckpointError, "holds a whole model; the adapter is merged into it already")


def test_an_adapter_of_another_base_is_refused(tmp_path):
    view, edit, _ = exported(tmp_path)
    folder = tmp_path / "adapter"
    other = ModelView.open(build("llama", seed=1))
    refuse(other, folder, MismatchError, "with digest .* another base")
    refuse(ModelView.open(build("gpt2")), folder, MismatchError, "is no map of GPT2LMHeadModel; .* another base")
    wider = ModelView.open(build("llama", intermediate_size=41))
    refuse(wider, folder, MismatchError, r"down_proj is \[24, 37\], .* has \[24, 41\].* another base")
    told = (folder / "memloc_edit.json").read_text()
    (folder / "memloc_edit.json").write_text(told.replace("model.layers.0.mlp.up_proj", "model.nowhere"))
    refuse(view, folder, MismatchError, r"its record names model\.nowhere.weight, which .* has not")
    (folder / "memloc_edit.json").write_text(told.replace('"before"', '"former"'))
    refuse(view, folder, CheckpointError, r"memloc_edit\.json cannot be read")
    (folder / "memloc_edit.json").unlink()
    refuse(other, folder, MismatchError, "is not that of .*base, the adapter's base")
    with pytest.raises(MismatchError, match="the edit was made for"):
        build("llama", seed=1).save_pretrained(tmp_path / "other")
        export_adapter(edit, tmp_path / "other", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_at_hand_is_known_by_its_name_only(tmp_path):
    view, edit, _ = exported(tmp_path, base="org/large")
    (tmp_path / "adapter" / "memloc_edit.json").unlink()
    refuse(
        view, tmp_path / "adapter", MismatchError, r"is an adapter of org/large, this model is .*base; pass any_base"
    )
    assert Edit.from_adapter(view, tmp_path / "adapter", any_base=True).digest == edit.digest
    assert Edit.from_adapter(ModelView(view.model, view.row, None, "org/large"), tmp_path / "adapter")


CHANGES = [
    ({"peft_type": "IA3"}, "peft_type 'IA3'; only LORA"),
    ({"use_dora": True}, "use_dora is set"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
    ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters is set"),
    ({"r": 9}, r"has factors .* the config says rank 9"),
    ({"r": None, "rank_pattern": None}, "no usable rank_pattern, rank or alpha"),
    ({"alpha_pattern": {"(": 3}}, "no usable alpha_pattern"),
    ({"lora_alpha": "two", "alpha_pattern": {}}, "no usable alpha_pattern"),
]


@pytest.mark.parametrize("change, said", CHANGES, ids=[next(iter(change)) for change, _ in CHANGES])
def test_what_an_edit_cannot_hold_is_refused_by_name(tmp_path, change, said):
    view, _, _ = exported(tmp_path)
    path = tmp_path / "adapter" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refuse(view, tmp_path / "adapter", CheckpointError, said)


def test_broken_adapter_folders_are_refused(tmp_path):
    view, _, _ = exported(tmp_path)
    folder, tensors = tmp_path / "adapter", load_file(tmp_path / "adapter" / TENSORS)
    name = next(iter(sorted(tensors)))

    def with_tensors(changed, said):
        save_file(changed, folder / TENSORS)
        refuse(view, folder, CheckpointError, said)

    with_tensors({key: part for key, part in tensors.items() if key != name}, "expected")
    with_tensors({**tensors, "base_model.model.lm_head.weight": torch.zeros(2)}, "no factor of a low-rank change")
    with_tensors({**tensors, name: tensors[name] * float("nan")}, "not finite")
    with_tensors({**tensors, name: tensors[name].to(torch.int8)}, "not a factor")
    save_file(tensors, folder / TENSORS)
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[:-3])
    refuse(view, folder, CheckpointError, "cut off or padded")
    (folder / TENSORS).unlink()
    refuse(view, folder, CheckpointError, "holds no adapter_model.safetensors")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    refuse(view, folder, CheckpointError, "only a pickle .* can run code")
    (folder / CONFIG).write_text('{"r": 1, "r": 2}')
    refuse(view, folder, CheckpointError, "a key stands twice")
    (folder / CONFIG).unlink()
    refuse(view, folder, CheckpointError, "is no PEFT adapter")


def test_nothing_is_written_over(tmp_path):
    _, edit, _ = exported(tmp_path)
    with pytest.raises(TargetError, match="not an empty folder"):
        export_adapter(edit, tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(TargetError, match="not an empty folder"):
        export_checkpoint(edit, tmp_path / "base", tmp_path / "adapter")
