"""rare-token-heads and attention-bypass against slow references, and on models whose attention we wrote."""

from __future__ import annotations

import math

import pytest
import torch
import zoo
from torch.testing import assert_close

from memloc.errors import InputError
from memloc.localizers.attention_bypass import AttentionBypass
from memloc.localizers.rare_token_heads import RareTokenHeads, queries_of, simple_patterns
from memloc.objectives import suffix_nll
from memloc.passages import Passage, Passages
from memloc.running.outcomes import Outcome
from memloc.running.patterns import short_circuit
from memloc.sites import Kind, Site
from memloc.view import ModelView

every_family = pytest.mark.parametrize("family", zoo.FAMILIES)


def repeating(count=3, seed=4):
    """Passages in which tokens repeat: 12 kinds of token, the higher the rarer."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, 13).double()
    items = []
    for index in range(count):
        ids = torch.multinomial(weights, 16 + index, replacement=True, generator=generator).tolist()
        items.append(Passage(f"p{index}", tuple(ids[:11]), tuple(ids[11:])))
    return Passages(tuple(items), "repeating")


# -- heads on rare tokens ----------------------------------------------------------------------------------------


def slow_rank_correlation(one, other):
    def ranks(values):
        return [sum(w < v - 1e-12 for w in values) + sum(abs(w - v) <= 1e-12 for w in values) / 2 for v in values]

    pairs = list(zip(ranks(one), ranks(other), strict=True))
    mean = len(pairs) / 2
    top = sum((a - mean) * (b - mean) for a, b in pairs)
    bottom = math.sqrt(sum((a - mean) ** 2 for a, _ in pairs) * sum((b - mean) ** 2 for _, b in pairs))
    return top / bottom if bottom else 0.0


def slow_rarity(family, passage, ordinary, query, skip):
    """[l][h]: the family's own eager patterns, one passage at a time, types one by one."""
    model = zoo.build(family, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        patterns = model(torch.tensor([passage.ids]), output_attentions=True).attentions
    text = [token for item in ordinary for token in item.ids] + list(passage.ids)
    size, total = len(passage.prefix), len(passage.ids)
    queries = {"last-prefix": [size - 1], "suffix": range(size - 1, total - 1), "all": range(total)}[query]
    found = []
    for layer in patterns:
        found.append([])
        for pattern in layer[0]:
            shares = {}
            for key in range(skip, size):
                seen = [float(pattern[at, key]) * (at + 1 if query == "all" else 1) for at in queries if at >= key]
                whole = len(seen) if query == "all" else len(queries)
                shares.setdefault(passage.prefix[key], []).append(sum(seen) / whole)
            attention = [sum(values) / len(values) for values in shares.values()]
            found[-1].append(slow_rank_correlation(attention, [-text.count(token) for token in shares]))
    return found


@every_family
@pytest.mark.parametrize("query,skip", [("last-prefix", 1), ("suffix", 0), ("all", 1)])
def test_scores_are_the_slow_correlations(family, query, skip, view_of):
    view, passages, ordinary = view_of(family, torch.float64), repeating(), repeating(5, seed=8)
    found = RareTokenHeads(query=query, skip=skip, permutations=3)(view, passages, contrast=ordinary)
    for passage in passages:
        expected = slow_rarity(family, passage, ordinary, query, skip)
        for site, scores in found.of(passage.id).scores.items():
            assert_close(scores, torch.tensor(expected[site.layer]), atol=1e-5, rtol=0)
    spread = torch.cat([scores.flatten() for scores in found.scores.values()])
    assert float(spread.std()) > 0.1


def test_without_contrast_rarity_is_by_the_passages_and_scores_are_means(view_of):
    view, passages = view_of("gpt2"), repeating()
    alone = RareTokenHeads()(view, passages)
    assert alone.passages is None and alone.notes["corpus"] == "the passages together"
    given = RareTokenHeads()(view, passages, contrast=passages).mean()
    # The passages' own counts once more change no order of counts by much.
    assert_close(alone.scores[Site(0, Kind.ATTN_OUT)], given.scores[Site(0, Kind.ATTN_OUT)], atol=0.2, rtol=0)


def rarity_model(direction):
    """GPT-2 with head 1 of layer 1 made to look for rare tokens: its keys read one direction of the stream, into which
    the embeddings write how rare a token is; its queries are a constant."""
    view = ModelView.open(zoo.build("gpt2", tie_word_embeddings=False))
    rows = slice(view.head_width, 2 * view.head_width)
    with torch.no_grad():
        for site in (Site(0, Kind.ATTN_OUT), Site(0, Kind.MLP_OUT)):
            view.parameter(site).zero_()
            view.parameter(Site(site.layer, site.kind, bias=True)).zero_()
        embed, place = view.model.transformer.wte.weight, view.model.transformer.wpe.weight
        place.mul_(0.01)
        embed.mul_(0.1)
        embed[:, 5] = torch.arange(zoo.VOCAB) / 4.0 * direction
        for kind, entries in ((Kind.ATTN_Q, None), (Kind.ATTN_K, 5)):
            weight = view.weight(Site(1, kind))
            weight[rows] = 0
            bias = view.weight(Site(1, kind, bias=True))[view.place(Site(1, kind)).rows]
            bias[rows] = 0 if entries is not None else 1
            if entries is not None:
                weight[rows, entries] = 1
        view.model.transformer.h[1].ln_1.weight.fill_(1)
    return view


@pytest.mark.parametrize("direction", [1, -1])
def test_a_head_made_to_look_for_rare_tokens_is_found(direction):
    """Tokens with higher ids are rarer in these passages; with the direction turned the same head comes last."""
    view, passages = rarity_model(direction), repeating(6)
    found = RareTokenHeads()(view, passages, contrast=repeating(40, seed=8))
    flat = torch.cat([scores for _, scores in sorted(found.mean().scores.items())])
    index = int(flat.argmax()) if direction == 1 else int(flat.argmin())
    assert divmod(index, view.heads) == (1, 1)
    assert abs(float(flat[index])) > 0.9
    if direction == 1:
        assert found.notes["best"]["site"] == "L1.attn.out" and found.notes["best"]["head"] == 1
        assert found.notes["best"]["z"] > 4 and found.notes["best"]["p"] < 0.01


def test_an_even_head_scores_nothing_and_the_published_statistic_is_fooled():
    """All keys zeroed: every head attends evenly. Its correlation is 0, its p is 1; summed bins say otherwise."""
    view = ModelView.open(zoo.build("gpt2"))
    with torch.no_grad():
        for layer in range(view.layers):
            view.weight(Site(layer, Kind.ATTN_K)).zero_()
            view.weight(Site(layer, Kind.ATTN_K, bias=True))[view.place(Site(layer, Kind.ATTN_K)).rows] = 0
    for query in ("last-prefix", "suffix", "all"):
        notes = RareTokenHeads(query=query, skip=0)(view, repeating(30), contrast=repeating(40, seed=8)).notes
        for layer in notes["r"]:
            assert notes["r"][layer] == [0.0] * 3 and notes["p"][layer] == [1.0] * 3
            assert notes["published"][layer] == pytest.approx([notes["published_even"]] * 3, abs=1e-5)
        assert notes["baselines"]["uniform"] == 0 and notes["published_even"] < -0.3


def test_the_family_wise_p_holds_its_level_on_models_that_know_nothing_of_rarity():
    """Random models and random passages of unrelated tokens: the best of 9 heads is below 10 % in about a tenth."""
    below = 0
    for seed in range(20):
        view = ModelView.open(zoo.build("gpt2", seed=seed), prove=False)
        found = RareTokenHeads(permutations=99)(view, zoo.passages(6, seed=seed), contrast=zoo.passages(30, seed=99))
        below += found.notes["best"]["p"] <= 0.1
    assert below <= 6


def test_z_is_the_correlation_in_its_own_standard_deviations(view_of):
    view, passages, ordinary = view_of("llama"), repeating(), repeating(5, seed=8)
    plain = RareTokenHeads()(view, passages, contrast=ordinary)
    scaled = RareTokenHeads(scale="z")(view, passages, contrast=ordinary)
    for row, passage in enumerate(passages):
        factor = math.sqrt(len(set(passage.prefix[1:])) - 1)
        for site, scores in plain.scores.items():
            assert_close(scaled.scores[site][row], scores[row] * factor)


def test_the_baselines_attend_as_they_say():
    from memloc.batches import pad

    batch = pad([list(range(7)), list(range(5))], [4, 3])
    at, weight = queries_of(batch, "suffix")
    assert at.tolist() == [[3, 4, 5], [2, 3, 4]]
    assert_close(weight[:, :, 0], torch.tensor([[1, 1, 1], [1.5, 1.5, 0]], dtype=torch.float64) / 3)
    even, first, previous = simple_patterns(at, 7)
    assert_close(even[0, 0], torch.tensor([0.25] * 4 + [0] * 3, dtype=torch.float64))
    assert first[1].argmax(-1).tolist() == [0, 0, 0] and previous[0].argmax(-1).tolist() == [2, 3, 4]


@pytest.mark.parametrize("ablate", ["zero", "mean"])
def test_ablating_a_head_does_what_it_says(ablate, view_of):
    """Beside forwards with changed weights: the output columns of the head zeroed, its mean put into the bias."""
    view, passages, ordinary = view_of("gpt2", torch.float64), repeating(), repeating(5, seed=8)
    notes = RareTokenHeads(ablate=ablate, silenced=2)(view, passages, contrast=ordinary).notes["ablation"]
    for entry in notes["heads"]:
        other, site = view.copy(), Site.parse(entry["site"])
        own = slice(entry["head"] * view.head_width, (entry["head"] + 1) * view.head_width)
        if ablate == "mean":
            seen = []
            for passage in passages:
                with torch.no_grad(), view.record([site]) as inside:
                    view.model(torch.tensor([passage.ids]))
                seen.append(inside[site][0, :, own])
            shift = view.weight(site).detach()[:, own] @ torch.cat(seen).mean(0)
        with torch.no_grad():
            other.weight(site)[:, own] = 0
            if ablate == "mean":
                other.weight(Site(site.layer, site.kind, bias=True)).add_(shift)
            for name, given in (("passages", passages), ("contrast", ordinary)):
                expected = [suffix_nll(other, next(other.batches(given[i : i + 1]))) for i in range(len(given))]
                assert entry[name]["nll"] == pytest.approx(float(torch.cat(expected).mean()), abs=1e-9)
                assert abs(entry[name]["nll"] - notes["clean"][name]["nll"]) > 1e-4


def test_rare_token_heads_refuse_what_has_no_ranks(view_of):
    with pytest.raises(InputError, match="no passages given"):
        RareTokenHeads()(view_of("gpt2"), Passages(()))
    with pytest.raises(InputError, match="no prefix has 3 types of token beyond the first 1"):
        RareTokenHeads()(view_of("gpt2"), Passages((Passage("a", (1, 2, 3), (4,)),)))
    with pytest.raises(InputError, match="silenced and batch_size: at least 1"):
        RareTokenHeads(silenced=0)


# -- outcomes ----------------------------------------------------------------------------------------------------


def test_outcomes_are_what_one_row_at_a_time_gives(view_of):
    view, passages = view_of("qwen2", torch.float64), zoo.passages(4)
    parts = [(batch, Outcome.of(view, batch)) for batch in view.batches(passages, size=3)]
    found = Outcome.gathered(parts, len(passages))
    for row, item in enumerate(passages):
        with torch.no_grad():
            spoken = view.model(torch.tensor([item.ids])).logits[0, len(item.prefix) - 1 : -1].softmax(-1)
        gold = torch.tensor(item.suffix)
        assert_close(found.nll[row], -spoken[range(len(gold)), gold].log().mean())
        assert_close(found.entropy[row], -(spoken * spoken.log()).sum(-1).mean())
        hits = spoken.argmax(-1) == gold
        assert_close(found.accuracy[row], hits.double().mean())
        assert found.exact[row] == float(hits.all())


def test_a_text_the_model_says_by_itself_is_recited(view_of):
    view = view_of("gpt2")
    ids = list(zoo.passages(1)[0].prefix)
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(view.model(torch.tensor([ids])).logits[0, -1].argmax()))
    own = Passages((Passage("own", tuple(ids[:-3]), tuple(ids[-3:])), Passage("not", tuple(ids[:-3]), (1, ids[-2]))))
    figures = Outcome.of(view, next(view.batches(own)))
    assert figures.exact.tolist() == [1, 0] and float(figures.accuracy[0]) == 1


# -- attention bypassed ------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize(
    "settings", [{}, {"grain": "head"}, {"span": "window"}, {"span": "quartile"}], ids=lambda s: str(list(s.values()))
)
def test_a_bypass_is_what_whole_forwards_one_at_a_time_say(family, settings, view_of):
    view, passages = view_of(family, torch.float64), zoo.passages(3)
    found = AttentionBypass(**settings, batch_size=2)(view, passages)
    for row, passage in enumerate(passages):
        batch = next(view.batches(passages[row : row + 1]))
        with torch.no_grad():
            clean = suffix_nll(view, batch)
        for site, scores in found.of(passage.id).scores.items():
            last, layer = view.layers - 1, site.layer
            layers = [layer]
            if settings.get("span") == "window":
                layers = range(max(0, layer - 1), min(last, layer + 1) + 1)
            if settings.get("span") == "quartile":
                layers = [other for other in range(last + 1) if other * 4 // (last + 1) == layer * 4 // (last + 1)]
            for head in range(view.heads) if settings.get("grain") == "head" else [None]:
                with torch.no_grad(), short_circuit(view, layers, None if head is None else [head]):
                    expected = float(suffix_nll(view, batch) - clean)
                assert float(scores if head is None else scores[head]) == pytest.approx(expected, abs=1e-6)
    assert max(float(scores.abs().max()) for scores in found.scores.values()) > 0.01


def test_only_the_layer_whose_attention_speaks_has_a_score():
    """Output projections of all layers but one are zeroed: what their attention looks at cannot matter."""
    view = ModelView.open(zoo.build("gpt_neox"))
    with torch.no_grad():
        for layer in (0, 2):
            view.parameter(Site(layer, Kind.ATTN_OUT)).zero_()
    scores = AttentionBypass()(view, zoo.passages(3)).mean().scores
    assert float(scores[Site(0, Kind.MLP_OUT)]) == pytest.approx(0, abs=1e-5)
    assert float(scores[Site(2, Kind.MLP_OUT)]) == pytest.approx(0, abs=1e-5)
    assert abs(float(scores[Site(1, Kind.MLP_OUT)])) > 0.05


def test_notes_tell_of_both_texts(view_of):
    view, passages, other = view_of("gpt2"), zoo.passages(3), zoo.passages(2, seed=9)
    found = AttentionBypass()(view, passages, contrast=other)
    told = found.notes
    assert list(told["passages"]["changed"]) == ["L0", "L1", "L2"]
    rise = told["passages"]["changed"]["L1"]["nll"] - told["passages"]["clean"]["nll"]
    assert rise == pytest.approx(float(found.mean().scores[Site(1, Kind.MLP_OUT)]), abs=1e-5)
    alone = AttentionBypass()(view, other)
    assert told["contrast"]["changed"]["L2"]["nll"] == pytest.approx(alone.notes["passages"]["changed"]["L2"]["nll"])
    assert found.provenance.inputs["contrast"] == other.digest
    assert set(told["contrast"]["clean"]) == {"nll", "accuracy", "exact", "entropy"}


def test_bypass_refuses_settings_that_mean_nothing(view_of):
    with pytest.raises(InputError, match="span of window is of layers"):
        AttentionBypass(grain="head", span="window")
    with pytest.raises(InputError, match="width 2"):
        AttentionBypass(width=2)
    with pytest.raises(InputError, match="no passages given"):
        AttentionBypass()(view_of("gpt2"), Passages(()))
