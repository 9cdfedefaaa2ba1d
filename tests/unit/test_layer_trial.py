"""Blocks and token chosen by measurement, against the same edits written into the model and asked by whole forwards."""

import json
from dataclasses import replace

import pytest
import torch
import zoo
from tiny_tokenizers import TEXT, byte_level

from editors.base import Request
from editors.checks import hands_off
from editors.facts import layer_trial
from editors.facts.ground import Ground
from editors.facts.layer_trial import Trial, candidates, chosen
from editors.rewriters.alphaedit import AlphaEdit
from editors.rewriters.emmet import Emmet
from editors.rewriters.memit import Memit
from editors.rewriters.pmet import Pmet
from memloc.errors import InputError
from memloc.moments import second_moments
from memloc.passages import Facts, Passages
from memloc.sites import Kind
from memloc.view import ModelView

RECORDS = [
    {"id": "a", "prompt": "{} lives in", "subject": "Ada Brolin", "target": "Paris", "target_true": "Rome"},
    {"id": "b", "prompt": "the dog of {} sat on", "subject": "Boris Kram", "target": "Rome", "target_true": "Paris"},
    {"id": "c", "prompt": "the cat of {} sat on", "subject": "Ida Sol", "target": "the mat", "target_true": "Rome"},
]
SMALL = {"namesakes": 0, "sentences": 8, "recalls": 0, "samples": 1, "steps": 12, "pace": 0.5, "clamp": 40.0,
         "price": 1e-6, "trials": 2}  # fmt: skip
MEASURED = {**SMALL, "measured": True, "token": "measured"}


def open_view(family="gpt2"):
    tokenizer = byte_level(start=True)
    tokenizer.bos_token = "<s>"
    return ModelView.open(zoo.build(family, vocab_size=330), tokenizer=tokenizer)


def read(folder, view, records=RECORDS):
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, records)))
    return Facts.read(folder / "facts.jsonl", view.tokenizer)


def asked(view, facts, **more):
    draw = torch.Generator().manual_seed(5)
    extra = [view.tokenizer.decode(torch.randint(2, 330, (30,), generator=draw).tolist()) for _ in range(8)]
    return Request(facts=facts, text=Passages.from_texts([*TEXT, *extra], view.tokenizer, window=12), **more)


@pytest.fixture(scope="module")
def view():
    return open_view()


@pytest.fixture
def request_(view, tmp_path):
    return asked(view, read(tmp_path, view))


@torch.no_grad()
def likelihoods(view, ids):
    return view.model(torch.tensor([ids])).logits[0].double().softmax(-1)


def slowly_judged(view, edit, trial):
    """Whole forwards of one row each, before and with the edit written into the weights."""
    found = []
    before = [[likelihoods(view, row.ids)[-1] for row in rows] for rows in trial.judges]
    with edit.apply(view):
        for entry, rows, clean in zip(trial.asked, trial.judges, before, strict=True):
            said, right = [], None
            for row in entry.prompts:
                scores = likelihoods(view, row.ids + entry.target[:-1])[len(row.ids) - 1 :]
                said.append(float(torch.stack([scores[i, t] for i, t in enumerate(entry.target)]).prod()))
                right = tuple(scores.argmax(-1).tolist()) == entry.target if right is None else right
            after = [likelihoods(view, row.ids)[-1] for row in rows]
            kept = [float(torch.min(one, other).sum()) for one, other in zip(clean, after, strict=True)]
            found.append((float(right), sum(said) / len(said), sum(kept) / len(kept)))
    return [sum(column) / len(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_best_candidate_is_chosen_as_whole_edits_show(family, tmp_path):
    """No namesake is protected here, so each candidate's edit is that of an editor told to edit there."""
    view = open_view(family)
    request = asked(view, read(tmp_path, view))
    with hands_off(view):
        edit = Memit(**MEASURED)(view, request)
    few = Facts(tuple(fact for fact in request.facts if fact.id in edit.notes["tried on"]), request.facts.origin)
    assert len(few) == 2
    moments, merits = second_moments(view, request.text, view.sites(Kind.MLP_OUT)), {}
    for row in edit.notes["tried"]:
        if "refused" in row:
            continue
        there = Memit(**SMALL, token=row["token"], layers=tuple(row["layers"]))
        trial = Trial.of(there, view, request, few, moments)
        figures = slowly_judged(view, there(view, replace(request, facts=few)), trial)
        assert figures == pytest.approx([row["right"], row["said"], row["kept"]], abs=2e-3)
        merits[row["token"], tuple(row["layers"])] = sum(figures) / 3
    best = max(merits, key=merits.__getitem__)
    assert len(merits) >= 4 and max(merits.values()) - min(merits.values()) > 0.01, "alike: the choice shows nothing"
    assert edit.notes["chosen"] == {"token": best[0], "layers": list(best[1])}
    told = Memit(**SMALL, token=best[0], layers=best[1])(view, request)
    assert set(told.deltas) == set(edit.deltas)
    for site, delta in told.deltas.items():
        torch.testing.assert_close(edit.deltas[site].dense(), delta.dense(), rtol=0, atol=0)


def test_another_merit_chooses_another_place(view, request_, monkeypatch):
    """What was chosen above was chosen by the figures: turned round, they choose the worst."""
    tried = Memit(**MEASURED)(view, request_).notes
    upright = layer_trial.merit
    monkeypatch.setattr(layer_trial, "merit", lambda seen: {**upright(seen), "merit": -upright(seen)["merit"]})
    turned = Memit(**MEASURED)(view, request_).notes
    open_ones = [row for row in tried["tried"] if "refused" not in row]
    worst = min(open_ones, key=lambda row: row["merit"])
    assert turned["chosen"] == {"token": worst["token"], "layers": worst["layers"]} != tried["chosen"]


@pytest.mark.parametrize("make", [Emmet, Pmet, AlphaEdit])
def test_every_editor_of_many_facts_measures_and_twice_the_same(make, view, request_):
    own = {"threshold": 5.0} if make is AlphaEdit else {"price": 0.0} if make is Pmet else {}
    editor = make(**{**MEASURED, "steps": 3, "trials": 1, **own})
    one, other = editor(view, request_), editor(view, request_)
    assert one.digest == other.digest and one.notes == other.notes
    assert len([row for row in one.notes["tried"] if "merit" in row]) >= 3
    assert one.provenance.settings["measured"] is True and one.provenance.settings["token"] == "measured"


def test_a_place_that_cannot_be_edited_is_passed_over_and_said(view, request_):
    notes = Memit(**{**MEASURED, "steps": 2})(view, request_).notes
    refused = {(row["token"], tuple(row["layers"])): row["refused"] for row in notes["tried"] if "refused" in row}
    assert refused and all(token == "subject-last" and 2 in layers for token, layers in refused)
    assert all("the last block puts out at the subject reaches no later token" in why for why in refused.values())
    assert len(refused) < len(notes["tried"])
    assert any(row["token"] == "subject-last" and "merit" in row for row in notes["tried"])


def test_facts_without_their_subject_are_tried_at_the_end_of_the_prompt_only(view, tmp_path):
    first, second = read(tmp_path, view)[:2]
    nobody = replace(second, prompt=replace(second.prompt, subject=None))
    request = asked(view, Facts((first, nobody), "made here"))
    notes = Memit(**{**MEASURED, "steps": 2, "trials": 1})(view, request).notes
    assert notes["chosen"]["token"] == "prompt-last"
    assert {row["token"] for row in notes["tried"] if "does not hold its subject" in row.get("refused", "")} == {
        "subject-last"
    }


def test_nothing_that_judges_was_used_to_edit(view, request_, monkeypatch):
    editor = Memit(**{**MEASURED, "namesakes": 24, "token": "prompt-last"})
    moments = second_moments(view, request_.text, view.sites(Kind.MLP_OUT))
    trial = Trial.of(editor, view, request_, request_.facts, moments)
    judges = {row for rows in trial.judges for row in rows}
    assert len(judges) >= 3 and not judges & set(trial.ground.kept.named)
    fitted = {row for entry in trial.ground.demands for row in entry.prompts[1:]}
    assert fitted and not fitted & {row for entry in trial.asked for row in entry.prompts}
    assert all(len(entry.prompts) > 4 for entry in trial.asked)
    named = Ground.of(editor, view, request_, request_.facts, moments).kept.named
    both = named[:2]  # a trained model names the same others again; this one has to be made to
    monkeypatch.setattr(layer_trial, "_judges", lambda *given: both)
    kept = Trial.of(editor, view, request_, request_.facts, moments).ground.kept.named
    assert set(named) - set(kept) == set(both) <= set(named)


def test_only_prompts_and_answers_of_the_facts_are_looked_at(view, tmp_path):
    """Phrasings and neighbours are what edits are judged by; a choice that saw them would be judged by itself."""
    more = {"paraphrases": ["{} has a home in"], "neighbors": [{"prompt": "Olga lives in", "target": "Rome"}]}
    plain, full = (read(tmp_path, view, records) for records in (RECORDS, [{**record, **more} for record in RECORDS]))
    assert full[0].paraphrases and not plain[0].paraphrases
    one, other = (Memit(**{**MEASURED, "steps": 3})(view, asked(view, facts)) for facts in (plain, full))
    assert one.notes == other.notes
    for site, delta in one.deltas.items():
        torch.testing.assert_close(other.deltas[site].dense(), delta.dense(), rtol=0, atol=0)


def test_only_one_place_is_not_tried(view, request_):
    editor = Memit(**SMALL, layers=(1,))
    assert candidates(editor, view) == [("prompt-last", (1,))]
    moments = second_moments(view, request_.text, view.sites(Kind.MLP_OUT))
    assert chosen(editor, view, request_, moments, candidates(editor, view)) == (editor, {})
    both = candidates(replace(editor, token="measured"), view)
    assert both == [("prompt-last", (1,)), ("subject-last", (1,))]
    assert candidates(Memit(measured=True, spread="last"), view) == [("prompt-last", (2,)), ("prompt-last", (1,))]


def test_what_cannot_be_measured_says_so(view, request_):
    for settings, said in [
        ({"layers": (1,)}, r"^memit: layers are \(1,\) and are to be measured; leave out one of the two"),
        ({"trials": 0}, "trials is 0, expected 1 or more"),
    ]:
        with pytest.raises(InputError, match=said):
            Memit(**{**MEASURED, **settings})(view, request_)
    with pytest.raises(InputError, match=r"^alphaedit: none of 8 candidates can be edited; the first: "):
        AlphaEdit(**MEASURED, threshold=1e-300)(view, request_)
    with pytest.raises(InputError, match="the token is to be measured"):
        Memit(**MEASURED).place  # noqa: B018
