"""PMET: values beside a decoy, against a slow search with whole forwards, torch's own Adam and one fact at a time."""

import json

import pytest
import torch
import zoo
from tiny_tokenizers import TEXT, byte_level
from torch.testing import assert_close

from editors.base import Request
from editors.checks import hands_off
from editors.facts.batch_edit import Work
from editors.facts.contexts import demand
from editors.facts.keys_values import Descent, optimise_values
from editors.facts.paired_values import PairedDescent, optimise_pairs
from editors.rewriters.memit import Memit
from editors.rewriters.pmet import Pmet
from memloc.errors import InputError
from memloc.passages import Facts, Passages
from memloc.sites import Kind, Site
from memloc.view import ModelView

RECORDS = [
    {"id": "a", "prompt": "{} lives in", "subject": "Ada Brolin", "target": "Paris", "target_true": "Rome"},
    {"id": "b", "prompt": "the dog of {} sat on", "subject": "Boris Kram", "target": "mat 東", "target_true": "Rome"},
]
BARE = {"prefixes": (), "recalls": 0, "protect": 0.0, "namesakes": 0, "replay": 0.0, "sentences": 0}


def open_view(family="gpt2", **changes):
    return ModelView.open(zoo.build(family, vocab_size=330, **changes), tokenizer=byte_level())


def read(folder, view):
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return Facts.read(folder / "facts.jsonl", view.tokenizer)


def ordinary(view):
    draw = torch.Generator().manual_seed(5)
    extra = [view.tokenizer.decode(torch.randint(2, 330, (30,), generator=draw).tolist()) for _ in range(8)]
    return Passages.from_texts([*TEXT, *extra], view.tokenizer, window=12)


def slowly(view, layer, asked, scale, how):
    """One fact, whole forwards of one row each, hooks of torch, torch's Adam. The MLP's change."""
    model, block = view.model, view.model.transformer.h[layer]
    both = torch.zeros(2, view.width, requires_grad=True)
    adam = torch.optim.Adam([both], lr=how.search.lr)

    def run(ids, at, change):
        def hook(part):
            def add(module, inputs, output):
                output = output.clone()
                output[0, at] = output[0, at] + change[part]
                return output

            return add

        handles = [block.mlp.c_proj.register_forward_hook(hook(0)), block.attn.c_proj.register_forward_hook(hook(1))]
        try:
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)
        finally:
            for handle in handles:
                handle.remove()

    with torch.no_grad():
        clean = run(asked.essence.ids, asked.essence.at, torch.zeros(2, view.width))[asked.essence.at]
    for step in range(how.search.steps):
        said, right = [], True
        for prompt in asked.prompts:
            logs = run(prompt.ids + asked.target[:-1], prompt.at, both)
            for place, token in enumerate(asked.target):
                spoken = logs[len(prompt.ids) - 1 + place]
                said.append(spoken[token])
                right &= int(spoken.argmax()) == token
        now = run(asked.essence.ids, asked.essence.at, both)[asked.essence.at]
        kl = (now.exp() * (now - clean)).sum()
        decay = how.search.weight_decay * (both[0].norm() + both[1].norm()) / scale**2
        loss = -torch.stack(said).mean() * (how.relief if right else 1.0) + how.search.kl_weight * kl + decay
        if step == how.search.steps - 1 or (right and float(kl.detach()) <= how.calm):
            return both[0].detach(), step
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            for part in both:
                part *= min(1.0, how.search.clamp * scale / float(part.norm()))


@pytest.mark.parametrize("layer", [0, 2])
def test_the_pair_is_what_a_slow_search_finds(layer, tmp_path):
    """Some facts stop before the others, at the first layer too, where nothing lies below to be kept."""
    view = open_view()
    facts = read(tmp_path, view)
    token = "subject-last" if layer == 0 else "prompt-last"
    asked = [demand(fact, view.tokenizer, ("the mat",), token) for fact in facts]
    scale = torch.tensor([2.0, 3.0])
    search = Descent(steps=14, lr=0.3, clamp=4.0, weight_decay=0.1, kl_weight=0.3, stop_below=0.0)
    how = PairedDescent(search=search, relief=0.1, calm=20.0)
    found = optimise_pairs(view, layer, asked, scale, how)
    with view.frozen(), torch.enable_grad():
        slow = [slowly(view, layer, one, float(norm), how) for one, norm in zip(asked, scale, strict=True)]
    for index, (change, updates) in enumerate(slow):
        assert int(found.updates[index]) == updates
        assert_close(found.change[index], change, rtol=1e-3, atol=1e-4)
    alone = optimise_values(view, layer, asked, scale, search)
    assert float((alone.change - found.change).norm()) > 0.05 * float(found.change.norm())


def test_facts_stop_when_they_are_said_and_their_essence_is_calm(tmp_path):
    view = open_view()
    asked = [demand(fact, view.tokenizer, (), "prompt-last", essence=False) for fact in read(tmp_path, view)]
    how = PairedDescent(search=Descent(steps=60, lr=0.5, clamp=60.0, weight_decay=0.0, stop_below=5.0))
    found = optimise_pairs(view, 1, asked, torch.ones(2), how)
    assert len(set(found.updates.tolist())) > 1 and int(found.updates.min()) < 59
    apart = [optimise_pairs(view, 1, [one], torch.ones(1), how).change[0] for one in asked]
    assert_close(found.change, torch.stack(apart), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gptj", "gpt_neox", "llama", "gemma2", "olmo2"])
def test_only_mlps_are_written_by_roots_of_what_is_left(family, tmp_path):
    """Of two layers the lower brings 1/√2 of what is missing, the upper the rest; attention only helped to find it."""
    view = open_view(family)
    facts = read(tmp_path, view)
    editor = Pmet(**BARE, layers=(0, 1), weight=0.0, steps=6)
    with hands_off(view):
        edit = editor(view, Request(facts=facts, text=ordinary(view)))
    assert set(edit.deltas) == {Site(0, Kind.MLP_OUT), Site(1, Kind.MLP_OUT)}
    work = Work.of(editor, view, Request(facts=facts, text=ordinary(view)), facts)
    assert [work._share(order) for order in (0, 1)] == pytest.approx([0.5**0.5, 1.0])
    plain = Memit(**BARE, layers=(0, 1), weight=0.0, price=0.0, spread="sqrt", steps=6, lr=0.2)
    other = plain(view, Request(facts=facts, text=ordinary(view)))
    assert edit.digest != other.digest


def test_the_target_becomes_likelier_though_the_decoy_is_left_out(tmp_path):
    view = open_view()
    facts = read(tmp_path, view)[:1]
    strong = Pmet(**BARE, layers=(0, 1), weight=0.0, lr=0.5, clamp=60.0, steps=40, calm=0.0, relief=1.0, rounds=2)
    (note,) = strong(view, Request(facts=facts, text=ordinary(view))).notes["facts"]
    assert note["value"] > 20 * note["before"] and note["after"] > 5 * note["before"]


def test_settings_that_mean_nothing_are_refused(tmp_path):
    view = open_view()
    request = Request(facts=read(tmp_path, view), text=ordinary(view))
    with pytest.raises(InputError, match=r"^pmet: price is 1.0, expected 0; its values"):
        Pmet(**BARE, price=1.0)(view, request)
    with pytest.raises(InputError, match=r"^pmet: calm is -1.0, expected 0 or more"):
        Pmet(**BARE, calm=-1.0)(view, request)
    with pytest.raises(InputError, match=r"no published settings for 'gpt5'; there are those for gpt-j-6b"):
        Pmet.published("gpt5")
    assert Pmet.published("gpt-j-6b").weight * 16384 == 6000
