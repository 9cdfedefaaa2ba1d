from __future__ import annotations

import pytest
import torch
import zoo
from torch.testing import assert_close

from editors.tuning.alternative import own_alternative
from editors.tuning.keep import Keep, Source
from editors.tuning.replay import _grams, recites, self_replay, token_pool
from memloc.batches import pad
from memloc.errors import InputError
from memloc.passages import Passage, Passages
from memloc.running.decoding import continuation
from memloc.view import ModelView


@pytest.fixture(scope="module")
def view():
    return ModelView.open(zoo.build("gpt2"))


@pytest.fixture(scope="module")
def other(view):
    """The same model with noise on its blocks: another opinion through the same unembedding."""
    changed = view.copy()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for site in changed.sites(*changed.kinds):
            changed.parameter(site).add_(torch.randn(changed.parameter(site).shape, generator=generator), alpha=0.2)
    return changed


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_greedy_continuation_is_what_whole_forwards_say(family):
    """With cached keys and values, and with none, the model says the same; its hidden states are those of one pass."""
    view = ModelView.open(zoo.build(family))
    start = torch.randint(zoo.VOCAB, (3, 5), generator=torch.Generator().manual_seed(2))
    made = continuation(view, start, 9)
    row = start
    with torch.no_grad():
        for _ in range(9):
            row = torch.cat([row, view.logits(pad(row.tolist()))[:, -1].argmax(-1, keepdim=True)], 1)
        hidden = view.hidden(pad(row.tolist()))[:, :-1]
    assert torch.equal(made.ids, row)
    assert_close(made.hidden, hidden, rtol=1e-4, atol=1e-4)


def test_samples_follow_the_models_distribution(view):
    """Chi-squared over the vocabulary at temperature 0.5: drawn frequencies against softmax(logits / 0.5)."""
    start = torch.full((6000, 1), 3)
    made = continuation(view, start, 1, temperature=0.5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = view.logits(pad([[3]]))[0, -1]
    counts = made.ids[:, 1].bincount(minlength=zoo.VOCAB).double()

    def distance(temperature: float) -> float:
        expected = 6000 * (logits.double() / temperature).softmax(-1)
        often = expected > 5
        return float(((counts - expected)[often] ** 2 / expected[often]).sum()) / int(often.sum())

    assert distance(0.5) < 2
    assert distance(1.0) > 10, "the test tells temperatures apart"


def test_samples_depend_on_the_seed_only(view):
    torch.manual_seed(5)
    one = self_replay(view, 64, length=12, seed=4, size=7)
    torch.manual_seed(6)
    two = self_replay(view, 64, length=12, seed=4, size=7)
    assert torch.equal(one.ids, two.ids) and torch.equal(one.hidden, two.hidden)
    assert not torch.equal(one.ids, self_replay(view, 64, length=12, seed=5, size=7).ids)
    assert one.ids.shape == (16, 12) and one.hidden.shape == (16, 11, view.width)


def test_no_sample_recites_a_target(view):
    free = self_replay(view, 160, length=16, seed=1)
    target = free.ids[7].tolist()
    grams = _grams([target], 4)
    assert sum(recites(row, grams) for row in free.ids.tolist()) >= 1, "without the filter one would"
    kept = self_replay(view, 160, length=16, seed=1, avoid=[target], ngram=4)
    assert not any(recites(row, grams) for row in kept.ids.tolist())
    assert kept.filtered == len(free.ids) - len(kept.ids) >= 1


def test_targets_shorter_than_the_ngram_count_whole():
    assert recites([9, 1, 2, 3, 9], _grams([(1, 2, 3)], 8))
    assert not recites([9, 1, 2, 9, 3], _grams([(1, 2, 3)], 8))


def test_the_likeliest_openings_are_finished(view):
    """A model that is sure after one token and not after others: most samples kept start there."""
    made = self_replay(view, 400, length=12, seed=0)
    few = continuation(view, made.ids[:, :1], 2, temperature=0.7, generator=torch.Generator().manual_seed(1))
    assert len(made.ids) == 100 and few.ids.shape == (100, 3)
    with torch.no_grad():
        spoken = (
            view.logits(pad(made.ids.tolist())).log_softmax(-1)[:, 1:2].gather(-1, made.ids[:, 2:3, None]).mean((1, 2))
        )
    assert float(spoken[:50].mean()) > float(spoken[50:].mean()) + 0.1


def test_starts_come_from_the_pool(view):
    passages = Passages((Passage("a", (3, 4), (5,)), Passage("b", (6,), (7,))))
    assert token_pool(passages, None, passages[:1]) == (3, 4, 5, 6, 7, 3, 4, 5)
    bare = self_replay(view, 64, length=8, seed=0)
    assert set(bare.ids[:, 0].tolist()) == {view.config.bos_token_id}
    pooled = self_replay(view, 400, length=8, starts=[11], seed=0).ids[:, 0]
    assert 0.2 < float((pooled == 11).double().mean()) < 0.9 and len(pooled.unique()) > 10


def test_the_keep_term_is_zero_on_the_model_itself_and_grows_away_from_it(view, other):
    made = self_replay(view, 64, length=12, seed=4)
    sources = [Source.of("replay", made.ids.tolist(), made.hidden), Source.of("text", [p.ids for p in zoo.passages(5)])]
    keep = Keep(view, sources, [3, 2], steps=4, seed=0)
    with torch.no_grad():
        for step in range(4):
            assert abs(float(keep.divergence(view, step))) < 1e-6
            assert float(keep.divergence(other, step)) > 0.1


def test_the_keep_term_is_the_mean_divergence_per_token(view, other):
    """Against the sum written out, in float64; every token of a row but the first counts once."""
    rows = [item.ids for item in zoo.passages(3)]
    found = Keep(view, [Source.of("text", rows)], [3], steps=1, seed=0).divergence(other, 0)
    total = tokens = 0.0
    with torch.no_grad():
        for row in rows:
            p, q = (m.logits(pad([row]))[0, :-1].double().log_softmax(-1) for m in (view, other))
            total += float((p.exp() * (p - q)).sum())
            tokens += len(row) - 1
    assert_close(float(found.detach()), total / tokens, rtol=1e-4, atol=1e-5)


def test_every_row_is_drawn_once_before_any_comes_again(view):
    keep = Keep(view, [Source.of("text", [p.ids for p in zoo.passages(5)])], [2], steps=5, seed=0)
    assert sorted(keep.order[0][:5]) == sorted(keep.order[0][5:]) == [0, 1, 2, 3, 4]


def test_alternatives_keep_the_prefix_and_leave_the_suffix(view):
    start = [list(item.prefix) for item in zoo.passages(3, ragged=False)]
    said = continuation(view, torch.tensor(start), 6).ids[:, 9:].tolist()
    recited = Passages(
        tuple(Passage(f"r{i}", tuple(a), tuple(b)) for i, (a, b) in enumerate(zip(start, said, strict=True)))
    )
    found = own_alternative(view, recited, tries=16, seed=0)
    for item, old in zip(found, recited, strict=True):
        assert item.prefix == old.prefix and item.id == old.id
        assert 2 * sum(a == b for a, b in zip(item.suffix, old.suffix, strict=True)) <= 6


def test_a_passage_that_cannot_be_disturbed_is_refused():
    view = ModelView.open(zoo.build("gpt2"))
    with torch.no_grad():
        for parameter in view.model.parameters():
            parameter.zero_()
    stuck = Passages((Passage("stuck", (3, 4, 5), (0, 0)),))
    with pytest.raises(InputError, match=r"'stuck' is recited \(2 of 2 tokens\)"):
        own_alternative(view, stuck, tries=8)
