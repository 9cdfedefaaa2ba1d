"""The prefix map, resumed rows and perturbed twins against plain loops: whole forwards, one exchange at a time."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch.testing import assert_close

from memloc.errors import InputError, ModelError
from memloc.localizers.prefix_perturbation import EMBED, PrefixPerturbation
from memloc.passages import Passage, Passages
from memloc.patching.perturbation import Exchanges, recited
from memloc.patching.twins import perturbed_twins
from memloc.running.resumed import LeftCache

every_family = pytest.mark.parametrize("family", zoo.FAMILIES)


@torch.no_grad()
def slow_nll(view, ids, prefix):
    spoken = view.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return -sum(float(spoken[at - 1, ids[at]]) for at in range(prefix, len(ids))) / (len(ids) - prefix)


@torch.no_grad()
def slow_greedy(view, prefix, length):
    ids = list(prefix)
    for _ in range(length):
        ids.append(int(view.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(prefix) :])


def leading(text, other):
    return next((at for at, (one, two) in enumerate(zip(text, other, strict=True)) if one != two), len(text))


def slow_maps(view, passage, tokens):
    """Rise, tokens right before the first mistake, and decoded text of every exchange."""
    clean = slow_nll(view, passage.ids, len(passage.prefix))
    rise, exact, texts = torch.zeros(tokens.shape), torch.zeros(tokens.shape), []
    for at in range(tokens.shape[0]):
        for which in range(tokens.shape[1]):
            prefix = (*passage.prefix[:at], int(tokens[at, which]), *passage.prefix[at + 1 :])
            rise[at, which] = slow_nll(view, prefix + passage.suffix, len(prefix)) - clean
            text = slow_greedy(view, prefix, len(passage.suffix))
            exact[at, which] = leading(text, passage.suffix)
            texts.append(text)
    return rise.double(), exact.long(), torch.tensor(texts).view(*tokens.shape, -1)


@every_family
def test_the_map_is_what_plain_loops_say(family, view_of):
    """float64, own continuations, so that some decoded tokens are right; sliding windows narrower than the passages."""
    view = view_of(family, torch.float64)
    passages = recited(view, zoo.passages(2, prefix=8, suffix=6))
    found = Exchanges(alternatives=2, decode=True, batch_size=2, stride=3).maps(view, passages)
    right = 0
    for item, mine in zip(passages, found, strict=True):
        assert mine.clean_exact == len(item.suffix)
        assert bool((mine.tokens != torch.tensor(item.prefix)[:, None]).all())
        rise, exact, text = slow_maps(view, item, mine.tokens)
        assert float(rise.abs().max()) > 0.05
        assert_close(mine.rise, rise, atol=1e-6, rtol=1e-6)
        assert torch.equal(mine.exact, exact)
        assert torch.equal(mine.written, text)
        right += int((exact > 0).sum() - (exact == len(item.suffix)).sum())
    assert right > 0, "no exchange left some tokens right and some wrong, so decoding from a mistake was not tried"


@every_family
def test_many_tokens_on_a_cached_prefix_are_exact(family, view_of):
    view = view_of(family, torch.float64)
    ids = torch.randint(zoo.VOCAB, (3, 14), generator=torch.Generator().manual_seed(0))
    other = torch.randint(zoo.VOCAB, (4, 9), generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([2, 0, 0, 1])
    left = LeftCache.of(view, ids)
    for column in (0, 1, 6, 14):
        whole = view.model.base_model(torch.cat([ids[rows, :column], other], 1), use_cache=False).last_hidden_state
        assert_close(left.resume(rows, column, other).hidden, whole[:, column:].detach(), atol=1e-9, rtol=1e-9)


def test_a_model_whose_cached_prefix_lies_is_refused(view_of):
    view = view_of("llama")
    left = LeftCache.of(view, torch.arange(10)[None])
    rows = torch.tensor([0])
    hidden = left.resume(rows, 4, torch.arange(4, 10)[None]).hidden
    left.proves(rows, 4, hidden[:, 0])
    with pytest.raises(ModelError, match="Llama: tokens on their cached prefix differ by"):
        left.proves(rows, 4, hidden[:, 1])


def test_chunks_and_strides_do_not_change_the_map(view_of, monkeypatch):
    view, passages = view_of("mistral", torch.float64), zoo.passages(3)
    whole = Exchanges(alternatives=3, decode=True).maps(view, passages)
    monkeypatch.setattr(Exchanges, "_row_bytes", lambda *_, **__: 1 << 20)
    for rows, stride in ((4, 5), (7, 100), (64, 1)):
        parts = Exchanges(alternatives=3, decode=True, stride=stride, memory_mb=rows).maps(view, passages)
        for one, other in zip(whole, parts, strict=True):
            assert_close(one.rise, other.rise, atol=1e-9, rtol=0)
            assert torch.equal(one.greedy, other.greedy) and torch.equal(one.written, other.written)


def test_scores_are_means_over_alternatives_and_notes_name_the_worst(view_of):
    view = view_of("gpt2", torch.float64)
    passages = recited(view, zoo.passages(2))
    maps = Exchanges(alternatives=3, decode=True).maps(view, passages)
    for score, effect in (("nll", "rise"), ("exact", "drop"), ("changed", "changed")):
        found = PrefixPerturbation(score=score, alternatives=3)(view, passages)
        assert found.lengths == tuple(len(item.ids) for item in passages)
        for row, (item, mine) in enumerate(zip(passages, maps, strict=True)):
            by = getattr(mine, effect).double()
            scores = found.scores[EMBED][row].double()
            assert_close(scores[: len(item.prefix)], by.mean(1), atol=1e-6, rtol=1e-5)
            assert not scores[len(item.prefix) :].any()
            at = found.notes["position"][row]
            assert_close(torch.tensor(found.notes["effect"][row]).double(), by.max(), atol=1e-6, rtol=1e-6)
            assert found.notes["token"][row] in mine.tokens[at] and by[at].max() == by.max()
            assert found.notes["exact_before"][row] == len(item.suffix)


def test_own_continuations_are_watched_in_the_suffixs_place(view_of):
    view, passages = view_of("gpt_neox"), zoo.passages(3)
    own = PrefixPerturbation(score="exact", target="own", alternatives=1)(view, passages)
    assert own.notes["exact_before"] == [len(item.suffix) for item in passages]
    assert own.provenance.inputs["passages"] == passages.digest
    given = PrefixPerturbation(score="exact", alternatives=1)(view, passages)
    assert given.notes["exact_before"] != own.notes["exact_before"]


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_a_twin_is_the_worst_exchange_and_what_the_model_then_writes(family, view_of):
    view = view_of(family, torch.float64)
    passages = recited(view, zoo.passages(2))
    maps = Exchanges(alternatives=2, seed=3).maps(view, passages)
    for by in ("nll", "exact"):
        twins = perturbed_twins(view, passages, Exchanges(alternatives=2, seed=3), by=by)
        assert twins.passages.ids == passages.ids
        for row, (item, twin, mine) in enumerate(zip(passages, twins.passages, maps, strict=True)):
            differ = [at for at, (one, two) in enumerate(zip(item.prefix, twin.prefix, strict=True)) if one != two]
            assert differ == [twins.position[row]] == [twin.tags["perturbed"]]
            assert twin.suffix == slow_greedy(view, twin.prefix, len(item.suffix))
            rise, exact = mine.rise, mine.exact
            at = twins.position[row], mine.tokens[twins.position[row]].tolist().index(twins.token[row])
            if by == "nll":
                assert at == divmod(int(rise.argmax()), 2)
            else:
                assert exact[at] == exact.min() and rise[at] == rise[exact == exact.min()].max()


def test_alternatives_depend_on_seed_and_tokens_only():
    one, other = Passage("a", (1, 2, 3), (4,)), Passage("b", (1, 2, 3), (4,), {"dose": 1})
    draw = Exchanges(alternatives=50).draw(5, one)
    assert torch.equal(draw, Exchanges(alternatives=50).draw(5, other))
    assert not torch.equal(draw, Exchanges(alternatives=50, seed=1).draw(5, one))
    assert {int(token) for token in draw[1]} == {0, 1, 3, 4}


def test_settings_out_of_range_are_refused(view_of):
    with pytest.raises(InputError, match="alternatives, batch_size, stride and memory_mb"):
        PrefixPerturbation(alternatives=0)
    with pytest.raises(InputError, match=r"passage 'x': token id 99 outside"):
        PrefixPerturbation()(view_of("gpt2"), Passages((Passage("x", (1, 99), (2,)),)))
