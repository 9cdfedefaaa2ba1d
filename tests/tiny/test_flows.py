"""Gradient times activation against whole forwards, one passage and one place at a time, in float64."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch.testing import assert_close

from memloc.batches import pad
from memloc.errors import InputError
from memloc.gradients.flows import flows, removal_effects
from memloc.localizers.grad_activation import GradActivation
from memloc.objectives import suffix_nll
from memloc.sites import Kind, Site

every_family = pytest.mark.parametrize("family", zoo.FAMILIES)


def slope_by_gates(view, item, site, side="input", base=0.0):
    """[width]: derivative of the passage's loss by a factor, at 1, on each entry of what `site` reads or writes (less
    `base`): one plain forward for one site of one passage."""
    ids = torch.tensor([item.ids])
    width = view.module(site)(torch.zeros(1, view.weight(site).shape[1], dtype=torch.float64)).shape[-1]
    gate = torch.ones(view.weight(site).shape[1] if side == "input" else width, dtype=torch.float64).requires_grad_()
    with view.replace([site], lambda _, tensor: base + gate * (tensor - base), side=side):
        logits = view.model(ids, use_cache=False).logits[0]
    gold = logits[:-1].log_softmax(-1)[torch.arange(len(item.ids) - 1), ids[0, 1:]]
    return torch.autograd.grad(-gold[len(item.prefix) - 1 :].mean(), gate)[0]


@every_family
def test_scores_are_minus_the_slope_of_the_loss_by_a_gate(family, view_of):
    view, passages = view_of(family, torch.float64), zoo.passages(3)
    neurons, heads = GradActivation()(view, passages), GradActivation(grain="head")(view, passages)
    for layer in range(view.layers):
        site = Site(layer, Kind.MLP_OUT)
        expected = -slope_by_gates(view, passages[1], site)
        assert float(expected.abs().max()) > 1e-4
        assert_close(neurons.scores[site][1].double(), expected, atol=1e-7, rtol=1e-5)
        site = Site(layer, Kind.ATTN_OUT)
        expected = -slope_by_gates(view, passages[1], site).view(view.heads, -1).sum(1)
        assert_close(heads.scores[site][1].double(), expected, atol=1e-7, rtol=1e-5)


@every_family
def test_a_maps_score_is_the_slope_of_the_loss_by_its_weight_scaled(family, view_of):
    view, passages = view_of(family, torch.float64), zoo.passages(3)
    found = GradActivation(grain="component")(view, passages)
    assert set(found.scores) == set(view.sites(*view.kinds))
    for site in view.sites(*view.kinds):
        bias, rows = getattr(view.module(site), "bias", None), view.place(site).rows
        slopes = slope_by_gates(view, passages[2], site, "output", 0.0 if bias is None else bias.detach())
        mine = slopes if rows is None else slopes[rows if isinstance(rows, slice) else list(rows)]
        assert_close(found.scores[site][2].double(), -mine.sum(), atol=1e-7, rtol=1e-5)


@every_family
def test_finer_scores_sum_to_coarser_ones(family, view_of):
    view, passages = view_of(family, torch.float64), zoo.passages(3)
    names = ("neuron", "head", "component", "layer")
    grains = {name: GradActivation(grain=name)(view, passages).scores for name in names}
    for layer in range(view.layers):
        heads, neurons = Site(layer, Kind.ATTN_OUT), Site(layer, Kind.MLP_OUT)
        attention, mlp = grains["head"][heads].sum(1), grains["neuron"][neurons].sum(1)
        assert_close(grains["component"][heads], attention, atol=1e-5, rtol=1e-4)
        assert_close(grains["component"][neurons], mlp, atol=1e-5, rtol=1e-4)
        assert_close(grains["layer"][neurons], attention + mlp, atol=1e-5, rtol=1e-4)


def test_it_is_exact_where_the_loss_is_linear(view_of):
    """A sum over the residual stream after the last block: its last neurons enter it with nothing bent between."""
    view = view_of("gpt2", torch.float64)
    site, direction = Site(view.layers - 1, Kind.MLP_OUT), torch.linspace(-1, 1, view.width, dtype=torch.float64)

    def projected(view, batch):
        with view.record_blocks([view.layers - 1], grad=True) as after:
            view.hidden(batch)
        return (after[view.layers - 1] @ direction).sum(1)

    batch = pad([item.ids for item in zoo.passages(2, ragged=False)], [9, 9])
    loss, effects = removal_effects(view, batch, [site], loss=projected)
    for neuron in (0, 5, 36):
        gate = (torch.arange(view.neurons) != neuron).double()
        with torch.no_grad(), view.replace([site], lambda _, tensor, g=gate: tensor * g):
            without = projected(view, batch)
        assert_close(effects[site][:, neuron], without.detach() - loss)


def test_a_row_has_its_own_gradient_whatever_its_company(view_of):
    view, passages = view_of("gpt_neox", torch.float64), zoo.passages(4)
    sites = view.sites(Kind.ATTN_Q, Kind.MLP_OUT)
    whole = next(view.batches(passages))
    together = flows(view, whole, outputs=sites, blocks=range(view.layers))
    assert_close(together.loss, suffix_nll(view, whole).detach())
    for place, row in enumerate(whole.rows):
        alone = flows(view, next(view.batches(passages[row : row + 1])), outputs=sites, blocks=range(view.layers))
        length = len(passages[row].ids)
        for site in sites:
            assert together.outputs[site].gradient.shape[-1] == view.weight(site).shape[0]
            mine, own = together.outputs[site].gradient[place], alone.outputs[site].gradient[0]
            assert_close(mine[:length], own)
            assert not mine[length:].any()
        assert_close(together.blocks[1].gradient[place, :length], alone.blocks[1].gradient[0])


def test_settings_that_cannot_be_used_are_refused(view_of):
    view, passages = view_of("gpt2"), zoo.passages(2)
    with pytest.raises(InputError, match="a head has none to choose from"):
        GradActivation(grain="head", kinds="attn.out")(view, passages)
    with pytest.raises(InputError, match=r"kinds mlp\.gate: this family has none"):
        GradActivation(grain="component", kinds="mlp.gate")(view, passages)
