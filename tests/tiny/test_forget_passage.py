"""Forgetting passages: derivatives, what is asked, what is kept, refusals."""

from __future__ import annotations

import json

import pytest
import torch
import zoo
from torch.testing import assert_close

from editors.base import Request
from editors.rewriters.forget_passage import ForgetPassage
from editors.tuning.odds import every_odds, log_odds, slopes
from memloc.errors import InputError
from memloc.localizers.random import Random
from memloc.sites import Kind, Site
from memloc.view import ModelView

QUICK = {"tries": 3, "replay": 0, "rounds": 6, "ridge": 0.0}


def test_log_odds_are_exact_where_the_probability_rounds_to_one():
    logits = torch.tensor([[60.0, 0.0, 1.0]])
    found = log_odds(logits, torch.tensor([0]))
    assert_close(found, torch.tensor([60.0 - torch.tensor([0.0, 1.0]).logsumexp(0)]))
    assert float(torch.special.logit(logits.softmax(1)[0, 0])) == float("inf"), "the naive way cannot tell"


def nudged(view, site, row, at, push):
    """Log-odds of the row's last token were `push` added to what `site` puts out at one position."""

    def bend(_, output):
        more = output.clone()
        more[:, at] += push
        return more

    with view.replace([site], bend, side="output"):
        return every_odds(view, [row])[0][-1]


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gpt_neox", "phi3"])
def test_slopes_are_the_derivatives_by_the_weights_read_at_one_position(family):
    """By finite differences: a map's change is let act at the predicting position only."""
    view = ModelView.open(zoo.build(family, dtype=torch.float64))
    rows = [item.ids[: 5 + index] for index, item in enumerate(zoo.passages(3))]
    sites = [Site(0, Kind.MLP_OUT), Site(1, Kind.ATTN_OUT)]
    found = slopes(view, sites, rows, size=2)
    generator = torch.Generator().manual_seed(0)
    for site in sites:
        change = torch.randn(view.weight(site).shape, generator=generator, dtype=torch.float64)
        for index, row in enumerate(rows):
            at, push = len(row) - 2, change @ found.read[site][index]
            ends = [nudged(view, site, row, at, size * push) for size in (-1e-3, 1e-3)]
            slope = (ends[1] - ends[0]) / 2e-3
            wanted = (found.pull[site][index] @ change * found.read[site][index]).sum()
            assert_close(slope, wanted, rtol=1e-2, atol=1e-3)  # some norms are float32 in every dtype


def test_every_odds_do_not_depend_on_the_batch():
    view = ModelView.open(zoo.build("gpt2", dtype=torch.float64))
    rows = [item.ids[: 4 + 3 * index] for index, item in enumerate(zoo.passages(4))]
    for one, many in zip([every_odds(view, [row])[0] for row in rows], every_odds(view, rows, size=3), strict=True):
        assert_close(one, many)


@pytest.fixture(scope="module")
def sure():
    """A model that recites two passages because it was trained to."""
    model = zoo.build("gpt2", dtype=torch.float32)
    learnt = zoo.passages(4, seed=11, ragged=False)
    view = ModelView.open(model)
    ids = torch.tensor([item.ids for item in learnt])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    with torch.enable_grad():
        for _ in range(120):
            loss = model(input_ids=ids, labels=ids).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.zero_grad(set_to_none=True)
    return view, learnt[:2], learnt[2:]


def tokens(view, passages):
    return torch.cat([odds[len(item.prefix) - 1 :] for item, odds in
                      zip(passages, every_odds(view, [item.ids for item in passages]), strict=True)])  # fmt: skip


def test_a_memory_is_gone_and_its_neighbour_stays(sure):
    view, forget, retain = sure
    assert bool((tokens(view, forget) > 0).all()) and bool((tokens(view, retain) > 0).all()), "both are known before"
    edit = ForgetPassage(**QUICK)(view, Request(forget=forget, retain=retain))
    with edit.apply(view):
        gone, kept = tokens(view, forget), tokens(view, retain)
    assert float((gone > 0).double().mean()) < 0.3
    assert bool((kept > 0).all())
    assert edit.notes["rounds"][-1]["energy"] > 0
    json.dumps(dict(edit.notes))


def test_without_protection_the_neighbour_is_hurt(sure):
    """The control: what holds the neighbour is that its lost tokens join the solve, and the metric."""
    view, forget, retain = sure
    blind = ForgetPassage(**{**QUICK, "rounds": 2})(view, Request(forget=forget, text=zoo.passages(6, seed=3)))
    held = ForgetPassage(**QUICK)(view, Request(forget=forget, retain=retain, text=zoo.passages(6, seed=3)))
    lost = []
    for edit in (blind, held):
        with edit.apply(view):
            lost.append(int((tokens(view, retain) < 0).sum()))
    assert lost[1] < lost[0]


def test_a_rank_is_kept(sure):
    view, forget, retain = sure
    edit = ForgetPassage(**QUICK, rank=3)(view, Request(forget=forget, retain=retain))
    assert {delta.rank for delta in edit.deltas.values()} == {3}


def test_only_the_first_positions_are_asked_for(sure):
    view, forget, retain = sure
    edit = ForgetPassage(**QUICK, positions=2)(view, Request(forget=forget, retain=retain))
    assert edit.notes["tokens"] == 2 * len(forget)


def test_a_selection_of_layers_chooses_the_maps(sure):
    view, forget, retain = sure
    chosen = Random(grain="layer")(view, forget).top(1)
    layer = next(site.layer for site, mask in chosen.masks.items() if bool(mask))
    edit = ForgetPassage(**QUICK, kinds="mlp.out")(view, Request(forget=forget, retain=retain, selection=chosen))
    assert set(edit.deltas) == {Site(layer, Kind.MLP_OUT)}


def test_what_makes_no_sense_is_refused(sure):
    view, forget, retain = sure
    editor = ForgetPassage(**QUICK)
    with pytest.raises(InputError, match="is both to forget and to retain"):
        editor(view, Request(forget=forget, retain=forget))
    with pytest.raises(InputError, match="needs something to keep"):
        editor(view, Request(forget=forget))
    neurons = Random(grain="neuron")(view, forget).top(3)
    with pytest.raises(InputError, match="a selection of neurons chooses no maps"):
        editor(view, Request(forget=forget, retain=retain, selection=neurons))
    with pytest.raises(InputError, match=r"disturb 1\.5: expected above 0, at most 1"):
        ForgetPassage(disturb=1.5)
    with pytest.raises(InputError, match="rounds 0: expected at least 1"):
        ForgetPassage(rounds=0)
    with pytest.raises(InputError, match="close -1: expected 0 or more"):
        ForgetPassage(close=-1)
