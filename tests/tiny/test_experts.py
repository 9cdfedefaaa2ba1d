"""Mixtures of experts: every expert's neuron is read where it is, changed alone, and written where it is kept."""

import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file
from torch.testing import assert_close

from editors.base import Request
from editors.checks import check_editor, state
from editors.deltas import Dense, LowRank, Sparse, by_expert
from editors.edit import Edit
from editors.hook_form import as_if
from editors.pruners.neuron_dropout import NeuronDropout
from editors.shipping.checkpoint import apply_edit, undo_edit
from editors.shipping.export import export_adapter
from memloc import architectures
from memloc.batches import pad
from memloc.errors import CheckpointError, InputError, ModelError
from memloc.provenance import Provenance
from memloc.scores import selected
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView

EXPERTS, WIDE, CHOSEN = 5, 13, 2
OUT, INTO, GATE = (Site(2, kind) for kind in (Kind.MLP_OUT, Kind.MLP_IN, Kind.MLP_GATE))
BY_HAND = Provenance("by hand")
every_mixture = pytest.mark.parametrize("family", zoo.MIXTURES)
both_mixtures = pytest.mark.parametrize("family", zoo.MIXTURES[:2])


def batch_of(rows=3, tokens=7, seed=3):
    return pad(torch.randint(zoo.VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed)).tolist())


def slow_block(model, layer, stream):
    """A mixture by its definition, token by token, in float64: neurons [tokens, experts, wide], and what is added."""
    block = model.model.layers[layer].mlp
    into, out, router = (
        p.detach().double() for p in (block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight)
    )
    neurons = torch.zeros(len(stream), EXPERTS, WIDE, dtype=torch.float64)
    added = torch.zeros(len(stream), out.shape[1], dtype=torch.float64)
    for token, x in enumerate(stream.double()):
        shares = (router @ x).softmax(0)
        best = shares.argsort(descending=True)[:CHOSEN].tolist()
        total = 1.0 if model.config.model_type != "mixtral" else float(sum(shares[expert] for expert in best))
        for expert in best:
            gate, passed = into[expert, :WIDE] @ x, into[expert, WIDE:] @ x
            neurons[token, expert] = shares[expert] / total * gate * gate.sigmoid() * passed
            added[token] += out[expert] @ neurons[token, expert]
    return neurons, added


@every_mixture
def test_neurons_are_those_of_the_definition(family):
    view, batch = ModelView.open(zoo.build(family, dtype=torch.float64)), batch_of()
    with (
        torch.no_grad(),
        view.record([OUT, INTO, *view.expert_sites(Kind.MLP_OUT)]) as into,
        view.record([OUT], side="output") as out,
        view.record_routing([2]) as routed,
    ):
        view.logits(batch)
    neurons, added = slow_block(view.model, 2, into[INTO].flatten(0, 1))
    assert_close(into[OUT].flatten(0, 1), neurons.flatten(1))
    assert_close(out[OUT].flatten(0, 1), added)
    assert ((routed[2] > 0).sum(-1) == CHOSEN).all()
    for expert in range(EXPERTS):
        assert torch.equal(
            into[OUT.of(expert)].flatten(0, 1), into[OUT].flatten(0, 1)[:, expert * WIDE : (expert + 1) * WIDE]
        )


@every_mixture
def test_an_experts_sides_add_up_to_the_block(family):
    view, batch = ModelView.open(zoo.build(family, dtype=torch.float64)), batch_of()
    mine = [OUT.of(expert) for expert in range(EXPERTS)]
    with torch.no_grad(), view.record(mine) as read, view.record([*mine, OUT], side="output") as said:
        view.logits(batch)
    for site in mine:
        assert_close(read[site] @ view.weight(site).T, said[site])
    assert_close(sum(said[site] for site in mine), said[OUT])


@both_mixtures
def test_who_looks_changes_nothing(family):
    model, batch = zoo.build(family), batch_of()
    view = ModelView.open(model)
    before, forwards = state(view), [module.forward for module in model.modules()]
    with torch.no_grad():
        plain = view.logits(batch)
        with view.record([OUT, GATE, INTO.of(3)]), view.record([INTO, OUT.of(1)], side="output"):
            assert torch.equal(view.logits(batch), plain)
    with pytest.raises(ZeroDivisionError), view.replace([OUT], lambda *_: 1 / 0):
        view.logits(batch)
    assert [module.forward for module in model.modules()] == forwards
    assert not any("forward" in vars(module) for module in model.modules())
    assert state(view) == before


@both_mixtures
@pytest.mark.parametrize("way", ("eager", "batched_mm", "grouped_mm"))
def test_all_ways_to_multiply_experts_agree(family, way):
    sizes = {"intermediate_size": 16} if family == "mixtral" else {"moe_intermediate_size": 16, "intermediate_size": 80}
    model, batch = zoo.build(family, **sizes), batch_of()
    with torch.no_grad():
        wanted = model(batch.ids).logits
        model.set_experts_implementation(way)
        view = ModelView.open(model)
        with view.replace([OUT], lambda _, neurons: neurons.clone()), view.record([OUT]) as seen:
            found = view.logits(batch)
        with view.record([OUT]) as plain:
            view.logits(batch)
    assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert_close(seen[OUT], plain[OUT], atol=1e-5, rtol=1e-5)
    assert model.config._experts_implementation == way


@both_mixtures
@pytest.mark.parametrize("expert", (None, 3))
def test_a_silenced_neuron_is_a_column_of_zeros(family, expert):
    view, batch = ModelView.open(zoo.build(family, dtype=torch.float64)), batch_of()
    site, neuron = (OUT, 3 * WIDE + 4) if expert is None else (OUT.of(expert), 4)

    def silence(_, neurons):
        return neurons.index_fill(-1, torch.tensor([neuron]), 0.0)

    with torch.no_grad():
        plain = view.logits(batch)
        with view.replace([site], silence):
            hooked = view.logits(batch)
        sizes = {site: view.weight(site).shape[1]}
        edit = NeuronDropout()(view, Request(selection=selected({site: [neuron]}, sizes, Grain.NEURON)))
        with edit.apply(view):
            edited = view.logits(batch)
    assert list(edit.deltas) == [OUT.of(3)]
    assert_close(hooked, edited)
    assert float((plain - edited).abs().max()) > 1e-3


@both_mixtures
def test_gradients_by_neurons_are_those_of_differences(family):
    view, batch = ModelView.open(zoo.build(family, dtype=torch.float64)), batch_of()
    with view.frozen(), view.record([OUT, INTO.of(1)], grad=True) as seen:
        view.logits(batch)[..., 5].sum().backward()
    neurons, gradient = seen[OUT].detach(), seen[OUT].grad
    for place in (neurons.nonzero()[0], (neurons == 0).nonzero()[0]):
        moved = one_at(neurons, tuple(place.tolist()))
        ends = []
        # The norms of these families are float32 in every dtype: a smaller step would be lost in their rounding.
        for step in (1e-2, -1e-2):
            with torch.no_grad(), view.replace([OUT], lambda _, t, change=step * moved: t + change):
                ends.append(view.logits(batch)[..., 5].sum())
        assert_close((ends[0] - ends[1]) / 2e-2, (gradient * moved).sum(), rtol=2e-3, atol=1e-4)


def one_at(tensor, place):
    found = torch.zeros_like(tensor)
    found[place] = 1.0
    return found


def test_experts_weights_are_views_and_joined_they_are_one_map(view_of):
    view = view_of("mixtral")
    stored = view.parameter(INTO)
    for expert in range(EXPERTS):
        assert view.weight(INTO.of(expert)).data_ptr() == stored[expert, WIDE:].data_ptr()
        assert torch.equal(view.weight(OUT)[:, expert * WIDE : (expert + 1) * WIDE], view.weight(OUT.of(expert)))
        assert torch.equal(view.weight(GATE)[expert * WIDE : (expert + 1) * WIDE], view.weight(GATE.of(expert)))
    for site in (OUT, GATE, INTO, INTO.of(2), OUT.of(4)):
        value = torch.randn(view.weight(site).shape)
        into = torch.zeros_like(view.parameter(site))
        view.place(site).write(into, value)
        assert torch.equal(view.place(site).read(into), value)
        assert int((into != 0).sum()) == value.numel()
        assert architectures.Place.from_json(view.place(site).to_json()) == view.place(site)


@pytest.mark.parametrize("columns", (True, False))
def test_a_joint_delta_is_its_experts_deltas_side_by_side(columns):
    shape = (7, EXPERTS * 3) if columns else (EXPERTS * 3, 7)
    dense = torch.randn(shape).where(torch.rand(shape) < 0.4, 0)
    low = LowRank(torch.randn(shape[0], 2), torch.randn(2, shape[1]))
    for delta in (Dense(dense), Sparse.of(dense), low):
        parts = [part.dense() for part in by_expert(delta, EXPERTS, columns=columns)]
        assert_close(torch.cat(parts, 1 if columns else 0), delta.dense())


def test_the_proof_notices_a_gate_taken_for_what_it_gates(monkeypatch):
    """The control: rows swapped in one parameter is the mistake a table of layouts makes."""
    monkeypatch.setattr(architectures.Place, "read", swapped(architectures.Place.read))
    with pytest.raises(ModelError, match=r"L0\.mlp\.(gate|in): output differs by .* from input @ weight\.T"):
        ModelView.open(zoo.build("mixtral"))


def swapped(read):
    def other(place, stored):
        if place.joined == "rows":
            width = stored.shape[1] // 2
            stored = torch.cat([stored[:, width:], stored[:, :width]], 1)
        return read(place, stored)

    return other


def test_a_dense_block_between_is_read_as_one(view_of):
    view = view_of("qwen3_moe")
    assert [view.experts(layer) for layer in range(3)] == [EXPERTS, 0, EXPERTS]
    assert view.expert_sites(Kind.MLP_OUT) == tuple(
        Site(layer, Kind.MLP_OUT).of(e) for layer in (0, 2) for e in range(EXPERTS)
    )
    assert not view.has(Site(1, Kind.MLP_ROUTER)) and view.has(Site(2, Kind.MLP_ROUTER))
    with pytest.raises(InputError, match=r"L1\.mlp\.out\.E0: not in .* with 0 experts in layer 1"):
        view.weight(Site(1, Kind.MLP_OUT, expert=0))


def test_blocks_of_unequal_widths_are_read_and_what_needs_one_number_says_so():
    view = ModelView.open(zoo.build("qwen3_moe", intermediate_size=31))
    assert view.widths == (65, 31, 65)
    with torch.no_grad(), view.record(view.sites(Kind.MLP_OUT)) as seen:
        view.logits(batch_of())
    assert [tensor.shape[-1] for tensor in seen.values()] == [65, 31, 65]
    with pytest.raises(ModelError, match=r"blocks of 31 to 65 neurons \(dense, and mixtures of experts\)"):
        _ = view.neurons


@pytest.mark.parametrize(
    ("name", "words"),
    (
        ("L2.attn.out.E1", "experts are counted from 0 and have mlp.gate, mlp.in and mlp.out"),
        ("L2.mlp.router.E1", "experts are counted from 0"),
        ("L2.mlp.out.E", "no site called"),
        ("L2.mlp.out.e1", "no site called"),
    ),
)
def test_what_is_no_experts_site_is_refused(name, words):
    with pytest.raises(InputError, match=words):
        Site.parse(name)


def test_experts_sites_print_as_they_are_read_and_sort_behind_the_joint_one():
    site = Site.parse("L2.mlp.out.E11")
    assert site == Site(2, Kind.MLP_OUT, expert=11) and str(site) == "L2.mlp.out.E11" and site.joint == OUT
    assert sorted([site, OUT, OUT.of(3)]) == [OUT, OUT.of(3), site]


def test_the_router_is_read_and_not_replaced(view_of):
    view = view_of("mixtral")
    router = Site(2, Kind.MLP_ROUTER)
    with torch.no_grad(), view.record([router]) as read, view.record([router], side="output") as said:
        view.logits(batch_of())
    assert_close(read[router] @ view.weight(router).T, said[router])
    for asked in (
        lambda: view.replace([router], None, side="output"),
        lambda: view.record([router], side="output", grad=True),
    ):
        with pytest.raises(InputError, match=r"L2\.mlp\.router: what a router puts out can only be read"):
            asked()


def test_a_model_that_cannot_run_says_what_to_do():
    model = zoo.build("mixtral", dtype=torch.float64)
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(ModelError, match=r"its own forward pass fails .*set_experts_implementation\('eager'\)"):
        ModelView.open(model)


@both_mixtures
def test_the_hook_form_of_an_edit_of_experts_is_the_edit(family):
    view, batch = ModelView.open(zoo.build(family, dtype=torch.float64)), batch_of()
    edit = Edit.of(view, changes(view), BY_HAND)
    with torch.no_grad():
        plain = view.logits(batch)
        with as_if(view, edit.deltas):
            hooked = view.logits(batch)
        with edit.apply(view):
            edited = view.logits(batch)
    assert_close(hooked, edited, atol=1e-5, rtol=1e-5)
    assert float((plain - edited).abs().max()) > 1e-2


def changes(view, *, size=0.3):
    """Of two experts: one map of low rank, the two halves of one parameter, and a dense map outside."""
    generator = torch.Generator().manual_seed(1)

    def low(site):
        out, into = view.weight(site).shape
        return LowRank(
            size * torch.randn(out, 2, generator=generator), size * torch.randn(2, into, generator=generator)
        )

    return {
        site: low(site)
        for site in (OUT.of(1), INTO.of(3), GATE.of(3), Site(0, Kind.MLP_OUT, expert=4), Site(1, Kind.ATTN_OUT))
    }


@both_mixtures
@pytest.mark.parametrize("own_layout", (True, False), ids=("by expert", "stacked"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_an_edit_goes_to_the_tensors_that_hold_it_and_back(family, own_layout, dtype, tmp_path):
    model = zoo.build(family, dtype=dtype)
    model.save_pretrained(tmp_path / "base", save_original_format=own_layout, max_shard_size="40KB")
    view = ModelView.open(tmp_path / "base")
    edit = Edit.of(view, changes(view), BY_HAND)
    edit.save(tmp_path / "kept.edit.safetensors")
    edit = Edit.load(tmp_path / "kept.edit.safetensors")
    written = apply_edit(edit, tmp_path / "base", tmp_path / "new")
    undo_edit(edit, tmp_path / "new", tmp_path / "back")
    before, after, back = (tensors(tmp_path / name) for name in ("base", "new", "back"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name.partition("[")[0] for name in written.tensors}
    assert len(changed) == (5 if own_layout else 4)
    for path in (tmp_path / "base").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()
        touched = any(name in load_file(path) for name in changed)
        assert (path.read_bytes() == (tmp_path / "new" / path.name).read_bytes()) is not touched
    reloaded = state(ModelView.open(tmp_path / "new"))
    with edit.apply(view):
        assert state(view) == reloaded
    assert before.keys() == back.keys()


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def test_a_folder_of_other_experts_is_refused(tmp_path):
    zoo.build("mixtral").save_pretrained(tmp_path / "base")
    zoo.build("mixtral", num_local_experts=4).save_pretrained(tmp_path / "fewer", save_original_format=False)
    view = ModelView.open(tmp_path / "base")
    edit = Edit.of(view, {Site(0, Kind.MLP_OUT, expert=4): Dense(torch.ones(24, WIDE))}, BY_HAND)
    with pytest.raises(CheckpointError, match=r"down_proj is \[4, 24, 13\], it holds no expert 4; nothing was written"):
        apply_edit(edit, tmp_path / "fewer", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@both_mixtures
@pytest.mark.parametrize("both", (False, True), ids=("out of experts", "into and out of experts"))
def test_peft_gives_the_logits_of_the_edited_model(family, both, tmp_path):
    peft = pytest.importorskip("peft")
    zoo.build(family).save_pretrained(tmp_path / "base")
    view, batch = ModelView.open(tmp_path / "base"), batch_of()
    asked = changes(view, size=0.1)
    edit = Edit.of(view, asked if both else {s: d for s, d in asked.items() if s.kind is Kind.MLP_OUT}, BY_HAND)
    export_adapter(edit, tmp_path / "base", tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    base.set_experts_implementation("eager")
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        plain, found = view.logits(batch), wrapped(batch.ids).logits
        with edit.apply(view):
            wanted = view.logits(batch)
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert float((plain - wanted).abs().max()) > 1e-3


def test_dropout_of_one_experts_neurons_passes_the_battery(tmp_path):
    view = ModelView.open(zoo.build("mixtral"))
    chosen = selected({OUT.of(2): [0, 7]}, {OUT.of(2): WIDE, OUT.of(3): WIDE}, Grain.NEURON)
    check_editor(NeuronDropout(), view, Request(selection=chosen), tmp_path)


@pytest.mark.parametrize("engine", ("nnsight", "transformer-lens"))
def test_other_engines_read_heads_and_refuse_the_inside_of_experts(engine):
    pytest.importorskip("nnsight" if engine == "nnsight" else "transformer_lens")
    model = zoo.build("mixtral")
    try:
        view = ModelView.open(model, engine=engine)
    except ModelError as error:
        assert "\n" not in str(error)
        return
    words = "the inside of a module of experts is visited by plain hooks only"
    with pytest.raises(ModelError, match=words), view.record([OUT]):
        view.logits(batch_of())
