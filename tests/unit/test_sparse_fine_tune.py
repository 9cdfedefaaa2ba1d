from __future__ import annotations

import math

import pytest
import torch
import zoo
from torch.testing import assert_close

from editors.base import Request
from editors.checks import check_editor, check_inside, hands_off
from editors.masks import weight_masks
from editors.rewriters.sparse_fine_tune import SparseFineTune
from editors.tuning.alternative import own_alternative
from editors.tuning.descent import MaskedAdam, working_copy
from editors.tuning.training import Stop, Term
from memloc.errors import InputError
from memloc.objectives import suffix_logprobs
from memloc.passages import Fact, Facts, Passage, Passages, Prompt
from memloc.provenance import Provenance
from memloc.running.decoding import continuation
from memloc.scores import Selection, selected
from memloc.sites import OUTSIDE, Grain, Kind, Site
from memloc.view import ModelView

QUICK = {"steps": 12, "lr": 1e-2, "replay": 32, "keep_rows": 6}
TEXT = zoo.passages(5, seed=3)


def recited(view: ModelView, count: int = 3, *, prefix: int = 6, suffix: int = 5) -> Passages:
    """Passages a random model recites: its own greedy continuations."""
    start = torch.randint(zoo.VOCAB, (count, prefix), generator=torch.Generator().manual_seed(7))
    rows = continuation(view, start, suffix).ids.tolist()
    return Passages(tuple(Passage(f"r{i}", tuple(row[:prefix]), tuple(row[prefix:])) for i, row in enumerate(rows)))


def weights(view: ModelView, share: float = 0.3, seed: int = 0) -> Selection:
    """Some entries of every map but the first block's queries."""
    generator = torch.Generator().manual_seed(seed)
    sites = [site for site in view.sites(*view.kinds) if site != Site(0, Kind.ATTN_Q)]
    masks = {site: torch.rand(view.weight(site).shape, generator=generator) < share for site in sites}
    return Selection(Grain.WEIGHT, masks, Provenance("by hand"))


def mean_logprob(view: ModelView, passages: Passages) -> float:
    with torch.no_grad():
        total = sum(float(suffix_logprobs(view, batch).sum()) for batch in view.batches(passages))
    return total / sum(len(item.suffix) for item in passages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_keeps_an_editors_promises(family, dtype, tmp_path):
    view = ModelView.open(zoo.build(family, dtype=dtype))
    request = Request(forget=recited(view), retain=zoo.passages(3), text=TEXT, selection=weights(view), seed=3)
    masks = weight_masks(view, weights(view))
    edit = check_editor(SparseFineTune(**QUICK, floor=-8.0), view, request, tmp_path, masks=masks)
    assert edit.count == sum(int(mask.sum()) for mask in masks.values()) == edit.notes["weights"]
    assert Site(0, Kind.ATTN_Q) not in edit.deltas


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_unlearning_takes_the_targets_down_in_every_family(family):
    view = ModelView.open(zoo.build(family))
    targets = recited(view)
    before = mean_logprob(view, targets)
    edit = SparseFineTune(**{**QUICK, "steps": 40}, floor=-8.0)(
        view, Request(forget=targets, selection=weights(view), text=TEXT)
    )
    with edit.apply(view):
        assert mean_logprob(view, targets) < before - 2


def test_editing_raises_the_new_answers():
    view = ModelView.open(zoo.build("gpt2"))
    facts = Facts((Fact("f", "{} x", "s", Prompt((5, 9, 2, 7), (0, 1), "s x"), (41,), (17,), " a", " b"),))
    new = facts.as_passages("new")
    before = mean_logprob(view, new)
    edit = SparseFineTune(objective="edit-to-target", **{**QUICK, "steps": 60}, keep_weight=1.0)(
        view, Request(facts=facts, selection=weights(view), text=TEXT)
    )
    with edit.apply(view):
        assert mean_logprob(view, new) > -1 > before + 2


def test_editing_passages_teaches_the_models_own_alternative():
    view = ModelView.open(zoo.build("llama"))
    targets = recited(view, 2)
    edit = SparseFineTune(objective="edit-to-target", **{**QUICK, "steps": 60}, keep_weight=1.0)(
        view, Request(forget=targets, selection=weights(view, 0.6), text=TEXT)
    )
    wanted = own_alternative(view, targets, seed=0)
    before, taught = mean_logprob(view, targets), mean_logprob(view, wanted)
    with edit.apply(view):
        assert mean_logprob(view, targets) < before - 0.5
        assert mean_logprob(view, wanted) > taught + 1.5
        said = continuation(view, torch.tensor([item.prefix for item in targets]), 5).ids[:, 6:].tolist()
    assert all(tuple(row) != item.suffix for row, item in zip(said, targets, strict=True))


def test_the_keep_term_keeps():
    """With it, ordinary text moves less than without it, targets falling either way."""
    view = ModelView.open(zoo.build("gpt2"))
    targets, selection = recited(view), weights(view)
    text = zoo.passages(12, seed=3)
    moved = {}
    for weight in (0.0, 30.0):
        settings = {**QUICK, "steps": 40, "keep_weight": weight, "keep_rows": 12, "replay": 0}
        edit = SparseFineTune(**settings, floor=-6.0)(view, Request(forget=targets, selection=selection, text=text))
        before = mean_logprob(view, text)
        with edit.apply(view):
            moved[weight] = abs(mean_logprob(view, text) - before)
            assert mean_logprob(view, targets) < -3
    assert moved[30.0] < 0.7 * moved[0.0]


def test_only_masked_entries_move_even_with_momentum():
    """The control: an ordinary optimiser with weight decay on masked gradients moves every weight."""
    view = ModelView.open(zoo.build("gpt2"))
    masks = weight_masks(view, weights(view))
    targets = recited(view)
    work = working_copy(view)
    optimiser = MaskedAdam(work, masks, lr=1e-2)
    with optimiser.training():
        for _ in range(3):
            suffix_logprobs(work, next(work.batches(targets))).sum().backward()
            optimiser.step()
    for site in view.sites(*view.kinds):
        moved = work.weight(site) != view.weight(site)
        assert not bool((moved & ~masks.get(site, torch.zeros_like(moved))).any())
        assert site not in masks or float(moved[masks[site]].double().mean()) > 0.9
    site = Site(1, Kind.MLP_OUT)
    naive = working_copy(view)
    parameter = naive.parameter(site)
    stepper = torch.optim.Adam([parameter], lr=1e-2, weight_decay=1.0)
    parameter.grad = torch.zeros_like(parameter)
    stepper.step()
    assert float((naive.weight(site) != view.weight(site)).double().mean()) > 0.9


def test_masked_adam_is_adam_on_those_entries():
    """Against torch's Adam on the whole matrix with the gradient masked: the same steps, to rounding."""
    view = ModelView.open(zoo.build("gpt2", dtype=torch.float64))
    masks, batch = weight_masks(view, weights(view)), next(view.batches(recited(view)))
    mine, theirs = working_copy(view), working_copy(view)
    optimiser = MaskedAdam(mine, masks, lr=1e-3)
    matrices = {name: p for name, p in theirs.model.named_parameters() if name.endswith("weight") and ".h." in name}
    stepper = torch.optim.Adam(matrices.values(), lr=1e-3)
    stored = {id(theirs.parameter(site)): torch.zeros(theirs.parameter(site).shape) for site in masks}
    for site, mask in masks.items():
        theirs.place(site).write(stored[id(theirs.parameter(site))], mask.float())
    with optimiser.training():
        for _ in range(5):
            suffix_logprobs(mine, batch).sum().backward()
            optimiser.step()
            suffix_logprobs(theirs, batch).sum().backward()
            for parameter in matrices.values():
                parameter.grad *= stored.get(id(parameter), torch.zeros(()))
            stepper.step()
            theirs.model.zero_grad()
    for site in masks:
        assert_close(mine.weight(site), theirs.weight(site), rtol=0, atol=1e-12)


def test_targets_are_not_pushed_beyond_the_floor():
    """Tokens below the floor add nothing to the loss, and their gradient is zero."""
    view = working_copy(ModelView.open(zoo.build("gpt2")))
    batch = next(view.batches(recited(view)))
    spoken = suffix_logprobs(view, batch).detach()
    worst = float(spoken.max())
    with torch.no_grad():
        loss, met = Term(worst + 1e-3, above=False)(view, batch)
        assert float(loss) == 0 and met
        loss, met = Term(worst - 0.5, above=False)(view, batch)
        assert_close(loss, (spoken - worst + 0.5).clamp_min(0).mean())
        loss, met = Term(-1e-6, above=True)(view, batch)
        assert_close(loss, (-1e-6 - spoken).clamp_min(0).mean())
        assert not met


def test_the_floor_follows_the_ordinary_text():
    view = ModelView.open(zoo.build("gpt2"))
    request = Request(forget=recited(view), selection=weights(view), text=TEXT)
    found = SparseFineTune(**QUICK)(view, request).notes["level"]
    assert_close(found, 0.8 * mean_logprob(view, TEXT), rtol=1e-5, atol=1e-6)
    bare = Request(forget=recited(view), selection=weights(view))
    assert SparseFineTune(**QUICK)(view, bare).notes["level"] == -4.0


def test_stops_once_targets_are_met_and_the_rest_is_close():
    stop = Stop(3, 0.5)
    assert not any(stop(False, 0.1) for _ in range(9)), "never before the targets are met"
    assert not any(stop(True, 0.9) for _ in range(9)), "not while the model is far from itself"
    assert [stop(True, 0.1) for _ in range(5)].index(True) == 1, "0.9, 0.1, 0.1 are 0.37 on average"


def test_an_early_stop_is_noted():
    view = ModelView.open(zoo.build("gpt2"))
    request = Request(forget=recited(view), selection=weights(view), text=TEXT)
    easy = SparseFineTune(**{**QUICK, "steps": 200}, floor=-3.0, patience=5, close=1.0)(view, request)
    assert easy.notes["stopped"] and easy.notes["steps"] < 200
    assert easy.notes["history"][-1][0] == easy.notes["steps"]
    assert all(math.isfinite(value) for row in easy.notes["history"] for value in row)


def test_the_seed_counts_and_the_given_model_is_left_alone():
    view = ModelView.open(zoo.build("gpt2"))
    request = {"forget": recited(view), "selection": weights(view), "text": TEXT}
    with hands_off(view):
        one = SparseFineTune(**QUICK)(view, Request(**request, seed=1))
        two = SparseFineTune(**QUICK)(view, Request(**request, seed=2))
    assert one.digest != two.digest


def test_every_keep_set_can_be_switched():
    view = ModelView.open(zoo.build("gpt2"))
    request = Request(forget=recited(view), selection=weights(view), text=TEXT, retain=zoo.passages(3, seed=8))
    assert set(SparseFineTune(**QUICK)(view, request).notes["keep_rows"]) == {"replay", "retain", "text"}
    for field, name in (("replay", "replay"), ("keep_retain", "retain"), ("keep_text", "text")):
        found = SparseFineTune(**{**QUICK, field: 0 if field == "replay" else False})(view, request)
        assert name not in found.notes["keep_rows"]
    none = SparseFineTune(**{**QUICK, "replay": 0}, keep_retain=False, keep_text=False)(view, request)
    assert "keep_rows" not in none.notes


@pytest.mark.parametrize("grain", [Grain.NEURON, Grain.HEAD])
def test_neurons_and_heads_can_be_selected(grain):
    view = ModelView.open(zoo.build("gpt2"))
    site = Site(1, Kind.MLP_OUT if grain is Grain.NEURON else Kind.ATTN_OUT)
    size = view.neurons if grain is Grain.NEURON else view.heads
    selection = selected({site: [0, 2]}, {site: size}, grain)
    edit = SparseFineTune(**QUICK)(view, Request(forget=recited(view), selection=selection, text=TEXT))
    check_inside(edit, weight_masks(view, selection))
    assert list(edit.deltas) == [site]


def test_refusals_say_what_is_missing():
    view = ModelView.open(zoo.build("gpt2"))
    targets, selection = recited(view), weights(view)
    method = SparseFineTune(**QUICK)
    with pytest.raises(InputError, match="needs passages to forget"):
        method(view, Request(selection=selection))
    with pytest.raises(InputError, match="needs a selection"):
        method(view, Request(forget=targets))
    with pytest.raises(InputError, match="'r0' is both to change and to retain"):
        method(view, Request(forget=targets, retain=targets, selection=selection))
    with pytest.raises(InputError, match="nothing to do: every token"):
        SparseFineTune(**QUICK, floor=-0.0001)(view, Request(forget=zoo.passages(2, ragged=False), selection=selection))
    with pytest.raises(InputError, match="needs facts, or passages"):
        SparseFineTune(objective="edit-to-target")(view, Request(selection=selection))
    with pytest.raises(InputError, match="steps 0: expected at least 1"):
        SparseFineTune(steps=0)
    embedding = Site(OUTSIDE, Kind.EMBED)
    whole = {embedding: torch.ones(view.weight(embedding).shape, dtype=torch.bool)}
    with pytest.raises(InputError, match="embed: only maps inside blocks"):
        method(view, Request(forget=targets, selection=Selection(Grain.WEIGHT, whole, Provenance("by hand"))))
