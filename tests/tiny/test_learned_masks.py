"""Learned masks: against torch's own Adam on scaled weights, together against alone, and how ties and stops work."""

from __future__ import annotations

import math

import pytest
import torch
import zoo
from torch.func import functional_call
from torch.testing import assert_close

from memloc.ablations.gates import gate_gradients, gate_sites
from memloc.ablations.learned_masks import _seeds
from memloc.errors import InputError
from memloc.localizers.hard_concrete import HardConcrete
from memloc.localizers.slimming import TIE, Slimming
from memloc.sites import Kind


def slow_mask(view, item, gates_of, penalty_of, *, start, steps, rate, high=None):
    """[l, f] by torch's Adam: gates as columns of weights in a functional call, the loss of the model's logits."""
    sites = view.sites(Kind.MLP_OUT)
    learned = torch.full((len(sites), view.neurons), start, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.Adam([learned], lr=rate)
    ids = torch.tensor([item.ids])
    for _ in range(steps):
        gates, scaled = gates_of(learned), {}
        for layer, site in enumerate(sites):
            place, stored = view.place(site), view.parameter(site).detach()
            scaled[place.parameter] = stored * (gates[layer][:, None] if place.transposed else gates[layer])
        logits = functional_call(view.model, scaled, (ids,), {"use_cache": False}).logits
        spoken = logits[0, len(item.prefix) - 1 : -1].log_softmax(-1)
        loss = -spoken[range(len(item.suffix)), list(item.suffix)].mean() + penalty_of(learned)
        descent.zero_grad()
        loss.backward()
        descent.step()
        if high is not None:
            learned.data.clamp_(0, high)
    return learned.detach()


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_slimming_is_adam_on_the_columns_of_the_weights(family, view_of):
    view, passages = view_of(family, torch.float64), zoo.passages(2)
    # Weights have no gradients here, only gates: else torch would keep both.
    found = Slimming(steps=9, learning_rate=0.05, penalty=3.0, stop=0)(view, passages)
    for row, item in enumerate(passages):
        with view.frozen():
            expected = slow_mask(
                view, item, lambda m: m, lambda m: 3.0 * m.mean(), start=1.0, steps=9, rate=0.05, high=1
            )
        assert expected.min() < 0.9 < expected.max()
        for layer, site in enumerate(found.scores):
            assert_close(found.scores[site][row].double(), expected[layer], atol=1.1 * TIE, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_hard_concrete_is_adam_on_noisy_columns_of_the_weights(family, view_of):
    """The formulas as the paper writes them, the noise drawn as promised: by seed and passage."""
    view, item = view_of(family, torch.float64), zoo.passages(1)
    temperature, steps = 0.5, 7
    noise = torch.Generator().manual_seed(_seeds(next(view.batches(item)), 3)[0])

    def gates(phi):
        u = 1e-4 + torch.rand(phi.shape, generator=noise, dtype=phi.dtype) * (1 - 2e-4)
        s = 1 / (1 + torch.exp(-(torch.log(u / (1 - u)) + phi) / temperature))
        return (s * 1.2 - 0.1).clamp(0, 1)

    def penalty(phi):
        return 2.0 * torch.sigmoid(phi - temperature * math.log(0.1 / 1.1)).mean()

    start = torch.logit(torch.tensor(0.8 / 1.2, dtype=torch.float64)).item()
    with view.frozen():
        expected = slow_mask(view, item[0], gates, penalty, start=start, steps=steps, rate=0.1).sigmoid()
    method = HardConcrete(penalty=2.0, learning_rate=0.1, steps=steps, start=0.7, temperature=0.5, stop=0, seed=3)
    for layer, scores in enumerate(method(view, item).scores.values()):
        assert_close(scores[0].double(), expected[layer], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "method",
    [Slimming(steps=30, learning_rate=0.05, stop=0.4, every=1), HardConcrete(steps=80, stop=0.6, every=1, penalty=2.0)],
)
def test_masks_learned_together_are_those_learned_alone(method, view_of):
    """Also where passages are done at different steps and leave the run: the others notice nothing."""
    view, passages = view_of("gpt_neo", torch.float64), zoo.passages(4)
    whole = method(view, passages)
    if isinstance(method, HardConcrete):
        assert len(set(whole.notes["steps"])) > 1
    for row, name in enumerate(passages.ids):
        alone = method(view, passages[row : row + 1])
        assert alone.notes["steps"] == [whole.notes["steps"][row]] and max(whole.notes["steps"]) < method.steps
        for site in whole.scores:
            assert_close(whole.of(name).scores[site], alone.of(name).scores[site], atol=1e-6, rtol=0)


def test_gates_that_end_equal_are_ordered_by_how_hard_they_were_held(view_of):
    """After one step all gates are equally shut; the order is that of the gradient, and no score moves further."""
    view, passages = view_of("gpt2"), zoo.passages(1)
    found = Slimming(steps=1, penalty=1e6, learning_rate=0.25)(view, passages)
    scores = torch.stack([entry[0] for entry in found.scores.values()]).flatten()
    assert 0.75 <= scores.min() < scores.max() <= 0.75 + 1.001 * TIE
    pull = -gate_gradients(view, next(view.batches(passages)))[0].flatten()
    assert torch.equal(scores.argsort(descending=True)[:5], pull.argsort(descending=True)[:5])


def test_a_passage_is_done_when_its_gates_are_shut_enough(view_of):
    view, passages = view_of("gpt2"), zoo.passages(3)
    notes = HardConcrete(stop=0.5, every=1, penalty=50.0)(view, passages).notes
    assert max(notes["openness"]) < 0.5 and max(notes["steps"]) < 200
    notes = HardConcrete(stop=0, steps=7)(view, passages).notes
    assert notes["steps"] == [7, 7, 7] and min(notes["openness"]) > 0.5


def test_a_larger_penalty_shuts_more(view_of):
    view, passages = view_of("llama"), zoo.passages(2)
    mean = [
        float(torch.stack(list(Slimming(penalty=size, steps=20, stop=0)(view, passages).mean().scores.values())).mean())
        for size in (0.1, 1000.0)
    ]
    assert mean[0] > mean[1] + 0.05


def test_noise_is_the_seeds(view_of):
    view, passages = view_of("gpt2"), zoo.passages(1)
    site = gate_sites(view, "neuron")[0]
    one, two = (HardConcrete(steps=3, seed=seed)(view, passages).scores[site] for seed in (0, 1))
    assert not torch.equal(one, two)


def test_plans_that_cannot_be_followed_are_refused():
    with pytest.raises(InputError, match="steps 0, every 5, batch_size 16: expected at least 1 each"):
        Slimming(steps=0)
    with pytest.raises(InputError, match=r"penalty -1\.0.*expected above 0, above 0, and a share below 1"):
        HardConcrete(penalty=-1.0)
    with pytest.raises(InputError, match="hard-concrete: start 1, temperature"):
        HardConcrete(start=1)
