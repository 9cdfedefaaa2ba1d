"""Every registered localizer on tiny random models: the battery, the planted answer, and slow references."""

from __future__ import annotations

import dataclasses

import cases
import pytest
import torch
import zoo
from torch.testing import assert_close

from memloc import checks
from memloc.batches import batches
from memloc.checks import check_localizer, finds_the_planted_neuron
from memloc.errors import InputError
from memloc.gradients import paths
from memloc.gradients.paths import rule
from memloc.localizers.activation import Activation
from memloc.localizers.integrated_gradients import IntegratedGradients
from memloc.localizers.random import Random
from memloc.localizers.weight_gradient import WeightGradient
from memloc.methods import LOCALIZERS
from memloc.objectives import suffix_nll
from memloc.sites import Grain, Kind, Site
from memloc.truth.planted import plant
from memloc.view import ModelView

every_family = pytest.mark.parametrize("family", zoo.FAMILIES)


@every_family
@pytest.mark.parametrize("name", sorted(LOCALIZERS))
def test_every_method_passes_the_battery_in_every_family(name, family, view_of, tmp_path):
    method = cases.made(name, view_of(family), tmp_path)
    ran = check_localizer(method, view_of(family), zoo.passages(3), contrast=zoo.passages(2, seed=9))
    assert len(ran) == len(checks.CHECKS)


@pytest.mark.parametrize("name", sorted(cases.VARIANTS))
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_setting_passes_the_battery(name, family, view_of, tmp_path):
    method = cases.made(name, view_of(family), tmp_path)
    check_localizer(method, view_of(family), zoo.passages(3), contrast=zoo.passages(2, seed=9))


@pytest.mark.parametrize("name", sorted(LOCALIZERS))
def test_every_method_passes_the_battery_in_half_precision(name, view_of, tmp_path):
    view = view_of("gpt2", torch.bfloat16)
    check_localizer(cases.made(name, view, tmp_path), view, zoo.passages(3), contrast=zoo.passages(2, seed=9))


# -- the planted neuron ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    return {
        family: plant(ModelView.open(zoo.build(family, tie_word_embeddings=False)), layer=1, neuron=7)
        for family in zoo.FAMILIES
    }


@every_family
def test_the_planted_neuron_alone_carries_the_suffix(family, planted):
    found = planted[family]
    batch = next(found.view.batches(found.passages))

    def keep_all_but(neuron):
        def change(_, tensor):
            return tensor * (torch.arange(tensor.shape[-1]) != neuron)

        return change

    with torch.no_grad():
        clean = suffix_nll(found.view, batch)
        with found.view.replace([found.site], keep_all_but(7)):
            without = suffix_nll(found.view, batch)
        with found.view.replace([found.site], keep_all_but(8)):
            other = suffix_nll(found.view, batch)
    assert float(clean.max()) < 0.5 and float(without.min()) > 3
    assert_close(other, clean, atol=0.1, rtol=0)


@every_family
@pytest.mark.parametrize("name", sorted(cases.FINDERS))
def test_finds_the_planted_neuron(name, family, planted, tmp_path):
    finds_the_planted_neuron(cases.made(name, planted[family].view, tmp_path), planted[family])


def test_random_scores_do_not_find_the_planted_neuron(planted):
    with pytest.raises(AssertionError, match=r"but neuron 7 of L1\.mlp\.out was planted"):
        finds_the_planted_neuron(Random(), planted["gpt2"])


def test_planting_needs_the_embeddings_apart(view_of):
    with pytest.raises(InputError, match="tied"):
        plant(view_of("gpt2"))
    with pytest.raises(InputError, match=r"neuron 99 at L1\.mlp\.out"):
        plant(view_of("gpt_neox"), neuron=99)


# -- integrated gradients against a slow reference ---------------------------------------------------------------


def slow_integrated_gradients(view, passage, quadrature, nodes):
    """[l, f] float64: whole forwards on the truncated text, one point of one layer at a time."""
    found = torch.zeros(view.layers, view.neurons, dtype=torch.float64)
    for step, token in enumerate(passage.suffix):
        ids = torch.tensor([passage.prefix + passage.suffix[:step]])
        for site in view.sites(Kind.MLP_OUT):
            with torch.no_grad(), view.record([site]) as seen:
                view.model(ids, use_cache=False)
            reading = seen[site][0, -1]
            for alpha, weight in zip(*rule(quadrature, nodes), strict=True):
                scaled = (alpha * reading).requires_grad_()
                with view.replace([site], lambda _, t, s=scaled: torch.cat([t[:, :-1], s[None, None]], 1)):
                    gold = view.model(ids, use_cache=False).logits[0, -1].softmax(-1)[token]
                (slope,) = torch.autograd.grad(gold, scaled)
                found[site.layer] += weight * slope * reading
    return found / len(passage.suffix)


@every_family
def test_one_token_on_a_cached_prefix_is_exact(family, view_of):
    """In float64, to 1e-8; sliding windows and local attention (5 tokens) are narrower than the passages."""
    view, passages = view_of(family, torch.float64), zoo.passages(3)
    method = IntegratedGradients(nodes=3, tolerance=1.0)
    batch = next(batches(passages, size=3))
    with view.frozen():
        found = method.integrate(view, batch).scores()
    for row, index in enumerate(batch.rows):
        expected = slow_integrated_gradients(view, passages[index], "gauss-legendre", 3)
        assert float(expected.abs().max()) > 1e-4
        assert_close(found[:, row], expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("quadrature", ["gauss-legendre", "riemann-right", "inclusive"])
def test_every_quadrature_rule_is_the_one_it_says(quadrature, view_of):
    view, passages = view_of("gpt2", torch.float64), zoo.passages(1)
    found = IntegratedGradients(quadrature=quadrature, nodes=4, tolerance=1.0)(view, passages)
    expected = slow_integrated_gradients(view, passages[0], quadrature, 4)
    for site, scores in found.scores.items():
        assert_close(scores[0].double(), expected[site.layer], atol=1e-8, rtol=1e-5)


def test_the_rules_by_hand():
    points, weights = rule("riemann-right", 4)
    assert points.tolist() == [0.25, 0.5, 0.75, 1.0] and weights.tolist() == [0.25] * 4
    points, weights = rule("inclusive", 5)
    assert points.tolist() == [0, 0.25, 0.5, 0.75, 1] and weights.tolist() == [0.2] * 5
    points, weights = rule("gauss-legendre", 3)
    for power in range(6):
        assert_close((weights * points**power).sum(), torch.tensor(1 / (power + 1), dtype=torch.float64))


@every_family
def test_scores_of_a_layer_sum_to_what_silencing_it_takes_away(family, view_of):
    """Completeness, on the first suffix token, by a forward pass that knows nothing of gradients."""
    view, passages = view_of(family), zoo.passages(1)
    found = IntegratedGradients(position="first", tolerance=1e-3)(view, passages)
    assert found.notes["completeness_gap"] <= 1e-3
    ids, token = torch.tensor([passages[0].prefix]), passages[0].suffix[0]

    def gold(*sites):
        def silence(_, tensor):
            return torch.cat([tensor[:, :-1], torch.zeros_like(tensor[:, -1:])], 1)

        with torch.no_grad(), view.replace(sites, silence):
            return view.model(ids, use_cache=False).logits[0, -1].float().softmax(-1)[token]

    for site, scores in found.scores.items():
        assert_close(scores.sum(), gold() - gold(site), atol=1e-5, rtol=2e-3)


def test_paths_are_halved_until_the_gap_is_small_and_no_further(view_of):
    view, passages = view_of("gpt2"), zoo.passages(3)
    rough = IntegratedGradients(nodes=1, halvings=0)(view, passages).notes
    fine = IntegratedGradients(nodes=1, tolerance=1e-3)(view, passages).notes
    assert rough["completeness_gap"] > 0.01 >= 1e-3 >= fine["completeness_gap"]
    assert rough["points_most"] == rough["points_mean"] == 1
    assert fine["points_most"] > fine["points_mean"] > 1


def test_halving_resolves_a_turn_that_many_nodes_miss(view_of):
    """A layer that writes a hundred times more than the stream holds: all happens within a hundredth of its path."""
    view = ModelView.open(zoo.build("gpt2", dtype=torch.float64))
    with torch.no_grad():
        view.parameter(Site(0, Kind.MLP_OUT)).mul_(300)
    passages = zoo.passages(2)
    many = IntegratedGradients(nodes=16, halvings=0)(view, passages).notes
    halved = IntegratedGradients()(view, passages).notes
    assert many["completeness_gap"] > 0.01 >= halved["completeness_gap"]


def test_memory_chunks_do_not_change_scores(view_of, monkeypatch):
    """A working memory of one row at a time, against everything at once."""
    view, passages = view_of("mistral", torch.float64), zoo.passages(3)
    whole = IntegratedGradients(memory_mb=4096)(view, passages)
    monkeypatch.setattr(paths, "unit_bytes", lambda *_: 1 << 20)
    for units in (1, 4, 11):
        parts = IntegratedGradients(memory_mb=units)(view, passages)
        for site in whole.scores:
            assert_close(parts.scores[site], whole.scores[site], atol=1e-9, rtol=1e-6)


def test_a_prefix_of_one_token_will_do(view_of):
    for family in ("gpt2", "mistral"):
        passages = zoo.passages(2, prefix=1, suffix=2, ragged=False)
        view = view_of(family, torch.float64)
        found = IntegratedGradients(nodes=2, tolerance=1.0)(view, passages)
        expected = slow_integrated_gradients(view, passages[1], "gauss-legendre", 2)
        for site in found.scores:
            assert_close(found.scores[site][1].double(), expected[site.layer], atol=1e-8, rtol=1e-5)


# -- weight gradients against autograd ---------------------------------------------------------------------------


def stored_gradients(view, passages):
    """Gradient of the mean of passages' mean NLL by every stored parameter, passage by passage, no padding."""
    found = {}
    for index in range(len(passages)):
        loss = suffix_nll(view, next(view.batches(passages[index : index + 1]))).sum() / len(passages)
        names, parameters = zip(*view.model.named_parameters(), strict=True)
        for name, part in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            found[name] = found.get(name, 0) + part
    return found


@every_family
def test_weight_scores_are_the_gradient_of_the_mean_loss(family, view_of):
    view, passages = view_of(family, torch.float64), zoo.passages(4)
    found = WeightGradient(grain="weight", scale="raw")(view, passages)
    expected = stored_gradients(view, passages)
    assert set(found.scores) == set(view.sites(*view.kinds))
    for site, scores in found.scores.items():
        place = view.place(site)
        assert_close(scores.double(), place.read(expected[place.parameter]).abs(), atol=1e-7, rtol=1e-5)


@every_family
def test_coarser_grains_reduce_the_weights_they_say(family, view_of):
    view, passages = view_of(family), zoo.passages(3)

    def scores(grain, reduce):
        return WeightGradient(grain=grain, reduce=reduce, scale="raw")(view, passages).scores

    weight = scores("weight", "max")
    for layer in range(view.layers):
        here = {site.kind: entry for site, entry in weight.items() if site.layer == layer}
        total = sum(entry.sum() for entry in here.values())
        assert_close(scores("layer", "sum")[Site(layer, Kind.MLP_OUT)], total, rtol=1e-4, atol=0)
        assert_close(scores("component", "norm")[Site(layer, Kind.ATTN_V)], here[Kind.ATTN_V].norm(), rtol=1e-4, atol=0)
        neurons = here[Kind.MLP_OUT].amax(0).maximum(here[Kind.MLP_IN].amax(1))
        if Kind.MLP_GATE in here:
            neurons = neurons.maximum(here[Kind.MLP_GATE].amax(1))
        assert_close(scores("neuron", "max")[Site(layer, Kind.MLP_OUT)], neurons)
        heads = []
        for head in range(view.heads):
            mine = slice(head * view.head_width, (head + 1) * view.head_width)
            group = head // (view.heads // view.kv_heads)
            shared = slice(group * view.head_width, (group + 1) * view.head_width)
            parts = (here[Kind.ATTN_Q][mine], here[Kind.ATTN_K][shared], here[Kind.ATTN_V][shared])
            heads.append(sum(part.sum() for part in (*parts, here[Kind.ATTN_OUT][:, mine])))
        assert_close(scores("head", "sum")[Site(layer, Kind.ATTN_OUT)], torch.stack(heads), rtol=1e-4, atol=0)


@pytest.mark.parametrize("grain", ["layer", "component", "head", "neuron", "weight"])
def test_relative_scores_are_shares(grain, view_of):
    view, passages = view_of("qwen2"), zoo.passages(3)
    raw = WeightGradient(grain=grain, scale="raw")(view, passages)
    shares = WeightGradient(grain=grain)(view, passages)
    assert_close(sum(entry.sum() for entry in shares.scores.values()), torch.tensor(1.0))
    total = sum(entry.sum() for entry in raw.scores.values())
    for site in raw.scores:
        assert_close(shares.scores[site] * total, raw.scores[site], rtol=1e-4, atol=0)


def test_the_papers_contrast_ranks_as_the_loss_does_because_its_other_term_has_no_gradient(view_of):
    """A divergence from the model itself is at its minimum: all of the gradient is the forgetting term's."""
    view, passages, contrast = view_of("gpt2", torch.float64), zoo.passages(3), zoo.passages(2, seed=9)
    plain = WeightGradient(grain="neuron", scale="raw")(view, passages)
    for kl in ("mean", "sum"):
        paper = WeightGradient(grain="neuron", scale="raw", objective="contrast-kl", kl=kl, forget=0.25)
        found = paper(view, passages, contrast=contrast)
        assert found.notes["kl_share"] < 1e-9
        for site in plain.scores:
            assert_close(found.scores[site], 0.25 * plain.scores[site])


def test_contrast_takes_away_what_the_contrast_set_pulls_on_too(view_of):
    view, passages, other = view_of("llama"), zoo.passages(3), zoo.passages(2, seed=9)
    method = WeightGradient(objective="contrast")
    for site, score in method(view, passages, contrast=passages).scores.items():
        assert score == 0, site
    mine, theirs = WeightGradient()(view, passages), WeightGradient()(view, other)
    for site, score in method(view, passages, contrast=other).scores.items():
        assert_close(score, mine.scores[site] - theirs.scores[site], atol=1e-7, rtol=1e-5)


def test_per_passage_gradients_are_those_of_the_passage_alone(view_of):
    view, passages = view_of("gpt_neox"), zoo.passages(3)
    found = WeightGradient(per_passage=True)(view, passages)
    for index, name in enumerate(passages.ids):
        alone = WeightGradient()(view, passages[index : index + 1])
        for site, score in found.of(name).scores.items():
            assert_close(score, alone.scores[site])


# -- activations -------------------------------------------------------------------------------------------------


@every_family
def test_activation_is_the_mean_size_of_what_is_written(family, view_of):
    view, passages = view_of(family, torch.float64), zoo.passages(2)
    neurons, heads = Activation()(view, passages), Activation(grain="head")(view, passages)
    for index, item in enumerate(passages):
        ids = torch.tensor([item.ids])
        where = slice(len(item.prefix) - 1, len(item.ids) - 1)
        sites = view.sites(Kind.MLP_OUT, Kind.ATTN_OUT)
        with torch.no_grad(), view.record(sites) as seen:
            view.model(ids, use_cache=False)
        for site in sites:
            entering, weight = seen[site][0, where], view.weight(site).detach()
            if site.kind is Kind.MLP_OUT:
                each = (entering[:, None] * weight).norm(dim=1)
                assert_close(neurons.scores[site][index].double(), each.mean(0), atol=1e-6, rtol=1e-5)
                continue
            each = torch.stack([
                (entering[:, part] @ weight[:, part].T).norm(dim=1)
                for part in torch.arange(view.heads * view.head_width).view(view.heads, -1)
            ])  # fmt: skip
            assert_close(heads.scores[site][index].double(), each.mean(1), atol=1e-6, rtol=1e-5)


def test_value_norms_make_scores_blind_to_where_a_neurons_size_is_kept():
    """Incoming weights of a gated neuron doubled, outgoing halved: the same model, the same scores."""
    view = ModelView.open(zoo.build("llama"))
    passages = zoo.passages(2)
    before, bare = Activation()(view, passages), Activation(values=False)(view, passages)
    with torch.no_grad():
        view.parameter(Site(1, Kind.MLP_IN))[5] *= 2
        view.parameter(Site(1, Kind.MLP_OUT))[:, 5] /= 2
    site = Site(1, Kind.MLP_OUT)
    assert_close(Activation()(view, passages).scores[site], before.scores[site])
    assert_close(Activation(values=False)(view, passages).scores[site][:, 5], 2 * bare.scores[site][:, 5])


# -- random, settings, errors ------------------------------------------------------------------------------------


def test_random_scores_depend_on_seed_and_site_only(view_of):
    view, site = view_of("gpt2"), Site(2, Kind.MLP_OUT)
    one, two = Random()(view, zoo.passages(2)), Random()(view, zoo.passages(3, seed=4))
    assert torch.equal(one.scores[site], two.scores[site])
    assert not torch.equal(one.scores[site], Random(seed=1)(view, zoo.passages(2)).scores[site])
    assert not torch.equal(one.scores[site], one.scores[Site(1, Kind.MLP_OUT)])
    some = Random(grain="weight", kinds="mlp.out")(view, zoo.passages(2))
    assert torch.equal(some.scores[site], Random(grain="weight")(view, zoo.passages(2)).scores[site])


@pytest.mark.parametrize("name", sorted(LOCALIZERS))
def test_every_method_has_a_summary_and_fields_that_can_be_flags(name):
    assert len(LOCALIZERS.summary(name)) > 20
    method = LOCALIZERS[name]
    assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(method))


def test_settings_that_cannot_be_used_are_refused(view_of):
    view, passages = view_of("gpt2"), zoo.passages(2)
    with pytest.raises(InputError, match="needs a contrast set"):
        WeightGradient(objective="contrast")(view, passages)
    with pytest.raises(InputError, match=r"no kind called 'mlp\.up'; kinds: attn\.q"):
        WeightGradient(kinds="mlp.up")(view, passages)
    with pytest.raises(InputError, match=r"kinds attn\.q: none that neuron scores"):
        WeightGradient(grain="neuron", kinds="attn.q")(view, passages)
    with pytest.raises(InputError, match="has none to choose from"):
        Random(kinds="mlp.out")(view, passages)
    with pytest.raises(InputError, match="a norm and has no sign"):
        Activation(grain="head", signed=True)(view, passages)
    with pytest.raises(InputError, match="expected at least 1 each"):
        IntegratedGradients(nodes=0)
    with pytest.raises(InputError, match="halvings -1"):
        IntegratedGradients(halvings=-1)
    for name in sorted(set(LOCALIZERS) - {"random"}):
        with pytest.raises(InputError, match=f"{name}: no passages given"):
            LOCALIZERS[name]()(view, passages[:0])


def test_grains_are_named_as_in_the_scores(view_of):
    view, passages = view_of("gpt2"), zoo.passages(2)
    assert WeightGradient(grain="head")(view, passages).grain is Grain.HEAD
