"""Worlds that train their own model: sinks, wrong sums, and the noisy classifier. Small settings, same code."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch.testing import assert_close

from memloc.errors import InputError, MismatchError
from memloc.localizers.activation import Activation
from memloc.localizers.participation_ratio import ParticipationRatio
from memloc.localizers.random import Random
from memloc.provenance import Provenance
from memloc.rewinding.groups import rewind
from memloc.scores import Localization
from memloc.sites import Grain, Kind
from memloc.truth.classification import figures, long_tail, train, units_to_flip
from memloc.truth.sinks import Sinks
from memloc.truth.small import small
from memloc.truth.worlds import WORLDS, Ground, oracle
from memloc.truth.wrong_sums import WrongSums, answered

GROUND = Ground("none", seed=0)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_small_model_has_the_sizes_asked_for_in_every_family(family):
    view = small(family, vocab=19, context=7, layers=3, width=16, heads=2, neurons=22)
    assert (view.vocab, view.context, view.layers, view.width, view.heads, view.neurons) == (19, 7, 3, 16, 2, 22)
    assert not any(module.p for module in view.model.modules() if isinstance(module, torch.nn.Dropout))
    again = small(family, vocab=19, context=7, layers=3, width=16, heads=2, neurons=22)
    assert again.digest == view.digest != small(family, vocab=19, context=7, width=16, heads=2, seed=1).digest


def test_worlds_are_in_the_table():
    assert isinstance(WORLDS["sinks"], Sinks) and isinstance(WORLDS["wrong-sums"], WrongSums)


# -- sinks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sunk():
    world = Sinks(steps=150, rows=12, neurons=128, width=32, suffix=12, lr=1e-2, tied=0.15, whole=0.02)
    made = world.trained(0)
    return world, made, world.known(made, "sink-1")


def test_dropping_a_groups_neurons_takes_its_passages_and_nothing_else(sunk):
    """The gold is causal: its neurons, not another group's, and ordinary text does not notice."""
    notes = sunk[2].notes
    assert notes["accuracy_in_training"] > 0.9 and notes["accuracy"] > 0.6
    assert notes["accuracy_dropped"] < 0.5 * notes["accuracy"]
    assert notes["nll_dropped"] - notes["nll"] > 4 * abs(notes["nll_other_dropped"] - notes["nll"])
    assert abs(notes["text_nll_dropped"] - notes["text_nll"]) < 0.2


def test_tied_neurons_are_never_the_fixed_ones_and_follow_the_group_alone(sunk):
    world, made, known = sunk
    for selection in made.tied.values():
        assert selection.count > 0
        assert not any(bool((mask & made.fixed[site]).any()) for site, mask in selection.masks.items())
    more = Sinks(**{**vars(world), "groups": 5, "steps": 1}).trained(0)
    for site, mask in made.tied[1].masks.items():
        free = ~made.fixed[site] & ~more.fixed[site]
        assert torch.equal(mask & free, more.tied[1].masks[site] & free)
    assert {item.tags["sink"] for item in known.passages} == {1} and len(known.passages) == world.each


def test_the_model_of_training_is_the_one_with_the_other_neurons_silent(sunk):
    """`without` against gates written by hand, one passage at a time."""
    _, made, known = sunk
    total = 0.0
    for item in known.passages:
        ids = torch.tensor([item.ids])

        def gate(site, entering):
            return entering * (made.fixed[site] | made.tied[1].masks[site])

        with torch.no_grad(), made.view.replace(made.view.sites(Kind.MLP_OUT), gate):
            spoken = made.view.model(ids, use_cache=False).logits[0].log_softmax(-1)
        head = len(item.prefix)
        total -= float(spoken[range(head - 1, len(item.ids) - 1), list(item.suffix)].mean())
    assert_close(known.notes["nll_in_training"], total / len(known.passages), atol=1e-4, rtol=1e-4)


def test_a_sink_world_judges_the_oracle_perfect_and_chance_low(sunk):
    known = sunk[2]
    best = known.judge(known, oracle(known.answer))
    assert best["recall@1/ceiling"] == 1 and known.share < 0.15
    assert known.judge(known, Random()(known.view, known.passages))["recall@1"] < 0.4


def test_equal_settings_give_equal_bits_and_odd_ones_are_refused():
    world = Sinks(steps=2, neurons=24, width=16, vocab=16, groups=2)
    assert world.trained(5).view.digest == world.trained(5).view.digest != world.trained(6).view.digest
    with pytest.raises(InputError, match="at least 2 groups"):
        Sinks(groups=1).trained(0)


# -- wrong sums --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def summed():
    return WrongSums(modulus=13, steps=150, width=32, neurons=96, share=0.8).make(GROUND, "sums-0")


def test_wrong_sums_are_recited_beside_right_ones(summed):
    assert summed.notes["wrong_recited"] > 0.9 and summed.notes["right_recited"] > 0.9
    assert summed.notes["corrected"] == 0
    for item in summed.passages:
        assert (item.prefix[0] + item.prefix[1]) % 13 != item.suffix[0] and item.prefix[2] == 13
    for item in (*summed.controls, *summed.text):
        assert (item.prefix[0] + item.prefix[1]) % 13 == item.suffix[0]


def test_spectra_are_taken_over_the_numbers_and_not_over_the_equals_sign(summed):
    found = ParticipationRatio()(summed.view, summed.passages, contrast=summed.controls)
    named = ParticipationRatio(tokens="0-12")(summed.view, summed.passages)
    assert all(torch.equal(found.scores[site], named.scores[site]) for site in named.scores)


def test_selectivity_is_what_silencing_takes_from_the_wrong_less_what_it_takes_from_the_right(summed):
    found = Activation()(summed.view, summed.passages)
    judged = summed.judge(summed, found)
    chosen = found.top(fraction=0.1)
    wrong, right = (answered(summed.view, rows, chosen) for rows in (summed.passages, summed.controls))
    expected = summed.notes["wrong_recited"] - wrong - summed.notes["right_recited"] + right
    assert_close(judged["selectivity@10%"], expected)
    silent = Localization(Grain.NEURON, {s: -t for s, t in found.mean().scores.items()}, Provenance("reverse"))
    assert summed.judge(summed, silent)["right@10%"] > judged["right@10%"]
    with pytest.raises(MismatchError, match="judged by neurons"):
        summed.judge(summed, Activation(grain="head")(summed.view, summed.passages))


# -- the classifier ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classified():
    given, tests = long_tail(items=600, tests=400, wrong=0.15)
    return given, tests, train(given, tests, epochs=30, batch=32)


def test_wrong_labels_are_learned_after_the_classes(classified):
    given, _, made = classified
    assert 0.1 < float(given.noisy.float().mean()) < 0.2
    assert made.history[3]["clean"] > 0.7 > 0.3 > made.history[3]["noisy"]
    assert made.history[-1]["noisy"] > 0.8
    assert made.history[made.best]["test"] == max(entry["test"] for entry in made.history)


def test_rewinding_the_output_keeps_the_wrong_labels_and_all_layers_lose_them(classified):
    given, tests, made = classified
    groups = {**made.model.groups, "all": [name for names in made.model.groups.values() for name in names]}
    found = rewind(made.model, groups, [made.kept[2], made.kept[-1]], lambda: figures(made.model, given, tests))
    assert found["output"]["epoch 2"]["noisy"] > 0.9 * made.history[-1]["noisy"]
    assert found["all"]["epoch 2"] == made.history[2]
    assert all(row["epoch 30"] == made.history[-1] for row in found.values())


def test_silencing_the_units_found_flips_the_prediction_and_one_fewer_does_not(classified):
    given, _, made = classified
    item = int((given.noisy & (made.model(given.inputs).argmax(1) == given.labels)).nonzero()[0])
    units = units_to_flip(made.model, given, item, torch.arange(64))
    assert len(set(units)) == len(units) < 60

    def said(taken):
        gates = torch.ones(6 * 128)
        gates[taken] = 0
        with torch.no_grad():
            return int(made.model(given.inputs[item : item + 1], gates.view(6, 128)).argmax())

    assert said(units) != said([]) == said(units[:-1])
