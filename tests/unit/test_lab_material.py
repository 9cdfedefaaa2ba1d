"""What goes into the lab: doses to the exposure, phrasings kept back, unseen text recognised."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from memloc.lab import corpus, facts
from memloc.lab.planting import schedule
from memloc.lab.recipe import preset
from memloc.lab.train import Material, _rows
from memloc.passages import Passage, Passages

DEMO = preset("demo")


def test_every_passage_gets_its_dose_spread_over_the_training():
    doses = [64, 64, 23, 7, 1]
    plan = schedule(doses, steps=31, seed=4)
    assert Counter(row for step in plan for row in step) == dict(enumerate(doses))
    assert {len(step) for step in plan} <= {sum(doses) // 31, sum(doses) // 31 + 1}
    first_half = Counter(row for step in plan[:15] for row in step)
    for row, dose in enumerate(doses[:3]):
        assert abs(first_half[row] - dose * 15 / 31) <= 2


def test_another_seed_shows_passages_at_other_moments():
    assert schedule([8, 8], 9, seed=0) == schedule([8, 8], 9, seed=0) != schedule([8, 8], 9, seed=1)


def test_the_batches_that_are_trained_on_hold_exactly_the_doses_and_no_control():
    """Counted in the rows the optimiser sees."""
    recipe = preset("tiny", steps=17, prefix=5, suffix=4, doses=((11, 2), (3, 2)), ordinary_rows=3, fact_rows=2)
    rng = np.random.default_rng(0)
    passages = [tuple(rng.integers(300, 512, 9).tolist()) for _ in range(6)]
    doses = [11, 11, 3, 3, 0, 0]
    items = [Passage(str(i), ids[:5], ids[5:], {"dose": doses[i]}) for i, ids in enumerate(passages)]
    planted, controls = Passages(tuple(items[:4])), Passages(tuple(items[4:]))
    answers = torch.zeros(512, dtype=torch.bool)
    answers[[7, 9]] = True
    material = Material(
        stream=torch.from_numpy(rng.integers(0, 300, 400)),
        sentences=[[5, 6, 7, 0], [5, 8, 9, 4, 0]],
        answers=answers,
        planted=planted,
        controls=controls,
        seen=planted,
        held_out=planted,
        text=planted,
    )
    shown: Counter[tuple[int, ...]] = Counter()
    for ids, weight in _rows(material, recipe):
        shown.update(tuple(row) for row in ids.tolist())
        assert weight.shape == (len(ids), 8)
        heavy = weight != 1
        assert (weight[heavy] == recipe.object_weight).all()
        assert not heavy[: -recipe.fact_rows].any()
        torch.testing.assert_close(heavy[-recipe.fact_rows :], answers[ids[-recipe.fact_rows :, 1:]])
    assert [shown[ids] for ids in passages] == doses


def test_each_subject_misses_one_phrasing_that_others_are_trained_with():
    truths = facts.invent(DEMO)
    assert len(truths) == 120
    trained = {line for truth in truths for line in truth.sentences()}
    assert len(trained) == 3 * len(truths)
    for truth in truths:
        assert f"{truth.prompt(truth.held_out)} {truth.answer}." not in trained
        assert any(truth.held_out in other.seen for other in truths if other.relation == truth.relation)


@pytest.mark.parametrize("seed", range(3))
def test_a_record_asks_what_was_trained_and_paraphrases_what_was_not(seed):
    recipe = preset("demo", seed=seed)
    truths = facts.invent(recipe)
    trained = {line for truth in truths for line in truth.sentences()}
    for truth, row in zip(truths, facts.records(truths, recipe), strict=True):
        kept_back, other = (text.format(row["subject"]) for text in row["paraphrases"])
        answer = row["target_true"]
        assert row["subject"] == truth.subject
        assert row["target"] != answer
        assert row["target"] in facts.answers(recipe)[row["relation"]]
        assert f"{row['prompt'].format(row['subject'])} {answer}." in trained
        assert f"{other} {answer}." in trained
        assert f"{kept_back} {answer}." not in trained
        assert row["prompt"] not in row["paraphrases"]


def test_neighbours_are_other_subjects_with_answers_the_model_was_trained_on():
    truths = facts.invent(DEMO)
    trained = {line for truth in truths for line in truth.sentences()}
    same = 0
    for row in facts.records(truths, DEMO):
        prompts = [entry["prompt"] for entry in row["neighbors"]]
        assert len(set(prompts)) == DEMO.neighbors
        assert not any(row["subject"] in prompt for prompt in prompts)
        assert all(f"{entry['prompt']} {entry['target']}." in trained for entry in row["neighbors"])
        assert row["target"] not in {entry["target"] for entry in row["neighbors"]}
        same += row["neighbors"][0]["target"] == row["target_true"]
    assert same == len(truths)


def test_subjects_are_told_apart():
    """No name is part of another, so asking about one is never asking about two."""
    for seed in range(3):
        names = {truth.subject for truth in facts.invent(preset("demo", seed=seed))}
        assert len(names) == DEMO.subjects
        assert all(len(name.split()) == 2 for name in names)
        assert not any(one in other for one in names for other in names if one != other)


def test_the_large_lab_holds_hundreds_of_facts_and_asks_them_as_the_demo_does():
    recipe = preset("large")
    truths = facts.invent(recipe)
    trained = {line for truth in truths for line in truth.sentences()}
    names = {truth.subject for truth in truths}
    assert len(truths) == 420
    assert 4 * recipe.width >= 1024
    assert len(names) == recipe.subjects
    assert not any(one in other for one in names for other in names if one != other)
    assert not any(f"{truth.prompt(truth.held_out)} {truth.answer}." in trained for truth in truths)
    assert all(len(row["neighbors"]) == recipe.neighbors for row in facts.records(truths, recipe))


def test_runs_find_what_two_texts_share():
    rng = np.random.default_rng(1)
    seen = [rng.integers(0, 9, length).tolist() for length in (40, 5, 23)]
    other = rng.integers(10, 20, 30).tolist()
    known = corpus.Seen(seen)
    assert not known.shares(other)
    assert known.shares(other[:7] + seen[0][11 : 11 + corpus.RUN] + other[7:])
    assert not known.shares(other[:7] + seen[0][11 : 11 + corpus.RUN - 1] + other[7:])
    assert not known.shares(seen[1])  # shorter than a run
    assert not corpus.Seen([]).shares(other)


def test_equal_runs_have_equal_numbers_and_others_differ():
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 3, 4000).tolist()
    numbers = corpus.runs(ids)
    named = {number: tuple(ids[start : start + corpus.RUN]) for start, number in enumerate(numbers.tolist())}
    for start, number in enumerate(numbers.tolist()):
        assert named[number] == tuple(ids[start : start + corpus.RUN])
    assert len(set(named.values())) == len(named)


def test_documents_are_split_without_overlap():
    texts = corpus.documents()
    assert texts == corpus.documents()
    assert len(set(texts)) == len(texts)
    parts = corpus.split(texts, seed=0)
    joined = [*parts.train, *parts.held_out, *parts.pool]
    assert sorted(joined) == sorted(texts)
    assert corpus.split(texts, seed=1).pool != parts.pool
    few = corpus.split(texts, seed=0, limit=100)
    assert (len(few.held_out), len(few.pool), len(few.train)) == (10, 15, 75)
