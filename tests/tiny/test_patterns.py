"""Attention patterns in every family, under every kernel, against the model's own eager ones; and short-circuits."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from torch.testing import assert_close

from memloc.batches import pad
from memloc.checks import hands_off
from memloc.errors import InputError, ModelError
from memloc.running import patterns
from memloc.running.patterns import Attention, short_circuit, split_heads, values_per_head
from memloc.sites import Kind, Site
from memloc.view import ModelView

every_family = pytest.mark.parametrize("family", zoo.FAMILIES)
# GPT-Neo has one kernel only.
KERNELS = [(family, kernel) for family in zoo.FAMILIES for kernel in ("eager", "sdpa")]
every_kernel = pytest.mark.parametrize("family,kernel", [pair for pair in KERNELS if pair != ("gpt_neo", "sdpa")])


def opened(family, kernel):
    # Mistral's eager kernel gives NaN in float64 for padding beyond the window: its softmax is float32.
    dtype = torch.float32 if (family, kernel) == ("mistral", "eager") else torch.float64
    return ModelView.open(zoo.build(family, dtype=dtype, attn_implementation=kernel))


def own_patterns(family, ids):
    """What the family's eager attention says of itself, [l][h, t, t]: another model, one row at a time, no padding."""
    model = zoo.build(family, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        found = model(torch.tensor([ids]), output_attentions=True).attentions
    return [entry[0] for entry in found]


def a_batch(count=3):
    return pad([item.ids for item in zoo.passages(count)], [len(item.prefix) for item in zoo.passages(count)])


@every_kernel
def test_patterns_are_the_models_own_in_every_family_under_every_kernel(family, kernel):
    """Windows (5 tokens) are narrower than the passages, head widths (4 to 10) than the number of keys."""
    view, batch = opened(family, kernel), a_batch()
    before = copy.deepcopy(view.config.to_dict()), view.config._attn_implementation
    with hands_off(view):
        found = Attention.of(view, batch)
        seen = [found.pattern(layer) for layer in range(view.layers)]
    assert (view.config.to_dict(), view.config._attn_implementation) == before
    for row, item in enumerate(zoo.passages(3)):
        size = len(item.ids)
        for layer, expected in enumerate(own_patterns(family, item.ids)):
            assert_close(seen[layer][row, :, :size, :size].double(), expected, atol=3e-6, rtol=0)
            assert float(seen[layer][row, :, size:].abs().sum()) == 0 and float(expected.std()) > 0.01


@pytest.mark.parametrize("family", ["mistral", "gpt_neo"])
def test_a_window_is_in_the_pattern(family):
    view, batch = opened(family, "eager"), a_batch()
    seen = Attention.of(view, batch).pattern(1 if family == "gpt_neo" else 0)
    query, key = torch.meshgrid(*[torch.arange(batch.ids.shape[1])] * 2, indexing="ij")
    outside = (query - key >= 5) | (key > query)
    assert float(seen[..., outside].abs().max()) == 0 and float(seen[..., query - key == 4].max()) > 0


@every_family
def test_some_query_positions_are_rows_of_the_whole(family, view_of):
    view, batch = view_of(family), a_batch()
    found = Attention.of(view, batch, layers=[1])
    at = torch.stack([batch.prefix - 1, batch.length - 1], 1)
    some, whole = found.pattern(1, at), found.pattern(1)
    for row in range(len(batch)):
        assert_close(some[row], whole[row][:, at[row]])
    with pytest.raises(InputError, match=r"layer 0: its attention was not asked for; there are \[1\]"):
        found.pattern(0)


def test_padding_does_not_change_a_pattern(view_of):
    view = view_of("mistral", torch.float64)
    whole = Attention.of(view, a_batch(3)).pattern(2)
    for row, item in enumerate(zoo.passages(3)):
        alone = Attention.of(view, pad([item.ids])).pattern(2)[0]
        assert_close(whole[row, :, : len(item.ids), : len(item.ids)], alone)


def test_patterns_in_half_precision_are_proved_too(view_of):
    for family in ("gpt2", "qwen3", "gpt_neo"):
        view, exact = view_of(family, torch.bfloat16), view_of(family, torch.float64)
        seen, truth = (Attention.of(entry, a_batch()).pattern(0) for entry in (view, exact))
        assert seen.dtype == torch.bfloat16
        assert float((seen.double() - truth).abs().mean()) < 0.01


def test_a_pattern_that_is_not_the_models_is_refused(view_of, monkeypatch):
    """A proof that cannot fail proves nothing: values read from the wrong rows of a fused map, and keys moved by 1."""
    view, batch = view_of("gpt_neox"), a_batch()
    found = Attention.of(view, batch)
    found.values[1].copy_(found.values[1].roll(1, 2))
    found.pattern(0)
    with pytest.raises(ModelError, match=r"L1\.attn\.out: pattern @ values differs by .* no pattern of GPT-NeoX"):
        found.pattern(1)
    honest = Attention._mixed
    monkeypatch.setattr(Attention, "_mixed", lambda self, layer, start: honest(self, layer, start).roll(1, -1))
    with pytest.raises(ModelError, match=r"L0\.attn\.out"):
        found.pattern(0)


# -- short-circuits ----------------------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("heads", [None, [1]])
def test_a_short_circuited_head_puts_out_its_own_value(family, heads, kernel):
    view, batch = opened(family, kernel), a_batch()
    outs, ins = view.sites(Kind.ATTN_OUT), view.sites(Kind.ATTN_V)
    with torch.no_grad():
        clean = view.hidden(batch)
        crossed, listening = short_circuit(view, [0, 2], heads), (view.record(ins), view.record(outs))
        with hands_off(view), crossed, listening[0] as entering, listening[1] as mixed:
            changed = view.hidden(batch)
        again = view.hidden(batch)
    assert_close(again, clean, atol=0, rtol=0)
    assert float((changed - clean)[:, 1:].abs().max()) > 0.01
    for layer in (0, 2):
        own = entering[ins[layer]] @ view.weight(ins[layer]).detach().T
        bias = Site(layer, Kind.ATTN_V, bias=True)
        own = own + view.weight(bias).detach() if view.has(bias) else own
        own = own.view(*own.shape[:-1], view.kv_heads, -1).repeat_interleave(view.heads // view.kv_heads, 2)
        found = split_heads(view, mixed[outs[layer]])
        for head in range(view.heads):
            same = torch.allclose(found[:, :, head], own[:, :, head], atol=1e-5)
            assert same is (heads is None or head in heads), (layer, head)


@every_family
def test_short_circuiting_the_last_layer_is_the_identity_pattern(family, view_of):
    """With values and patterns of `Attention`: the head's part of the block's output, made from an identity matrix."""
    view, batch = view_of(family, torch.float64), a_batch()
    last = view.layers - 1
    found = Attention.of(view, batch, [last])
    eye = torch.eye(batch.ids.shape[1], dtype=torch.float64).expand(len(batch), view.heads, -1, -1)
    expected = torch.einsum("nhqk,nkhw->nqhw", eye, found.values[last]).flatten(-2)
    with torch.no_grad(), short_circuit(view, [last]), view.record([Site(last, Kind.ATTN_OUT)]) as seen:
        view.hidden(batch)
    assert_close(seen[Site(last, Kind.ATTN_OUT)], expected)


def test_heads_may_differ_by_layer_and_gradients_flow(view_of):
    view, batch = view_of("llama"), a_batch()
    with short_circuit(view, [0, 1], {0: [2], 1: [0, 5]}), view.record([Site(0, Kind.ATTN_V)], grad=True) as seen:
        view.hidden(batch).square().sum().backward()
    assert float(seen[Site(0, Kind.ATTN_V)].grad.abs().max()) > 0
    view.model.zero_grad(set_to_none=True)


def test_short_circuits_refuse_what_is_not_there(view_of):
    with pytest.raises(InputError, match="layer 9: the model has 3"), short_circuit(view_of("gpt2"), [9]):
        pass
    with pytest.raises(InputError, match=r"L1: no head 3; there are 3"), short_circuit(view_of("gpt2"), [1], [3]):
        pass


def test_an_error_inside_leaves_no_hook(view_of):
    view = view_of("qwen2")
    with hands_off(view), pytest.raises(RuntimeError, match="on purpose"), short_circuit(view, [0]):
        raise RuntimeError("on purpose")


def test_a_short_circuit_works_token_by_token_on_a_cache(view_of):
    view, ids = view_of("qwen3", torch.float64), torch.tensor([zoo.passages(1)[0].ids])
    with torch.no_grad(), short_circuit(view, [1]):
        whole = view.model(ids, use_cache=False).logits[:, -1]
        past = view.model(ids[:, :-1], use_cache=True).past_key_values
        last = view.model(ids[:, -1:], past_key_values=past, use_cache=True).logits[:, -1]
    assert_close(last, whole)


def test_values_of_grouped_queries_are_shared(view_of):
    view, batch = view_of("llama"), a_batch()
    with torch.no_grad(), view.record([Site(0, Kind.ATTN_V)], side="output") as seen:
        view.hidden(batch)
    own = values_per_head(view, 0, seen[Site(0, Kind.ATTN_V)])
    assert_close(own[:, :, 0], own[:, :, 2])
    assert not torch.equal(own[:, :, 2], own[:, :, 3])
    assert patterns.split_heads(view, own.flatten(-2)).shape == own.shape
