"""Knowledge-neuron surgery, UltraEdit and MEND: their algebra against slow versions, published traps, refusals."""

from __future__ import annotations

from dataclasses import replace

import editor_cases as cases
import pytest
import torch
import zoo
from torch.testing import assert_close

from editors.base import Request
from editors.rewriters.knowledge_neuron_surgery import KnowledgeNeuronSurgery
from editors.rewriters.mend import Mend
from editors.rewriters.ultraedit import Running, UltraEdit, ridge_update
from editors.tuning.hypernet import Hypernet, Signal, Trained, changed, signal
from editors.tuning.hypernet_training import Training
from memloc.batches import pad
from memloc.errors import InputError, MismatchError
from memloc.localizers.random import Random
from memloc.passages import Facts
from memloc.sites import OUTSIDE, Kind, Site
from memloc.view import ModelView

# -- knowledge neurons ----------------------------------------------------------------------------------------------


@pytest.fixture
def view():
    return ModelView.open(zoo.build("gpt2"))


def neurons(view, count=5):
    return Random(grain="neuron")(view, zoo.passages(2)).top(count)


def test_an_amplified_neuron_says_more_and_no_other_does(view):
    chosen = neurons(view)
    batch = pad([item.ids for item in zoo.passages(2)])
    edit = KnowledgeNeuronSurgery(mode="amplify", factor=3.0)(view, Request(selection=chosen))

    def louder(site, hidden):
        return torch.where(chosen.masks[site], 3 * hidden, hidden)

    with torch.no_grad(), view.replace(list(edit.deltas), louder):
        wanted = view.logits(batch)
    with torch.no_grad(), edit.apply(view):
        assert_close(view.logits(batch), wanted, atol=1e-4, rtol=1e-4)


def test_erasing_is_silencing(view):
    chosen = neurons(view)
    batch = pad([item.ids for item in zoo.passages(2)])
    with (
        torch.no_grad(),
        view.replace(
            view.sites(Kind.MLP_OUT),
            lambda site, h: torch.where(chosen.masks[site], torch.zeros_like(h), h) if site in chosen.masks else h,
        ),
    ):
        wanted = view.logits(batch)
    with torch.no_grad(), KnowledgeNeuronSurgery()(view, Request(selection=chosen)).apply(view):
        assert_close(view.logits(batch), wanted, atol=1e-4, rtol=1e-4)


def test_the_published_value_is_the_papers_formula(view):
    chosen, fact = neurons(view), cases.facts(1, seed=2)
    edit = KnowledgeNeuronSurgery.published()(view, Request(selection=chosen, facts=fact))
    table = view.weight(Site(OUTSIDE, Kind.UNEMBED)).detach()
    for site, delta in edit.deltas.items():
        wanted = torch.zeros(delta.shape)
        for index in chosen.masks[site].nonzero()[:, 0].tolist():
            wanted[:, index] = 8 * table[fact[0].target[0]] - table[fact[0].target_true[0]]
        assert_close(delta.dense(), wanted)


def test_a_shared_first_token_is_passed_over(view):
    (fact,) = cases.facts(1, seed=2)
    same = Facts((replace(fact, target=(5, 7), target_true=(5, 9)),))
    edit = KnowledgeNeuronSurgery.published()(view, Request(selection=neurons(view), facts=same))
    table = view.weight(Site(OUTSIDE, Kind.UNEMBED)).detach()
    assert_close(next(iter(edit.deltas.values())).left[:, 0], 8 * table[7] - table[9])
    with pytest.raises(InputError, match="begin alike to the end of the shorter"):
        KnowledgeNeuronSurgery.published()(
            view, Request(selection=neurons(view), facts=Facts((replace(fact, target=(5, 7), target_true=(5,)),)))
        )


def test_a_neuron_below_zero_is_pushed_the_other_way():
    """What the edit adds to the stream at the prompt's end goes along the new answer for every neuron."""
    view = ModelView.open(zoo.build("gpt2"))
    facts, chosen = cases.facts(1, seed=2), neurons(view, 40)
    editor = KnowledgeNeuronSurgery(mode="replace", old=0.0)
    edit = editor(view, Request(selection=chosen, facts=facts))
    (batch,) = view.batches(facts.as_passages("new"), size=1)
    at = len(facts[0].prompt.ids) - 1
    with torch.no_grad(), view.record(list(edit.deltas)) as seen:
        view.hidden(batch)
    for site, delta in edit.deltas.items():
        parts = seen[site][0, at] * delta.right[0]
        assert bool((parts >= 0).all()) and bool((seen[site][0, at][chosen.masks[site]] < 0).any())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "amplify", "factor": 1.0}, "factor 1 changes nothing"),
        ({"mode": "swap"}, "expected 'erase', 'amplify' or 'replace'"),
        ({"mode": "replace", "old": 0.0, "new": 0.0}, "old 0 and new 0 change nothing"),
    ],
)
def test_settings_of_surgery_that_change_nothing_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        KnowledgeNeuronSurgery(**settings)


def test_surgery_wants_neurons_and_facts(view):
    heads = Random(grain="head")(view, zoo.passages(2)).top(1)
    with pytest.raises(InputError, match="a selection of heads has no values of neurons"):
        KnowledgeNeuronSurgery()(view, Request(selection=heads))
    with pytest.raises(InputError, match="needs facts to change"):
        KnowledgeNeuronSurgery(mode="replace")(view, Request(selection=neurons(view)))


# -- UltraEdit ------------------------------------------------------------------------------------------------------


def test_running_statistics_do_not_depend_on_how_rows_come():
    rows = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = Running.empty(3).seen(rows)
    parts = Running.empty(3).seen(rows[:4]).seen(rows[4:5]).seen(rows[5:5]).seen(rows[5:])
    assert parts.count == 7
    assert_close(parts.mean, rows.mean(0))
    assert_close(parts.squares / 6, rows.var(0))
    assert_close(whole.normed(rows), (rows - rows.mean(0)) / rows.std(0))
    back = Running.from_json(parts.to_json())
    assert torch.equal(back.mean, parts.mean) and torch.equal(back.squares, parts.squares)


def test_one_row_gives_no_nan():
    """A published trap: torch's variance of a one-row batch is NaN, and so was every edit after it."""
    row = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    with pytest.warns(UserWarning, match="degrees of freedom"):
        assert bool(row.var(0).isnan().all()), "the trap"
    assert bool(Running.empty(2).seen(row).seen(row + 1).normed(row).isfinite().all())


def test_the_ridge_in_rows_is_the_ridge_in_columns():
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    values = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    slow = torch.linalg.solve(keys.T @ keys + 0.7 * torch.eye(9, dtype=torch.float64), keys.T @ values).T
    found = ridge_update(keys, values, 0.7)
    assert_close(found.dense(), slow.float())


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_keys_and_gradients_are_paired_whatever_the_batch(view, size):
    """A published trap: keys were found by ceil(n / batch), gradients by floor, so some rows met others' gradients."""
    facts = cases.facts(5, seed=6)
    whole = UltraEdit(lr=1e-2, batch_size=64)(view, Request(facts=facts))
    parts = UltraEdit(lr=1e-2, batch_size=size)(view, Request(facts=facts))
    for site, delta in whole.deltas.items():
        assert_close(parts.deltas[site].dense(), delta.dense(), atol=2e-4 * float(delta.dense().abs().max()), rtol=1e-3)


def test_ultraedit_is_its_equations():
    """Fact by fact, with autograd on the weights' own outputs, and the dense solve."""
    view = ModelView.open(zoo.build("gpt2", dtype=torch.float64))
    facts, site = cases.facts(2, seed=6), Site(2, Kind.MLP_OUT)
    found = UltraEdit(lr=1e-2, layers=(2,))(view, Request(facts=facts)).deltas[site].dense().double()
    keys, pulls = [], []
    for fact in facts:
        batch = pad([fact.prompt.ids + fact.target])
        with torch.enable_grad(), view.record([site]) as read, view.record([site], side="output", grad=True) as out:
            logs = view.logits(batch)[0].log_softmax(-1)
        places = [len(fact.prompt.ids) - 1 + step for step in range(len(fact.target))]
        loss = -sum(logs[at, token] for at, token in zip(places, fact.target, strict=True))
        (gradient,) = torch.autograd.grad(loss, out[site])
        keys += [read[site][0, at] for at in places]
        pulls += [gradient[0, at] for at in places]
    h, g = torch.stack(keys), torch.stack(pulls)
    hats = [(rows - rows.mean(0)) / torch.where(rows.std(0) > 0, rows.std(0), 1.0) for rows in (h, g)]
    values = -1e-2 * (hats[0] ** 2).sum(1, keepdim=True) * hats[1]
    slow = torch.linalg.solve(h.T @ h + torch.eye(h.shape[1], dtype=h.dtype), h.T @ values).T
    # Passages of equal length may come in another order, which sums do not see.
    assert_close(found, slow, atol=1e-5 * float(slow.abs().max()), rtol=1e-4)


def test_a_past_edit_is_gone_on_from(view):
    first = UltraEdit(lr=1e-2)(view, Request(facts=cases.facts(2, seed=6)))
    second = UltraEdit(lr=1e-2)(view, Request(facts=cases.facts(2, seed=9), past=(first,)))
    counts = [next(iter(edit.notes["statistics"].values()))["count"] for edit in (first, second)]
    assert counts[1] == counts[0] + sum(len(fact.target) for fact in cases.facts(2, seed=9))
    alone = UltraEdit(lr=1e-2)(view, Request(facts=cases.facts(2, seed=9)))
    assert alone.digest != second.digest


def test_one_token_without_a_past_is_refused(view):
    (fact,) = cases.facts(1, seed=6)
    one = Facts((replace(fact, target=fact.target[:1]),))
    with pytest.raises(InputError, match="one token has no spread"):
        UltraEdit()(view, Request(facts=one))
    past = UltraEdit()(view, Request(facts=cases.facts(2, seed=3)))
    assert UltraEdit()(view, Request(facts=one, past=(past,))).deltas


def test_statistics_of_another_model_are_refused(view):
    other = ModelView.open(zoo.build("gpt_neo"))
    past = UltraEdit(layers=(2,))(other, Request(facts=cases.facts(2, seed=3)))
    with pytest.raises(MismatchError, match=r"L2\.mlp\.out: a past edit's statistics of 57 entries, expected 61"):
        UltraEdit(layers=(2,))(view, Request(facts=cases.facts(2, seed=3), past=(past,)))


# -- MEND -----------------------------------------------------------------------------------------------------------

HOW = Training(steps=4, rank=3, last=2, alpha=0.05, others=1, windows=1, save_every=2, lr=1e-2)


def test_an_untrained_network_steps_along_the_normalised_gradient():
    site = Site(0, Kind.MLP_OUT)
    net = Hypernet({site: (3, 4)}, rank=2, alpha=0.5, seed=0)
    generator = torch.Generator().manual_seed(0)
    entry = Signal(torch.randn(5, 4, generator=generator), torch.randn(5, 3, generator=generator))
    net.learn_spread([{site: entry}])
    left, right = net(site, entry)
    hats = [(rows - rows.mean(0)) / rows.std(0, unbiased=False) for rows in (entry.read, entry.pull)]
    slow = -0.5 * sum(torch.outer(pull, read) for read, pull in zip(*hats, strict=True))
    assert_close((left @ right).detach(), slow)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "phi3", "gpt_neox"])
def test_a_network_learns_through_the_changed_model(family, tmp_path):
    """The gradient that training sees equals the loss's by finite differences, through fused maps too."""
    view = ModelView.open(zoo.build(family))
    facts = cases.facts(3, seed=8)
    net = HOW(view, facts, zoo.passages(2), tmp_path / "net.safetensors").net
    asked = facts.as_passages("new")[:1]
    (batch,) = view.batches(asked, size=1)

    def loss(factors):
        with changed(view, factors):
            row, column, token, _ = batch.suffix_index()
            return -view.logits_at(batch, row, column).log_softmax(-1).gather(1, token[:, None]).sum()

    entries = signal(view, asked, list(net.sizes))
    factors = {site: net(site, entry) for site, entry in entries.items()}
    site = min(factors)
    (slope,) = torch.autograd.grad(loss(factors), factors[site][0])
    push = 1e-2 * slope / slope.norm()
    with torch.no_grad():
        ends = [loss({**factors, site: (factors[site][0] + sign * push, factors[site][1])}) for sign in (-1, 1)]
    assert_close((ends[1] - ends[0]) / 2, (slope * push).sum(), rtol=0.05, atol=1e-4)


def test_training_that_was_interrupted_goes_on_to_the_same_network(view, tmp_path):
    facts, text = cases.facts(3, seed=8), zoo.passages(2)
    whole = HOW(view, facts, text, tmp_path / "whole")
    replace(HOW, steps=2)(view, facts, text, tmp_path / "parts")
    parts = HOW(view, facts, text, tmp_path / "parts")
    assert parts.step == whole.step == 4
    for name, entry in whole.net.tensors().items():
        assert torch.equal(parts.net.tensors()[name], entry), name
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    with pytest.raises(MismatchError, match="was trained on other data or with other settings"):
        replace(HOW, rank=4)(view, facts, text, tmp_path / "parts")


def test_a_network_lowers_its_loss_on_what_it_trains_on(view, tmp_path):
    facts = cases.facts(2, seed=8)
    before = replace(HOW, steps=0)(view, facts, None, tmp_path / "before")
    after = replace(HOW, steps=40, windows=0, save_every=40)(view, facts, None, tmp_path / "after")
    said = []
    for path in (tmp_path / "before", tmp_path / "after"):
        total = 0.0
        for index in range(len(facts)):
            with Mend(trained=str(path))(view, Request(facts=facts[index : index + 1])).apply(view):
                (batch,) = view.batches(facts.as_passages("new")[index : index + 1], size=1)
                row, column, token, _ = batch.suffix_index()
                with torch.no_grad():
                    logs = view.logits_at(batch, row, column).log_softmax(-1)
                total -= float(logs.gather(1, token[:, None]).sum())
        said.append(total)
    assert said[1] < said[0] - 1
    assert (before.step, after.step) == (0, 40)


def test_a_network_belongs_to_its_model(view, tmp_path):
    path = tmp_path / "net"
    facts = cases.facts(2, seed=8)
    replace(HOW, steps=1)(view, facts, None, path)
    other = ModelView.open(zoo.build("gpt2", seed=1))
    with pytest.raises(MismatchError, match="was trained on another model"):
        Mend(trained=str(path))(other, Request(facts=facts))
    with pytest.raises(InputError, match="mend needs a trained network"):
        Mend()(view, Request(facts=facts))
    with pytest.raises(InputError, match="1 facts to train on; at least two"):
        HOW(view, facts[:1], None, tmp_path / "none")
    with pytest.raises(InputError, match="rank 0: expected at least 1"):
        Training(rank=0)
    assert Trained.load(path).step == 1
