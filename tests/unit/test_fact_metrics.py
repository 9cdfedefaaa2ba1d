"""The benchmarks' figures, on models whose answers we choose: a table of what is said after what."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import format_samples as samples
import pytest
import tiny_models
import torch
from tiny_tokenizers import byte_level

from memloc.errors import InputError, MismatchError
from memloc.formats.rewrites import counterfact, knowedit, mquake, zsre, zsre_answers
from memloc.formats.ripple import ripple
from memloc.measures import asking, ripple_effects
from memloc.measures import knowedit as knowedit_module
from memloc.measures import mquake as mquake_module
from memloc.measures.counterfact import CounterFact
from memloc.measures.facts import FactRecall
from memloc.measures.knowedit import KnowEdit, asks
from memloc.measures.mquake import Mquake
from memloc.measures.prose import inverse_frequencies, names, ngram_entropy, similarity
from memloc.measures.ripple_effects import RippleEffects
from memloc.measures.zsre import Zsre
from memloc.passages import Facts
from memloc.running.decoding import continuation
from memloc.view import ModelView


@pytest.fixture(scope="module")
def view():
    tokenizer = byte_level()
    model = tiny_models.tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=96)
    return ModelView.open(model, tokenizer=tokenizer)


def facts_of(records, tokenizer):
    return Facts.from_records([(f"line {index}", record) for index, record in enumerate(records)], tokenizer)


@torch.no_grad()
def said(view, prompt, count):
    """Greedy tokens, one plain forward each."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(view.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# -- prose -------------------------------------------------------------------------------------------------------


def test_the_entropy_of_ngrams_is_that_of_counting_them():
    text = "a b a b c"  # bigrams ab 2, ba 1, bc 1; trigrams aba, bab, abc
    two, three = 1.5, math.log2(3)
    assert ngram_entropy(text) == pytest.approx((2 / 3 * two + 4 / 3 * three) / 2)
    assert ngram_entropy("ha " * 40) == 0 < ngram_entropy("the cat sat on the mat and the dog on the log")
    assert ngram_entropy("word") == 0 == ngram_entropy("")


def test_similar_texts_share_their_rare_words():
    inverse = inverse_frequencies(["the cat sat", "the dog sat", "the log"])
    assert inverse["the"] < inverse["sat"] < inverse["cat"]
    assert similarity("the cat", "THE CAT!", inverse) == pytest.approx(1)
    assert similarity("cat", "dog", inverse) == 0 == similarity("xyz", "cat", inverse)
    assert similarity("the cat", "the dog", inverse) < similarity("the cat", "cat sat", inverse)


@pytest.mark.parametrize(
    ("text", "answers", "held"),
    [
        ("It is in São Paulo, Brazil.", ("Sao Paulo",), True),
        ("The Beatles played", ("Beatles",), True),
        ("Romeo lives here", ("Rome",), False),
        ("New and York", ("New York",), False),
        ("nothing", ("the",), False),
        ("42 years", ("41", "42"), True),
        ("", ("Rome",), False),
    ],
)
def test_an_answer_is_named_as_whole_words_however_it_is_spelled(text, answers, held):
    assert names(text, answers) is held


# -- asking ------------------------------------------------------------------------------------------------------


def test_what_is_predicted_is_the_argmax_of_each_place(view):
    asked = [((1, 2, 3), (4, 5)), ((7,), (1, 2, 3)), ((1, 2, 3), (4, 5))]
    found = asking.predicted(view, asked, batch_size=2)
    for (prompt, answer), tokens in zip(asked, found, strict=True):
        logits = view.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        assert tokens == tuple(logits.argmax(-1).tolist())
    assert asking.predicted(view, [], batch_size=2) == []


def test_what_is_written_is_greedy_and_prompts_keep_their_place(view):
    prompts = ["the cat", "Ada Brolin lives in", "the cat"]
    found = asking.written(view, prompts, 4, batch_size=2)
    for prompt, text in zip(prompts, found, strict=True):
        ids = view.tokenizer(prompt)["input_ids"]
        assert text == view.tokenizer.decode(said(view, ids, 4))


def test_the_k_likeliest_are_all_that_is_drawn(view):
    start = torch.tensor([[1, 2, 3]]).repeat(40, 1)
    draw = torch.Generator().manual_seed(0)
    found = continuation(view, start, 1, temperature=1.0, top_k=3, generator=draw).ids[:, -1]
    best = view.model(start[:1]).logits[0, -1].topk(3).indices.tolist()
    assert set(found.tolist()) <= set(best) and len(set(found.tolist())) > 1
    every = continuation(view, start, 1, temperature=3.0, generator=draw).ids[:, -1]
    assert not set(every.tolist()) <= set(best)


# -- CounterFact -------------------------------------------------------------------------------------------------


def test_counterfact_adds_to_recall_what_the_papers_print(view, tmp_path):
    record = counterfact(samples.CASE, None)[0]
    other = {**record, "id": "8", "generation_prompts": None}
    facts = facts_of([record, other], view.tokenizer)
    snippets = [{"relation_id": "P1", "target_id": "Q1", "samples": [{"text": "Rome is old"}, {"text": "Rome"}]},
                {"relation_id": "P1", "target_id": "Q2", "samples": [{"text": "Paris is old"}]}]  # fmt: skip
    (tmp_path / "snippets.json").write_text(json.dumps(snippets))
    found = CounterFact(tokens=24, snippets=str(tmp_path / "snippets.json"))(view, facts)
    recall = FactRecall()(view, facts)
    assert {name: found.figures[name] for name in recall.figures} == dict(recall.figures)
    fact, row = facts[0], found.rows[0]
    ids = fact.prompt.ids

    @torch.no_grad()
    def chance(prompt, answer):
        logs = view.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return math.exp(float(logs.gather(1, torch.tensor(answer)[:, None]).mean()))

    assert row["efficacy magnitude"] == pytest.approx(
        chance(ids, fact.target) - chance(ids, fact.target_true), rel=1e-6
    )
    near = fact.neighbors[0]
    wanted = chance(near.prompt.ids, near.target) - chance(near.prompt.ids, fact.target)
    assert row["neighbour magnitude"] == pytest.approx(wanted, rel=1e-6)
    assert found["fluency"] > 0 and 0 <= found["consistency"] <= 1
    assert CounterFact(tokens=24)(view, facts).rows[0]["fluency"] == row["fluency"]
    assert CounterFact(tokens=24, seed=1)(view, facts).rows[0]["fluency"] != row["fluency"]
    assert "fluency" not in CounterFact(generate=False)(view, facts).figures
    (tmp_path / "bad.json").write_text('[{"a": 1}]')
    with pytest.raises(InputError, match=r"bad\.json: not a list of \{relation_id"):
        CounterFact(snippets=str(tmp_path / "bad.json"))(view, facts)


# -- zsRE --------------------------------------------------------------------------------------------------------


def test_zsre_counts_tokens_and_tells_its_conventions_apart(view):
    both = [zsre(samples.ZSRE, None)[0], zsre_answers(samples.ZSRE, None)[0]]
    first, second = (facts_of([record], view.tokenizer) for record in both)
    found = Zsre()(view, first)
    fact = first[0]
    best = view.model(torch.tensor([[*fact.prompt.ids, *fact.target]])).logits[0].argmax(-1).tolist()
    start = len(fact.prompt.ids) - 1
    share = sum(a == b for a, b in zip(best[start:], fact.target, strict=False)) / len(fact.target)
    assert found["efficacy"] == pytest.approx(share) and found["efficacy exact"] == (share == 1)
    assert "alt" in found.provenance.settings["convention"]
    assert "answers[0]" in Zsre()(view, second).provenance.settings["convention"]
    mixed = facts_of([{**both[0], "id": "a"}, {**both[1], "id": "b"}], view.tokenizer)
    with pytest.raises(InputError, match=r"^zsre: facts of two conventions .* measure them one by one$"):
        Zsre()(view, mixed)


def test_zsre_scores_a_model_that_answers_as_one(view):
    record = zsre(samples.ZSRE, None)[0]
    blank = facts_of([record], view.tokenizer)[0]
    ids = said(view, blank.prompt.ids, 2)
    right = Facts((type(blank)(**{**vars(blank), "target": tuple(ids), "paraphrases": (), "neighbors": ()}),))
    assert Zsre()(view, right)["efficacy"] == 1
    half = Facts((type(blank)(**{**vars(right[0]), "target": (ids[0], (ids[1] + 1) % 300)}),))
    found = Zsre()(view, half)
    assert found["efficacy"] == 0.5 and found["efficacy exact"] == 0 and "score" not in found.figures


# -- KnowEdit ----------------------------------------------------------------------------------------------------


def test_locality_is_what_the_model_said_before_not_what_is_true(view, tmp_path):
    facts = facts_of([knowedit(samples.KNOWEDIT, None)[0]], view.tokenizer)
    before = KnowEdit(tokens=5)(view, facts)
    assert "locality" not in before.figures and "portability reasoning" in before.figures
    before.save(tmp_path / "before.json")
    same = KnowEdit(tokens=5, before=str(tmp_path / "before.json"))(view, facts)
    assert same["locality"] == 1
    model = tiny_models.tiny("llama", vocab_size=len(view.tokenizer), max_position_embeddings=96, seed=3)
    other = KnowEdit(tokens=5, before=str(tmp_path / "before.json"))(
        ModelView.open(model, tokenizer=view.tokenizer), facts
    )
    assert other["locality"] < 1
    assert set(other.figures) >= {"locality relation specificity", "locality forgetfulness", "rewrite", "fluency"}


def test_the_generated_protocol_asks_for_the_models_own_words(view, monkeypatch):
    facts = facts_of([knowedit(samples.KNOWEDIT, None)[0]], view.tokenizer)
    table = {ask.prompt: "It is Rome, Italy." if "ge" in ask.prompt else "IT." for ask in asks(facts[0])}
    monkeypatch.setattr(knowedit_module, "written", lambda view, prompts, *_, **__: [table[text] for text in prompts])
    found = KnowEdit(protocol="generated", fluency=False)(view, facts)
    assert found["portability reasoning"] == 1 and found["rewrite"] == 0
    assert found.provenance.settings["protocol"] == "generated"


def test_a_measurement_of_something_else_is_no_before(view, tmp_path):
    facts = facts_of([knowedit(samples.KNOWEDIT, None)[0]], view.tokenizer)
    FactRecall()(view, facts).save(tmp_path / "recall.json")
    with pytest.raises(MismatchError, match=r"recall\.json: facts of 1 items; expected knowedit of the same 1 items"):
        KnowEdit(before=str(tmp_path / "recall.json"))(view, facts)


# -- MQuAKE ------------------------------------------------------------------------------------------------------


def answering(table, fallback="I do not know"):
    return lambda view, prompts, *_, **__: [
        next((reply for words, reply in table.items() if words in prompt), fallback) for prompt in prompts
    ]


def test_a_case_counts_when_any_of_its_questions_is_answered(view, monkeypatch):
    record = {**samples.MQUAKE, "new_single_hops": [
        {"question": "Where does Ada live?", "answer": "Rome", "answer_alias": []},
        {"question": "What is Italy's capital?", "answer": "Oslo", "answer_alias": ["Christiania"]}]}  # fmt: skip
    facts = facts_of(mquake(record, None), view.tokenizer)
    assert len(facts) == 2
    monkeypatch.setattr(mquake_module, "written", answering({"Q: a\n": " Christiania\nQ: more: Paris"}))
    found = Mquake()(view, facts)
    assert len(found.rows) == 1 and found["multi-hop"] == 1 and found["multi-hop each"] == pytest.approx(1 / 3)
    assert found["multi-hop old"] == 0 and found["instance-wise"] == 0 and 0 <= found["edit-wise"] <= 1
    table = {"Where is the home": "Paris", "Ada live?": "Rome", "Italy's": "christiania!"}
    monkeypatch.setattr(mquake_module, "written", answering(table))
    found = Mquake()(view, facts)
    assert found["multi-hop"] == 0 and found["multi-hop old"] == 1 and found["instance-wise"] == 1


def test_mquake_refuses_facts_without_questions(view, tmp_path):
    plain = facts_of([samples.OWN_FACT], view.tokenizer)
    with pytest.raises(InputError, match=r"^fact 'f0' carries no multi-hop 'questions' and 'new_answer'; mquake needs"):
        Mquake()(view, plain)
    with pytest.raises(InputError, match=r"template 'Q:': expected one \{\}"):
        Mquake(template="Q:")
    facts = facts_of(mquake(samples.MQUAKE, None), view.tokenizer)
    with pytest.raises(InputError, match=r"nowhere: the shots cannot be read"):
        Mquake(shots=str(tmp_path / "nowhere"))(view, facts)


def test_shots_stand_in_front_of_every_question(view, tmp_path, monkeypatch):
    (tmp_path / "shots.txt").write_text("Q: Who?\nA: Me\n")
    asked = []
    monkeypatch.setattr(
        mquake_module, "written", lambda view, prompts, *_, **__: asked.extend(prompts) or ["x"] * len(prompts)
    )
    Mquake(shots=str(tmp_path / "shots.txt"))(view, facts_of(mquake(samples.MQUAKE, None), view.tokenizer))
    assert all(prompt.startswith("Q: Who?\nA: Me\n\nQ: ") and prompt.endswith("\nA:") for prompt in asked)


# -- RippleEdits -------------------------------------------------------------------------------------------------


def query(prompt, *answers):
    return {"prompt": prompt, "answers": [{"value": value, "aliases": [value + "!"]} for value in answers]}


@pytest.fixture
def rippled(view):
    tests = [
        {"test_queries": [query("one", "yes"), query("two", "no")], "test_condition": "OR", "condition_queries": []},
        {"test_queries": [query("one", "yes"), query("two", "no")], "test_condition": "AND", "condition_queries": []},
        {"test_queries": [query("one", "yes")], "test_condition": "OR", "condition_queries": [query("known", "sure")]},
    ]
    record = {**samples.ripple(), "Compositionality_I": tests, "Logical_Generalization": []}
    return facts_of(ripple(record, None), view.tokenizer)


def measured(view, facts, monkeypatch, table, took=True, **settings):
    monkeypatch.setattr(ripple_effects, "written", answering(table))
    said = facts[0].target if took else tuple(token + 1 for token in facts[0].target)
    monkeypatch.setattr(ripple_effects, "predicted", lambda *_, **__: [said])
    return RippleEffects(**settings)(view, facts)


def test_a_test_runs_only_where_the_unedited_model_met_its_conditions(view, rippled, monkeypatch, tmp_path):
    after = {"one": "yes, of course", "two": "maybe", "known": "sure"}
    alone = measured(view, rippled, monkeypatch, after)
    assert alone["compositionality i"] == pytest.approx(2 / 3) and alone["conditions"] == 1
    for name, table, wanted in (("met", {"known": "sure"}, 2 / 3), ("unmet", {}, 1 / 2)):
        measured(view, rippled, monkeypatch, table).save(tmp_path / f"{name}.json")
        found = measured(view, rippled, monkeypatch, after, before=str(tmp_path / f"{name}.json"))
        assert found["compositionality i"] == pytest.approx(wanted)
    failed = measured(view, rippled, monkeypatch, after, took=False, before=str(tmp_path / "met.json"))
    assert "compositionality i" not in failed.figures and failed["edit"] == 0
    assert failed.rows[0]["tests run"] == 0


def test_ripple_effects_refuses_what_it_cannot_read(view, rippled):
    with pytest.raises(InputError, match=r"^fact 'f0' carries no 'tests'"):
        RippleEffects()(view, facts_of([samples.OWN_FACT], view.tokenizer))
    broken = rippled[0]
    tags = {**broken.tags, "tests": {"Forgetfulness": [{"test_queries": [{"prompt": "p"}]}]}}
    with pytest.raises(InputError, match=r"test 0 of Forgetfulness cannot be read"):
        RippleEffects()(view, Facts((type(broken)(**{**vars(broken), "tags": tags}),)))


@pytest.mark.parametrize("measure", [KnowEdit, Mquake, RippleEffects, CounterFact, Zsre])
def test_counts_below_one_are_refused(measure):
    with pytest.raises(InputError, match="batch_size is 0, expected at least 1"):
        measure(batch_size=0)
    assert SimpleNamespace(**vars(measure())).batch_size == 32
