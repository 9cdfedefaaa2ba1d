"""ModelView on one tiny random model of every model type in the table."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import zoo
from torch.testing import assert_close

from memloc import architectures
from memloc.architectures import Fused
from memloc.batches import pad
from memloc.checks import hands_off
from memloc.errors import InputError, ModelError
from memloc.objectives import divergence, reference_logprobs, suffix_logprobs, suffix_nll
from memloc.proof import prove_row
from memloc.sites import OUTSIDE, Kind, Site
from memloc.view import ModelView

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
every_family = pytest.mark.parametrize("family", tuple(zoo.CONFIGS))


def batch_of(view, count=3):
    return next(view.batches(zoo.passages(count), size=count))


def test_the_zoo_has_every_model_type_of_the_table():
    served = {settings[0].model_type for settings in {**zoo.CONFIGS, **zoo.MASKED}.values()}
    assert served == {name for row in architectures.ROWS for name in row.model_types}
    rows = [architectures.row_for(zoo.build(family).config) for family in {**zoo.CONFIGS, **zoo.MASKED}]
    assert all(row in rows for row in architectures.ROWS)


@every_family
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_row_is_proved_in_every_dtype(family, dtype, view_of):
    view = view_of(family, dtype)
    with hands_off(view):
        prove_row(view)


WRONG = {
    "orientation": ("gpt2", {"stored_in_out": False}, r"^L0\.attn\.q: input has 24 entries, .* check stored_in_out"),
    "orientation of a square map": (
        "llama",
        {"stored_in_out": True},
        r"^L0\.attn\.q: output differs by .* check stored",
    ),
    "fused layout": (
        "gpt_neox",
        {"fused": (Fused("attention.query_key_value", "qkv"),)},
        r"^L0\.attn\.v: values at position 0 differs? by .* check the fused layout",
    ),
    "final norm": (
        "gpt_neox",
        {"final_norm": "gpt_neox.layers.0.input_layernorm"},
        r"^unembed: .* check final_norm and unembed",
    ),
    "path": ("gpt_neo", {"blocks": "transformer.blocks"}, r"^the row of GPT-Neo names transformer\.blocks\.0"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_row_fails_and_says_where(wrong):
    family, changes, sentence = WRONG[wrong]
    model = zoo.build(family)
    row = dataclasses.replace(architectures.row_for(model.config), **changes)
    with pytest.raises(ModelError, match=sentence):
        prove_row(ModelView(model, row))


def test_swapped_maps_fail_and_say_where():
    model = zoo.build("llama")
    row = architectures.row_for(model.config)
    maps = {**row.maps, Kind.ATTN_V: row.maps[Kind.ATTN_K], Kind.ATTN_K: row.maps[Kind.ATTN_V]}
    with pytest.raises(ModelError, match=r"^L0\.attn\.v: values at position 0"):
        prove_row(ModelView(model, dataclasses.replace(row, maps=maps)))


@every_family
def test_weights_are_out_in_and_share_memory_where_they_are_contiguous(family, view_of):
    view = view_of(family)
    inner, heads = view.heads * view.head_width, view.kv_heads * view.head_width
    neurons = 96 if family == "bloom" else 37  # Four times the width, whatever is asked for.
    neurons = 65 if family in zoo.MIXTURES else neurons  # Of five experts together.
    expected = {
        Kind.ATTN_Q: (inner, view.width), Kind.ATTN_K: (heads, view.width), Kind.ATTN_V: (heads, view.width),
        Kind.ATTN_OUT: (view.width, inner), Kind.MLP_GATE: (neurons, view.width), Kind.MLP_IN: (neurons, view.width),
        Kind.MLP_OUT: (view.width, neurons),
    }  # fmt: skip
    for site in view.sites(*view.kinds):
        weight, stored = view.weight(site), view.parameter(site)
        assert tuple(weight.shape) == expected[site.kind], site
        shared = weight.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
        # Query, key and value of some families are interleaved head by head: only a copy can hold one of them. So too
        # the experts' maps side by side, of which the gates and `mlp.in` of all are apart in memory.
        place = view.place(site)
        assert shared == (not isinstance(place.rows, tuple) and not place.joined), site


def test_fused_rows_do_not_overlap_and_leave_nothing_out(view_of):
    for family in zoo.CONFIGS:
        view = view_of(family)
        for fused in view.row.fused:
            places = [view.place(Site(1, kind)) for kind in fused.kinds]
            stored = view.model.get_parameter(places[0].parameter)
            every = torch.arange(stored.shape[1 if places[0].transposed else 0])
            rows = [every[list(place.rows) if isinstance(place.rows, tuple) else place.rows] for place in places]
            assert torch.equal(torch.cat(rows).sort().values, every), family


@every_family
def test_what_is_recorded_explains_what_comes_out(family, view_of):
    view = view_of(family, torch.float64)
    sites = view.sites(Kind.MLP_OUT, Kind.ATTN_OUT)
    with torch.no_grad(), view.record(sites) as entering, view.record(sites, side="output") as leaving:
        view.hidden(batch_of(view))
    for site in sites:
        bias = Site(site.layer, site.kind, bias=True)
        made = entering[site] @ view.weight(site).T + (view.weight(bias) if view.has(bias) else 0)
        assert_close(made, leaving[site])


@every_family
def test_replacing_with_the_same_changes_nothing_and_with_another_is_undone(family, view_of):
    view = view_of(family)
    batch, site = batch_of(view), Site(1, Kind.MLP_OUT)
    with hands_off(view), torch.no_grad():
        clean = view.logits(batch)
        with view.replace([site], lambda _, tensor: tensor.clone()):
            assert_close(view.logits(batch), clean)
        # Not a multiple: a norm behind the map would take it away.
        with view.replace([site], lambda _, tensor: tensor.roll(1, -1)):
            changed = view.logits(batch)
        assert float((changed - clean).abs().max()) > 1e-3
        assert_close(view.logits(batch), clean)


def test_hooks_are_gone_after_an_error(view_of):
    view = view_of("gpt2")
    with hands_off(view), pytest.raises(ZeroDivisionError), view.record(view.sites(Kind.MLP_OUT)):
        raise ZeroDivisionError


@every_family
def test_the_recorded_gradient_is_the_slope_of_the_loss(family, view_of):
    """Central difference along a random direction. Few families are float64 throughout: the attention of some and the
    norms of the Llama shape are float32 in every dtype, which a small step would magnify."""
    # Which experts a token is sent to jumps: of a mixture the last layer, above which nothing is sent anywhere.
    view, site = view_of(family, torch.float64), Site(2 if family in zoo.MIXTURES else 0, Kind.MLP_OUT)
    batch = batch_of(view)
    with view.frozen(), view.record([site], grad=True) as seen:
        suffix_nll(view, batch).mean().backward()
    slope, entering = seen[site].grad, seen[site].detach()
    direction = torch.randn(entering.shape, dtype=entering.dtype, generator=torch.Generator().manual_seed(3))

    def loss(step):
        with torch.no_grad(), view.replace([site], lambda _, tensor: tensor + step * direction):
            return suffix_nll(view, batch).mean()

    exact = ("gpt2", "gpt_neox", "opt", "phi", "falcon", "falcon_new", "falcon_rw")
    step, tolerance = (1e-5, 1e-6) if family in exact else (1e-3, 1e-3)
    found = (loss(step) - loss(-step)) / (2 * step)
    assert_close(found, (slope * direction).sum(), rtol=tolerance, atol=1e-7)


@every_family
def test_stopping_early_records_the_same(family, view_of):
    view, site = view_of(family), Site(1, Kind.ATTN_OUT)
    batch = batch_of(view)
    with torch.no_grad():
        with view.record([site]) as whole:
            view.hidden(batch)
        with view.record([site], stop=True) as part:
            view.hidden(batch)
    assert_close(part[site], whole[site])


@every_family
def test_the_tail_equals_the_whole_forward(family, view_of):
    view = view_of(family, torch.float64)
    batch = batch_of(view)
    for layer in range(view.layers):
        tail = view.tail(layer, batch)
        with torch.no_grad():
            assert_close(tail.hidden(tail.residual)[batch.mask], view.hidden(batch)[batch.mask])
            with view.replace_blocks([layer], lambda _, residual: 2 * residual):
                changed = view.hidden(batch)
            assert_close(tail.hidden(2 * tail.residual)[batch.mask], changed[batch.mask])


@every_family
def test_padding_does_not_matter(family, view_of):
    view, passages = view_of(family, torch.float64), zoo.passages(4)
    together = next(view.batches(passages, size=4))
    assert not together.mask.all()
    with torch.no_grad():
        whole = suffix_logprobs(view, together)
        for index, row in enumerate(together.rows):
            alone = suffix_logprobs(view, next(view.batches(passages[row : row + 1])))[0]
            # GPT-Neo's attention is float32 in every dtype.
            assert_close(whole[index, : len(alone)], alone, atol=1e-6, rtol=1e-6)
            assert not whole[index, len(alone) :].any()


@every_family
def test_logits_at_are_those_of_the_whole(family, view_of):
    view = view_of(family)
    batch = batch_of(view)
    row, column, token, _ = batch.suffix_index()
    with torch.no_grad():
        assert_close(view.logits_at(batch, row, column), view.logits(batch)[row, column])
    assert torch.equal(token, batch.ids[row, column + 1])


def test_the_divergence_from_itself_is_zero_and_so_is_its_gradient(view_of):
    view, site = view_of("gpt2", torch.float64), Site(1, Kind.MLP_OUT)
    batch = batch_of(view)
    parameter = view.parameter(site)
    with view.trainable([parameter]):
        gap = divergence(view, batch, reference_logprobs(view, batch))
        (slope,) = torch.autograd.grad(gap, parameter)
    assert_close(gap.detach(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)


def test_frozen_and_trainable_leave_flags_as_they_were(view_of):
    view = view_of("qwen3")
    wanted = view.parameter(Site(0, Kind.MLP_OUT))
    with hands_off(view), view.trainable([wanted]):
        assert [entry is wanted for entry in view.model.parameters() if entry.requires_grad] == [True]


def test_tied_embeddings_are_named(view_of):
    assert view_of("gpt2").tied("transformer.wte.weight") == ("lm_head.weight",)
    assert view_of("gpt_neox").tied("gpt_neox.embed_in.weight") == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value):
    model = zoo.build("gpt2")
    model.transformer.h[1].mlp.c_fc.weight.data[3, 5] = value
    with pytest.raises(ModelError, match=r"^transformer\.h\.1\.mlp\.c_fc\.weight holds values that are not finite"):
        ModelView.open(model)


def test_an_offloaded_weight_is_named():
    model = zoo.build("llama")
    model.model.layers[2].mlp.up_proj.weight = torch.nn.Parameter(torch.empty(37, 24, device="meta"))
    with pytest.raises(ModelError, match=r"^model\.layers\.2\.mlp\.up_proj\.weight is offloaded"):
        ModelView.open(model)


def test_a_quantised_weight_is_named():
    model = zoo.build("llama")
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(37, 24, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ModelError, match=r"^model\.layers\.0\.mlp\.up_proj\.weight is quantised \(torch\.int8\)"):
        ModelView.open(model)


def test_a_site_that_is_not_there_is_refused(view_of):
    with pytest.raises(InputError, match=r"L3\.mlp\.out: not in GPT-2 with 3 layers"):
        view_of("gpt2").weight(Site(3, Kind.MLP_OUT))
    with pytest.raises(InputError, match=r"L0\.mlp\.gate: not in GPT-2"):
        view_of("gpt2").weight(Site(0, Kind.MLP_GATE))


def test_a_token_outside_the_vocabulary_is_refused(view_of):
    passages = zoo.passages(2)
    odd = dataclasses.replace(passages[1], suffix=(zoo.VOCAB,))
    with pytest.raises(InputError, match="p1"):
        list(view_of("gpt2").batches(type(passages)((passages[0], odd))))


def test_the_digest_follows_every_weight():
    view = ModelView.open(zoo.build("qwen3"))
    before, copy = view.digest, view.copy()
    assert copy.digest == before
    copy.parameter(Site(OUTSIDE, Kind.EMBED)).data[0, 0] += 1
    assert copy.digest != before and view.digest == before


def test_a_prompt_batch_is_all_prefix():
    batch = pad([(1, 2, 3), (4,)])
    assert not bool(batch.suffix_mask.any()) and batch.mask.tolist() == [[True] * 3, [True, False, False]]


def test_gradients_the_caller_had_are_still_there():
    view = ModelView.open(zoo.build("gpt2"))
    parameters = list(view.model.parameters())
    parameters[0].grad = torch.ones_like(parameters[0])
    with view.trainable(parameters[1:2]):
        assert parameters[0].grad is None and not parameters[0].requires_grad and parameters[1].requires_grad
    torch.testing.assert_close(parameters[0].grad, torch.ones_like(parameters[0]))
    assert all(parameter.requires_grad for parameter in parameters)
