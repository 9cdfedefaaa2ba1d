"""Spectra over tokens, the two-layer network that memorizes wrong sums, and the localizer that reads spectra."""

from __future__ import annotations

import math

import pytest
import torch
import zoo
from torch.testing import assert_close

from memloc.errors import InputError
from memloc.localizers.participation_ratio import ParticipationRatio
from memloc.reading.fourier import one_wave, participation
from memloc.sites import Kind, Site
from memloc.truth.arithmetic import Figures, prune_curve, sums, train, untrained


def wave(n, frequency, phase=0.3):
    return torch.cos(2 * math.pi * frequency * torch.arange(n, dtype=torch.float64) / n + phase)


# -- spectra -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [29, 30])
def test_a_cosine_has_the_ratio_its_convention_says(n):
    assert_close(participation(wave(n, 4), "half"), torch.tensor(1.0).double())
    assert_close(participation(wave(n, 4), "full"), torch.tensor(0.5).double())
    both = wave(n, 4) + wave(n, 7)
    assert_close(participation(both, "half"), torch.tensor(0.5).double())
    assert_close(participation(both, "full"), torch.tensor(0.25).double())


def test_noise_has_four_or_two_over_n():
    noise = torch.randn(4000, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(float(participation(noise, "half").mean()), 4 / 97, atol=0.003, rtol=0)
    assert_close(float(participation(noise, "full").mean()), 2 / 97, atol=0.002, rtol=0)


def test_the_ratio_is_that_of_the_definition():
    """A discrete Fourier transform written as a sum, one frequency at a time."""
    series = torch.randn(11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = torch.arange(11, dtype=torch.float64)
    turns = [series @ torch.exp(-2j * math.pi * k * at / 11).real for k in range(11)]
    sides = [series @ torch.exp(-2j * math.pi * k * at / 11).imag for k in range(11)]
    size = torch.stack([a**2 + b**2 for a, b in zip(turns, sides, strict=True)])
    assert_close(participation(series, "full"), size.square().sum() / size.sum() ** 2)
    assert_close(participation(series, "half"), size[:6].square().sum() / size[:6].sum() ** 2)


def test_a_constant_is_a_wave_of_frequency_zero_unless_it_is_taken_away():
    series = 5 + wave(23, 3) + wave(23, 8)
    assert participation(series) > 0.9
    assert_close(participation(series, centred=True), torch.tensor(0.5).double())
    assert participation(torch.zeros(23)) == 0


def test_one_wave_is_kept_each_its_own():
    rows = torch.stack([wave(23, 3) + wave(23, 8), wave(23, 2, 1.0) + 4])
    assert_close(one_wave(rows, torch.tensor([8, 2])), torch.stack([wave(23, 8), wave(23, 2, 1.0)]))


# -- the network -------------------------------------------------------------------------------------------------


def test_the_table_is_what_it_says():
    table = sums(23, share=0.6, wrong=0.2, seed=3)
    assert int(table.train.sum()) == round(0.6 * 529) and int(table.corrupted.sum()) == round(0.2 * round(0.6 * 529))
    assert bool((table.corrupted <= table.train).all())
    assert bool(((table.labels != table.answers) == table.corrupted).all())
    assert bool((table.answers == table.pairs.sum(1) % 23).all())
    with pytest.raises(InputError, match="modulus 4"):
        sums(4)


@pytest.fixture(scope="module")
def trained():
    table = sums(29, share=0.6, wrong=0.15)
    return table, train(table, neurons=128, steps=300)


def test_a_network_knows_the_rule_and_the_wrong_labels(trained):
    found = trained[1].history[-1][1]
    assert found.corrupted > 0.95 and found.clean > 0.95 and found.test > 0.8


def test_low_ratios_hold_the_wrong_labels_and_high_ones_the_rule(trained):
    """Pruned from the lowest ratio the wrong labels go and the rule stays; from the highest, and at random, it goes."""
    table, result = trained
    curves = {
        order: dict(prune_curve(result.net, table, order, (0.0, 0.6))) for order in ("lowest", "highest", "random")
    }
    whole = Figures.of(result.net, table)
    assert all(curve[0.0] == whole for curve in curves.values())
    assert curves["lowest"][0.6].corrupted < 0.4 and curves["lowest"][0.6].test > 0.85
    assert curves["lowest"][0.6].restored > 0.5
    assert curves["highest"][0.6].test < 0.2 and curves["highest"][0.6].corrupted > 0.6
    assert curves["random"][0.6].test < 0.6 and curves["random"][0.6].corrupted > 0.6


def test_one_frequency_a_neuron_restores_the_rule_but_brings_none(trained):
    """Negative controls: an untrained network, and one trained on labels that are all wrong."""
    table, result = trained
    restored = Figures.of(result.net.one_wave(), table)
    assert restored.test > 0.97 and restored.restored > 0.97 and restored.corrupted < 0.03
    assert Figures.of(untrained(29, 128).one_wave(), table).test < 0.15
    noise = sums(29, share=0.6, wrong=1.0)
    assert Figures.of(train(noise, neurons=128, steps=200).net.one_wave(), noise).test < 0.15


# -- the localizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_neuron_made_to_read_and_write_one_wave_is_the_least_memorizing(family):
    """Embeddings of tokens 3 .. 31 are the waves' own axes, so a row of a map can be pointed along one."""
    view_model = zoo.build(family, dtype=torch.float64, tie_word_embeddings=False)
    from memloc.view import ModelView

    view = ModelView.open(view_model)
    with torch.no_grad():
        for name in (view.row.embed, view.row.unembed):
            table = view_model.get_submodule(name).weight
            table[3:32, 0], table[3:32, 1] = wave(29, 5), wave(29, 5, 1.9)
        axes = torch.zeros(view.width, dtype=torch.float64)
        axes[0], axes[1] = 1.0, -0.5
        for kind in (Kind.MLP_IN, Kind.MLP_GATE):
            if view.has(Site(1, kind)):
                view.weight(Site(1, kind))[7] = axes
        view.weight(Site(1, Kind.MLP_OUT))[:, 7] = axes
    method = ParticipationRatio(tokens="3-31")
    found = method(view, zoo.passages(1))
    scores = found.scores[Site(1, Kind.MLP_OUT)]
    assert float(scores[7]) < 1e-6 < 0.2 < float(torch.cat([scores[:7], scores[8:]]).min())
    assert found.notes["tokens"] == 29 and found.notes["ratio_most"] > 1 - 1e-6
    assert_close(float(ParticipationRatio(tokens="3-31", convention="full")(view, zoo.passages(1)).scores[
        Site(1, Kind.MLP_OUT)][7]), 0.5, atol=1e-6, rtol=0)  # fmt: skip
    shuffled = ",".join(map(str, torch.randperm(29, generator=torch.Generator().manual_seed(0)).add(3).tolist()))
    assert float(ParticipationRatio(tokens=shuffled)(view, zoo.passages(1)).scores[Site(1, Kind.MLP_OUT)][7]) > 0.5


def test_tokens_come_from_the_contrast_set_or_the_passages(view_of):
    view, passages, other = view_of("gpt2"), zoo.passages(3), zoo.passages(2, seed=9)
    ids = sorted(set(other[0].ids) ^ set(other[1].ids))
    named = ParticipationRatio(tokens=",".join(map(str, ids)))(view, passages)
    for site, scores in ParticipationRatio()(view, passages, contrast=other).scores.items():
        assert torch.equal(scores, named.scores[site])
    for site, scores in ParticipationRatio()(view, other).scores.items():
        assert torch.equal(scores, named.scores[site])


def test_too_few_or_unknown_tokens_are_refused(view_of):
    with pytest.raises(InputError, match="needs at least 5"):
        ParticipationRatio(tokens="3-6")(view_of("gpt2"), zoo.passages(1))
    with pytest.raises(InputError, match="outside the vocabulary of 53"):
        ParticipationRatio(tokens="40-60")(view_of("gpt2"), zoo.passages(1))
    with pytest.raises(InputError, match="FIRST-LAST or ids"):
        ParticipationRatio(tokens="some")(view_of("gpt2"), zoo.passages(1))
