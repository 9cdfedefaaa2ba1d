from __future__ import annotations

import json

import pytest
import torch
from small_models import DTYPES, FORMS, OUT, bits, build, delta_for, deltas_for, look
from torch.testing import assert_close

from editors.deltas import Dense, LowRank, Sparse
from editors.edit import Edit
from memloc import store
from memloc.errors import ArtifactError, InputError, MismatchError, ModelError
from memloc.provenance import Provenance
from memloc.sites import OUTSIDE, Kind, Site

BY = Provenance("by hand", {"strength": 2}, 3, {"model": "abc"})
QKV = tuple(Site(0, kind) for kind in (Kind.ATTN_Q, Kind.ATTN_K, Kind.ATTN_V))


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def typed(request):
    return look(build("gpt2", request.param))


@pytest.fixture(scope="module")
def view():
    return look(build())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-4, 0.05, 30.0])
def test_apply_adds_and_undo_gives_every_bit_back(typed, form, rounding, scale):
    before, weight = bits(typed.model), typed.weight(OUT).detach().double().clone()
    edit = Edit.of(typed, deltas_for(typed, OUT, form=form, scale=scale), BY, rounding=rounding, rounding_seed=5)
    assert bits(typed.model) == before, "making an edit must not write"
    with edit.apply(typed) as applied:
        wanted = weight + edit.deltas[OUT].dense().double()
        spacing = torch.finfo(typed.dtype).eps * wanted.abs().clamp(min=1e-3) + 1e-7
        assert bool(((typed.weight(OUT).double() - wanted).abs() <= spacing).all())
        assert {name for name, data in bits(typed.model).items() if data != before[name]} == {
            "transformer.h.1.mlp.c_proj.weight"
        }
        assert applied.survived[OUT].asked == int((edit.deltas[OUT].dense() != 0).sum())
    assert bits(typed.model) == before


def test_the_way_back_is_what_restores_the_bits(view):
    """The control: without the repair, subtracting the delta leaves other bits."""
    edit = Edit.of(view, deltas_for(view, OUT, scale=30.0), BY)
    assert edit.touched[OUT].way_back
    stored = view.parameter(OUT).detach().clone()
    edit.change(stored, [OUT])
    naive = stored - edit.deltas[OUT].dense().T
    assert not torch.equal(naive, view.parameter(OUT))
    edit.change_back(stored, [OUT])
    assert torch.equal(stored, view.parameter(OUT))


@pytest.mark.parametrize("family", ["gpt2", "neox", "llama"])
def test_sites_of_one_fused_matrix_are_edited_together(family):
    view = look(build(family))
    before = bits(view.model)
    weights = {site: view.weight(site).detach().clone() for site in QKV}
    edit = Edit.of(view, {**deltas_for(view, *QKV[:2]), **deltas_for(view, QKV[2], form="sparse")}, BY)
    assert len(edit.parameters) == (3 if family == "llama" else 1)
    with edit.apply(view):
        for site in QKV:
            assert_close(view.weight(site), weights[site] + edit.deltas[site].dense())
    assert bits(view.model) == before


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("kind", [Kind.MLP_OUT, Kind.ATTN_K])
def test_a_bias_is_edited_like_a_weight(view, form, kind):
    site = Site(0, kind, bias=True)
    before, bias = bits(view.model), view.weight(site).detach().clone()
    edit = Edit.of(view, deltas_for(view, site, form=form), BY)
    with edit.apply(view):
        assert_close(view.weight(site), bias + edit.deltas[site].dense())
        assert not torch.equal(view.weight(site), bias)
    assert bits(view.model) == before
    with pytest.raises(InputError, match=r"L0.*bias takes a dense or sparse"):
        Edit.of(view, {site: LowRank(torch.ones(15, 1), torch.ones(1, 1))}, BY)


def test_entries_whose_delta_is_zero_keep_their_bits_even_minus_zero():
    view = look(build())
    with torch.no_grad():
        view.weight(OUT)[0].fill_(-0.0)
    change = torch.zeros(15, 22)
    change[3] = 1.0
    before = view.weight(OUT).detach().clone().view(torch.int32)
    with Edit.of(view, {OUT: Dense(change)}, BY).apply(view):
        now = view.weight(OUT).detach().contiguous().view(torch.int32)
        assert sorted((now != before).any(1).nonzero().reshape(-1).tolist()) == [3]


def test_applying_twice_or_to_another_model_is_refused(view):
    edit = Edit.of(view, deltas_for(view, OUT), BY)
    with edit.apply(view):
        now = bits(view.model)
        with pytest.raises(MismatchError, match=r"L1\.mlp\.out: this edit is already applied to the model"):
            edit.apply(view)
        assert bits(view.model) == now
    with pytest.raises(MismatchError, match=r"L1\.mlp\.out: the model holds .* with digest .* was made for"):
        edit.apply(look(build(seed=1)))
    with pytest.raises(MismatchError, match=r"as BF16 \[22, 15\], the edit was made for F32 \[22, 15\]"):
        edit.apply(look(build(dtype=torch.bfloat16)))
    with pytest.raises(MismatchError, match="another family"):
        edit.apply(look(build("llama")))


def test_undo_refuses_weights_that_were_changed_since_and_edits_nest():
    view = look(build())
    before = bits(view.model)
    first = Edit.of(view, deltas_for(view, OUT), BY).apply(view)
    second = Edit.of(view, deltas_for(view, OUT, seed=9), BY).apply(view)
    with pytest.raises(MismatchError, match="undo what came after it first"):
        first.undo()
    second.undo()
    first.undo()
    first.undo()
    assert bits(view.model) == before


def test_the_edit_is_taken_out_when_the_block_fails(view):
    before = bits(view.model)
    with pytest.raises(KeyError), Edit.of(view, deltas_for(view, OUT), BY).apply(view):
        raise KeyError
    assert bits(view.model) == before


def test_aliases_see_the_edit_and_gradients_stay_allowed(view):
    alias, address = view.parameter(OUT).data, view.parameter(OUT).data_ptr()
    held = alias.clone()
    with Edit.of(view, deltas_for(view, OUT), BY).apply(view):
        assert not torch.equal(alias, held)
        assert view.parameter(OUT).data_ptr() == address
        assert view.parameter(OUT).requires_grad


def test_nothing_is_written_when_one_of_two_weights_would_overflow():
    view = look(build(dtype=torch.float16))
    before = bits(view.model)
    first, last = Site(0, Kind.MLP_OUT), OUT
    fine = delta_for((15, 22), "low-rank")
    with pytest.raises(ModelError, match=r"L1\.mlp\.out: old \+ delta does not fit F16; nothing was changed"):
        Edit.of(view, {first: fine, last: Dense(torch.full((15, 22), 1e6))}, BY)
    with pytest.raises(ModelError, match=r"L1\.mlp\.out: the delta holds values"):
        Edit.of(view, {last: LowRank(torch.full((15, 1), 1e30), torch.full((1, 22), 1e30))}, BY)
    assert bits(view.model) == before


def test_weights_that_are_not_finite_are_named():
    view = look(build())
    with torch.no_grad():
        view.weight(OUT)[2, 3] = float("nan")
    with pytest.raises(ModelError, match=r"L1\.mlp\.out: the weight holds values that are not finite"):
        Edit.of(view, deltas_for(view, OUT), BY)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_the_weights_as_they_were(error, monkeypatch):
    view = look(build())
    before = bits(view.model)
    edit = Edit.of(view, deltas_for(view, Site(0, Kind.MLP_OUT), Site(0, Kind.MLP_IN), OUT), BY)
    calls, real = [], torch.Tensor.copy_

    def breaking(self, *args, **kwargs):
        calls.append(self)
        found = real(self, *args, **kwargs)
        if len(calls) == 2:
            raise error
        return found

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(torch.Tensor, "copy_", breaking)
        edit.apply(view)
    assert len(calls) == 4, "two writes, two rollbacks"
    assert bits(view.model) == before


def test_half_of_a_tied_pair_is_refused_with_both_names():
    site = Site(OUTSIDE, Kind.UNEMBED)
    change = {site: Dense(torch.ones(37, 15))}
    with pytest.raises(ModelError, match=r"transformer\.wte\.weight and lm_head\.weight are one tensor"):
        Edit.of(look(build()), change, BY)
    free = look(build(tied=False))
    with Edit.of(free, change, BY).apply(free):
        assert not torch.equal(free.weight(site), free.weight(Site(OUTSIDE, Kind.EMBED)))


def test_quantised_and_offloaded_weights_are_refused(view):
    other = look(build())
    holder = other.module(OUT)
    holder.weight = torch.nn.Parameter(torch.zeros(22, 15, dtype=torch.int8), requires_grad=False)
    other._names[id(holder.weight)] = "transformer.h.1.mlp.c_proj.weight"
    with pytest.raises(ModelError, match=r"L1\.mlp\.out: the weight is quantised \(I8\)"):
        Edit.of(other, {OUT: Dense(torch.ones(15, 22))}, BY)
    holder.weight = torch.nn.Parameter(torch.zeros(22, 15, device="meta"))
    other._names[id(holder.weight)] = "transformer.h.1.mlp.c_proj.weight"
    edit = Edit.of(view, {OUT: Dense(torch.ones(15, 22))}, BY)
    with pytest.raises(ModelError, match=r"L1\.mlp\.out: the weight is offloaded; edit the checkpoint folder"):
        edit.apply(other)


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, "0 deltas"),
        ({OUT: Dense(torch.ones(22, 15))}, r"L1\.mlp\.out: delta \[22, 15\], expected the weight's \[15, 22\]"),
        ({Site(7, Kind.MLP_OUT): Dense(torch.ones(15, 22))}, "L7"),
    ],
)
def test_deltas_that_do_not_fit_are_refused(view, change, said):
    with pytest.raises(InputError, match=said):
        Edit.of(view, change, BY)


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_edit_is_the_same_edit(typed, form, tmp_path):
    change = {**deltas_for(typed, OUT, form=form), **deltas_for(typed, *QKV, form=form)}
    edit = Edit.of(typed, change, BY, rounding="stochastic", rounding_seed=4, notes={"steps": 3})
    edit.save(tmp_path / "a.safetensors")
    again = Edit.load(tmp_path / "a.safetensors")
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (again.touched, again.provenance, dict(again.notes)) == (edit.touched, edit.provenance, {"steps": 3})
    assert (again.digest, again.rounding, again.rounding_seed) == (edit.digest, "stochastic", 4)
    for site in change:
        assert_close(again.deltas[site].dense(), edit.deltas[site].dense(), rtol=0, atol=0)
    before = bits(typed.model)
    with edit.apply(typed):
        now = bits(typed.model)
    with again.apply(typed):
        assert bits(typed.model) == now != before
    assert bits(typed.model) == before


def test_an_altered_or_cut_edit_file_is_refused(view, tmp_path):
    path, bad = tmp_path / "edit.safetensors", tmp_path / "bad.safetensors"
    Edit.of(view, deltas_for(view, OUT, form="sparse"), BY).save(path)
    tensors, header = store.load(path, "edit")

    def rewritten(change_tensors, change_header):
        fresh, head = {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(header))
        change_tensors(fresh)
        change_header(head)
        head.pop("kind"), head.pop("format")
        store.save(bad, "edit", fresh, head)
        return bad

    name, leave = f"{OUT}/values", lambda value: None
    entry = str(OUT)
    attempts = {
        "digest": (lambda found: found[name].add_(1e-3), leave),
        "values": (lambda found: found.pop(name), leave),
        "positions": (lambda found: found.update({f"{OUT}/index": found[f"{OUT}/index"][:-3]}), leave),
        "expected the weight's": (leave, lambda head: head["sites"][entry]["shape"].reverse()),
        "delta": (leave, lambda head: head["sites"][entry].pop("delta")),
        "no site called": (leave, lambda head: head["sites"].update({"L1.mouth": head["sites"].pop(entry)})),
        "provenance lacks": (leave, lambda head: head["provenance"].pop("method")),
    }
    for said, (first, second) in attempts.items():
        with pytest.raises(ArtifactError, match=said):
            Edit.load(rewritten(first, second))
    bad.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArtifactError):
        Edit.load(bad)
    with pytest.raises(ArtifactError, match="no such file"):
        Edit.load(tmp_path / "absent")


def test_a_damaged_way_back_is_noticed_before_anything_is_written(tmp_path):
    view = look(build())
    edit = Edit.of(view, deltas_for(view, OUT, scale=30.0), BY)
    edit.save(tmp_path / "e.safetensors")
    tensors, header = store.load(tmp_path / "e.safetensors", "edit")
    other = Edit.of(view, deltas_for(view, OUT, scale=29.0), BY).touched[OUT].way_back
    tensors[f"{OUT}/way_back"] = torch.tensor(list(other), dtype=torch.uint8)
    store.save(
        tmp_path / "e.safetensors", "edit", tensors, {k: v for k, v in header.items() if k not in ("kind", "format")}
    )
    applied = Edit.load(tmp_path / "e.safetensors").apply(view)
    now = bits(view.model)
    with pytest.raises(MismatchError, match="the edit was altered"):
        applied.undo()
    assert bits(view.model) == now


def test_edits_of_one_base_add_and_cancel():
    view = look(build())
    before, weight = bits(view.model), view.weight(OUT).detach().clone()
    first = Edit.of(view, deltas_for(view, OUT, QKV[0]), BY)
    second = Edit.of(view, deltas_for(view, OUT, QKV[1], form="sparse", seed=5), BY)
    both = first + second
    assert set(both.deltas) == {OUT, QKV[0], QKV[1]}
    assert not both.reversible
    assert both.provenance.settings["parts"][0]["method"] == "by hand"
    with both.apply(view) as applied:
        wanted = weight + first.deltas[OUT].dense() + second.deltas[OUT].dense()
        assert_close(view.weight(OUT), wanted)
        assert set(applied.survived) == set(both.deltas)
        with pytest.raises(MismatchError, match="digest"):
            both.rebased(view)
    assert bits(view.model) == before
    assert both.rebased(view).reversible
    assert both.rebased(view).digest == both.digest
    with (first + -first).apply(view):
        assert_close(view.weight(OUT), weight, rtol=0, atol=1e-7)
    with first.apply(view):
        later = Edit.of(view, deltas_for(view, OUT, seed=8), BY)
    with pytest.raises(MismatchError, match="made for different weights"):
        first + later
    with pytest.raises(InputError, match="stochastic"):
        first + Edit.of(view, deltas_for(view, OUT), BY, rounding="stochastic")


def test_a_sum_of_edits_of_other_parameters_keeps_its_way_back(view):
    both = Edit.of(view, deltas_for(view, OUT), BY) + Edit.of(view, deltas_for(view, QKV[0]), BY)
    assert both.reversible


def test_norms_counts_and_survival_tell_what_was_done(view):
    values = torch.zeros(15, 22)
    values[2, :3] = 0.5
    edit = Edit.of(view, {OUT: Sparse.of(values)}, BY)
    assert (edit.count, edit.share) == (3, 3 / 330)
    assert edit.norms[OUT] == pytest.approx(0.75**0.5)
    found = edit.survived[OUT]
    assert (found.asked, found.changed, found.share) == (3, 3, 1.0)
    assert found.requested == pytest.approx(0.75**0.5)
    assert found.error < 1e-6


def test_pruning_leaves_zeros_and_needs_no_repair(typed):
    weight = typed.weight(OUT).detach().clone()
    if weight.dtype == torch.float64:
        weight = weight.float().double()
        with torch.no_grad():
            typed.weight(OUT).copy_(weight)
    silenced = torch.zeros(15, 22)
    silenced[:, 4] = -weight[:, 4].float()
    edit = Edit.of(typed, {OUT: Sparse.of(silenced)}, BY)
    assert edit.touched[OUT].way_back == b""
    with edit.apply(typed):
        assert not bool(typed.weight(OUT)[:, 4].any())
    assert torch.equal(typed.weight(OUT), weight)


def test_a_small_edit_of_bfloat16_survives_stochastic_rounding_and_not_nearest():
    """A change far below the spacing is eaten by nearest rounding; stochastic keeps its sum over many entries."""
    view = look(build(dtype=torch.bfloat16))
    with torch.no_grad():
        view.weight(OUT).fill_(1.0)
    change = {OUT: Dense(torch.full((15, 22), 1e-3))}
    eaten, kept = (Edit.of(view, change, BY, rounding=rounding) for rounding in ("nearest", "stochastic"))
    assert eaten.survived[OUT].changed == 0
    assert eaten.survived[OUT].error == pytest.approx(1.0)
    with kept.apply(view):
        assert float(view.weight(OUT).detach().double().sum() - 330) == pytest.approx(0.33, rel=0.35)
        first = bits(view.model)
    other = Edit.of(view, change, BY, rounding="stochastic", rounding_seed=1)
    assert other.touched[OUT].after != kept.touched[OUT].after
    with Edit.of(view, change, BY, rounding="stochastic").apply(view):
        assert bits(view.model) == first
