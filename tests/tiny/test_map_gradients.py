"""Norms of gradients that are never formed, and gradients by folded weights, against plain autograd in float64."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
import zoo
from torch.testing import assert_close

from memloc.errors import ModelError
from memloc.gradients import map_gradients
from memloc.gradients.folding import WRITERS
from memloc.gradients.map_gradients import by_gram, pulls, squared_row_norms
from memloc.localizers.weight_gradient import WeightGradient
from memloc.proof import prove_row
from memloc.sites import Kind, Site
from memloc.view import ModelView

every_family = pytest.mark.parametrize("family", zoo.FAMILIES)
GRAINS = ("layer", "component", "head", "neuron")


def nll(view, item):
    """The passage's loss by one plain forward."""
    ids = torch.tensor([item.ids])
    logits = view.model(ids, use_cache=False).logits[0]
    gold = logits[:-1].log_softmax(-1)[torch.arange(len(item.ids) - 1), ids[0, 1:]]
    return -gold[len(item.prefix) - 1 :].mean()


# -- norms of gradients that are not formed ----------------------------------------------------------------------


@every_family
def test_norms_of_unformed_gradients_are_those_of_formed_ones(family, view_of):
    view, passages = view_of(family, torch.float64), zoo.passages(3)
    for batch in view.batches(passages):
        _, pulled = pulls(view, batch, view.sites(*view.kinds))
        for place, row in enumerate(batch.rows):
            names, parameters = zip(*view.model.named_parameters(), strict=True)
            found = dict(zip(names, torch.autograd.grad(nll(view, passages[row]), parameters), strict=True))
            for site, pull in pulled.items():
                where = view.place(site)
                expected = where.read(found[where.parameter])
                # GPT-Neo's attention is float32 in every dtype.
                assert_close(pull.rows()[place], expected.square().sum(1), atol=1e-6, rtol=1e-5)
                assert_close(pull.columns()[place], expected.square().sum(0), atol=1e-6, rtol=1e-5)


@every_family
@pytest.mark.parametrize("convention", ["raw", "folded"])
def test_the_batched_norms_are_those_of_the_loop(family, convention, view_of):
    """Passage by passage, from whole gradients, in the same settings."""
    view, passages = view_of(family, torch.float64), zoo.passages(3)
    for grain in GRAINS:
        batched = WeightGradient(grain=grain, per_passage=True, reduce="norm", convention=convention)
        found = batched(view, passages)
        alone = dataclasses.replace(batched, per_passage=False)
        for index, name in enumerate(passages.ids):
            expected = alone(view, passages[index : index + 1])
            for site, scores in found.of(name).scores.items():
                assert_close(scores, expected.scores[site], atol=1e-7, rtol=1e-6)


def test_batched_norms_take_the_contrast_set_away_once(view_of):
    view, passages, other = view_of("llama", torch.float64), zoo.passages(3), zoo.passages(2, seed=9)
    method = WeightGradient(per_passage=True, reduce="norm", objective="contrast")
    found = method(view, passages, contrast=other)
    theirs = WeightGradient(reduce="norm")(view, other)
    own = WeightGradient(reduce="norm", per_passage=True)(view, passages)
    for site in found.scores:
        assert_close(found.scores[site], own.scores[site] - theirs.scores[site])


@pytest.mark.parametrize("tokens", [2, 40])
def test_both_ways_to_a_norm_agree(tokens, monkeypatch):
    """Few tokens go by Gram matrices, many by the gradient itself, a part of the passages at a time."""
    generator = torch.Generator().manual_seed(0)
    read = torch.randn(5, tokens, 7, dtype=torch.float64, generator=generator)
    written = torch.randn(5, tokens, 11, dtype=torch.float64, generator=generator)
    assert by_gram(tokens, 7, 11) == (tokens == 2)
    monkeypatch.setattr(map_gradients, "CHUNK", 2 * 7 * 11)
    expected = torch.einsum("nto,nti->noi", written, read).square().sum(-1)
    assert_close(squared_row_norms(read, written), expected)


# -- folded weights ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def folded(view):
    """A copy whose norms have gain 1 and bias 0, with both in the maps that read them, and writers centred where norms
    take means away: the same function. Maps without a bias have what they would need added to their output."""
    copy = view.copy()
    layer_norm = isinstance(copy.block(0).get_submodule(copy.row.norms[Kind.ATTN_Q]), torch.nn.LayerNorm)
    shifts = {}
    with torch.no_grad():
        norms = {}
        for site in copy.sites(*copy.kinds):
            weight, where = copy.weight(site).clone(), copy.place(site)
            if site.kind in WRITERS:
                if layer_norm:
                    where.write(copy.parameter(site), weight - weight.mean(0))
                    bias = getattr(copy.module(site), "bias", None)
                    if bias is not None:
                        bias -= bias.mean()
                continue
            norm = copy.block(site.layer).get_submodule(copy.row.norms[site.kind])
            gain, beta = norms.setdefault(norm, (norm.weight.clone(), getattr(norm, "bias", None)))
            where.write(copy.parameter(site), weight * gain)
            if beta is not None:
                rows = slice(None) if where.rows is None else where.rows
                width = copy.module(site)(torch.zeros(1, weight.shape[1], dtype=weight.dtype)).shape[-1]
                shift = shifts.setdefault(Site(site.layer, site.kind), torch.zeros(width, dtype=weight.dtype))
                shift[rows if isinstance(rows, slice) else list(rows)] = weight @ beta
        for norm, (_, beta) in norms.items():
            norm.weight.fill_(1)
            if beta is not None:
                beta.zero_()
    with copy.replace(shifts, lambda site, tensor: tensor + shifts[site], side="output"):
        yield copy


@every_family
def test_folded_gradients_are_those_of_a_model_that_was_folded(family):
    """Also of a stream entry whose gain is 0, where a division by the gain would fail."""
    view = ModelView.open(zoo.build(family, dtype=torch.float64))
    with torch.no_grad():
        view.block(1).get_submodule(view.row.norms[Kind.MLP_IN]).weight[3] = 0
    passages = zoo.passages(2)
    found = WeightGradient(grain="weight", scale="raw", convention="folded")(view, passages)
    raw = WeightGradient(grain="weight", scale="raw")(view, passages)
    with folded(view) as other:
        ids = torch.tensor([passages[1].ids])
        assert_close(other.model(ids).logits, view.model(ids).logits)
        loss = torch.stack([nll(other, item) for item in passages]).mean()
        names, parameters = zip(*other.model.named_parameters(), strict=True)
        expected = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    for site, scores in found.scores.items():
        place = view.place(site)
        assert_close(scores.double(), place.read(expected[place.parameter]).abs(), atol=1e-7, rtol=1e-5)
        if site.kind not in WRITERS:
            assert float((scores - raw.scores[site]).abs().max()) > 0.01 * float(scores.max())


def test_a_gain_stored_less_one_is_what_the_row_says():
    """Stored as gain less 1 and read so, the same norm gives the same folded gradients; read plainly it does not."""
    view, passages = ModelView.open(zoo.build("llama", dtype=torch.float64)), zoo.passages(2)
    method = WeightGradient(grain="component", convention="folded", reduce="norm")
    expected = method(view, passages)

    class Shifted(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(norm.weight.detach() - 1), norm.variance_epsilon

        def forward(self, x):
            return (1 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    for layer in range(view.layers):
        view.block(layer).input_layernorm = Shifted(view.block(layer).input_layernorm)
    stored = ModelView(view.model, dataclasses.replace(view.row, norm_offset=1.0))
    with torch.no_grad():
        for layer in range(view.layers):
            stored.block(layer).post_attention_layernorm = Shifted(stored.block(layer).post_attention_layernorm)
    stored = ModelView(view.model, stored.row)
    plainly = method(ModelView(view.model, dataclasses.replace(view.row, norm_offset=0.0)), passages)
    for site, score in method(stored, passages).scores.items():
        assert_close(score, expected.scores[site], atol=1e-6, rtol=1e-5)
    site = Site(0, Kind.ATTN_Q)
    assert float((plainly.scores[site] - expected.scores[site]).abs()) > 0.01 * float(expected.scores[site])


def test_a_row_that_names_the_wrong_norm_fails_its_proof():
    model = zoo.build("gpt_neox")
    view = ModelView(model, ModelView.open(model).row)
    prove_row(view)
    swapped = {kind: "post_attention_layernorm" for kind in view.row.norms}
    with pytest.raises(
        ModelError, match=r"L0\.attn\.q: input differs by .* from what post_attention_layernorm puts out"
    ):
        prove_row(ModelView(model, dataclasses.replace(view.row, norms=swapped)))
    with pytest.raises(ModelError, match=r"its bare form, gain and bias; check norm_offset"):
        prove_row(ModelView(model, dataclasses.replace(view.row, norm_offset=1.0)))


def test_a_family_whose_row_names_no_norms_is_refused(view_of):
    view = view_of("llama")
    post = ModelView(view.model, dataclasses.replace(view.row, norms={}))
    with pytest.raises(ModelError, match=r"L0\.attn\.q cannot be folded: the row of Llama names no norm before it"):
        WeightGradient(convention="folded")(post, zoo.passages(2))
    raw = WeightGradient(reduce="norm")(post, zoo.passages(2))
    assert set(raw.scores) == set(view.sites(*view.kinds))
