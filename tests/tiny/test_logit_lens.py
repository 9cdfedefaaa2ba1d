"""The logit lens and direct attribution, against arithmetic written out by hand."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
import zoo
from torch.testing import assert_close

from memloc.batches import batches
from memloc.errors import InputError, ModelError
from memloc.localizers.logit_lens import LogitLens
from memloc.objectives import suffix_logprobs
from memloc.reading.attribution import Norm, attribute
from memloc.reading.readout import Lens, lens, lens_table, spoken_at
from memloc.sites import OUTSIDE, Grain, Kind, Site
from memloc.view import ModelView

every_family = pytest.mark.parametrize("family", zoo.FAMILIES)


def first_batch(passages):
    return next(batches(passages, size=len(passages)))


# -- attribution -------------------------------------------------------------------------------------------------


class Rms(torch.nn.Module):
    """RMSNorm in the stream's own dtype; transformers' is float32 in every model, float64 ones too."""

    def __init__(self, weight, epsilon):
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt()


@pytest.fixture(scope="module")
def exact_view():
    """Views in float64 whose final norm is float64 too."""

    @cache
    def exact_view(family):
        model = zoo.build(family, dtype=torch.float64)
        if hasattr(model, "model"):
            model.model.norm = Rms(model.model.norm.weight, model.model.norm.variance_epsilon)
        return ModelView.open(model)

    return exact_view


@every_family
@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("of", ["suffix", "prediction"])
def test_components_and_the_embedding_sum_to_the_logit(family, centre, of, exact_view):
    """Exact: biases, centring norms and those that do not centre, in float64, against the model's own logits."""
    view, batch = exact_view(family), first_batch(zoo.passages(3))
    found = attribute(view, Norm.of(view), batch, centre=centre, of=of)
    with torch.no_grad():
        logits = view.logits(batch)[found.row, found.column]
    token = spoken_at(batch)[2] if of == "suffix" else logits.argmax(-1)
    expected = logits[torch.arange(len(token)), token] - (logits.mean(-1) if centre else 0)
    assert len(found.components) == 2 * view.layers and float(expected.abs().max()) > 1
    assert_close(sum(found.components.values()) + found.embedding + found.constant, expected, atol=1e-9, rtol=1e-9)
    assert_close(found.logit, expected)


@every_family
def test_components_sum_to_the_logit_also_where_the_norm_is_coarser_than_the_model(family, view_of):
    for dtype, near in ((torch.float64, 1e-5), (torch.float32, 1e-4), (torch.bfloat16, 0.3)):
        view, batch = view_of(family, dtype), first_batch(zoo.passages(3))
        found = attribute(view, Norm.of(view), batch)
        assert_close(sum(found.components.values()) + found.embedding + found.constant, found.logit, atol=near, rtol=0)


@every_family
def test_heads_and_neurons_sum_to_their_component_but_for_the_bias(family, view_of):
    view, batch = view_of(family, torch.float64), first_batch(zoo.passages(3))
    for kind, name in ((Kind.ATTN_OUT, "heads"), (Kind.MLP_OUT, "neurons")):
        found = attribute(view, Norm.of(view), batch, entering=kind)
        for site in view.sites(kind):
            parts = getattr(found, name)(view, site)
            assert parts.shape[1] == (view.heads if kind is Kind.ATTN_OUT else view.neurons)
            bias = Site(site.layer, kind, bias=True)
            rest = found.along @ view.weight(bias).detach() if view.has(bias) else 0
            assert_close(parts.sum(1) + rest, found.components[site], atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_attribution_is_the_formula_written_out(family, view_of):
    """LayerNorm takes the mean away, RMSNorm does not; σ is the whole stream's."""
    view, passages = view_of(family, torch.float64), zoo.passages(1)
    found = LogitLens(mode="attribution")(view, passages)
    ids = torch.tensor([passages[0].ids])
    where = slice(len(passages[0].prefix) - 1, len(passages[0].ids) - 1)
    sites = view.sites(Kind.ATTN_OUT, Kind.MLP_OUT)
    last = view.layers - 1
    with torch.no_grad(), view.record(sites, side="output") as seen, view.record_blocks([last]) as after:
        view.model(ids, use_cache=False)
    stream, centred = after[last][0, where], family == "gpt2"
    norm = view.model.get_submodule(view.row.final_norm)
    epsilon = norm.eps if centred else norm.variance_epsilon
    around = stream - stream.mean(-1, keepdim=True) if centred else stream
    sigma = (around.square().mean(-1, keepdim=True) + epsilon).sqrt()
    unembed = view.weight(Site(OUTSIDE, Kind.UNEMBED)).detach()
    read = unembed[list(passages[0].suffix)] - unembed.mean(0)
    for site in sites:
        part = seen[site][0, where]
        part = part - part.mean(-1, keepdim=True) if centred else part
        expected = (read * norm.weight.detach() * part / sigma).sum(-1).mean()
        assert_close(found.scores[site][0].double(), expected, atol=1e-6, rtol=1e-5)


def test_an_unembedding_with_a_bias_is_counted():
    view = ModelView.open(zoo.build("gpt_neox", dtype=torch.float64))
    head = view.model.get_submodule(view.row.unembed)
    head.bias = torch.nn.Parameter(torch.linspace(-2, 3, view.vocab, dtype=torch.float64))
    batch = first_batch(zoo.passages(2))
    found = attribute(view, Norm.of(view), batch, centre=False)
    with torch.no_grad():
        logits = view.logits(batch)[found.row, found.column, found.token]
    assert_close(sum(found.components.values()) + found.embedding + found.constant, logits, atol=1e-9, rtol=1e-9)


class Times(torch.nn.Module):
    """Stands for a norm between a sublayer's map and the stream."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def test_sublayers_that_are_normed_before_they_are_added_are_refused():
    model = zoo.build("gpt2")
    model.transformer.h[1].mlp.dropout = Times(2.0)
    view = ModelView.open(model, prove=False)
    with pytest.raises(ModelError, match="make up the stream but for"):
        LogitLens(mode="attribution")(view, zoo.passages(2))
    model.transformer.h[1].mlp.dropout = Times(1.0)
    LogitLens(mode="attribution")(view, zoo.passages(2))


def test_a_final_norm_of_another_kind_is_refused():
    model = zoo.build("gpt2")
    model.transformer.ln_f = torch.nn.Sequential(model.transformer.ln_f, torch.nn.Tanh())
    view = ModelView.open(model, prove=False)
    with pytest.raises(ModelError, match="no gain, centring and scale"):
        LogitLens(mode="attribution")(view, zoo.passages(2))


@every_family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_is_taken_apart_by_arithmetic(family, dtype, view_of):
    view = view_of(family, dtype)
    norm = Norm.of(view)
    module = view.model.get_submodule(view.row.final_norm)
    assert norm.centre == (family in ("gpt2", "gpt_neo", "gpt_neox"))
    near = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert_close(norm.gain, module.weight.detach().to(norm.gain), atol=near, rtol=near)
    bias = getattr(module, "bias", None)
    assert_close(norm.bias, torch.zeros_like(norm.bias) if bias is None else bias.detach().to(norm.bias))


# -- the lens ----------------------------------------------------------------------------------------------------


@every_family
def test_the_lens_reads_every_layer_as_if_it_were_the_last(family, view_of):
    view, passages = view_of(family, torch.float64), zoo.passages(2)
    batch = first_batch(passages)
    found = lens(view, batch)
    assert found.rank.shape == found.logprob.shape == (view.layers + 1, len(found.row))
    for index in range(len(found.row)):
        row, column = int(found.row[index]), int(found.column[index])
        item = passages[batch.rows[row]]
        token = item.ids[column + 1]
        streams = []
        for layer in range(view.layers):
            side = "input" if layer == 0 else "output"
            with torch.no_grad(), view.record_blocks([0], side="input") as entering, view.record_blocks([layer]) as out:
                view.model(torch.tensor([item.ids[: column + 1]]), use_cache=False)
            streams += ([entering[0]] if side == "input" else []) + [out[layer]]
        for layer, stream in enumerate(streams):
            spoken = view.unembed(view.final_norm(stream[0, -1])).detach().log_softmax(-1)
            # GPT-Neo's attention is float32 in every dtype, and sees other paddings here.
            assert_close(found.logprob[layer, index], spoken[token], atol=1e-6, rtol=1e-6)
            order = spoken.argsort(descending=True).tolist()
            assert int(found.rank[layer, index]) == order.index(token)


@every_family
def test_lens_scores_sum_to_the_models_own_logprob(family, view_of):
    view, passages = view_of(family), zoo.passages(3)
    found = LogitLens()(view, passages)
    assert found.grain is Grain.LAYER
    batch = first_batch(passages)
    with torch.no_grad():
        own = suffix_logprobs(view, batch).sum(1) / (batch.length - batch.prefix)
    start = found.notes["layers"]["embedding"]["logprob"] * len(passages)
    total = sum(scores.sum() for scores in found.scores.values())
    assert_close(total + start, own.sum(), atol=1e-4, rtol=1e-4)
    assert list(found.notes["layers"]) == ["embedding", *(f"L{layer}" for layer in range(view.layers))]
    assert len(found.notes["first_on_top"]) == len(found.notes["on_top_from"]) == len(passages)


def test_what_the_model_predicts_is_on_top_last(view_of):
    view, passages = view_of("mistral"), zoo.passages(3)
    notes = LogitLens(of="prediction")(view, passages).notes
    last = f"L{view.layers - 1}"
    assert notes["layers"][last]["on_top"] == 1 and notes["layers"][last]["rank"] == 0
    assert max(notes["on_top_from"]) <= view.layers
    assert LogitLens()(view, passages).notes["layers"][last]["on_top"] < 1, "random suffixes are not predicted"


def test_first_on_top_and_on_top_from_by_hand():
    rank = torch.tensor([[0, 5, 3, 9], [2, 0, 1, 9], [0, 3, 0, 9], [0, 0, 0, 1]])
    none = torch.zeros(4)
    found = Lens(rank, -rank.double(), none, none, none)
    assert found.first.tolist() == [0, 1, 2, 4] and found.steady.tolist() == [2, 3, 2, 4]


def test_the_table_of_a_passage_is_its_lens_as_plain_numbers(view_of):
    view, passages = view_of("qwen2"), zoo.passages(2)
    table, found = lens_table(view, passages[1]), lens(view, first_batch(passages[1:]))
    assert table == json.loads(json.dumps(table)) and table["layers"] == ["embedding", "L0", "L1", "L2"]
    assert table["tokens"] == [f"⟨{token}⟩" for token in passages[1].suffix]
    assert_close(torch.tensor(table["probability"]), found.logprob.exp())
    assert table["rank"] == found.rank.tolist() and table["first"] == found.first.tolist()


def test_settings_that_cannot_be_used_are_refused(view_of):
    with pytest.raises(InputError, match="expected at least 1 each"):
        LogitLens(memory_mb=0)
    with pytest.raises(InputError, match="logit-lens: no passages given"):
        LogitLens()(view_of("gpt2"), zoo.passages(1)[:0])
