"""Outlier sets: the search against answers known beforehand, candidates by hand, the planted neuron alone."""

from __future__ import annotations

import pytest
import torch
import zoo
from slow_gates import slow_nll
from torch.testing import assert_close

from memloc.ablations.gates import silenced
from memloc.batches import pad
from memloc.errors import InputError
from memloc.localizers.outlier_set import OutlierSet, _search
from memloc.running.decoding import continuation
from memloc.sites import Kind
from memloc.truth.planted import plant
from memloc.view import ModelView


@pytest.fixture(scope="module", params=["gpt2", "gpt_neox", "llama"])
def planted(request):
    return plant(ModelView.open(zoo.build(request.param, tie_word_embeddings=False)), layer=1, neuron=7)


@pytest.mark.parametrize("until", ["nll", "exact"])
def test_the_planted_neuron_alone_is_the_set(until, planted):
    found = OutlierSet(until=until)(planted.view, planted.passages, contrast=planted.controls)
    assert found.notes["ended"] == [True] * len(planted.passages)
    if until == "nll":
        assert found.notes["sizes"] == [1] * len(planted.passages)
    for name, size in zip(found.passages, found.notes["sizes"], strict=True):
        assert planted.neuron in found.of(name).top(size).indices()[planted.site]


def test_silencing_the_set_ends_the_recital_and_freeing_a_member_brings_it_back(planted):
    """By whole forwards and by greedy decoding, which know nothing of the search."""
    view, item = planted.view, planted.passages[0]
    for until in ("nll", "exact"):
        found = OutlierSet(until=until)(view, planted.passages[:1], contrast=planted.controls)

        def recited(selection, until=until, found=found):
            with silenced(view, selection):
                if until == "nll":
                    return slow_nll(view, item) < found.notes["nll_bar"]
                prompt = pad([item.prefix]).ids
                return tuple(continuation(view, prompt, len(item.suffix)).ids[0, len(item.prefix) :]) == item.suffix

        (size,) = found.notes["sizes"]
        chosen = found.of(item.id).top(size)
        assert size >= 1 and not recited(chosen)
        for site, units in chosen.indices().items():
            for unit in units:
                chosen.masks[site][unit] = False
                assert recited(chosen)
                chosen.masks[site][unit] = True


def test_members_score_above_one_and_others_by_the_level_they_join_at(planted):
    method = OutlierSet(until="nll")
    found = method(planted.view, planted.passages[:1], contrast=planted.controls)
    scores = torch.stack([entry[0] for entry in found.scores.values()])
    assert int((scores > 1).sum()) == found.notes["sizes"][0] and scores.min() >= 0 and scores.max() == 2
    with torch.no_grad():
        usual, _ = method._heard(planted.view, planted.controls)
        loud, _ = method._heard(planted.view, planted.passages[:1])
    levels = method._levels(((loud[0] - usual.mean(0)) / usual.std(0)).abs(), loud[0])
    rest = scores < 1
    order = scores[rest].argsort(descending=True)
    assert bool((levels[rest][order].diff() >= 0).all())


def told(search, recited):
    """Answer a search until it ends: what it found, and the masks it asked about."""
    asked, mask = [], next(search)
    while True:
        asked.append(mask.clone())
        try:
            mask = search.send(recited(mask))
        except StopIteration as end:
            return (*end.value, asked)


@pytest.mark.parametrize("hidden", [[(0, 3)], [(1, 0), (2, 5)], [(0, 1), (0, 2), (2, 6)]])
def test_the_search_finds_the_units_that_matter_and_no_other(hidden):
    """Recited unless all of the hidden units are silent: the answer is those, whatever else was a candidate."""
    generator = torch.Generator().manual_seed(len(hidden))
    levels = torch.randint(0, 9, (3, 7), generator=generator)
    for place in hidden:
        levels[place] = levels[place].clamp(max=6)
    unusual = torch.rand(3, 7, generator=generator)
    chosen, ended, asked = told(_search(levels, unusual, 8), lambda mask: not all(mask[place] for place in hidden))
    assert ended and sorted(map(tuple, chosen.nonzero().tolist())) == hidden
    # Bisection starts from nothing and from all, and only then narrows.
    assert not asked[0].any() and torch.equal(asked[1], levels <= 7) and len(asked) < 30


def test_the_search_says_where_no_candidates_suffice_and_where_none_are_needed():
    levels, unusual = torch.randint(0, 4, (2, 5), generator=torch.Generator().manual_seed(0)), torch.rand(2, 5)
    chosen, ended, _ = told(_search(levels, unusual, 3), lambda _: True)
    assert not ended and torch.equal(chosen, levels <= 2)
    chosen, ended, asked = told(_search(levels, unusual, 3), lambda _: False)
    assert ended and not chosen.any() and len(asked) == 1


def test_levels_by_hand():
    """θ = 3, 2, 1: strictly above it, or among the loudest so far of the layer."""
    method = OutlierSet(highest=3.0, lowest=1.0, decrement=1.0, growth=1)
    assert method._count() == 3
    unusual = torch.tensor([[3.5, 3.0, 2.5, 1.2, 1.0, 0.2, 0.1]])
    loud = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, -9.0, 8.0]])
    assert method._levels(unusual, loud).tolist() == [[0, 1, 1, 2, 3, 0, 1]]
    deviation = OutlierSet(highest=3.0, lowest=1.0, decrement=1.0, growth=0)
    assert deviation._levels(unusual, loud).tolist() == [[0, 1, 1, 2, 3, 3, 3]]


def test_activations_are_means_over_the_positions_that_predict(view_of):
    view, passages = view_of("mistral", torch.float64), zoo.passages(3)
    with torch.no_grad():
        loud, spent = OutlierSet(batch_size=2)._heard(view, passages)
    for row, item in enumerate(passages):
        with torch.no_grad(), view.record(view.sites(Kind.MLP_OUT)) as seen:
            view.model(torch.tensor([item.ids]), use_cache=False)
        for layer, site in enumerate(seen):
            where = slice(len(item.prefix) - 1, len(item.ids) - 1)
            assert_close(loud[row, layer], seen[site][0, where].mean(0), atol=1e-8, rtol=1e-6)
        assert_close(float(spent[row]), slow_nll(view, item), atol=1e-8, rtol=1e-6)


def test_what_cannot_be_searched_is_refused(view_of):
    view, passages = view_of("gpt2"), zoo.passages(2)
    with pytest.raises(InputError, match="a contrast set of 0; it needs two passages or more"):
        OutlierSet()(view, passages)
    with pytest.raises(InputError, match="a contrast set of 1"):
        OutlierSet()(view, passages, contrast=passages[:1])
    with pytest.raises(InputError, match=r"highest 1\.0, lowest 2\.0"):
        OutlierSet(highest=1.0, lowest=2.0)
    with pytest.raises(InputError, match="growth -1"):
        OutlierSet(growth=-1)
