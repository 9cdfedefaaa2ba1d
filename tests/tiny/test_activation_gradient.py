"""Gradients by activations against plain autograd on one unpadded passage at a time, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import zoo
from torch.testing import assert_close

from memloc.errors import InputError
from memloc.localizers.activation_gradient import PARTS, ActivationGradient
from memloc.sites import Kind, Site

every_family = pytest.mark.parametrize("family", zoo.FAMILIES)


def gradient(view, item, part, layer):
    """[t, units]: of the passage's loss by a shift added to one activation of one layer; one plain forward."""
    kind, side = PARTS[part]
    site = Site(layer, kind)
    if not view.has(site):
        return None
    rows = view.place(site).rows if side == "output" else None
    width = view.width if side == "block" else view.weight(site).shape[side == "input"]
    shift = torch.zeros(len(item.ids), width, dtype=torch.float64).requires_grad_()

    def moved(_, tensor):
        if rows is None:
            return tensor + shift
        spread = torch.zeros(tensor.shape[-1], width, dtype=torch.float64)
        chosen = list(range(tensor.shape[-1]))[rows] if isinstance(rows, slice) else list(rows)
        spread[chosen, torch.arange(width)] = 1
        return tensor + shift @ spread.T

    place = view.replace_blocks([layer], moved) if side == "block" else view.replace([site], moved, side=side)
    ids = torch.tensor([item.ids])
    with place:
        logits = view.model(ids, use_cache=False).logits[0]
    gold = logits[:-1].log_softmax(-1)[torch.arange(len(item.ids) - 1), ids[0, 1:]]
    return torch.autograd.grad(-gold[len(item.prefix) - 1 :].mean(), shift)[0]


def place_of(part, layer):
    return Site(layer, PARTS[part][0])


@every_family
def test_every_activation_has_its_own_gradient(family, view_of):
    """Positions show them one by one; padding shows beyond the shorter passages."""
    view, passages = view_of(family, torch.float64), zoo.passages(2)
    for part in PARTS:
        if not view.sites(PARTS[part][0]):
            continue
        method = ActivationGradient(grain="position", parts=part, scale="raw")
        found, item = method(view, passages), passages[0]
        assert found.lengths == tuple(len(entry.ids) for entry in passages)
        for layer in range(view.layers):
            expected = gradient(view, item, part, layer).abs().amax(-1)
            mine = found.scores[place_of(part, layer)][0].double()
            assert_close(mine[: len(item.ids)], expected, atol=1e-7, rtol=1e-5)
            assert not mine[len(item.ids) - 1 :].any() and mine[:-2].any()


@every_family
def test_coarser_grains_reduce_the_gradients_they_say(family, view_of):
    view, passages = view_of(family, torch.float64), zoo.passages(3)
    item, layer = passages[1], 1
    prefix = len(item.prefix)
    spans = {"all": slice(None), "prefix": slice(prefix), "predicting": slice(prefix - 1, len(item.ids) - 1)}
    parts = {part: gradient(view, item, part, layer) for part in PARTS}

    def score(place, **settings):
        scores = ActivationGradient(scale="raw", **settings)(view, passages).scores
        return scores[place_of(place, layer)][1].double()

    for name, span in spans.items():
        mine = score("post", grain="neuron", positions=name)
        assert_close(mine, parts["post"][span].abs().mean(0), atol=1e-7, rtol=1e-5)
    mine = score("residual", grain="layer", reduce="top-10%", positions="prefix")
    count = math.ceil(0.1 * view.width)
    expected = parts["residual"][:prefix].abs().sort(-1).values[:, -count:].mean()
    assert_close(mine, expected, atol=1e-7, rtol=1e-5)
    for part in ("q", "pre", "mlp_out"):
        assert_close(score(part), parts[part].abs().amax(-1).mean(), atol=1e-7, rtol=1e-5)
    for part in ("z", "k"):
        mine = score(part, grain="head", parts=part)
        for head in range(view.heads):
            many = view.heads if part == "z" else view.kv_heads
            index = head // (view.heads // many)
            own = parts[part][:, index * view.head_width : (index + 1) * view.head_width]
            assert_close(mine[head], own.abs().amax(-1).mean(), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("grain", ["layer", "component", "head", "neuron", "position"])
def test_relative_scores_are_each_passages_shares(grain, view_of):
    view, passages = view_of("qwen3"), zoo.passages(3)
    raw = ActivationGradient(grain=grain, scale="raw")(view, passages)
    shares = ActivationGradient(grain=grain)(view, passages)
    totals = torch.stack([part.reshape(3, -1).sum(1) for part in raw.scores.values()]).sum(0)
    for site, part in shares.scores.items():
        assert_close(part * totals.view(-1, *[1] * (part.dim() - 1)), raw.scores[site], rtol=1e-4, atol=0)


def test_parts_that_cannot_be_used_are_refused(view_of):
    with pytest.raises(InputError, match="no head scores of 'post'; there are those of q, k, v, z"):
        ActivationGradient(grain="head", parts="post")
    with pytest.raises(InputError, match="two of them stand at one place"):
        ActivationGradient(parts="z,attn_out")
    with pytest.raises(InputError, match="'gate': GPT-2 has none"):
        ActivationGradient(parts="gate")(view_of("gpt2"), zoo.passages(2))
    assert set(ActivationGradient(grain="component")(view_of("llama"), zoo.passages(2)).scores) >= {
        Site(0, Kind.MLP_GATE),
        Site(2, Kind.ATTN_Q),
    }
