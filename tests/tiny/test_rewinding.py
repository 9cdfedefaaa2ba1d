"""Rewinding and retraining: against models assembled by hand, from one file or shards, and refused where it must be."""

from __future__ import annotations

import copy
import json

import cases
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from torch.testing import assert_close

from memloc.checks import hands_off
from memloc.costs import counted
from memloc.errors import CheckpointError, InputError, MismatchError
from memloc.localizers.layer_retrain import LayerRetrain
from memloc.localizers.layer_rewind import LayerRewind
from memloc.objectives import suffix_nll
from memloc.rewinding.groups import Kept, gradient_accounting, retrain, rewind, substituted
from memloc.rewinding.snapshots import Snapshot, series
from memloc.sites import Kind, Site
from memloc.view import ModelView

every_family = pytest.mark.parametrize("family", zoo.FAMILIES)


def saved(model, folder):
    """A checkpoint folder of a model."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"))
    return str(folder)


def loaded(view, folder):
    """A second model: a copy of the view's with everything a checkpoint holds written into it."""
    model = copy.deepcopy(view.model)
    model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)
    return model


def nll(model, passages):
    """[n] float64: each passage alone through the whole model, the definition written out."""
    found = []
    with torch.no_grad():
        for item in passages:
            logits = model(torch.tensor([item.ids]), use_cache=False).logits[0].log_softmax(-1)
            spoken = [logits[len(item.prefix) + step - 1, token] for step, token in enumerate(item.suffix)]
            found.append(-torch.stack(spoken).mean())
    return torch.stack(found)


def assembled(view, other, layers, kinds=None):
    """A second model: `view`'s, with blocks (or maps of some kinds) of `other` written into it."""
    model = copy.deepcopy(view.model)
    whole = ModelView(model, view.row)
    with torch.no_grad():
        for layer in layers:
            if kinds is None:
                whole.block(layer).load_state_dict(ModelView(other, view.row).block(layer).state_dict())
            for kind in kinds or ():
                for site in (Site(layer, kind), Site(layer, kind, bias=True)):
                    if whole.has(site):
                        theirs = view.place(site).read(other.get_parameter(view.place(site).parameter))
                        whole.place(site).write(whole.parameter(site).data, theirs)
    return model


@every_family
def test_a_rewound_window_is_the_model_assembled_by_hand(family, view_of, tmp_path):
    """In float64, all contiguous windows, another seed's model as the earlier one; whole forwards one at a time."""
    view, other = view_of(family, torch.float64), zoo.build(family, dtype=torch.float64, seed=5)
    passages, clean = zoo.passages(3), nll(view_of(family, torch.float64).model, zoo.passages(3))
    method = LayerRewind(earlier=saved(other, tmp_path / "other"), window=0)
    found = method(view, passages, contrast=zoo.passages(2, seed=9)).notes
    wanted = [(start, stop) for start in range(view.layers) for stop in range(start, view.layers)]
    assert len(found["rise"]) == len(wanted)
    for start, stop in wanted:
        model = assembled(view, other, range(start, stop + 1))
        name = f"L{start}" if start == stop else f"L{start}-L{stop}"
        expected = float((nll(model, passages) - clean).mean())
        assert abs(found["rise"][name]["other"] - expected) < 1e-5 * max(1, abs(expected))
        contrast = float((nll(model, zoo.passages(2, seed=9)) - nll(view.model, zoo.passages(2, seed=9))).mean())
        assert abs(found["contrast_rise"][name]["other"] - contrast) < 1e-5 * max(1, abs(contrast))
        assert abs(found["criticality"][name]["other"] - expected + contrast) < 2e-5 * max(1, abs(expected))


@every_family
def test_a_rewound_component_takes_its_rows_of_a_fused_map_and_no_other(family, view_of, tmp_path):
    view, other = view_of(family, torch.float64), zoo.build(family, dtype=torch.float64, seed=5)
    passages, clean = zoo.passages(2), nll(view_of(family, torch.float64).model, zoo.passages(2))
    found = LayerRewind(earlier=saved(other, tmp_path / "other"), grain="component")(view, passages)
    assert set(found.scores) == set(view.sites(*view.kinds))
    for site, scores in found.scores.items():
        expected = nll(assembled(view, other, [site.layer], [site.kind]), passages) - clean
        assert_close(scores.double(), expected, atol=1e-5, rtol=1e-5)
    together = LayerRewind(earlier=str(tmp_path / "other"), kinds="attn.q,attn.v")(view, passages)
    for layer in range(view.layers):
        expected = nll(assembled(view, other, [layer], [Kind.ATTN_Q, Kind.ATTN_V]), passages) - clean
        assert_close(together.scores[Site(layer, Kind.MLP_OUT)].double(), expected, atol=1e-5, rtol=1e-5)


@every_family
def test_rewinding_to_the_model_itself_changes_nothing(family, view_of, tmp_path):
    view = view_of(family, torch.float64)
    found = LayerRewind(earlier=saved(view.model, tmp_path / "now"), window=0)(view, zoo.passages(3))
    assert max(abs(value["now"]) for value in found.notes["rise"].values()) < 1e-6
    assert set(found.notes["moved"]["L0"].values()) == {0.0}


@every_family
def test_rewinding_every_layer_is_the_earlier_model_where_the_rest_is_equal(family, view_of, tmp_path):
    view, passages = view_of(family, torch.float64), zoo.passages(3)
    folder = cases.before(view, tmp_path)
    whole = f"L0-L{view.layers - 1}"
    found = LayerRewind(earlier=folder, window=0)(view, passages).notes
    earlier = loaded(view, folder)
    assert abs(found["nll"] + found["rise"][whole]["before"] - float(nll(earlier, passages).mean())) < 1e-5


def test_scores_share_a_windows_rise_among_its_layers(view_of, tmp_path):
    view, passages = view_of("llama"), zoo.passages(2)
    found = LayerRewind(earlier=cases.before(view, tmp_path), window=2)(view, passages)
    rise = {name: value["before"] for name, value in found.notes["rise"].items()}
    expected = (rise["L1"] + rise["L0-L1"] / 2 + rise["L1-L2"] / 2) / 3
    assert_close(float(found.mean().scores[Site(1, Kind.MLP_OUT)]), expected, rtol=1e-5, atol=1e-6)


def test_several_checkpoints_are_averaged_and_told_apart(view_of, tmp_path):
    view, passages = view_of("gpt2"), zoo.passages(2)
    for step, seed in ((900, 1), (1000, 2)):
        saved(zoo.build("gpt2", seed=seed), tmp_path / "series" / f"step-{step}")
    whole = LayerRewind(earlier=str(tmp_path / "series"))(view, passages)
    parts = [LayerRewind(earlier=f"{tmp_path}/series/step-{step}")(view, passages) for step in (900, 1000)]
    assert list(whole.notes["rise"]["L0"]) == ["step-900", "step-1000"]
    for site in whole.scores:
        assert_close(whole.scores[site], (parts[0].scores[site] + parts[1].scores[site]) / 2)
    assert parts[0].provenance.inputs["earlier"] != parts[1].provenance.inputs["earlier"]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_shards_and_names_without_the_base_prefix_are_read_alike(family, view_of, tmp_path):
    view, other = view_of(family), zoo.build(family, seed=5)
    one = LayerRewind(earlier=saved(other, tmp_path / "one"))(view, zoo.passages(2))
    other.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    base = other.base_model_prefix + "."
    (tmp_path / "bare").mkdir()
    stored = {name.removeprefix(base): entry.clone() for name, entry in other.state_dict().items()}
    save_file(stored, tmp_path / "bare" / "model.safetensors")
    for name in ("many", "bare"):
        found = LayerRewind(earlier=str(tmp_path / name))(view, zoo.passages(2))
        for site in one.scores:
            assert torch.equal(found.scores[site], one.scores[site])


def test_one_block_of_the_checkpoint_is_in_memory_at_a_time(tmp_path):
    """Six layers: a whole second model would be seen; the control shows that it would."""
    view = ModelView.open(zoo.build("gpt2", n_layer=6, n_embd=96, n_head=4, n_inner=None))
    folder = saved(zoo.build("gpt2", n_layer=6, n_embd=96, n_head=4, n_inner=None, seed=2), tmp_path / "other")
    size = sum(parameter.numel() * 4 for parameter in view.model.parameters())
    passages = zoo.passages(1)
    for method in (LayerRewind(earlier=folder, window=0), LayerRewind(earlier=folder, grain="component")):
        with counted(view) as spent:
            method(view, passages)
        assert spent.bytes < 0.7 * size
    with counted(view) as naive:
        snapshot = Snapshot.open(folder)
        twin = {name: snapshot.tensor(name) for name in snapshot.files}
        blocks = {name: entry for name, entry in twin.items() if ".h." in name}
        substituted(view.model, blocks, lambda: suffix_nll(view, next(view.batches(passages))))
    assert naive.bytes > size


# -- what is refused ---------------------------------------------------------------------------------------------


def test_checkpoints_of_another_architecture_are_refused_in_one_line(view_of, tmp_path):
    view, passages = view_of("gpt2"), zoo.passages(2)

    def refused(error, match, folder):
        with pytest.raises(error, match=match) as caught, hands_off(view):
            LayerRewind(earlier=str(folder))(view, passages)
        assert "\n" not in str(caught.value)

    saved(zoo.build("llama"), tmp_path / "llama")
    refused(MismatchError, "model_type is 'llama', the model's is 'gpt2'", tmp_path / "llama")
    saved(zoo.build("gpt2", n_head=6), tmp_path / "heads")
    refused(MismatchError, "n_head is 6, the model's is 3", tmp_path / "heads")
    saved(zoo.build("gpt2", n_embd=48), tmp_path / "wide")
    (tmp_path / "wide" / "config.json").unlink()
    refused(MismatchError, r"ln_1\.weight is \[48\], the model's is \[24\]", tmp_path / "wide")
    saved(zoo.build("gpt2", n_layer=2), tmp_path / "short")
    (tmp_path / "short" / "config.json").unlink()
    refused(CheckpointError, r"transformer\.h\.2\..* is in none of its weight files", tmp_path / "short")
    stored = {name: entry.clone() for name, entry in zoo.build("gpt2").state_dict().items() if "lm_head" not in name}
    stored["transformer.h.1.mlp.c_fc.weight"][0, 0] = float("nan")
    (tmp_path / "nan").mkdir()
    save_file(stored, tmp_path / "nan" / "model.safetensors")
    refused(CheckpointError, "not finite", tmp_path / "nan")


def test_folders_that_hold_no_checkpoint_are_refused(tmp_path, view_of):
    with pytest.raises(InputError, match="name its folder"):
        LayerRewind()(view_of("gpt2"), zoo.passages(1))
    with pytest.raises(CheckpointError, match="no such folder"):
        series(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds neither"):
        series(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="only pickles"):
        series(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        series(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0")
    with pytest.raises(CheckpointError, match="cut off"):
        series(tmp_path)


def test_another_vocabulary_is_refused(tmp_path, view_of):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def words(*names):
        made = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="a"))
        return PreTrainedTokenizerFast(tokenizer_object=made)

    view = ModelView(view_of("gpt2").model, view_of("gpt2").row, words("a", "b", "c"))
    folder = saved(zoo.build("gpt2"), tmp_path / "other")
    words("a", "c", "b", "d").save_pretrained(folder)
    with pytest.raises(MismatchError, match="2 tokens have other ids, the first 'b'"):
        LayerRewind(earlier=folder)(view, zoo.passages(1))
    words("a", "b").save_pretrained(folder)
    LayerRewind(earlier=folder)(view, zoo.passages(1))


# -- retraining --------------------------------------------------------------------------------------------------


@every_family
def test_retraining_for_no_step_is_rewinding(family, view_of, tmp_path):
    view, passages, contrast = view_of(family), zoo.passages(3), zoo.passages(2, seed=9)
    folder = cases.before(view, tmp_path)
    retrained = LayerRetrain(earlier=folder, steps=0)(view, passages, contrast=contrast)
    rewound = LayerRewind(earlier=folder)(view, passages)
    for site in rewound.scores:
        assert_close(retrained.scores[site], rewound.scores[site], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize("kinds", [None, "attn.k,mlp.out"])
def test_only_the_window_is_trained(family, kinds, view_of, tmp_path):
    """Against a second model, trained by hand with everything else frozen, in float64."""
    view, passages, contrast = view_of(family, torch.float64), zoo.passages(2), zoo.passages(2, seed=9)
    folder = cases.before(view, tmp_path)
    method = LayerRetrain(earlier=folder, steps=4, lr=1e-2, rows=2, kinds=kinds)
    with hands_off(view):
        found = method(view, passages, contrast=contrast)
    earlier = loaded(view, folder)
    named = [Kind(kind) for kind in kinds.split(",")] if kinds else None
    for layer in range(view.layers):
        model = assembled(view, earlier, [layer], named)
        mine = ModelView(model, view.row)
        if named is None:
            trained = {parameter: torch.ones_like(parameter) for parameter in mine.block(layer).parameters()}
        else:
            trained = {}
            for site in [Site(layer, kind, bias) for kind in named for bias in (False, True)]:
                if mine.has(site):
                    mask = trained.setdefault(mine.parameter(site), torch.zeros_like(mine.parameter(site)))
                    mine.place(site).write(mask, torch.ones_like(mine.weight(site)))
        optimizer = torch.optim.Adam(trained, lr=1e-2)
        for _ in range(4):
            optimizer.zero_grad()
            losses = [suffix_nll(mine, next(mine.batches(contrast[row : row + 1]))).mean() for row in range(2)]
            (sum(losses) / 2).backward()
            for parameter, mask in trained.items():
                parameter.grad *= mask
            optimizer.step()
        expected = nll(model, passages) - nll(view.model, passages)
        assert_close(found.scores[Site(layer, Kind.MLP_OUT)].double(), expected, atol=2e-5, rtol=1e-4)


def test_retraining_needs_clean_text(view_of, tmp_path):
    with pytest.raises(InputError, match="clean text to train on"):
        LayerRetrain(earlier=cases.before(view_of("gpt2"), tmp_path))(view_of("gpt2"), zoo.passages(1))


# -- any module --------------------------------------------------------------------------------------------------


def classifier(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def test_a_classifier_is_rewound_group_by_group():
    model, early = classifier(0), classifier(1)
    given = torch.randn(11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    groups = {"first": ["0.weight", "0.bias"], "last": ["2.weight", "2.bias"]}
    groups["all"] = [*groups["first"], *groups["last"]]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    found = rewind(model, groups, [Kept.of(early, "early")], lambda: {"sum": float(model(given).sum())})
    mixed = nn.Sequential(early[0], nn.Tanh(), model[2])
    assert abs(found["first"]["early"]["sum"] - float(mixed(given).sum().detach())) < 1e-12
    assert abs(found["all"]["early"]["sum"] - float(early(given).sum().detach())) < 1e-12
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_a_classifier_group_is_retrained_alone():
    model, early = classifier(0), classifier(1)
    given = torch.randn(11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = model(given).detach()

    def off():
        return ((model(given) - wanted) ** 2).mean()

    found = retrain(
        model, {"last": ["2.weight", "2.bias"]}, Kept.of(early, "early"), lambda _: off(),
        lambda: {"loss": float(off().detach())}, count=400, lr=0.05,
    )  # fmt: skip
    assert found["last"]["retrained"]["loss"] < 1e-4 < 1e-2 < found["last"]["reset"]["loss"]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_module_is_whole_again_when_the_work_fails():
    model = classifier(0)
    before = dict(model.named_parameters())

    def fail():
        assert float(model[0].weight.abs().max()) == 0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        substituted(model, {"0.weight": torch.zeros(7, 5, dtype=torch.float64)}, fail)
    assert all(part is before[name] for name, part in model.named_parameters())


def test_values_of_another_model_are_refused():
    wide = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    with pytest.raises(MismatchError, match=r"0\.weight is \[7, 6\], the model's is \[7, 5\]"):
        rewind(classifier(0), {"first": ["0.weight"]}, [Kept.of(wide, "wide")], dict)
    with pytest.raises(MismatchError, match=r"keeps no 0\.weight"):
        rewind(classifier(0), {"first": ["0.weight"]}, [Kept("other", {})], dict)


def test_gradient_accounting_by_hand():
    """y = a·x: gradients known on paper."""
    model = nn.Linear(2, 1, bias=False).double()
    one, two = torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[-3.0, 4.0]]).double()
    found = gradient_accounting(model, {"all": ["weight"]}, model(one).sum(), 2 * model(two).sum())
    assert_close(found["all"].clean, 5.0 / 2)
    assert_close(found["all"].noisy, 10.0 / 2)
    assert_close(found["all"].cosine, (16 - 9) / 25)
    assert model.weight.grad is None
