import json
from dataclasses import replace

import pytest
import torch
import zoo
from tiny_tokenizers import TEXT, byte_level

from editors.base import Request
from editors.checks import check_editor, hands_off
from editors.facts.contexts import Demand, Row, demand, sample, sample_prefixes
from editors.facts.keys_values import Descent, optimise_values, read_at
from editors.facts.own_words import namesakes, recalls
from editors.facts.protected import rows_of_past
from editors.rewriters.rome import Rome
from memloc.errors import InputError
from memloc.moments import Moments, second_moments
from memloc.passages import Facts, Passages
from memloc.sites import Kind, Site
from memloc.view import ModelView

VOCAB = 330
RECORDS = [
    {"id": "a", "prompt": "{} lives in", "subject": "Ada Brolin", "target": "Paris", "target_true": "Rome"},
    {"id": "b", "prompt": "the dog of {} sat on", "subject": "Boris Kram", "target": "Rome", "target_true": "Paris"},
    {
        "id": "long",
        "prompt": "the cat of {} sat on",
        "subject": "Boris Kram",
        "target": "mat 東",
        "target_true": "Rome",
    },
]
PLAIN = {
    "samples": 1, "namesakes": 6, "recalls": 2, "clamp": 50.0, "kl_weight": 0.0, "steps": 40,
    "pace": 0.5, "price": 1e-6, "damping": 1e-4,
}  # fmt: skip


def open_view(family="gpt2", tokenizer=None, **changes):
    return ModelView.open(zoo.build(family, vocab_size=VOCAB, **changes), tokenizer=tokenizer or byte_level())


def with_start():
    tokenizer = byte_level(start=True)
    tokenizer.bos_token = "<s>"
    return tokenizer


@pytest.fixture
def view():
    return open_view(tokenizer=with_start())


@pytest.fixture
def facts(tmp_path, view):
    return read(tmp_path, view)


def read(folder, view):
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return Facts.read(folder / "facts.jsonl", view.tokenizer)


def ordinary(view):
    draw = torch.Generator().manual_seed(5)
    extra = [view.tokenizer.decode(torch.randint(2, VOCAB, (30,), generator=draw).tolist()) for _ in range(6)]
    return Passages.from_texts([*TEXT, *extra], view.tokenizer, window=12)


@torch.no_grad()
def says(view, fact):
    """Whether every token of the target is the likeliest, teacher-forced, by a plain forward."""
    ids = torch.tensor([fact.prompt.ids + fact.target])
    best = view.model(ids).logits[0].argmax(-1)
    start = len(fact.prompt.ids)
    return tuple(best[start - 1 : -1].tolist()) == fact.target


# -- the whole editor --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", (*zoo.FAMILIES, "falcon_new", "opt"))
def test_the_target_becomes_the_likeliest_answer_in_every_family(family, tmp_path):
    view = open_view(family, with_start())
    facts = read(tmp_path, view)[:2]
    for index in range(len(facts)):
        assert not says(view, facts[index])
        edit = Rome(layer=1, token="prompt-last", **PLAIN)(
            view, Request(facts=facts[index : index + 1], text=ordinary(view))
        )
        (delta,) = edit.deltas.values()
        assert delta.rank == 1 and set(edit.deltas) == {Site(1, Kind.MLP_OUT)}
        with edit.apply(view):
            assert says(view, facts[index])


@pytest.mark.parametrize("settings", [{"layer": 1, "token": "prompt-last"}, {"tries": 2}, {"variant": "2022"}])
def test_keeps_every_promise_of_an_editor(settings, view, facts, tmp_path):
    check_editor(Rome(**{**PLAIN, "steps": 6, **settings}), view, Request(facts=facts, text=ordinary(view)), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_edited_too(dtype, tmp_path):
    """Values and closed form are worked out in float32 and float64; only the weights and the forward are coarse."""
    view = ModelView.open(zoo.build("llama", vocab_size=VOCAB, dtype=dtype), tokenizer=with_start())
    fact = read(tmp_path, view)[0]
    edit = Rome(layer=2, token="prompt-last", **PLAIN)(view, Request(facts=Facts((fact,)), text=ordinary(view)))
    assert edit.deltas[Site(2, Kind.MLP_OUT)].left.dtype == torch.float32
    with hands_off(view), edit.apply(view):
        assert says(view, fact)


def test_square_weights_are_not_turned(tmp_path):
    """f == d, so a wrong orientation would fit too; GPT-2 stores [in, out], Llama [out, in]."""
    for family, changes in (("gpt2", {"n_inner": 24}), ("llama", {"intermediate_size": 24})):
        view = open_view(family, with_start(), **changes)
        fact = read(tmp_path, view)[0]
        assert view.neurons == view.width
        edit = Rome(layer=1, token="prompt-last", **PLAIN)(view, Request(facts=Facts((fact,)), text=ordinary(view)))
        with edit.apply(view):
            assert says(view, fact)


def test_several_facts_are_one_edit_equal_to_one_after_the_other(view, facts):
    facts = facts[:2]
    moment = second_moments(view, ordinary(view), view.sites(Kind.MLP_OUT))
    rome = Rome(**PLAIN, layer=1, token="prompt-last", moment=moment, prefixes=("the cat",))
    both = rome(view, Request(facts=facts))
    first = rome(view, Request(facts=facts[:1]))
    with first.apply(view):
        second = rome(view, Request(facts=facts[1:], past=(first,)))
    site = Site(1, Kind.MLP_OUT)
    wanted = first.deltas[site].dense() + second.deltas[site].dense()
    torch.testing.assert_close(both.deltas[site].dense(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert both.deltas[site].rank == 2
    with both.apply(view):
        assert [says(view, fact) for fact in facts] == [True, True]


def test_same_seed_same_bytes_and_another_seed_another_edit(view, facts, tmp_path):
    rome, text = Rome(layer=1, **{**PLAIN, "steps": 5}), ordinary(view)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(len(name) + seed * 7)
        rome(view, Request(facts=facts[:1], text=text, seed=seed)).save(tmp_path / name)
    bytes_of = {name: (tmp_path / name).read_bytes() for name in "abc"}
    assert bytes_of["a"] == bytes_of["b"]
    assert bytes_of["a"] != bytes_of["c"]


def test_ingredients_given_from_outside_win(view, facts):
    site = Site(1, Kind.MLP_OUT)
    draw = torch.randn(200, view.neurons, generator=torch.Generator().manual_seed(2))
    moment = draw.T @ draw / 200
    given = {
        "layer": 1,
        "token": "prompt-last",
        "prefixes": ("the mat", "café"),
        "namesakes": 0,
        "recalls": 0,
        "sentences": 0,
        "steps": 5,
        "damping": 1e-4,
    }
    request = Request(facts=facts[:1], seed=9)
    edit = Rome(**given, moment=moment)(view, request)
    assert edit.notes["prefixes"] == ["the mat", "café"]
    # Nothing random is left, so the seed, text and samples do not matter; the direction is that of the given moment.
    again = Rome(**given, moment=moment, samples=7)(view, Request(facts=facts[:1], text=ordinary(view), seed=1))
    torch.testing.assert_close(again.deltas[site].dense(), edit.deltas[site].dense(), rtol=0, atol=0)
    asked = demand(facts[0], view.tokenizer, ("the mat", "café"), "prompt-last", essence=False)
    keys = read_at(view, [site], asked.prompts)[site]
    mean = 0.5 * keys[0] + 0.5 * keys[1:].mean(0)
    damped = moment.double() + 1e-4 * moment.double().diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    along = torch.linalg.solve(damped, mean)
    right = edit.deltas[site].right[0].double()
    torch.testing.assert_close(right / right.norm(), along / along.norm(), rtol=1e-5, atol=1e-6)
    whole = Moments({site: moment}, 1, edit.provenance)
    torch.testing.assert_close(
        Rome(**given, moment=whole)(view, request).deltas[site].dense(), edit.deltas[site].dense(), rtol=0, atol=0
    )


def test_variants_differ_in_their_keys_and_in_nothing_else(view, facts):
    """Each against the algebra written out, from the δ they share."""
    site, prefixes = Site(1, Kind.MLP_OUT), ("the mat", "the log", "Paris")
    moment = second_moments(view, ordinary(view), [site])
    shared = {"layer": 1, "token": "prompt-last", "prefixes": prefixes, "moment": moment, "damping": 0.01, "bare": None,
              "namesakes": 0, "recalls": 0, "sentences": 0, "steps": 8, "lr": 0.5, "price": 0.0}  # fmt: skip
    asked = demand(facts[0], view.tokenizer, prefixes, "prompt-last", essence=False)
    keys = read_at(view, [site], asked.prompts)[site]
    bare, mean = keys[0], keys.mean(0)
    clean = read_at(view, [site], asked.prompts[:1], side="output")[site].norm(dim=1)
    change = optimise_values(view, 1, [asked], clean, Rome(**shared).descent).change[0].double()
    weight = view.weight(site).detach().double()
    ridge = moment.mean(site)
    ridge = ridge + 0.01 * ridge.diagonal().mean() * torch.eye(len(ridge), dtype=torch.float64)
    toward_mean, toward_bare = torch.linalg.solve(ridge, mean), torch.linalg.solve(ridge, bare)
    wanted = {
        "consistent": torch.outer(weight @ bare + change - weight @ mean, toward_mean) / (toward_mean @ mean),
        "2022": torch.outer(change, toward_mean) / (toward_mean @ bare),
        "prompt-only": torch.outer(change, toward_bare) / (toward_bare @ bare),
    }
    for variant, value in wanted.items():
        found = Rome(**shared, variant=variant)(view, Request(facts=facts[:1])).deltas[site].dense().double()
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=variant)
    assert float((wanted["consistent"] - wanted["2022"]).norm()) > 0.01 * float(wanted["2022"].norm())


def test_without_prefixes_all_variants_are_one(view, facts):
    site = Site(1, Kind.MLP_OUT)
    moment = second_moments(view, ordinary(view), [site])
    given = {"layer": 1, "token": "subject-last", "prefixes": (), "recalls": 0, "namesakes": 0, "sentences": 0,
             "steps": 5}  # fmt: skip
    made = [
        Rome(**given, variant=variant, moment=moment)(view, Request(facts=facts[:1])).deltas[site].dense()
        for variant in ("consistent", "prompt-only", "2022")
    ]
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=0)
    torch.testing.assert_close(made[0], made[2], rtol=0, atol=0)


def test_the_published_preset_is_the_published_algorithm(view, facts):
    """Against the original's procedure written out naively: whole forwards, torch's Adam, a dense inverse."""
    prefixes = ("the mat", "the log and the cat")
    site = Site(1, Kind.MLP_OUT)
    draw = torch.randn(300, view.neurons, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moment = draw.T @ draw / 300
    rome = Rome.published(1, prefixes=prefixes, moment=moment, steps=7)
    assert len(facts[2].target) > 1
    found = rome(view, Request(facts=facts[2:])).deltas[site].dense()
    torch.testing.assert_close(found, naive_rome(view, facts[2], prefixes, moment, steps=7), rtol=2e-3, atol=2e-5)


def naive_rome(view, fact, prefixes, moment, *, steps):
    tokenizer, out = view.tokenizer, view.module(Site(1, Kind.MLP_OUT))
    texts = [fact.prompt.text, *(prefix + ". " + fact.prompt.text for prefix in prefixes)]
    name_ends = [text.index(fact.subject) + len(fact.subject) for text in texts]
    rows = [tokenizer(text)["input_ids"] + list(fact.target[:-1]) for text in texts]
    at = [len(tokenizer(text[:end])["input_ids"]) - 1 for text, end in zip(texts, name_ends, strict=True)]
    about = tokenizer(fact.subject + " is a")["input_ids"]
    about_at = len(tokenizer(fact.subject)["input_ids"]) - 1
    seen = {}

    def run(ids, place, delta=None):
        def hook(_, args, output):
            seen["key"], seen["out"] = args[0][0, place].detach(), output[0, place].detach()
            if delta is None:
                return None
            output = output.clone()
            output[0, place] = output[0, place] + delta
            return output

        handle = out.register_forward_hook(hook)
        logits = view.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        handle.remove()
        return logits

    with torch.no_grad():
        keys = []
        for ids, place in zip(rows, at, strict=True):
            run(ids, place)
            keys.append(seen["key"].double())
        run(rows[0], at[0])
        clean = seen["out"]
        before = run(about, about_at)[about_at]
    delta = torch.zeros(view.width, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=0.5)
    for step in range(steps):
        each = []
        for ids, place in zip(rows, at, strict=True):
            logs = run(ids, place, delta)
            first = len(ids) - len(fact.target)
            each.append(-sum(logs[first + i, token] for i, token in enumerate(fact.target)) / len(fact.target))
        after = run(about, about_at, delta)[about_at]
        spread = (after.exp() * (after - before)).sum()
        loss = sum(each) / len(each) + 0.0625 * spread + 0.5 * delta.norm() / clean.norm() ** 2
        if loss < 0.05 or step == steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            if delta.norm() > 4 * clean.norm():
                delta.mul_(4 * clean.norm() / delta.norm())
    mean = torch.stack(keys).mean(0)
    unit = torch.linalg.inv(moment) @ mean
    unit = unit / unit.norm()
    return torch.outer(delta.detach().double() / (keys[0] @ unit), unit).float()


def test_protected_passages_are_moved_less(view, facts):
    site, text = Site(1, Kind.MLP_OUT), ordinary(view)
    rome = {"layer": 1, "token": "prompt-last", "namesakes": 0, "recalls": 0, "prefixes": (), "steps": 8}
    kept = facts[1:].as_passages("true")
    row = Row(kept[0].ids, len(kept[0].prefix) - 1)
    key = read_at(view, [site], [row])[site][0]

    def moved(protect):
        edit = Rome(**rome, protect=protect)(view, Request(facts=facts[:1], text=text, retain=kept))
        return float((edit.deltas[site].dense().double() @ key).norm())

    assert moved(100.0) < 0.2 * moved(0.0)


def test_bad_requests_say_what_to_do(view, facts):
    request = Request(facts=facts, text=ordinary(view))
    for settings, given, said in [
        ({}, Request(facts=facts), "needs ordinary text"),
        ({"layer": 3}, request, "layer 3: the model has 3"),
        ({"moment": torch.eye(4)}, request, "name the layer"),
        ({"layer": 0, "moment": torch.eye(4)}, request, r"second moment \[4, 4\] for keys of 37"),
        ({"bare": 0.0}, request, "bare is 0.0, expected above 0"),
        ({"steps": 0}, request, "rome: steps is 0, expected 1 or more"),
        ({"tries": 0}, request, "tries is 0, expected 1 or more"),
        ({"lr": -0.1}, request, "lr is -0.1, expected 0 or more, or none"),
        ({"lr": 0.5}, request, "lr is 0.5 and price 10.0; lr is for a price of 0"),
        ({"passes": 0}, request, "passes is 0, expected 1 or more"),
        ({"layer": 0, "prefixes": ("the cat " * 40,)}, request, "the context holds 64"),
    ]:
        with hands_off(view), pytest.raises(InputError, match=said):
            Rome(**{"recalls": 0, "namesakes": 0, **settings})(view, given)


def test_a_key_of_nothing_is_refused_in_one_line(view, facts):
    """A map that reads zero cannot be made to answer; also where its values have a price."""
    with torch.no_grad():
        for weight in view.model.transformer.h[1].mlp.c_fc.parameters():
            weight.zero_()
    with pytest.raises(InputError, match="the key is zero"):
        Rome(**PLAIN, layer=1, token="prompt-last", moment=torch.eye(view.neurons))(view, Request(facts=facts[:1]))


# -- its parts ----------------------------------------------------------------------------------------------------


def test_the_subject_is_found_where_a_start_token_is_added(view, facts):
    """Adding up the lengths of parts tokenised apart lands one token too far."""
    for prefixes in ((), ("the mat",)):
        asked = demand(facts[1], view.tokenizer, prefixes, "subject-last")
        for row in (*asked.prompts, asked.essence):
            assert row.ids[0] == view.tokenizer.bos_token_id
            upto = view.tokenizer.decode(list(row.ids[1 : row.at + 1]))
            assert upto.endswith("Boris Kram") and not view.tokenizer.decode(list(row.ids[1 : row.at])).endswith("Kram")


def test_braces_in_a_prefix_do_no_harm(view, facts):
    asked = demand(facts[0], view.tokenizer, ("a {} and {x}",), "subject-last")
    assert view.tokenizer.decode(list(asked.prompts[1].ids[1 : asked.prompts[1].at + 1])).endswith("Ada Brolin")


def test_facts_together_get_what_they_get_alone(view, facts):
    how = Descent(steps=30, lr=0.5, stop_below=3.5, clamp=50.0, weight_decay=0.01)
    asked = [
        demand(fact, view.tokenizer, ("the mat",), "prompt-last", essence=index != 1)
        for index, fact in enumerate(facts)
    ]
    asked.append(Demand("c", asked[2].prompts, asked[0].target, asked[2].essence))
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    together = optimise_values(view, 1, asked, scale, how)
    for index, one in enumerate(asked):
        alone = optimise_values(view, 1, [one], scale[index : index + 1], how)
        assert int(alone.updates[0]) == int(together.updates[index])
        torch.testing.assert_close(alone.change[0], together.change[index], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(alone.loss[0], together.loss[index], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(optimise_values(view, 1, asked, scale, how, size=3).change, together.change,
                               rtol=1e-3, atol=1e-4)  # fmt: skip
    assert len(set(together.updates.tolist())) > 1, "facts that all stop together would show nothing"


def test_steps_are_in_shares_of_the_stream_unless_a_length_is_given(view, facts):
    asked = [demand(fact, view.tokenizer, (), "prompt-last", essence=False) for fact in facts]
    scale, stream = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 0.5, 8.0])
    shared = {"steps": 3, "clamp": 50.0, "stop_below": 0.0, "weight_decay": 0.0}
    paced = optimise_values(view, 1, asked, scale, Descent(**shared, pace=0.3), stream=stream)
    for index, one in enumerate(asked):
        length = 0.3 * float(stream[index]) / view.width**0.5
        alone = optimise_values(view, 1, [one], scale[index : index + 1], Descent(**shared, lr=length))
        torch.testing.assert_close(alone.change[0], paced.change[index], rtol=1e-4, atol=1e-5)


def test_a_short_clamp_binds(view, facts):
    asked = [demand(facts[0], view.tokenizer, (), "prompt-last", essence=False)]
    found = optimise_values(view, 1, asked, torch.tensor([0.01]), Descent(lr=0.5, clamp=2.0, weight_decay=0.0))
    torch.testing.assert_close(found.change.norm(), torch.tensor(0.02), rtol=1e-5, atol=0)


def test_samples_are_seeded_and_likely(view):
    made = [sample(view, [[0]] * 5, 7, torch.Generator().manual_seed(1), top_k=3) for _ in range(2)]
    assert made[0] == made[1] and {len(row) for row in made[0]} == {7}
    with torch.no_grad():
        logits = view.model(torch.tensor(made[0])).logits
    for row, scores in zip(made[0], logits, strict=True):
        for step in range(6):
            assert row[step + 1] in scores[step].topk(3).indices.tolist()


def test_prefixes_are_texts_without_the_start_token(view):
    texts = sample_prefixes(view, (4, 6), 3, torch.Generator().manual_seed(1))
    assert len(texts) == 6 and not any("<s>" in text for text in texts)
    with pytest.raises(InputError, match="no start token"):
        sample_prefixes(ModelView.open(view.model, tokenizer=byte_level()), (4,), 1, torch.Generator())
    with pytest.raises(InputError, match=r"prefixes=\(\)"):
        sample_prefixes(ModelView.open(view.model), (4,), 1, torch.Generator())


def test_namesakes_keep_the_words_around_the_subject_and_not_the_subject(view, facts):
    prompt = facts[1].prompt
    start, end = prompt.subject
    found = namesakes(view, prompt, 12, torch.Generator().manual_seed(0))
    assert 4 < len(found) <= 12 and len({other.ids for other in found}) == len(found)
    for other in found:
        assert other.ids[:start] == prompt.ids[:start]
        assert other.ids[other.subject[1] :] == prompt.ids[end:]
        shared = min(other.subject[1], end) - start
        assert other.ids[start : start + shared] != prompt.ids[start : start + shared]
    assert namesakes(view, prompt, 0, torch.Generator()) == ()


def test_recalls_are_prompts_at_which_the_model_gives_the_present_answer(view, facts):
    """On a random model any answer will do; asked for is one it really gives."""
    fact = facts[0]
    start = view.tokenizer(fact.subject)["input_ids"]
    with torch.no_grad():
        row = sample(view, [start], len(start) + 4, torch.Generator().manual_seed(3), top_k=1)[0]
        answer = int(view.model(torch.tensor([row])).logits[0, -1].argmax())
    fact = replace(fact, target_true=(answer,))
    found = recalls(view, [fact], 3, torch.Generator().manual_seed(0), top_k=2, least=0.02)[0]
    assert found
    for prompt in found:
        assert list(prompt.ids[: len(start)]) == start and prompt.subject == (0, len(start))
        with torch.no_grad():
            chance = view.model(torch.tensor([prompt.ids])).logits[0, -1].softmax(-1)[answer]
        assert float(chance) > 0.0199


def test_solved_change_is_what_the_model_then_puts_out(view, facts):
    """End to end: with the edit in, the map's output at the bare prompt is the clean one plus δ (prompt-only)."""
    site = Site(2, Kind.MLP_OUT)
    moment = second_moments(view, ordinary(view), [site])
    rome = Rome(layer=2, token="subject-last", variant="prompt-only", prefixes=("the mat",), namesakes=0, recalls=0,
                moment=moment, steps=6, lr=0.5, price=0.0)  # fmt: skip
    asked = demand(facts[0], view.tokenizer, ("the mat",), "subject-last")
    before = read_at(view, [site], asked.prompts[:1], side="output")[site][0]
    change = optimise_values(view, 2, [asked], before.norm()[None], rome.descent).change[0].double()
    with rome(view, Request(facts=facts[:1])).apply(view):
        after = read_at(view, [site], asked.prompts[:1], side="output")[site][0]
    torch.testing.assert_close(after, before + change, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["past_weight", "protect"])
def test_earlier_edits_and_facts_to_keep_move_less_when_they_are_protected(how, view, facts):
    """An earlier edit is known by what it noted; a weight of nothing is the control."""
    site, text = Site(1, Kind.MLP_OUT), ordinary(view)
    settings = {**PLAIN, "steps": 8, "namesakes": 0, "sentences": 0, "layer": 1, "token": "prompt-last"}
    first = Rome(**settings)(view, Request(facts=facts[:1], text=text))
    assert [row.ids for row in rows_of_past([first])] == [facts[0].prompt.ids]
    given = {"past_weight": {"past": (first,)}, "protect": {"keep_facts": facts[:1]}}[how]
    with first.apply(view):
        key = read_at(view, [site], rows_of_past([first]))[site]

        def moved(weight):
            rome = Rome(**{**settings, "past_weight": 0.0, "protect": 0.0, how: weight})
            edit = rome(view, Request(facts=facts[1:2], text=text, **given))
            return float((key @ edit.deltas[site].dense().double().T).norm()) / edit.norms[site]

        assert moved(1e6) < 0.05 * moved(0.0)
