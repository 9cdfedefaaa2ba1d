"""Edits of facts made in passes: what the first would change is held, what it misses is demanded more strictly."""

import json
from dataclasses import replace

import pytest
import torch
import zoo
from tiny_tokenizers import TEXT, byte_level
from torch.testing import assert_close

from editors.base import Request
from editors.facts import single_edit
from editors.facts.batch_edit import Work
from editors.facts.contexts import Row
from editors.facts.held import Watch
from editors.facts.keys_values import read_at
from editors.facts.place import Keys
from editors.facts.protected import Protected, others_of_past, pins, protected_rows, spellings
from editors.facts.together import likeliest
from editors.rewriters.alphaedit import AlphaEdit
from editors.rewriters.emmet import Emmet
from editors.rewriters.memit import Memit
from editors.rewriters.rome import Rome
from memloc.passages import Facts, Passages
from memloc.sites import Kind, Site
from memloc.view import ModelView

VOCAB = 330
RECORDS = [
    {"id": "a", "prompt": "{} lives in", "subject": "Ada Brolin", "target": "Paris", "target_true": "Rome"},
    {"id": "b", "prompt": "the dog of {} sat on", "subject": "Boris Kram", "target": "Rome", "target_true": "Paris"},
]
STRONG = {
    "prefixes": (), "recalls": 0, "namesakes": 6, "sentences": 12, "sentence_length": 7, "kl_weight": 0.0,
    "steps": 40, "pace": 0.5, "clamp": 60.0, "price": 1e-6, "layers": (0, 1), "damping": 1e-3,
}  # fmt: skip


@pytest.fixture
def view():
    return ModelView.open(zoo.build("llama", vocab_size=VOCAB), tokenizer=byte_level())


@pytest.fixture
def facts(view, tmp_path):
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return Facts.read(tmp_path / "facts.jsonl", view.tokenizer)


def worked(editor, view, facts):
    draw = torch.Generator().manual_seed(5)
    extra = [view.tokenizer.decode(torch.randint(2, VOCAB, (30,), generator=draw).tolist()) for _ in range(8)]
    text = Passages.from_texts([*TEXT, *extra], view.tokenizer, window=12)
    return Work.of(editor, view, Request(facts=facts, text=text), facts)


def test_the_likeliest_tokens_are_those_of_rows_run_one_by_one(view):
    draw = torch.Generator().manual_seed(1)
    texts = [tuple(torch.randint(2, VOCAB, (size,), generator=draw).tolist()) for size in (5, 3, 9, 5)]
    rows = [Row(ids, at) for ids in (*texts, texts[0]) for at in range(len(ids) - 1, -1, -2)]
    plain = [int(view.model(torch.tensor([row.ids])).logits[0, row.at].argmax()) for row in rows]
    assert likeliest(view, rows, size=2).tolist() == plain
    assert likeliest(view, []).tolist() == []


def test_lost_is_where_the_answer_is_another_one_and_missed_where_the_target_is_not_said(view, facts):
    """Against whole forwards of a copy with the change written in; no change, nothing lost and all missed."""
    work = worked(Memit(**STRONG, passes=1), view, facts)
    watch = Watch.of(view, work.kept, work.demands)
    none = watch.lost({})
    assert none.named == none.said == () and watch.missed({}) == [0, 1]
    deltas = work._once(work._values())
    lost, missed = watch.lost(deltas), watch.missed(deltas)
    copy = view.copy()
    with torch.no_grad():
        for site, delta in deltas.items():
            copy.weight(site).add_(delta.dense())
    for rows, asked, found in (
        (work.kept.named, work.kept.asked, lost.named),
        (work.kept.said, [row.at for row in work.kept.said], lost.said),
    ):
        changed = [
            row for row, at in zip(rows, asked, strict=True)
            if view.model(torch.tensor([row.ids])).logits[0, at].argmax()
            != copy.model(torch.tensor([row.ids])).logits[0, at].argmax()
        ]  # fmt: skip
        assert found == tuple(changed) and changed
    said = [int(copy.model(torch.tensor([fact.prompt.ids])).logits[0, -1].argmax()) for fact in facts]
    assert missed == [index for index, fact in enumerate(facts) if said[index] != fact.target[0]]


@pytest.mark.parametrize(
    "editor", [Memit(weight=0.01), Emmet(slack=0.001), AlphaEdit(threshold=5.0, ridge=1e-3, hold=1.0, hold_own=1.0)]
)
def test_what_a_pass_loses_moves_less_in_the_next(editor, view, facts):
    """And not where nothing weighs on it: the control."""
    site = Site(0, Kind.MLP_OUT)

    def moved(**changes):
        settings = {**vars(editor), **STRONG, "layers": (0,), **changes}
        work = worked(type(editor)(**settings), view, facts)
        first = work._once(work._values())
        lost = Watch.of(view, work.kept, work.demands).lost(first)
        deltas, notes = work.solved()
        keys = read_at(view, [site], [*lost.named, *lost.said])[site].float()
        return float((deltas[site].dense() @ keys.T).norm()), notes["passes"]

    plain, told = moved(passes=1)
    assert told == []
    held, told = moved(passes=2, hold=30.0, hold_own=30.0)
    assert told[0]["lost"] + told[0]["lost own"] > 0
    assert held < 0.7 * plain
    free, _ = moved(passes=2, hold=0.0, hold_own=0.0)
    assert free == pytest.approx(plain, rel=1e-4) or told[0]["missed"]


def test_a_fact_that_a_pass_misses_is_demanded_more_strictly(view, facts):
    """With much slack nothing is said at first; each pass that misses makes a miss ten times as dear."""
    soft = {**STRONG, "namesakes": 0, "sentences": 0, "protect": 0.0, "replay": 0.0, "price": 0.0}
    chances = []
    for passes in (1, 2, 4):
        work = worked(Memit(**soft, weight=300.0, passes=passes), view, facts)
        _, notes = work.solved()
        assert [entry["missed"] for entry in notes["passes"]][:1] == [2][: passes - 1]
        chances.append(sum(entry["after"] for entry in notes["facts"]))
    assert chances[0] < chances[1] < chances[2]


def test_what_should_stay_is_left_without_rows_together_with_where_they_are_answered():
    rows = [Row((1, 2, 3), 1), Row((4, 5), 1), Row((6, 7, 8), 0)]
    kept = Protected(tuple(rows), (2, 1, 2), said=(rows[0],)).without({rows[1]})
    assert kept.named == (rows[0], rows[2]) and kept.asked == (2, 2) and kept.said == (rows[0],)


def test_edits_in_passes_are_the_same_twice(view, facts):
    one, other = (worked(Memit(**STRONG), view, facts).solved()[0] for _ in range(2))
    for site, delta in one.items():
        assert_close(delta.dense(), other[site].dense(), rtol=0, atol=0)


def test_a_later_edit_spares_the_others_that_an_earlier_one_spared(view, facts):
    """Known by its notes, once only; not those that now are to change, nor where no namesakes are wanted."""
    text = Passages.from_texts([*TEXT], view.tokenizer, window=12)
    editor = Memit(**STRONG)
    first = editor(view, Request(facts=facts[:1], text=text))
    spared = others_of_past([first])
    assert spared and set(spared) <= set(
        Work.of(editor, view, Request(facts=facts[:1], text=text), facts[:1]).kept.named
    )
    with first.apply(view):
        later = Request(facts=facts[1:], text=text, past=(first, first))
        kept = Work.of(editor, view, later, facts[1:]).kept
        alone = Work.of(editor, view, replace(later, past=()), facts[1:]).kept
        bare = Work.of(replace(editor, namesakes=0), view, later, facts[1:]).kept
    edited = [(spellings(view, facts[1]), facts[1].target_true[0])]
    says = {row: int(view.model(torch.tensor([row.ids])).logits[0, row.at].argmax()) for row in spared}
    free = {row for row in spared if not pins(row.ids, row.at, says[row], edited, "prompt-last")}
    assert set(kept.named) == set(alone.named) | free and len(set(kept.named)) == len(kept.named)
    assert not set(kept.others) & set(spared) and bare.named == ()


# -- one fact after the other ------------------------------------------------------------------------------------------

ONE = {key: value for key, value in STRONG.items() if key != "layers"} | {"token": "prompt-last", "passes": 1}


def test_every_third_of_what_nobody_named_judges_and_nothing_else():
    rows = [Row((1, place, 3), 1) for place in range(10)]
    said = tuple(Row((9, text), at) for text in range(4) for at in (0, 1))
    kept = Protected((*rows, Row((7,), 0)), (2,) * 10 + (0,), said, others=tuple(rows[:6]), spared=tuple(rows[6:]))
    judges = kept.third()
    assert judges.others == (rows[2], rows[5]) and judges.named == (rows[8],) and judges.asked == (2,)
    assert judges.said == tuple(row for row in said if row.ids == (9, 2))
    left = kept.without({*judges.others, *judges.named, *judges.said})
    assert not {*left.named, *left.said} & {*judges.others, *judges.named, *judges.said}
    assert len(left.named) == 8 and Row((7,), 0) in left.named and len(left.said) == 6


def asked_of(view, facts):
    return Request(facts=facts, text=Passages.from_texts(TEXT, view.tokenizer, window=12))


def test_facts_one_by_one_spare_what_those_before_them_spared(view, facts, monkeypatch):
    """Within one edit as across two: the second fact protects the first one's namesakes, as far as they are drawn."""
    seen = []

    def noted(*args, **more):
        seen.append(protected_rows(*args, **more))
        return seen[-1]

    monkeypatch.setattr(single_edit, "protected_rows", noted)
    Rome(**ONE, layer=1)(view, asked_of(view, facts))
    first, second = seen
    assert first.others and not first.spared and second.spared
    assert set(second.spared) <= set(first.others) and set(second.spared) <= set(second.named)
    assert set(second.past) == {Row(facts[0].prompt.ids, len(facts[0].prompt.ids) - 1)}
    seen.clear()
    edit = Rome(**ONE, layer=1, spared=2)(view, asked_of(view, facts))
    assert 0 < len(seen[1].spared) <= 2
    seen.clear()
    with edit.apply(view):
        Rome(**ONE, layer=1)(view, replace(asked_of(view, facts[:1]), past=(edit,)))
    assert seen[0].spared and len(seen[0].past) == 2


@pytest.mark.parametrize(("layer", "helps"), [(0, False), (1, True)])
def test_a_single_edit_is_made_again_only_where_that_loses_less(layer, helps, view, facts):
    """Counted anew; where it does not help, and where nothing is held, the change is the first pass's to the bit."""
    request, site = asked_of(view, facts[:1]), Site(layer, Kind.MLP_OUT)

    def made(**changes):
        edit = Rome(**{**ONE, "layer": layer, "steps": 60, **changes})(view, request)
        return edit.deltas[site], edit.notes["facts"][0]

    plain, note = made()
    assert "passes" not in note
    held, note = made(passes=4, hold=30.0, hold_own=30.0)
    work = single_edit.Work.of(Rome(**ONE, layer=layer), view, facts[0], request, keys=Keys("consistent", 0.5),
                               moments={}, prefixes=(), trial=())  # fmt: skip
    place = work._place("prompt-last", False)
    watch = Watch.of(view, place.kept, [place.asked])
    before, after = watch.lost({site: plain}), watch.lost({site: held})
    assert note["passes"][0] == before.counts and sum(before.counts.values()) > 0
    assert (after.of(place.kept) < before.of(place.kept)) is helps
    assert helps or torch.equal(held.dense(), plain.dense())
    assert watch.missed({site: plain}) == watch.missed({site: held}) == []
    free, note = made(passes=4, hold=0.0, hold_own=0.0)
    assert_close(free.dense(), plain.dense(), rtol=0, atol=0)


def test_a_price_buys_a_single_edit_that_disturbs_less(view, facts):
    drifts = []
    for price in (1e-6, 1.0, 30.0):
        edit = Rome(**{**ONE, "layer": 1, "price": price})(view, asked_of(view, facts[:1]))
        drifts.append(edit.notes["facts"][0]["drift"])
    assert drifts[0] > drifts[1] > drifts[2] > 0
