"""Fact recall against one prompt at a time, and on answers whose verdicts are known because we chose them."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import CONFIGS, VOCAB, case, greedy

from memloc.errors import InputError
from memloc.measures.facts import FactRecall
from memloc.passages import Fact, Facts, Neighbor, Prompt
from memloc.view import ModelView


def prompt(*ids: int) -> Prompt:
    return Prompt(ids, None, "")


def fact(name: str, target, true, *, prompts=((1, 2),), neighbors=(), **tags) -> Fact:
    first, *rest = (prompt(*ids) for ids in prompts)
    others = tuple(Neighbor(prompt(*ids), answer) for ids, answer in neighbors)
    return Fact(name, "{}", "s", first, tuple(target), tuple(true), "", "", tuple(rest), others, tags)


def nll(model, ids, answer) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item()


def random_facts(model, count: int = 9) -> Facts:
    generator = torch.Generator().manual_seed(3)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCAB, (n,), generator=generator).tolist())

    items = []
    for index in range(count):
        prompts = tuple(draw(2 + (index + part) % 4) for part in range(1 + index % 4))
        target, true = draw(1 + index % 3), draw(1 + (index + 1) % 2)
        if index % 3 == 0:
            target = greedy(model, prompts[0], len(target))
        if index % 3 == 1:
            true = greedy(model, prompts[-1], len(true))
        near = [draw(3 + part) for part in range(index % 3)]
        neighbors = tuple((ids, greedy(model, ids, 2) if part else draw(2)) for part, ids in enumerate(near))
        items.append(fact(f"fact-{index}", target, true, prompts=prompts, neighbors=neighbors))
    return Facts(tuple(items))


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_verdict_is_that_of_one_prompt_at_a_time(family):
    model, _ = case(family)
    facts = random_facts(model)
    found = FactRecall(batch_size=5)(ModelView.open(model), facts)
    for item, row in zip(facts, found.rows, strict=True):
        new, true = nll(model, item.prompt.ids, item.target), nll(model, item.prompt.ids, item.target_true)
        assert (row["nll_new"], row["nll_true"]) == pytest.approx((new, true), rel=1e-5)
        assert row["efficacy success"] == (new < true)
        assert row["efficacy accuracy"] == (greedy(model, item.prompt.ids, len(item.target)) == item.target)
        assert row["true accuracy"] == (greedy(model, item.prompt.ids, len(item.target_true)) == item.target_true)
        if item.paraphrases:
            said = [p.ids for p in item.paraphrases]
            share = sum(nll(model, ids, item.target) < nll(model, ids, item.target_true) for ids in said)
            assert row["paraphrase success"] == share / len(said)
            exact = sum(greedy(model, ids, len(item.target)) == item.target for ids in said)
            assert row["paraphrase accuracy"] == exact / len(said)
            known = sum(greedy(model, ids, len(item.target_true)) == item.target_true for ids in said)
            assert row["paraphrase true accuracy"] == known / len(said)
        if item.neighbors:
            near = [(n.prompt.ids, n.target) for n in item.neighbors]
            kept = sum(nll(model, ids, own) < nll(model, ids, item.target) for ids, own in near)
            assert row["neighbour success"] == kept / len(near)
            assert row["neighbour accuracy"] == sum(greedy(model, ids, 2) == own for ids, own in near) / len(near)
    assert 0 < found["efficacy accuracy"] < 1 and 0 < found["true accuracy"] < 1 and found["neighbour accuracy"] > 0


def test_each_fact_counts_once_however_many_paraphrases_it_has():
    model, _ = case("gpt2")
    ids = (5, 6, 7)
    said, other = greedy(model, ids, 1), ((greedy(model, ids, 1)[0] + 1) % VOCAB,)
    recited = fact("one", said, other, prompts=(ids, ids))
    missed = fact("four", other, said, prompts=(ids, ids, ids, ids, ids))
    found = FactRecall()(ModelView.open(model), Facts((recited, missed)))
    assert found["paraphrase success"] == found["paraphrase accuracy"] == 0.5
    assert found["paraphrase true accuracy"] == 0.5
    assert found.figures["paraphrase success"].n == 2


def test_answers_of_several_tokens_are_compared_per_token():
    """A long likely answer may have a smaller total probability than a short unlikely one."""
    model, _ = case("gpt2")
    ids = (9, 1, 30)
    long = greedy(model, ids, 6)
    totals = sorted((nll(model, ids, (token,)), token) for token in range(VOCAB))
    mean = nll(model, ids, long)
    short = next(token for level, token in totals if mean < level < 6 * mean)
    found = FactRecall()(ModelView.open(model), Facts((fact("f", long, (short,), prompts=(ids,)),)))
    assert found["efficacy success"] == 1


def test_order_and_batch_size_do_not_matter():
    model, _ = case("llama")
    facts, view = random_facts(model), ModelView.open(model)
    whole = FactRecall()(view, facts)
    other = FactRecall(batch_size=1)(view, Facts(facts.items[::-1]))
    for name, figure in whole.figures.items():
        assert other[name] == pytest.approx(figure.value, rel=1e-12)
    assert [row["id"] for row in other.rows] == list(facts.ids)[::-1]


def test_a_question_asked_twice_is_run_once(monkeypatch):
    model, _ = case("gpt2")
    view = ModelView.open(model)
    twice = Facts(tuple(fact(name, (3,), (4,), prompts=((1, 2), (1, 2))) for name in "ab"))
    rows = []
    hidden = view.hidden
    monkeypatch.setattr(view, "hidden", lambda batch: rows.append(len(batch)) or hidden(batch))
    FactRecall()(view, twice)
    assert sum(rows) == 2


def test_figures_nobody_has_prompts_for_are_left_out():
    model, _ = case("gpt2")
    found = FactRecall()(ModelView.open(model), Facts((fact("bare", (3,), (4,)),)))
    assert set(found.figures) == {"efficacy success", "efficacy accuracy", "true accuracy"}


def test_the_score_is_the_harmonic_mean_and_zero_where_a_part_is():
    model, _ = case("gpt2")
    ids, view = (5, 6, 7), ModelView.open(model)
    said, other = greedy(model, ids, 1), ((greedy(model, ids, 1)[0] + 1) % VOCAB,)
    good = fact("good", said, other, prompts=(ids, ids), neighbors=((ids, other),))
    split = fact("split", said, other, prompts=(ids, ids), neighbors=((ids, other), ((1, 1), greedy(model, (1, 1), 1))))
    assert split.neighbors[1].target != said
    assert FactRecall()(view, Facts((good,)))["score"] == 0
    found = FactRecall()(view, Facts((split,)))
    assert found["neighbour success"] == 0.5
    assert found["score"] == pytest.approx(3 / (1 + 1 + 2))
    assert found.figures["score"].low <= found["score"] <= found.figures["score"].high


def test_tags_and_provenance_travel():
    model, _ = case("gpt2")
    view = ModelView.open(model)
    facts = Facts((fact("f", (3,), (4,), relation="city", note="left behind"),))
    found = FactRecall()(view, facts)
    assert found.rows[0]["relation"] == "city" and "note" not in found.rows[0]
    assert found.provenance.inputs == {"model": view.digest, "facts": facts.digest}
    assert math.isfinite(found.rows[0]["nll_new"])


def test_a_token_outside_the_vocabulary_names_the_fact():
    model, _ = case("gpt2")
    with pytest.raises(InputError, match=f"'odd, prompt and answer 0': token id {VOCAB}"):
        FactRecall()(ModelView.open(model), Facts((fact("odd", (VOCAB,), (4,)),)))
