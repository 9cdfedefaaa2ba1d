"""The token record against transformers itself: one unpadded row at a time, full softmax, float64, real generation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_models import CONFIGS, VOCAB, case, greedy, mixed_passages, tiny, view_of
from transformers import TopKLogitsWarper, TopPLogitsWarper

from memloc.errors import InputError, ModelError
from memloc.measures import record as record_module
from memloc.measures.record import Scheme, TokenRecord, suffix_logits, token_record
from memloc.passages import Passage, Passages
from memloc.view import ModelView

SCHEMES = (
    Scheme(),
    Scheme(temperature=0.7),
    Scheme(top_k=5),
    Scheme(temperature=1.9, top_k=3),
    Scheme(top_p=0.8),
    Scheme(temperature=0.8, top_k=9, top_p=0.6),
)
EXACT = dict.fromkeys(CONFIGS, 1e-9) | {"gpt-neo": 1e-5}  # GPT-Neo's attention scores are float32 in any model
families = pytest.mark.parametrize("family", sorted(CONFIGS))


def forced(model, passage: Passage) -> torch.Tensor:
    """Logits [s, v] that predict the suffix: one row, no padding, all positions unembedded."""
    with torch.no_grad():
        logits = model(torch.tensor([passage.ids])).logits[0]
    return logits[len(passage.prefix) - 1 : -1]


def warped(logits: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Log-probabilities after transformers' own warpers."""
    logits = logits / scheme.temperature
    if scheme.top_k is not None:
        logits = TopKLogitsWarper(scheme.top_k)(None, logits)
    if scheme.top_p is not None:
        logits = TopPLogitsWarper(scheme.top_p)(None, logits)
    return logits.softmax(-1).log()


@families
def test_log_pz_of_every_scheme_is_that_of_transformers_warpers(family):
    model, passages = case(family)
    found = token_record(ModelView.open(model), passages, schemes=SCHEMES, batch_size=5)
    for scheme in SCHEMES:
        expected = [
            warped(forced(model, item), scheme).gather(1, torch.tensor(item.suffix)[:, None]).sum() for item in passages
        ]
        torch.testing.assert_close(found.log_pz(scheme), torch.stack(expected), rtol=EXACT[family], atol=EXACT[family])
    cut = found.log_pz(Scheme(top_k=5))
    assert cut.isneginf().any() and cut.isfinite().any()


@families
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_strict_and_first_miss_are_what_generation_finds_on_every_row(family, dtype):
    model, passages = case(family, dtype=dtype)
    found = token_record(ModelView.open(model), passages, batch_size=4)
    said = [greedy(model, item.prefix, len(item.suffix)) for item in passages]
    assert found.strict.tolist() == [told == item.suffix for told, item in zip(said, passages, strict=True)]
    agree = [
        sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(told, item.suffix, strict=True)))
        for told, item in zip(said, passages, strict=True)
    ]
    assert found.first_miss.tolist() == agree
    assert 0 < found.strict.sum() < len(passages)


@families
def test_ranks_matches_and_nll_are_those_of_the_whole_row(family):
    model, passages = case(family)
    found = token_record(ModelView.open(model), passages)
    for row, item in enumerate(passages):
        logits, tokens = forced(model, item), torch.tensor(item.suffix)
        mine = logits.gather(1, tokens[:, None])
        assert found.rank[row, : len(tokens)].tolist() == (logits > mine).sum(1).tolist()
        assert found.match[row, : len(tokens)].tolist() == (logits.argmax(1) == tokens).tolist()
        torch.testing.assert_close(found.nll()[row], torch.nn.functional.cross_entropy(logits, tokens))


@pytest.mark.parametrize("size", [1, 2, 100])
def test_batch_size_order_and_padding_do_not_matter(size):
    model, passages = case("gpt2")
    view = ModelView.open(model)
    whole = token_record(view, passages, schemes=SCHEMES, batch_size=6)
    turned = Passages(passages.items[::-1])
    other = token_record(view, turned, schemes=SCHEMES, batch_size=size)
    for scheme in SCHEMES:
        torch.testing.assert_close(other.log_pz(scheme).flip(0), whole.log_pz(scheme), rtol=1e-11, atol=1e-11)
    for name in ("strict", "first_miss", "fragile", "exact_memorization", "extraction_strength"):
        assert getattr(other, name).flip(0).tolist() == getattr(whole, name).tolist()


def test_the_size_of_a_chunk_does_not_matter_and_bounds_what_is_unembedded(monkeypatch):
    model, passages = case("llama")
    view = ModelView.open(model)
    whole = token_record(view, passages)
    unembed, widths = view.unembed, []
    monkeypatch.setattr(view, "unembed", lambda hidden: widths.append(len(hidden)) or unembed(hidden))
    monkeypatch.setattr(record_module, "CHUNK", 3 * VOCAB)
    narrow = token_record(view, passages)
    assert max(widths) == 3 and sum(widths) == sum(len(item.suffix) for item in passages)
    torch.testing.assert_close(narrow.log_pz(Scheme()), whole.log_pz(Scheme()), rtol=1e-12, atol=1e-12)


def test_every_suffix_token_comes_once():
    model, passages = case("gpt-neox")
    seen = sorted(
        (row, step, token)
        for chunk in suffix_logits(ModelView.open(model), passages, size=3)
        for row, step, token in zip(chunk.row.tolist(), chunk.step.tolist(), chunk.token.tolist(), strict=True)
    )
    assert seen == [(row, step, token) for row, item in enumerate(passages) for step, token in enumerate(item.suffix)]


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(top_k=1)])
def test_probabilities_of_all_continuations_sum_to_one(scheme):
    """Brute force over every suffix of three tokens: the scheme is a distribution, and p_z its probabilities."""
    model = tiny("qwen3", vocab_size=6)
    suffixes = list(itertools.product(range(6), repeat=3))
    passages = Passages(tuple(Passage(str(suffix), (4, 0, 2), suffix) for suffix in suffixes))
    chances = token_record(ModelView.open(model), passages, schemes=(scheme,)).log_pz(scheme).exp()
    torch.testing.assert_close(chances.sum(), torch.ones((), dtype=torch.float64))
    with torch.no_grad():
        tree = warped(model(torch.tensor([(4, 0, 2)])).logits[0, -1:], scheme)[0].exp()
    by_first = chances.view(6, 36).sum(1)
    torch.testing.assert_close(by_first, tree)


def test_tokens_that_tie_at_the_kth_are_all_kept():
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]]).repeat(5, 1)
    found = Scheme(top_k=2).logprobs(logits, torch.arange(5)).exp()
    norm = math.e**3 + 3 * math.e
    torch.testing.assert_close(found, torch.tensor([math.e**3, math.e, math.e, math.e, 0]) / norm)
    torch.testing.assert_close(found, warped(logits[:1], Scheme(top_k=2))[0].exp())


def test_tokens_that_tie_at_the_edge_of_the_nucleus_are_all_kept():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log().repeat(4, 1)
    found = Scheme(top_p=0.6).logprobs(logits, torch.arange(4)).exp()
    torch.testing.assert_close(found, torch.tensor([0.5, 0.2, 0.2, 0.0]) / 0.9)


def test_the_likeliest_token_stays_however_small_the_nucleus():
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    found = Scheme(top_p=1e-9).logprobs(logits, logits.argmax(1))
    torch.testing.assert_close(found, torch.zeros(7))


def test_top_one_is_greedy():
    model, passages = case("mistral")
    found = token_record(ModelView.open(model), passages, schemes=(Scheme(top_k=1),))
    assert found.log_pz(Scheme(top_k=1)).tolist() == [0.0 if strict else -math.inf for strict in found.strict]


@pytest.mark.parametrize("asked", ["low", "high"])
def test_a_tie_goes_to_the_lowest_id_as_in_generation_and_is_called_fragile(asked):
    """Two tokens share one unembedding row, so their logits are equal to the bit."""
    model = tiny("llama", spread=2.0)
    said = greedy(model, (3, 1, 4), 1)[0]
    twin = (said + 5) % VOCAB
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[said]
    token = min(said, twin) if asked == "low" else max(said, twin)
    passages = Passages((Passage("tied", (3, 1, 4), (token,)),))
    found = token_record(ModelView.open(model), passages, schemes=(Scheme(), Scheme(top_k=1)))
    assert found.strict.tolist() == [greedy(model, (3, 1, 4), 1) == (token,)] == [asked == "low"]
    assert (found.rank.item(), found.ties.item(), found.fragile.item()) == (0, 1, True)
    torch.testing.assert_close(found.log_pz(Scheme(top_k=1)), torch.tensor([-math.log(2)], dtype=torch.float64))


def test_a_clear_verdict_is_not_fragile():
    model, passages = case("llama")
    assert not token_record(ModelView.open(model), passages).fragile.any()


def test_a_tie_in_a_row_that_misses_anyway_is_not_fragile():
    found = table([[True, False, True]], close=[[True, False, False]])
    assert not found.fragile.any()
    assert table([[True, True, True]], close=[[True, False, False]]).fragile.all()


def test_half_precision_verdicts_are_those_of_generation_but_for_fragile_rows():
    model = tiny("gpt2", dtype=torch.bfloat16)
    passages = mixed_passages(model, count=30)
    found = token_record(ModelView.open(model), passages)
    said = [greedy(model, item.prefix, len(item.suffix)) == item.suffix for item in passages]
    differs = [row for row, strict in enumerate(found.strict.tolist()) if strict != said[row]]
    assert found.strict.any() and all(found.fragile[row] for row in differs)
    assert found.logprob[Scheme()].dtype == torch.float64


def table(match: list[list[bool]], close: list[list[bool]] | None = None) -> TokenRecord:
    """A record written by hand; rows shorter than the longest are padded as the record does."""
    widest = max(len(row) for row in match)
    padded = torch.tensor([row + [True] * (widest - len(row)) for row in match])
    length = torch.tensor([len(row) for row in match])
    zero = torch.zeros(padded.shape, dtype=torch.long)
    near = torch.zeros(padded.shape, dtype=torch.bool) if close is None else torch.tensor(close)
    return TokenRecord(length, torch.arange(widest) < length[:, None], zero, zero, padded, near, {})


def test_extraction_strength_at_its_edges():
    y, n = True, False
    found = table([[y, y, y, y], [y, y, y, n], [n, y, y, y], [n, n, n, n], [n, y], [y, n], [y], [n], [y, n, y, y]])
    assert found.extraction_strength.tolist() == [1, 0, 0.75, 0, 0.5, 0, 1, 0, 0.5]
    assert found.exact_memorization.tolist() == [1, 0.75, 0.75, 0, 0.5, 0.5, 1, 0, 0.75]
    assert found.first_miss.tolist() == [4, 3, 0, 0, 0, 1, 1, 0, 1]
    assert found.strict.tolist() == [y, n, n, n, n, n, y, n, n]


def test_a_token_outside_the_vocabulary_is_refused_by_name():
    passages = Passages((Passage("fine", (1,), (2,)), Passage("strange", (1,), (VOCAB,))))
    with pytest.raises(InputError, match=f"'strange': token id {VOCAB} outside the vocabulary of {VOCAB}"):
        token_record(view_of("gpt2"), passages)


def test_a_row_longer_than_the_context_is_refused_by_name():
    passages = Passages((Passage("long", (1,) * 40, (2,) * 9),))
    with pytest.raises(InputError, match=r"'long': 49 tokens.*holds 48"):
        token_record(view_of("gpt2"), passages)


def test_no_passage_is_refused():
    with pytest.raises(InputError, match="no passage to measure"):
        token_record(view_of("gpt2"), Passages(()))


def test_logits_that_are_not_finite_name_the_passage():
    view = view_of("gpt2")
    with torch.no_grad():
        view.model.transformer.wpe.weight[6] = math.inf
    passages = Passages((Passage("short", (1,), (2, 3)), Passage("long", (1,) * 5, (2,) * 4)))
    with pytest.raises(ModelError, match="'long': the logits for suffix token 0 are not finite"):
        token_record(view, passages)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"temperature": 0}, "strict rate"), ({"temperature": math.inf}, "temperature"), ({"top_k": 0}, "at least 1"),
     ({"top_p": 0.0}, "mass"), ({"top_p": 1.5}, "mass"), ({"temperature": math.nan}, "temperature")],
)  # fmt: skip
def test_a_scheme_outside_its_range_is_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Scheme(**settings)
