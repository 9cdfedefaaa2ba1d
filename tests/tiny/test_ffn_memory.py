"""Keys and values of neurons: slow references, tables that merge to the bit, and a memory we wrote."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import zoo
from torch import nn
from torch.testing import assert_close

from memloc.batches import pad
from memloc.errors import InputError, MismatchError, ModelError
from memloc.localizers.ffn_memory import FfnMemory
from memloc.passages import Passages
from memloc.reading import composition, promoted, triggers
from memloc.reading.composition import SHARES, Heard, chosen
from memloc.reading.promoted import DirectPath, Promoted
from memloc.reading.triggers import Triggers, purity, read_triggers, shuffled
from memloc.sites import OUTSIDE, Kind, Site
from memloc.truth.planted import plant
from memloc.view import ModelView

every_family = pytest.mark.parametrize("family", zoo.FAMILIES)


def readings_alone(view, passage):
    """What enters every mlp.out, [l][t, f], the passage alone."""
    sites = view.sites(Kind.MLP_OUT)
    with torch.no_grad(), view.record(sites) as seen:
        view.model(torch.tensor([passage.ids]))
    return [seen[site][0] for site in sites]


# -- keys --------------------------------------------------------------------------------------------------------


def slow_triggers(view, corpus, layer, neuron, count):
    """All contexts of one neuron, sorted: (score, text, position, next token)."""
    found = []
    for text, passage in enumerate(corpus):
        heard = readings_alone(view, passage)[layer][:, neuron].float().tolist()
        for position, following in enumerate(passage.ids[1:]):
            if heard[position] > 0:
                found.append((heard[position], text, position, following))
    return sorted(found, key=lambda entry: (-entry[0], entry[1], entry[2]))[:count]


@every_family
def test_triggers_are_the_strongest_contexts(family, view_of):
    view, corpus = view_of(family), zoo.passages(7, seed=3)
    table = read_triggers(view, corpus, count=5, batch_size=3)
    for layer, neuron in ((0, 0), (1, 36), (2, 11)):
        expected = slow_triggers(view, corpus, layer, neuron, 5)
        found = table.where(layer, neuron)
        assert [entry[1:] for entry in found] == [entry[1:3] for entry in expected]
        assert_close([entry[0] for entry in found], [entry[0] for entry in expected], atol=1e-4, rtol=1e-4)
        following = [token for token in table.tokens_at(1)[layer, neuron].tolist() if token >= 0]
        assert following == [entry[3] for entry in expected]
        ended = [token for token in table.tokens_at(0)[layer, neuron].tolist() if token >= 0]
        assert ended == [corpus[text].ids[position] for _, text, position, _ in expected]


def test_a_context_is_spelled_within_its_text(view_of):
    corpus = zoo.passages(3, seed=3)
    table = read_triggers(view_of("gpt2"), corpus, count=2)
    assert table.context(1, 4, 3) == (list(corpus[1].ids[2:5]), corpus[1].ids[5])
    assert table.context(2, 1, 8) == (list(corpus[2].ids[:2]), corpus[2].ids[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_merge_to_the_whole_to_the_bit(dtype, view_of):
    """One text a batch, so that padding adds no rounding; in half precision many scores are equal."""
    view, corpus = view_of("gpt2", dtype), zoo.passages(7, seed=3)
    whole = read_triggers(view, corpus, count=4, batch_size=1)
    merged = read_triggers(view, corpus[:2], count=4, batch_size=1)
    for part in (corpus[2:3], corpus[3:]):
        merged = merged.merged(read_triggers(view, part, count=4, batch_size=1))
    assert torch.equal(merged.packed, whole.packed) and torch.equal(merged.tokens, whole.tokens)
    assert torch.equal(merged.starts, whole.starts) and merged.names == whole.names == corpus.ids
    in_parts = read_triggers(view, corpus, count=4, batch_size=1, part=3)
    assert torch.equal(in_parts.packed, whole.packed)


def test_the_earliest_comes_first_among_equals():
    """By hand: score 2 at places 9, 4 and 6 and one larger; a table of three keeps the larger and the earlier two."""
    table = torch.zeros(1, 3, dtype=torch.long)
    for score, place in ((2.0, 9), (2.0, 4), (3.5, 8), (-1.0, 0), (0.0, 1), (2.0, 6)):
        triggers._keep_largest(table, torch.tensor([[score]]), torch.tensor([place]))
    found = Triggers(table[None], torch.arange(20, dtype=torch.int32), torch.tensor([0, 20]), ("t",), "m")
    assert found.scores.tolist() == [[[3.5, 2.0, 2.0]]] and found.places.tolist() == [[[8, 4, 6]]]
    none = Triggers(torch.zeros(1, 1, 2, dtype=torch.long), found.tokens, found.starts, ("t",), "m")
    assert none.places.tolist() == [[[-1, -1]]] and none.tokens_at(1).tolist() == [[[-1, -1]]] and not none.where(0, 0)


def test_chunks_do_not_change_a_table(view_of, monkeypatch):
    view, corpus = view_of("llama"), zoo.passages(5, seed=3)
    whole = read_triggers(view, corpus, count=3)
    monkeypatch.setattr(triggers, "CHUNK", 7)
    assert torch.equal(read_triggers(view, corpus, count=3).packed, whole.packed)


def test_a_table_survives_the_disk_and_an_interrupt(view_of, tmp_path, monkeypatch):
    """Stopped in the third part, a run goes on behind the second, reading no text twice."""
    view, corpus, file = view_of("gpt_neox"), zoo.passages(7, seed=3), tmp_path / "triggers.safetensors"
    whole = read_triggers(view, corpus, count=3, part=2)
    honest, texts = triggers._read, []

    def failing(view, part, *rest):
        texts.extend(part.ids)
        if len(texts) == 6:
            raise KeyboardInterrupt
        return honest(view, part, *rest)

    monkeypatch.setattr(triggers, "_read", failing)
    with pytest.raises(KeyboardInterrupt):
        read_triggers(view, corpus, count=3, part=2, path=file)
    assert Triggers.load(file).names == corpus.ids[:4]
    found = read_triggers(view, corpus, count=3, part=2, path=file)
    assert texts == [*corpus.ids[:6], *corpus.ids[4:]]
    again = Triggers.load(file)
    for table in (found, again):
        assert torch.equal(table.packed, whole.packed) and table.names == whole.names and table.model == whole.model


def test_tables_of_something_else_are_refused(view_of, tmp_path):
    view, corpus, file = view_of("gpt2"), zoo.passages(3, seed=3), tmp_path / "t.safetensors"
    table = read_triggers(view, corpus, count=3, path=file)
    with pytest.raises(MismatchError, match="nothing was merged"):
        table.merged(read_triggers(view, corpus, count=4))
    with pytest.raises(MismatchError, match="of another model"):
        table.merged(dataclasses.replace(table, model="another"))
    for other, texts, count in (
        (view_of("llama"), corpus, 3),
        (view, zoo.passages(3, seed=4), 3),
        (view, corpus[:2], 3),
        (view, corpus, 2),
    ):
        with pytest.raises(MismatchError, match=r"t\.safetensors holds contexts of another model, of other texts"):
            read_triggers(other, texts, count=count, path=file)
    with pytest.raises(InputError, match="4294967296 tokens; a table of contexts tells 4294967295 apart"):
        triggers._check_size(1 << 32)


def test_purity_by_hand():
    tokens = torch.tensor([[5, 5, 5, 2], [1, 2, 3, -1], [4, 4, -1, -1], [9, -1, -1, -1], [-1, -1, -1, -1]])
    assert purity(tokens) == pytest.approx((3 / 4 + 1 / 3 + 1) / 3)
    assert purity(tokens[3:]) == 0
    dealt = shuffled(tokens, seed=0)
    assert torch.equal(dealt < 0, tokens < 0) and not torch.equal(dealt, tokens)
    assert sorted(dealt[dealt >= 0].tolist()) == sorted(tokens[tokens >= 0].tolist())


# -- values ------------------------------------------------------------------------------------------------------


@every_family
def test_the_direct_path_and_the_biases_are_the_models_own(family, view_of):
    """Of the whole stream: the logits above their mean, in every family."""
    view = view_of(family, torch.float64)
    path = DirectPath.of(view)
    residual = 3 * torch.randn(5, view.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    tokens = torch.tensor([0, 7, 52, 3, 3])
    with torch.no_grad():
        bias = view.unembed(path.norm.bias)
        logits = view.unembed(view.final_norm(residual)) - bias
        expected = logits.gather(1, tokens[:, None])[:, 0] - logits.mean(1)
        # Root mean square norms are float32 inside.
        atol = 1e-9 if path.norm.centre else 1e-5
        assert_close((path.towards(tokens, residual) * residual).sum(-1), expected, atol=atol, rtol=0)
        assert_close(path.logits(residual).argsort(), logits.argsort())


def test_a_final_norm_of_another_kind_is_refused():
    class Bent(nn.Module):
        def forward(self, hidden):
            return torch.tanh(hidden)

    view = ModelView.open(zoo.build("llama"))
    view.model.model.norm = Bent()
    view = ModelView(view.model, view.row)
    with pytest.raises(ModelError, match="the final norm is no gain, centring and scale"):
        FfnMemory()(view, zoo.passages(2))


def norm_by_hand(view):
    """Gain [d], and the residual as the norm sees it, by what the module is."""
    norm = view.model.get_submodule(view.row.final_norm)
    layer_norm = isinstance(norm, nn.LayerNorm)
    return norm.weight.detach(), (lambda x: x - x.mean(-1, keepdim=True)) if layer_norm else (lambda x: x)


@every_family
def test_promoted_tokens_are_the_slow_ones(family, view_of, monkeypatch):
    view = view_of(family, torch.float64)
    gain, seen = norm_by_hand(view)
    targets = torch.randint(zoo.VOCAB, (view.layers, view.neurons, 2), generator=torch.Generator().manual_seed(0))
    targets[1, 5, 0] = -1
    found = Promoted.of(DirectPath.of(view), count=4, targets=targets)
    unembedding = view.weight(Site(OUTSIDE, Kind.UNEMBED)).detach()
    for layer, neuron in ((0, 0), (1, 5), (2, 36)):
        value = view.weight(Site(layer, Kind.MLP_OUT)).detach()[:, neuron]
        spoken = [float(row @ (gain * seen(value))) for row in unembedding]
        order = sorted(range(zoo.VOCAB), key=lambda token: -spoken[token])
        assert found.most[layer, neuron].tolist() == order[:4]
        assert found.least[layer, neuron].tolist() == order[::-1][:4]
        expected = [order.index(token) if token >= 0 else -1 for token in targets[layer, neuron].tolist()]
        assert found.rank[layer, neuron].tolist() == expected
        assert_close(found.norm[layer, neuron], value.norm())
    monkeypatch.setattr(promoted, "CHUNK", 3 * zoo.VOCAB)
    chunked = Promoted.of(DirectPath.of(view), count=4, targets=targets)
    assert torch.equal(chunked.most, found.most) and torch.equal(chunked.rank, found.rank)


# -- how a layer's output is made of them ------------------------------------------------------------------------


def test_positions_looked_at_are_spread_over_all_suffixes():
    passages = zoo.passages(4)
    total = sum(len(item.suffix) for item in passages)
    assert [len(entry) for entry in chosen(passages, total)] == [len(item.suffix) for item in passages]
    assert [len(entry) for entry in chosen(passages, 999)] == [len(item.suffix) for item in passages]
    some = chosen(passages, 5)
    assert sum(len(entry) for entry in some) == 5 and all(some)
    assert chosen(passages, 0) == [set()] * 4


def slow_shares(view, passages):
    """[l][8], one position at a time, on whole forwards of one passage."""
    gain, seen = norm_by_hand(view)
    unembedding = view.weight(Site(OUTSIDE, Kind.UNEMBED)).detach()
    sites, table = view.sites(Kind.MLP_OUT), torch.zeros(view.layers, len(SHARES), dtype=torch.float64)

    def says(vector):
        return int((unembedding @ (gain * seen(vector))).argmax())

    def lens(vector):
        return int(view.unembed(view.final_norm(vector)).argmax())

    for passage in passages:
        outputs = view.record(sites, side="output")
        with (
            torch.no_grad(),
            view.record(sites) as neurons,
            outputs as written,
            view.record_blocks(range(9)[: view.layers]) as after,
        ):
            view.model(torch.tensor([passage.ids]))
        for at in range(len(passage.prefix) - 1, len(passage.ids) - 1):
            final = lens(after[view.layers - 1][0, at])
            for site in sites:
                w, out, x = neurons[site][0, at], written[site][0, at], after[site.layer][0, at]
                values = view.weight(site).detach()
                awake = {says(values[:, i]) for i in range(view.neurons) if w[i] > 0}
                loud = sorted(range(view.neurons), key=lambda i: -float(w[i].abs() * values[:, i].norm()))[:10]
                ten = {says(values[:, i] * w[i].sign()) for i in loud}
                own, after_it, before_it = says(out), lens(x), lens(x - out)
                kept, taken = after_it == before_it, after_it == own and after_it != before_it
                marked, drawn = sum(says(values[:, i]) == own for i in range(view.neurons)), int((w > 0).sum())
                dealt = math.comb(view.neurons - marked, drawn) / math.comb(view.neurons, drawn)
                row = [own not in awake, dealt, own not in ten, float((w > 0).double().mean()), kept, taken]
                row += [not kept and not taken, after_it == final]
                table[site.layer] += torch.tensor([float(entry) for entry in row], dtype=torch.float64)
    return table / sum(len(item.suffix) for item in passages)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mistral"])
def test_shares_of_positions_are_the_slow_ones(family, view_of, monkeypatch):
    view, passages = view_of(family, torch.float64), zoo.passages(3)
    monkeypatch.setattr(composition, "CHUNK", 4)
    notes = FfnMemory(positions=999, batch_size=2)(view, passages).notes["layers"]
    with torch.no_grad():
        expected = slow_shares(view, passages)
    for layer in range(view.layers):
        found = torch.tensor([notes[f"L{layer}"][name] for name in SHARES], dtype=torch.float64)
        assert_close(found, expected[layer])
    assert notes[f"L{view.layers - 1}"]["agrees_with_final"] == 1


def test_the_chance_that_none_is_drawn_by_hand():
    """5 cards, 2 marked: drawing none, 1, 3 and 4 misses both in 1, 3/5, 1/10 and 0 of all ways."""
    drawn = torch.tensor([0, 1, 3, 4])
    found = composition._none_drawn(5, torch.full_like(drawn, 2), drawn)
    assert_close(found, torch.tensor([1, 0.6, 0.1, 0], dtype=torch.float64))


def test_a_layer_of_one_neuron_composes_nothing(view_of):
    """Its output says what the neuron's value says, or its opposite where the neuron is below 0."""
    view = ModelView.open(zoo.build("gpt_neox"))
    with torch.no_grad():
        for site in view.sites(Kind.MLP_OUT):
            view.weight(site)[:, 1:] = 0
            view.parameter(Site(site.layer, site.kind, bias=True)).zero_()
    notes = FfnMemory(positions=999)(view, zoo.passages(3)).notes["layers"]
    assert all(entry["composition_of_ten"] == 0 for entry in notes.values())


# -- the score ---------------------------------------------------------------------------------------------------


def slow_score(view, passage):
    """[l, f]: take the neuron's writing out of the final residual, with the norm's mean and scale frozen, and look."""
    norm = view.model.get_submodule(view.row.final_norm)
    gain, seen = norm_by_hand(view)
    epsilon = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
    unembedding = view.weight(Site(OUTSIDE, Kind.UNEMBED)).detach()
    neurons = readings_alone(view, passage)
    with torch.no_grad(), view.record_blocks([view.layers - 1]) as after:
        view.model(torch.tensor([passage.ids]))
    found = torch.zeros(view.layers, view.neurons, dtype=torch.float64)
    for at in range(len(passage.prefix) - 1, len(passage.ids) - 1):
        x = after[view.layers - 1][0, at]
        scale = (seen(x).square().mean() + epsilon).sqrt()
        for layer in range(view.layers):
            values = view.weight(Site(layer, Kind.MLP_OUT)).detach()
            for neuron in range(view.neurons):
                taken = x - neurons[layer][at, neuron] * values[:, neuron]
                fall = unembedding @ (gain * (seen(x) - seen(taken)) / scale)
                found[layer, neuron] += fall[passage.ids[at + 1]] - fall.mean()
    return found / len(passage.suffix)


@every_family
def test_the_score_is_what_leaves_the_logit_with_the_neuron(family, view_of):
    view, passages = view_of(family, torch.float64), zoo.passages(2)
    found = FfnMemory(counts="all", positions=0, readings=0)(view, passages)
    expected = slow_score(view, passages[1])
    for site, scores in found.scores.items():
        assert_close(scores[1].double(), expected[site.layer], atol=1e-6, rtol=1e-5)
    assert float(expected.abs().max()) > 0.01


def test_agreeing_counts_only_where_the_value_says_the_token(view_of):
    """With all tokens promoted nothing is left out; with one, only positions whose token is the value's first."""
    view, passages = view_of("gpt2", torch.float64), zoo.passages(3)
    plain = FfnMemory(counts="all")(view, passages)
    every = FfnMemory(promotes=zoo.VOCAB)(view, passages)
    first = FfnMemory(promotes=1)(view, passages)
    tops = Promoted.of(
        DirectPath.of(view), count=1, targets=torch.zeros(view.layers, view.neurons, 1, dtype=torch.long)
    )
    counted = 0
    for site, scores in plain.scores.items():
        assert_close(every.scores[site], scores)
        for row, passage in enumerate(passages):
            silent = torch.tensor([int(token) not in passage.suffix for token in tops.most[site.layer, :, 0]])
            assert float(first.scores[site][row][silent].abs().sum()) == 0
            counted += int((~silent).sum())
    assert counted > 10 and float(sum(entry.abs().sum() for entry in first.scores.values())) > 0


# -- notes -------------------------------------------------------------------------------------------------------


@every_family
def test_the_planted_memory_is_read_out(family):
    """Neuron 7 of layer 1 wakes before the target and promotes it: both halves of a memory, and the best-scored one."""
    planted = plant(ModelView.open(zoo.build(family, tie_word_embeddings=False)), layer=1, neuron=7)
    notes = FfnMemory(readings=3)(planted.view, planted.passages).notes
    best, token = notes["readings"][0], planted.passages[0].suffix[0]
    assert (best["site"], best["index"]) == ("L1.mlp.out", 7)
    assert best["promotes"][0] == f"⟨{token}⟩" and f"⟨{token}⟩" not in best["suppresses"]
    assert best["triggers"][0]["score"] == max(entry["score"] for entry in best["triggers"]) > 0
    assert [entry["score"] for entry in notes["readings"]] == sorted(
        (entry["score"] for entry in notes["readings"]), reverse=True
    )
    by_id = {item.id: item.ids for item in planted.passages}
    for trigger in best["triggers"]:
        ids, at = by_id[trigger["passage"]], trigger["position"]
        assert trigger["next"] == f"⟨{ids[at + 1]}⟩"
        assert trigger["text"] == "".join(f"⟨{entry}⟩" for entry in ids[max(0, at - 7) : at + 1])


def test_notes_of_layers_follow_from_the_table_and_the_values(view_of):
    view, passages, corpus = view_of("qwen2"), zoo.passages(3), zoo.passages(30, seed=5, ragged=False)
    method = FfnMemory(triggers=6)
    notes = method(view, passages, contrast=corpus).notes
    assert notes["corpus"] == {"of": "contrast", "texts": 30, "tokens": sum(len(item.ids) for item in corpus)}
    table = read_triggers(view, corpus, count=6)
    following = table.tokens_at(1)
    values = Promoted.of(DirectPath.of(view), count=1, targets=following[..., :1])
    for layer in range(view.layers):
        told, awake = notes["layers"][f"L{layer}"], following[layer, :, 0] >= 0
        top, target = values.most[layer, awake, 0], following[layer, awake, 0]
        assert told["awake"] == pytest.approx(float(awake.double().mean()))
        assert told["agreement"] == pytest.approx(float((top == target).double().mean()))
        assert told["target_rank"] == float(values.rank[layer, awake, 0].double().median())
        assert told["next_purity"] == pytest.approx(purity(following[layer]))
        generator = torch.Generator().manual_seed(0)
        dealt = [top == target[torch.randperm(len(target), generator=generator)] for _ in range(3000)]
        mean = float(torch.stack(dealt).double().mean())
        assert told["agreement_dealt"] == pytest.approx(mean, abs=5 * math.sqrt(mean / 3000 / len(top)) + 1e-4)


def test_a_table_on_disk_saves_the_reading(view_of, tmp_path):
    from memloc.costs import counted

    view, passages, corpus = view_of("gpt2"), zoo.passages(3), zoo.passages(9, seed=5)
    method = FfnMemory(table=str(tmp_path / "keys.safetensors"))
    first, second = [], []
    for into in (first, second):
        with counted(view) as spent:
            into.append(method(view, passages, contrast=corpus))
        into.append(spent.forward)
    said = method.cost(view, passages, contrast=corpus)
    assert said.bound == "at most" and second[1] < first[1] == said.forward
    assert first[0].notes == second[0].notes
    for site, scores in first[0].scores.items():
        assert torch.equal(scores, second[0].scores[site])


def test_ffn_memory_refuses_what_it_cannot_do(view_of):
    with pytest.raises(InputError, match="no passages given"):
        FfnMemory()(view_of("gpt2"), Passages(()))
    with pytest.raises(InputError, match="triggers, promotes and batch_size: expected at least 1"):
        FfnMemory(triggers=0)


def test_heard_positions_are_those_that_predict(view_of):
    from memloc.localizers.ffn_memory import _listen

    view, passages = view_of("mistral", torch.float64), zoo.passages(2)
    batch = pad([item.ids for item in passages], [len(item.prefix) for item in passages])
    heard = _listen(view, batch)
    assert isinstance(heard[0], Heard)
    expected = torch.cat([readings_alone(view, item)[2][len(item.prefix) - 1 : -1] for item in passages])
    assert_close(heard[2].neurons, expected)
