"""Many facts at once: the shared engine, against a slow one that writes into a copy of the model."""

import json
from dataclasses import replace

import pytest
import torch
import zoo
from tiny_tokenizers import TEXT, byte_level
from torch.testing import assert_close

from editors.base import Request
from editors.checks import hands_off
from editors.facts.batch_edit import Work
from editors.facts.conflicts import refuse_alike, refuse_same
from editors.facts.keys_values import read_at, read_blocks_at
from editors.facts.protected import pins, rows_of_facts, rows_of_past, spellings
from editors.hook_form import as_if
from editors.rewriters.alphaedit import AlphaEdit
from editors.rewriters.emmet import Emmet
from editors.rewriters.memit import Memit
from memloc.errors import InputError
from memloc.moments import second_moments
from memloc.passages import Facts, Passages
from memloc.sites import Kind, Site
from memloc.view import ModelView

VOCAB = 330
RECORDS = [
    {"id": "a", "prompt": "{} lives in", "subject": "Ada Brolin", "target": "Paris", "target_true": "Rome"},
    {"id": "b", "prompt": "the dog of {} sat on", "subject": "Boris Kram", "target": "Rome", "target_true": "Paris"},
]
BARE = {
    "prefixes": (), "recalls": 0, "protect": 0.0, "namesakes": 0, "replay": 0.0, "sentences": 0, "kl_weight": 0.0,
    "steps": 8, "pace": 0.1,
}  # fmt: skip


def open_view(family="gpt2", **changes):
    return ModelView.open(zoo.build(family, vocab_size=VOCAB, **changes), tokenizer=byte_level())


def read(folder, view, records=RECORDS):
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, records)))
    return Facts.read(folder / "facts.jsonl", view.tokenizer)


def ordinary(view):
    draw = torch.Generator().manual_seed(5)
    extra = [view.tokenizer.decode(torch.randint(2, VOCAB, (30,), generator=draw).tolist()) for _ in range(8)]
    return Passages.from_texts([*TEXT, *extra], view.tokenizer, window=12)


def worked(editor, view, facts):
    return Work.of(editor, view, Request(facts=facts, text=ordinary(view)), facts)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox", "falcon", "phi", "llama", "gemma2", "gemma3", "olmo2"])
def test_the_stream_becomes_what_was_searched_for(family, tmp_path):
    """In parallel blocks, and where a norm stands behind the map: above one changed layer, the stream is the goal."""
    view = open_view(family)
    work = worked(Emmet(**BARE, layers=(1,)), view, read(tmp_path, view))
    values = work._values()
    goal = work._goal(values)
    rows = [work.asked.rows[row] for row in work.asked.first.tolist()]
    clean = read_blocks_at(view, 1, rows)
    deltas = {}
    work._layer(1, 1.0, goal, deltas)
    with as_if(view, deltas):
        got = read_blocks_at(view, 1, rows)
    moved = float((goal - clean).abs().max())
    assert moved > 1e-2
    assert_close(got, goal, atol=2e-3 * moved, rtol=0)


def test_memit_is_memit_on_a_working_copy_with_dense_solves(tmp_path):
    """Layer by layer: weights written into a copy, f-sized systems, residuals measured again above each layer."""
    view = open_view(dtype=torch.float64)
    facts = read(tmp_path, view)
    editor = Memit(**BARE, layers=(0, 1, 2), price=0.0, weight=0.4, damping=0.0, token="prompt-last", lr=0.4)
    edit = editor(view, Request(facts=facts, text=ordinary(view)))
    work = worked(editor, view, facts)
    goal, rows, copy = work._goal(work._values()), list(work.asked.rows), view.copy()
    moments = second_moments(view, ordinary(view), view.sites(Kind.MLP_OUT))
    for order, layer in enumerate((0, 1, 2)):
        site = Site(layer, Kind.MLP_OUT)
        keys = read_at(copy, [site], rows)[site].T
        missing = (goal - read_blocks_at(copy, 2, rows)).T / (3 - order)
        system = 0.4 * len(keys) * moments.mean(site) + keys @ keys.T
        change = missing @ torch.linalg.solve(system, keys).T
        assert_close(edit.deltas[site].dense().double(), change, rtol=1e-3, atol=1e-6 * float(change.abs().max()))
        with torch.no_grad():
            weight = copy.model.transformer.h[layer].mlp.c_proj.weight
            weight.copy_(weight + change.T)


@pytest.mark.parametrize("editor", [Memit(weight=0.0), Emmet(), AlphaEdit(threshold=5.0, ridge=0.0, price=10.0)])
def test_the_targets_are_said(editor, tmp_path):
    view = open_view()
    facts = read(tmp_path, view)
    search = {"steps": 60, "pace": 0.5, "clamp": 60.0, "price": 1e-6}
    strong = replace(editor, **{**BARE, **search}, layers=(0, 1), rounds=2)
    request = Request(facts=facts, text=ordinary(view))
    with hands_off(view):
        edit = strong(view, request)
    ids = torch.tensor([fact.prompt.ids for fact in facts[:1]])
    assert int(view.model(ids).logits[0, -1].argmax()) != facts[0].target[0]
    with edit.apply(view):
        for fact in facts:
            likeliest = view.model(torch.tensor([fact.prompt.ids])).logits[0, -1].argmax()
            assert (int(likeliest),) == fact.target
    assert all(delta.rank <= 2 * strong.rounds for delta in edit.deltas.values())


def test_a_higher_price_buys_less_drift(tmp_path):
    view = open_view()
    facts = read(tmp_path, view)
    norms = [
        sum(Emmet(**BARE, layers=(1,), price=price)(view, Request(facts=facts, text=ordinary(view))).norms.values())
        for price in (0.01, 1e4)
    ]
    assert norms[1] < 0.5 * norms[0]


def test_named_facts_move_less_when_they_are_protected(tmp_path):
    view = open_view()
    facts = read(tmp_path, view)
    kept = read(tmp_path, view, [{**RECORDS[0], "id": "k", "subject": "Ida Bralon"}])

    def drift(weight):
        editor = Emmet(**{**BARE, "protect": weight}, layers=(1,))
        edit = editor(view, Request(facts=facts, text=ordinary(view), keep_facts=kept))
        site = Site(1, Kind.MLP_OUT)
        key = read_at(view, [site], rows_of_facts(kept, "prompt-last"))[site]
        return float((key @ edit.deltas[site].dense().double().T).norm()) / edit.norms[site]

    assert drift(1e4) < 0.2 * drift(0.0)


def test_only_the_subject_itself_is_held_back_from_protection_however_it_is_spelled(tmp_path):
    """At the start of a text, behind a word, behind more text; not others whose names end or begin alike."""
    view = open_view()
    (fact,) = read(tmp_path, view, RECORDS[:1])
    edited, answer = [(spellings(view, fact), fact.target_true[0])], fact.target_true[0]

    def held_back(text, token, says):
        ids = tuple(view.tokenizer(text)["input_ids"])
        return pins(ids, len(ids) - 1, says, edited, token)

    for text in ("Ada Brolin lives in", "the cat of Ada Brolin sat on"):
        assert held_back(text, "prompt-last", answer) and not held_back(text, "prompt-last", answer + 1)
        assert held_back(text, "subject-last", answer + 1)
    for text in ("Ida Brolin lives in", "Ada Brolan lives in", "the cat sat on"):
        assert not held_back(text, "prompt-last", answer) and not held_back(text, "subject-last", answer)


@pytest.mark.parametrize("make", [Memit, Emmet, AlphaEdit])
def test_edits_already_made_are_protected_by_what_they_note(make, tmp_path):
    view = open_view()
    facts = read(tmp_path, view)
    own = {"threshold": 5.0} if make is AlphaEdit else {}
    first = make(**BARE, **own, layers=(1,))(view, Request(facts=facts[:1], text=ordinary(view)))
    site = Site(1, Kind.MLP_OUT)
    with first.apply(view):
        rows = rows_of_past([first])
        assert [row.ids for row in rows] == [facts[0].prompt.ids]
        key = read_at(view, [site], rows)[site]

        def moved(past):
            edit = make(**{**BARE, "past_weight": 1e6}, **own, layers=(1,))(
                view, Request(facts=facts[1:], text=ordinary(view), past=past)
            )
            return float((key @ edit.deltas[site].dense().double().T).norm()) / edit.norms[site]

        assert moved((first,)) < 0.05 * moved(())


def test_growth_beyond_the_limit_is_scaled_down_and_said(tmp_path):
    view = open_view()
    facts = read(tmp_path, view)
    request = Request(facts=facts, text=ordinary(view))
    edit = Emmet(**BARE, layers=(1,), growth=0.01)(view, request)
    (note,) = edit.notes["layers"]
    assert note["scaled by"] < 1 and note["grown"] == pytest.approx(0.01, rel=1e-4)
    with (
        edit.apply(view),
        pytest.raises(InputError, match=r"^L1.mlp.out: edits already made .* limit is 0.005"),
    ):
        Emmet(**BARE, layers=(1,), growth=0.005)(view, replace(request, past=(edit,)))


def test_facts_that_contradict_each_other_are_named(tmp_path):
    view = open_view()
    facts = read(tmp_path, view, [RECORDS[0], {**RECORDS[0], "id": "c", "target": "Oslo"}, RECORDS[1]])
    with pytest.raises(InputError, match=r"^facts 'a' and 'c' give 'Ada Brolin lives in' different answers"):
        Emmet(**BARE)(view, Request(facts=facts, text=ordinary(view)))
    refuse_same(facts[1:])
    keys = torch.tensor([[1.0, 0.0, 2.0], [0.3, 1.0, 0.0], [2.0, 0.001, 4.0]], dtype=torch.float64)
    with pytest.raises(InputError, match=r"^L1.mlp.out reads nearly the same key for facts 'a' and 'b' \(cosine 1.0"):
        refuse_alike(facts, torch.tensor([0, 1, 2]), keys, Site(1, Kind.MLP_OUT))
    refuse_alike(facts, torch.tensor([0, 1, 0]), keys, Site(1, Kind.MLP_OUT))


def test_an_edit_that_cannot_reach_the_answer_is_refused(tmp_path):
    view = open_view()
    facts = read(tmp_path, view)
    with pytest.raises(InputError, match=r"^fact 'a': what the last block puts out at the subject reaches no later"):
        Emmet(**BARE, layers=(2,), token="subject-last")(view, Request(facts=facts, text=ordinary(view)))
    with pytest.raises(InputError, match=r"^memit needs ordinary text"):
        Memit(**BARE)(view, Request(facts=facts))


def test_layers_are_given_or_by_depth_and_spread_as_asked():
    view = open_view()
    assert Memit(depths=(0.5, 1.0)).layers_of(view) == (1, 2)
    assert Memit(layers=(2, 0, 1), spread="first-last").layers_of(view) == (0, 2)
    assert Memit(layers=(0, 1), spread="last").layers_of(view) == (1,)
    with pytest.raises(InputError, match="layer 7: the model has 3"):
        Memit(layers=(7,)).layers_of(view)
    assert Memit.published("gpt2-xl").weight * 6400 == 20000
    assert AlphaEdit.published("gpt-j-6b").layers == (3, 4, 5, 6, 7, 8)
    assert Emmet.published("gpt2-xl", several=False).slack == 0
    with pytest.raises(InputError, match="no published settings for 'gpt5'"):
        Memit.published("gpt5")
