"""Joint selection: against copies with weights set to 0, with every localizer of neurons or heads, and on twins."""

from __future__ import annotations

import cases
import pytest
import torch
import zoo
from slow_gates import slow_nll, without
from torch.testing import assert_close

from memloc.ablations.gates import gate_count, gate_sites, silenced
from memloc.ablations.joint import joint_selection, removal_curves
from memloc.errors import InputError
from memloc.localizers.activation import Activation
from memloc.localizers.outlier_set import OutlierSet
from memloc.localizers.random import Random
from memloc.localizers.weight_gradient import WeightGradient
from memloc.localizers.zero_out import ZeroOut
from memloc.methods import LOCALIZERS
from memloc.scores import selected
from memloc.sites import Grain, Kind, Site
from memloc.truth.planted import plant
from memloc.view import ModelView


def cut(view, units):
    """A copy of `view` without those units."""
    for site, unit in units:
        view = without(view, site, [unit])
    return view


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "name", [*sorted({*LOCALIZERS} - {"outlier-set"}), "zero-out head", "activation head", "slimming head"]
)
def test_a_localizer_scores_a_silenced_model_as_one_that_lost_the_units(name, family, view_of, tmp_path):
    """Its own hooks, caches and gradients compose with the gates around it; the units gone are not compared.

    Outlier sets are ranks, which count the units gone too: see the twins.
    """
    view, passages, contrast = view_of(family, torch.float64), zoo.passages(2), zoo.passages(3, seed=9)
    method = cases.made(name, view, tmp_path)
    whole = method(view, passages, contrast=contrast).mean()
    if whole.grain not in (Grain.NEURON, Grain.HEAD):
        pytest.skip(f"{name} scores {whole.grain}s, which have no gates")
    sites = gate_sites(view, whole.grain)
    gone = [(sites[0], 1), (sites[1], 0), (sites[2], 2)]
    sizes = dict.fromkeys(sites, gate_count(view, whole.grain))
    with silenced(view, selected({site: [unit] for site, unit in gone}, sizes, whole.grain)):
        found = method(view, passages, contrast=contrast).mean()
    expected = method(cut(view, gone), passages, contrast=contrast).mean()
    largest = max(float(entry.abs().max()) for entry in expected.scores.values())
    for site, unit in gone:
        found.scores[site][unit] = expected.scores[site][unit]
    for site in sites:
        assert_close(found.scores[site], expected.scores[site], atol=2e-5 * largest, rtol=1e-4)
    if name != "random":
        assert any(not torch.equal(found.scores[site], whole.scores[site]) for site in sites)


@pytest.mark.parametrize(("method", "family"), [(ZeroOut(), "gpt2"), (ZeroOut(grain="head"), "qwen2")])
def test_each_step_takes_the_best_of_what_is_left(method, family, view_of):
    view, passages = view_of(family), zoo.passages(2)
    found = joint_selection(method, view, passages, count=5, step=2)
    order = []
    for taken in (2, 2, 1):
        scores = method(cut(view, order), passages).mean().scores
        places = [(site, unit) for site in sorted(scores) for unit in range(len(scores[site]))]
        left = [place for place in places if place not in order]
        order += sorted(left, key=lambda place: -float(scores[place[0]][place[1]]))[:taken]
    assert list(found.order) == order
    assert found.selection.count == 5 and all(found.selection.masks[site][unit] for site, unit in order)
    for count in range(1, 6):
        top = found.localization.top(count).indices()
        assert sorted((site, unit) for site, units in top.items() for unit in units) == sorted(order[:count])


def test_all_at_once_is_the_order_of_single_scores(view_of):
    view, passages = view_of("gpt2"), zoo.passages(2)
    found = joint_selection(Activation(), view, passages, count=4, step=4)
    assert found.order == found.single
    assert set(Activation()(view, passages).top(4).indices()) == {site for site, _ in found.order}


@pytest.fixture(scope="module")
def twins():
    """The planted neuron 7 twice, as 7 and 9 of layer 1: each carries the suffix without the other."""
    found = plant(ModelView.open(zoo.build("gpt2", tie_word_embeddings=False)), layer=1, neuron=7)
    view = found.view
    with torch.no_grad():
        for kind in (Kind.MLP_IN, Kind.MLP_OUT):
            site = Site(1, kind)
            weight = view.weight(site).clone()
            if kind is Kind.MLP_IN:
                weight[9] = weight[7]
            else:
                weight[:, 9] = weight[:, 7]
            view.place(site).write(view.parameter(site).data, weight)
        bias = view.parameter(Site(1, Kind.MLP_IN, bias=True))
        bias[9] = bias[7]
    return found


def test_twins_cover_for_each_other_until_one_is_gone(twins):
    """Silenced alone neither is missed; scored again, the second is worth many times what it was."""
    site, method = twins.site, ZeroOut()
    single = method(twins.view, twins.passages).mean().scores[site]
    joint = joint_selection(method, twins.view, twins.passages, count=2, step=1)
    assert set(joint.order) == {(site, 7), (site, 9)}
    with silenced(twins.view, selected({site: [7]}, {site: twins.view.neurons}, Grain.NEURON)):
        again = method(twins.view, twins.passages).mean().scores[site]
    assert float(again[9]) > 5 * float(single[9])


def test_an_outlier_set_is_found_in_a_silenced_model(twins):
    alone, site = selected({twins.site: [7]}, {twins.site: twins.view.neurons}, Grain.NEURON), twins.site
    method, both = OutlierSet(until="nll"), {"contrast": twins.controls}
    assert method(twins.view, twins.passages, **both).mean().top(2).indices() == {site: [7, 9]}
    with silenced(twins.view, alone):
        found = method(twins.view, twins.passages, **both)
    assert found.notes["sizes"] == [1] * len(twins.passages) and found.mean().top(1).indices() == {site: [9]}


def test_curves_tell_what_silencing_does(twins):
    view, passages = twins.view, twins.passages
    joint = joint_selection(ZeroOut(), view, passages, count=4, step=1)
    mine, single, random = removal_curves(joint, view, passages, points=(0, 1, 2, 4), draws=3)
    assert [curve.name for curve in (mine, single, random)] == ["joint", "single", "random"]
    clean = torch.tensor([slow_nll(view, item) for item in passages])
    for curve in (mine, single, random):
        assert_close(torch.tensor(curve.rows[0]), clean.float(), atol=1e-5, rtol=1e-4)
    lost = cut(view, joint.order[:2])
    assert_close(torch.tensor(mine.rows[2]), torch.tensor([slow_nll(lost, item) for item in passages]).float(),
                 atol=1e-4, rtol=1e-4)  # fmt: skip
    assert mine.nll[2] > 3 + mine.nll[1] and random.nll[3] < 1
    other = removal_curves(joint, view, passages, points=(4,), draws=3, seed=1)
    assert other[0].nll == mine.nll[3:] and other[2].nll != random.nll[3:]


def test_what_cannot_be_selected_jointly_is_refused(view_of):
    view, passages = view_of("gpt2"), zoo.passages(2)
    with pytest.raises(InputError, match="weights have no gates"):
        joint_selection(Random(grain="weight"), view, passages, count=2, step=1)
    with pytest.raises(InputError, match="components have no gates"):
        joint_selection(WeightGradient(), view, passages, count=2, step=1)
    with pytest.raises(InputError, match="step 3, count 2; expected 1 ≤ step ≤ count"):
        joint_selection(Activation(), view, passages, count=2, step=3)
    with pytest.raises(InputError, match="count 500, but 111 neurons are scored"):
        joint_selection(Activation(), view, passages, count=500, step=5)
    joint = joint_selection(Activation(), view, passages, count=2, step=2)
    with pytest.raises(InputError, match="point 3, but the order has 2 units"):
        removal_curves(joint, view, passages, points=(3,))
