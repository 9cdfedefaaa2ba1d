"""Gates: what they shut, their gradient, and how they compose with other hooks."""

from __future__ import annotations

import pytest
import torch
import zoo
from slow_gates import slow_nll, without
from torch.testing import assert_close

from memloc.ablations.gates import gate_count, gate_gradients, gate_sites, gated, silenced
from memloc.errors import InputError
from memloc.objectives import suffix_nll
from memloc.scores import selected
from memloc.sites import Grain, Kind, Site

every_family = pytest.mark.parametrize("family", zoo.FAMILIES)
both_grains = pytest.mark.parametrize("grain", [Grain.NEURON, Grain.HEAD])


@every_family
@both_grains
def test_the_gradient_by_a_gate_is_the_slope_of_the_loss(family, grain, view_of):
    """Central differences of the NLL along one gate at a time, float64 (float32 inside RMSNorm)."""
    view, passages = view_of(family, torch.float64), zoo.passages(2)
    batch = next(view.batches(passages))
    found = gate_gradients(view, batch, grain)
    step = 1e-3
    for layer, site in enumerate(gate_sites(view, grain)):
        for unit in (0, gate_count(view, grain) - 1):
            gate = torch.ones(gate_count(view, grain), dtype=torch.float64)
            spent = []
            for value in (1 + step, 1 - step):
                gate[unit] = value
                with torch.no_grad(), gated(view, {site: gate}):
                    spent.append(suffix_nll(view, batch))
            assert_close(found[:, layer, unit], (spent[0] - spent[1]) / (2 * step), atol=5e-4, rtol=1e-3)


@every_family
@both_grains
def test_a_silenced_unit_is_one_the_model_never_had(family, grain, view_of):
    view, item = view_of(family, torch.float64), zoo.passages(1)
    site = gate_sites(view, grain)[1]
    chosen = selected({site: [0, 2]}, {site: gate_count(view, grain)}, grain)
    with torch.no_grad(), silenced(view, chosen):
        found = suffix_nll(view, next(view.batches(item)))
    assert_close(float(found), slow_nll(without(view, site, [0, 2]), item[0]), atol=1e-6, rtol=0)
    assert abs(float(found) - slow_nll(view, item[0])) > 1e-4


def test_every_row_has_gates_of_its_own(view_of):
    view, passages = view_of("qwen3", torch.float64), zoo.passages(2)
    site, batch = Site(0, Kind.MLP_OUT), next(view.batches(passages))
    gates = torch.ones(2, view.neurons, dtype=torch.float64)
    gates[1, 4] = 0
    with torch.no_grad():
        clean = suffix_nll(view, batch)
        with gated(view, {site: gates}):
            found = suffix_nll(view, batch)
    assert found[0] == clean[0] and abs(float(found[1] - clean[1])) > 1e-5


def test_what_looks_inside_sees_what_gates_left_and_what_looks_outside_does_not(view_of):
    """The first hook set is the first to act, so the outer `with` comes first."""
    view, site = view_of("gpt2"), Site(1, Kind.MLP_OUT)
    batch = next(view.batches(zoo.passages(1)))
    gate = torch.ones(view.neurons)
    gate[5] = 0
    with torch.no_grad(), gated(view, {site: gate}), view.record([site]) as inside:
        view.hidden(batch)
    with torch.no_grad(), view.record([site]) as outside, gated(view, {site: gate}):
        view.hidden(batch)
    assert not inside[site][..., 5].any() and outside[site][..., 5].any()
    with (
        torch.no_grad(),
        gated(view, {site: gate}),
        view.replace([site], lambda _, t: t + 1),
        view.record([site]) as both,
    ):
        view.hidden(batch)
    assert bool((both[site][..., 5] == 1).all())


def test_what_has_no_gates_is_refused(view_of):
    view = view_of("gpt2")
    with pytest.raises(InputError, match="weights have no gates; expected neurons or heads"):
        gate_sites(view, Grain.WEIGHT)
    wrong = selected({Site(0, Kind.ATTN_OUT): [1]}, {Site(0, Kind.ATTN_OUT): view.neurons}, Grain.NEURON)
    with (
        pytest.raises(InputError, match=r"L0\.attn\.out: neurons are not gated there, but at mlp\.out"),
        silenced(view, wrong),
    ):
        pass
