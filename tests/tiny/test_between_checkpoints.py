"""Edits towards other checkpoints: the very bits of an earlier one, averages, differences; norms without gains."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from editors.base import Request
from editors.deltas import Dense, LowRank, Sparse
from editors.disk.other_checkpoints import every_site, open_other, read_weights, smallest
from editors.edit import Edit
from editors.pruners.layer_rewind import LayerRewind
from editors.pruners.layernorm_removal import LayernormRemoval
from editors.rewriters.fuse import Fuse
from editors.rewriters.task_vector import TaskVector
from editors.shipping.checkpoint import apply_edit, undo_edit
from memloc.batches import pad
from memloc.errors import CheckpointError, InputError, MismatchError, ModelError
from memloc.localizers.random import Random
from memloc.provenance import Provenance
from memloc.sites import OUTSIDE, Grain, Kind, Site
from memloc.view import ModelView

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FORGET = zoo.passages(3)


def twin(model, folder: Path, *, dtype=None, wild: bool = False) -> str:
    """A folder with the model's shape and other weights; `wild`: signs and sizes that no float32 difference reaches."""
    made, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            factor = noise.clamp(-2, 2) * 10 ** (3 * noise.clamp(-2, 1) - 2) if wild else 1 + noise
            parameter.copy_(parameter * factor.to(parameter.dtype) + (0 if wild else 0.01))
            if wild:
                parameter.view(-1)[0] = -0.0
    (made if dtype is None else made.to(dtype)).save_pretrained(folder)
    return str(folder)


def tensors(view: ModelView) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in view.model.named_parameters()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma3"])
def test_rewound_blocks_hold_the_earlier_bits(family, dtype, tmp_path):
    """Whole blocks, norms and biases too; the rest untouched; undone to the bit; by file and on disk too."""
    model = zoo.build(family, dtype=dtype)
    model.save_pretrained(tmp_path / "model")
    view, folder = ModelView.open(model), twin(model, tmp_path / "earlier", wild=True)
    earlier, before = ModelView.open(folder, prove=False), tensors(view)
    old = tensors(earlier)
    edit = LayerRewind(earlier=folder, layers=(1,))(view, Request())
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert loaded.digest == edit.digest
    inside, start = 0, f"{view.row.blocks}.1."
    with loaded.apply(view):
        for name, found in tensors(view).items():
            wanted = old[name] if name.startswith(start) else before[name]
            inside += name.startswith(start)
            assert torch.equal(bits(found), bits(wanted)), name
        edited = view.digest
    assert inside == len(list(view.block(1).parameters()))
    assert all(torch.equal(bits(found), bits(before[name])) for name, found in tensors(view).items())
    apply_edit(loaded, tmp_path / "model", tmp_path / "edited")
    assert ModelView.open(str(tmp_path / "edited"), prove=False).digest == edited
    undo_edit(loaded, tmp_path / "edited", tmp_path / "back")
    assert ModelView.open(str(tmp_path / "back")).digest == view.digest


def test_a_difference_alone_would_miss_the_earlier_bits(tmp_path):
    """The control: without the bits kept beside it, float32 weights that shrank come out as others."""
    model = zoo.build("gpt2")
    view, folder = ModelView.open(model), twin(model, tmp_path / "earlier", wild=True)
    edit = LayerRewind(earlier=folder, layers=(1,), kinds="mlp.out")(view, Request())
    site = Site(1, Kind.MLP_OUT)
    plain = Edit.of(view, edit.deltas, edit.provenance)
    assert plain.digest != edit.digest
    meant = ModelView.open(folder, prove=False).weight(site)
    with plain.apply(view):
        assert 0.1 < float((view.weight(site) != meant).float().mean()) < 1
    with edit.apply(view):
        assert torch.equal(view.weight(site), meant)


def test_exact_bits_survive_another_rounding(tmp_path):
    model = zoo.build("llama", dtype=torch.bfloat16)
    view, folder = ModelView.open(model), twin(model, tmp_path / "earlier", wild=True)
    edit = LayerRewind(earlier=folder, layers=(0,), kinds="mlp.gate")(view, Request())
    site = Site(0, Kind.MLP_GATE)
    assert edit.touched[site].exact
    with edit.rebased(view).apply(view):
        assert torch.equal(bits(view.weight(site)), bits(ModelView.open(folder, prove=False).weight(site)))


def test_a_checkpoint_of_another_dtype_is_cast_once(tmp_path):
    model = zoo.build("llama", dtype=torch.float16)
    view = ModelView.open(model)
    folder = twin(copy.deepcopy(model).double(), tmp_path / "earlier")
    old = load_file(Path(folder) / "model.safetensors")
    with LayerRewind(earlier=folder, layers=(2,))(view, Request()).apply(view):
        found = view.weight(Site(2, Kind.MLP_IN))
        assert torch.equal(found, old["model.layers.2.mlp.up_proj.weight"].half())


@pytest.mark.parametrize("grain", ["component", "layer", "weight", "neuron", "head"])
def test_a_selection_is_put_back_and_nothing_else(grain, tmp_path):
    model = zoo.build("qwen3")
    view, folder = ModelView.open(model), twin(model, tmp_path / "earlier")
    earlier = ModelView.open(folder, prove=False)
    if grain == "layer":
        chosen = Random(grain="component", kinds="mlp.out")(view, FORGET).top(1)
        chosen = type(chosen)(Grain.LAYER, chosen.masks, chosen.provenance)
    else:
        chosen = Random(grain=grain)(view, FORGET).top(fraction=0.3)
    edit = LayerRewind(earlier=folder)(view, Request(selection=chosen))
    with edit.apply(view):
        for site in every_site(view):
            found, old = view.weight(site), earlier.weight(site)
            if site not in edit.deltas:
                assert torch.equal(found, edit_free(view, site, edit))
                continue
            delta = edit.deltas[site]
            where = torch.ones_like(found, dtype=torch.bool)
            if isinstance(delta, Sparse):
                where = torch.zeros(found.numel(), dtype=torch.bool)
                where[delta.index] = True
                where = where.view(found.shape)
            assert torch.equal(found[where], old[where])
    if grain == "layer":
        (layer,) = {site.layer for site in edit.deltas}
        assert {site for site in edit.deltas} == {s for s in every_site(view) if s.layer == layer}


def edit_free(view, site, edit):
    """A weight the edit does not name, as a fresh model has it."""
    return ModelView.open(zoo.build("qwen3"), prove=False).weight(site)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "bloom", "falcon_new", "opt"])
def test_a_fused_model_is_the_weighted_sum_of_every_parameter(family, tmp_path):
    model = zoo.build(family)
    view, folder = ModelView.open(model), twin(model, tmp_path / "other")
    other, before = tensors(ModelView.open(folder, prove=False)), tensors(view)
    edit = Fuse(others=(folder,), weights=(0.3, 0.7))(view, Request())
    with edit.apply(view):
        for name, found in tensors(view).items():
            wanted = 0.3 * before[name].double() + 0.7 * other[name].double()
            assert_close(found.double(), wanted, atol=1e-6, rtol=1e-6, msg=name)
    assert all(torch.equal(found, before[name]) for name, found in tensors(view).items())


def test_three_fuse_alike_and_the_geometric_mean_keeps_signs(tmp_path):
    model = zoo.build("llama")
    view = ModelView.open(model)
    folders = (twin(model, tmp_path / "a"), twin(model, tmp_path / "b", wild=True))
    parts = [tensors(view), *(tensors(ModelView.open(folder, prove=False)) for folder in folders)]
    edits = [Fuse(others=folders, mean=mean)(view, Request()) for mean in ("arithmetic", "geometric")]
    for edit, mean in zip(edits, ("arithmetic", "geometric"), strict=True):
        with edit.apply(view):
            for name, found in tensors(view).items():
                stack = torch.stack([part[name].double() for part in parts])
                wanted = stack.mean(0)
                if mean == "geometric":
                    wanted = wanted.sign() * stack.abs().prod(0) ** (1 / 3)
                assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)
    assert edits[0].digest != edits[1].digest


def test_a_tied_embedding_is_fused_once_and_under_both_names(tmp_path):
    model = zoo.build("gpt2")
    model.save_pretrained(tmp_path / "model")
    view, folder = ModelView.open(model), twin(model, tmp_path / "other")
    edit = Fuse(others=(folder,))(view, Request())
    embed = Site(OUTSIDE, Kind.EMBED)
    assert embed in edit.deltas and Site(OUTSIDE, Kind.UNEMBED) not in edit.deltas
    with edit.apply(view):
        assert model.lm_head.weight is model.transformer.wte.weight
        edited = view.digest
    with pytest.raises(ModelError, match="one tensor, tied; an edit of one would be an edit of both"):
        Edit.of(view, {embed: edit.deltas[embed]}, Provenance("by hand"))
    apply_edit(edit, tmp_path / "model", tmp_path / "fused")
    assert ModelView.open(str(tmp_path / "fused")).digest == edited


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_task_vector_is_a_multiple_of_the_difference(dtype, tmp_path):
    model = zoo.build("gpt2", dtype=dtype)
    view, folder = ModelView.open(model), twin(model, tmp_path / "tuned")
    before, tuned = tensors(view), tensors(ModelView.open(folder, prove=False))
    for editor, sign in ((TaskVector(finetuned=folder, scale=-0.5), -0.5), (TaskVector(base=folder, scale=0.5), -0.5)):
        with editor(view, Request()).apply(view):
            for name, found in tensors(view).items():
                wanted = (before[name].double() + sign * (tuned[name].double() - before[name].double())).to(dtype)
                eps = torch.finfo(dtype).eps
                assert_close(found, wanted, atol=eps, rtol=2 * eps)
    both = twin(zoo.build("gpt2", dtype=dtype, seed=3), tmp_path / "third")
    edit = TaskVector(finetuned=folder, base=both, scale=0.25)(view, Request())
    site = Site(1, Kind.MLP_OUT)
    wide = {entry: ModelView.open(entry, prove=False).weight(site).double() for entry in (folder, both)}
    assert_close(edit.deltas[site].dense().double(), 0.25 * (wide[folder] - wide[both]), atol=1e-6, rtol=1e-5)


def test_to_take_all_of_it_back_is_to_be_the_base(tmp_path):
    model = zoo.build("llama")
    view, folder = ModelView.open(model), twin(model, tmp_path / "base")
    base = tensors(ModelView.open(folder, prove=False))
    with TaskVector(base=folder)(view, Request()).apply(view):
        for name, found in tensors(view).items():
            assert_close(found, base[name], atol=1e-6, rtol=1e-5)


def test_a_merged_adapter_leaves_factors_and_a_few_entries_stay_few():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 90, generator=generator)
    factors = torch.randn(60, 3, generator=generator) @ torch.randn(3, 90, generator=generator)
    merged = smallest((weight + factors).double() - weight.double(), weight)
    assert isinstance(merged, LowRank) and merged.rank == 3
    assert_close(merged.dense(), factors, atol=1e-5, rtol=1e-4)
    assert isinstance(smallest(torch.randn(60, 90, generator=generator), weight), Dense)
    few = torch.zeros(60, 90)
    few[3, 5], few[50, 80] = 1.0, -2.0
    assert isinstance(smallest(few, weight), Sparse) and smallest(few, weight).touched == 2
    assert_close(smallest(few, weight).dense(), few)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "falcon", "olmo2"])
def test_norms_without_gains_only_normalize(family, tmp_path):
    """What the maps of a block read is then the bare norm's output, by plain arithmetic; other blocks keep theirs."""
    view = ModelView.open(zoo.build(family))
    edit = LayernormRemoval(layers=(1,))(view, Request())
    norms = {site for site in edit.deltas if not site.bias}
    assert norms and {site.layer for site in edit.deltas} == {1} and all(site.kind.is_norm for site in edit.deltas)
    batch = pad([item.ids for item in zoo.passages(2, ragged=False)], device=view.device)
    with edit.apply(view), torch.no_grad():
        for site in norms:
            assert torch.equal(view.weight(site), torch.full_like(view.weight(site), 1 - view.row.norm_offset))
            with view.record([site]) as entering, view.record([site], side="output") as leaving:
                view.hidden(batch)
            stream, found = entering[site].double(), leaving[site].double()
            if view.has(Site(site.layer, site.kind, bias=True)):
                stream = stream - stream.mean(-1, keepdim=True)
            assert_close(found, stream / (stream.square().mean(-1, keepdim=True) + 1e-5).sqrt(), atol=1e-3, rtol=1e-3)


def test_norms_are_chosen_by_kind_and_layer(view_of):
    view = view_of("gpt2")
    edit = LayernormRemoval(kinds="norm,mlp.norm", biases=False)(view, Request())
    assert {str(site) for site in edit.deltas} == {"norm", *(f"L{layer}.mlp.norm" for layer in range(3))}
    edit = LayernormRemoval(kinds="attn.norm", gains=False, layers=(2,))(view, Request())
    assert [str(site) for site in edit.deltas] == ["L2.attn.norm.bias"]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda _: LayerRewind(), "no earlier checkpoint; name its folder"),
        (lambda _: Fuse(), "no other checkpoint; name their folders"),
        (lambda _: TaskVector(), "no checkpoint; name the folder of `finetuned`"),
        (lambda _: TaskVector(scale=0), "scale 0 changes nothing"),
        (lambda folder: Fuse(others=(folder,), weights=(1.0,)), "1 weights for the model and 1 others"),
        (lambda folder: Fuse(others=(folder,), weights=(1.0, 1.0)), "weights sum to 2, not 1"),
        (lambda folder: LayerRewind(earlier=folder, layers=(7,)), "layer 7: the model has 3"),
        (lambda folder: LayerRewind(earlier=folder), "has the model's own weights there; nothing is put back"),
        (lambda folder: Fuse(others=(folder,)), "own weights there; there is nothing to do"),
        (lambda folder: TaskVector(finetuned=folder), "the same weights there; there is no difference"),
        (lambda _: LayernormRemoval(kinds="mlp.in"), "no norm called 'mlp.in'; norms: attn.norm"),
        (lambda _: LayernormRemoval(layers=(9,)), "layer 9: the model has 3"),
        (lambda _: LayernormRemoval(kinds="attn.outnorm"), "GPT-2: attn.outnorm have no gains or biases"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(make, told, view_of, tmp_path):
    view = view_of("gpt2")
    view.model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=told):
        make(str(tmp_path))(view, Request())


@pytest.mark.parametrize(
    "editor", [lambda f: LayerRewind(earlier=f), lambda f: Fuse(others=(f,)), lambda f: TaskVector(finetuned=f)]
)
def test_checkpoints_that_do_not_fit_are_refused_in_a_line(editor, view_of, tmp_path):
    view = view_of("llama")
    with pytest.raises(CheckpointError, match="no such folder"):
        editor(str(tmp_path / "none"))(view, Request())
    zoo.build("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(MismatchError, match="model_type is 'gpt2', the model's is 'llama'"):
        editor(str(tmp_path / "gpt2"))(view, Request())
    zoo.build("llama", intermediate_size=39).save_pretrained(tmp_path / "wider")
    with pytest.raises(MismatchError, match="intermediate_size is 39, the model's is 37"):
        editor(str(tmp_path / "wider"))(view, Request())
    folder = Path(twin(view.model, tmp_path / "damaged"))
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][2, 3] = torch.nan
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight is quantised or holds values that are"):
        editor(str(folder))(view, Request())


def test_another_vocabulary_and_an_untied_embedding_are_refused(view_of, tmp_path):
    view = view_of("gpt2")
    folder = Path(twin(view.model, tmp_path / "other"))
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, "lm_head.weight": stored["transformer.wte.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(MismatchError, match="the model ties them; untie it first"):
        open_other(view, str(folder))
    longer = torch.cat([stored["transformer.wte.weight"]] * 2)
    save_file({**stored, "transformer.wte.weight": longer}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": len(longer)}))
    with pytest.raises(MismatchError, match=r"wte\.weight is \[106, 24\], the model's is \[53, 24\]"):
        list(read_weights(view, [open_other(view, str(folder))], [Site(OUTSIDE, Kind.EMBED)]))
