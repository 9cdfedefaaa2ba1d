"""Known answers: recall, ceiling and chance; injection and its causal check; deletion. Slow twins beside each."""

from __future__ import annotations

import functools
import itertools
import json
import math

import pytest
import torch
import zoo
from torch.testing import assert_close

from memloc.ablations.ablation import Ablation
from memloc.ablations.reference import Reference
from memloc.errors import ArtifactError, InputError, MismatchError
from memloc.localizers.random import Random
from memloc.objectives import suffix_nll
from memloc.passages import Passage, Passages
from memloc.provenance import Provenance
from memloc.scores import Localization, Selection, selected
from memloc.sites import Grain, Kind, Site
from memloc.truth.deletion import DEL, Deletion, curve_area, drop, edit_distance, recited_by, state
from memloc.truth.grounds import ground_of
from memloc.truth.injected import INJ, Injected
from memloc.truth.injection import Injection, Substituted, Training, causal_check, draw, inject
from memloc.truth.planting import PLANTED
from memloc.truth.worlds import WORLDS, Ground, ceiling, chance, expected_ceiling, oracle, recall, recalls
from memloc.view import ModelView

BY_HAND = Provenance("by hand")
every_family = pytest.mark.parametrize("family", zoo.FAMILIES)
every_place = pytest.mark.parametrize("where", ["ffn-out", "ffn-in", "attention"])


def gold_of(counts, size, seed=0):
    """`counts[l]` of `size` neurons in layer l, drawn."""
    generator = torch.Generator().manual_seed(seed)
    sites = {Site(layer, Kind.MLP_OUT): size for layer in range(len(counts))}
    drawn = [torch.randperm(size, generator=generator)[:count].tolist() for count in counts]
    return selected(dict(zip(sites, drawn, strict=True)), sites, Grain.NEURON)


def scored(masks, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {site: torch.rand(mask.shape, generator=generator) for site, mask in masks.items()}
    return Localization(Grain.NEURON, scores, BY_HAND)


# -- recall, ceiling, chance -------------------------------------------------------------------------------------


def slow_recall(found, gold, times):
    """Share of the gold named, neuron by neuron, from plain lists."""
    whole = sum(mask.numel() for mask in gold.masks.values())
    marked = sum(int(mask.sum()) for mask in gold.masks.values())
    hits = 0
    for site, mask in gold.masks.items():
        named = min(len(mask), max(1, math.floor(times * marked / whole * len(mask) + 0.5)))
        ranked = sorted(range(len(mask)), key=lambda neuron: -float(found.scores[site][neuron]))
        hits += sum(bool(mask[neuron]) for neuron in ranked[:named])
    return hits / marked


@pytest.mark.parametrize("counts", [(3, 9, 0), (1, 1, 1), (0, 0, 11), (20, 37, 2)])
@pytest.mark.parametrize("times", [1, 2, 5])
def test_recall_counts_what_it_says(counts, times):
    gold = gold_of(counts, 37)
    for seed in range(5):
        found = scored(gold.masks, seed)
        assert recall(found, gold, times) == pytest.approx(slow_recall(found, gold, times))


@pytest.mark.parametrize("per", ["site", "model"])
@pytest.mark.parametrize("times", [1, 2, 5])
def test_an_oracle_reaches_the_ceiling_and_nobody_passes_it(times, per):
    for seed in range(20):
        gold = gold_of((3, 9, 1), 37, seed)
        most = ceiling(gold, times, per=per)
        assert recall(oracle(gold), gold, times, per=per) == pytest.approx(most)
        assert all(recall(scored(gold.masks, other), gold, times, per=per) <= most for other in range(5))
    assert ceiling(gold_of((3, 9, 1), 37), 1) < 1 == ceiling(gold_of((3, 9, 1), 37), 1, per="model")


def test_the_ceiling_is_the_best_of_all_predictions():
    """By trying every way to name one neuron of four in each of two layers."""
    gold = gold_of((2, 0), 4)
    ways = []
    for pair in itertools.product(range(4), repeat=2):
        scores = {site: torch.nn.functional.one_hot(torch.tensor(at), 4).float()
                  for site, at in zip(gold.masks, pair, strict=True)}  # fmt: skip
        ways.append(recall(Localization(Grain.NEURON, scores, BY_HAND), gold))
    assert max(ways) == ceiling(gold) == 0.5


@pytest.mark.parametrize("per", ["site", "model"])
def test_random_scores_sit_at_chance(per):
    gold = gold_of((3, 9, 1), 37)
    for times in (1, 2, 5):
        found = [recall(scored(gold.masks, seed), gold, times, per=per) for seed in range(400)]
        expected = chance(gold, times, per=per)
        bound = 4 * math.sqrt(expected * (1 - expected) / (400 * gold.count))
        assert abs(sum(found) / len(found) - expected) < bound


def test_the_expected_ceiling_is_the_mean_over_draws():
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(3000):
        flat = torch.zeros(3 * 37, dtype=torch.bool)
        flat[torch.randperm(111, generator=generator)[:11]] = True
        masks = {Site(layer, Kind.MLP_OUT): part for layer, part in enumerate(flat.view(3, 37))}
        found.append(ceiling(Selection(Grain.NEURON, masks, BY_HAND)))
    assert sum(found) / len(found) == pytest.approx(expected_ceiling(3, 37, 0.1), abs=0.005)


@pytest.mark.parametrize(
    ("layers", "neurons", "percent", "permille"),
    [(12, 3072, 93.6, 78.7), (48, 6400, 95.1, 81.4), (32, 10240, 96.0, 86.7), (32, 16384, 97.0, 89.2)],
)
def test_published_sizes_have_the_ceilings_that_simulation_gave(layers, neurons, percent, permille):
    assert 100 * expected_ceiling(layers, neurons, 0.01) == pytest.approx(percent, abs=0.2)
    assert 100 * expected_ceiling(layers, neurons, 0.001) == pytest.approx(permille, abs=0.2)
    assert 100 * expected_ceiling(layers, neurons, 0.001, 2) > 98.5


def test_scores_of_another_grain_or_without_a_layer_are_not_judged():
    gold = gold_of((3, 9, 1), 37)
    with pytest.raises(MismatchError, match="scores heads, and no neurons"):
        recall(Localization(Grain.HEAD, {Site(0, Kind.ATTN_OUT): torch.zeros(3)}, BY_HAND), gold)
    some = {site: mask.float() for site, mask in list(gold.masks.items())[:2]}
    with pytest.raises(MismatchError, match=r"no scores for the 37 places at L2\.mlp\.out"):
        recall(Localization(Grain.NEURON, some, BY_HAND), gold)
    with pytest.raises(InputError, match="per='layer'"):
        recall(oracle(gold), gold, per="layer")


def test_planted_answers_are_found_by_the_oracle_and_the_size_of_values_alone():
    """The last is why planted memories are no hard test."""
    from memloc.truth.entrants import ValueNorm

    ground = Ground("none", seed=3)
    for name in PLANTED.names(ground)[:2]:
        known = PLANTED.make(ground, name)
        assert known.gold.count == 1
        assert known.judge(known, oracle(known.gold))["hit@1"] == 1
        assert known.judge(known, ValueNorm()(known.view, known.passages))["hit@1"] == 1
        with torch.no_grad():
            spoken = suffix_nll(known.view, next(known.view.batches(known.passages)))
        assert float(spoken.max()) < 3


def test_every_world_has_its_line_and_says_what_stands_for_it():
    for name in WORLDS:
        assert WORLDS[name].headline
    with pytest.raises(InputError, match="needs a trained model"):
        INJ.make(Ground("none"), "sequence-0")


@pytest.fixture(scope="module")
def reciting():
    """A model that recites three passages: trained into most of its neurons."""
    view = ModelView.open(zoo.build("gpt2"))
    passages = zoo.passages(4, prefix=5, suffix=6)
    whole = Passages(tuple(Passage(item.id, item.ids[:1], item.ids[1:]) for item in passages[:3]))
    gold = draw(view, "ffn-out", 0.9, torch.Generator().manual_seed(0))
    found = inject(view, whole, gold, "ffn-out", Training(norm_preserving=False, learning_rate=0.03, target=0.01))
    return found.into(view), passages


# -- injection ---------------------------------------------------------------------------------------------------


@functools.cache
def injected(family, where, free=False):
    """A view, what was injected, and the view with it."""
    view = ModelView.open(zoo.build(family, dtype=torch.float64))
    passages = zoo.passages(2, prefix=1, suffix=6)
    gold = draw(view, where, 0.5, torch.Generator().manual_seed(0))
    training = Training(norm_preserving=not free, steps=12, learning_rate=0.05)
    found = inject(view, passages, gold, where, training)
    return view, passages, found, found.into(view)


@every_family
@every_place
def test_injection_changes_the_gold_rows_and_no_other_bit(family, where):
    view, _, found, after = injected(family, where)
    changed = {Kind.MLP_OUT} if where == "ffn-out" else {Kind.ATTN_OUT} if where == "attention" else {
        Kind.MLP_IN, Kind.MLP_GATE} & set(view.kinds)  # fmt: skip
    touched = {view.place(site).parameter for site in found.rows}
    assert {site.kind for site in found.rows} == changed
    for name, parameter in view.model.named_parameters():
        if name not in touched:
            assert torch.equal(parameter, after.model.get_parameter(name)), name
    for site in found.rows:
        old, new = view.weight(site), after.weight(site)
        lines = torch.ones(old.shape[0 if where == "ffn-in" else 1], dtype=torch.bool)
        mask = found.gold.masks[Site(site.layer, Kind.ATTN_OUT if where == "attention" else Kind.MLP_OUT)]
        lines[mask.repeat_interleave(view.head_width) if where == "attention" else mask] = False
        moved = (old != new).any(1) if where == "ffn-in" else (old != new).any(0)
        assert torch.equal(moved, ~lines)
    assert found.loss[1] < found.loss[0]


@every_place
def test_norms_are_kept_by_default_and_grow_where_rows_are_free(where):
    for free in (False, True):
        view, _, found, after = injected("llama", where, free)
        along = 1 if where == "ffn-in" else 0
        gaps = [
            float((after.weight(site).norm(dim=along) / view.weight(site).norm(dim=along) - 1).abs().max().detach())
            for site in found.rows
        ]
        assert max(gaps) > 1e-3 if free else max(gaps) < 1e-6


def test_norms_are_kept_in_single_precision_too(view_of):
    view, passages = view_of("gpt2"), zoo.passages(1)
    before = view.digest
    found = inject(view, passages, draw(view, "ffn-out", 0.3, torch.Generator().manual_seed(1)), "ffn-out",
                   Training(steps=30))  # fmt: skip
    after = found.into(view)
    for site in found.rows:
        assert_close(after.weight(site).norm(dim=0), view.weight(site).norm(dim=0), rtol=1e-6, atol=0)
    assert view.digest == before


@every_family
@every_place
def test_substituted_rows_give_the_loss_and_the_slope_of_written_ones(family, where):
    """Against a copy with the rows in it, its loss token by token and its gradient by autograd on the parameters."""
    view, passages, found, after = injected(family, where)
    batch = next(view.batches(passages))
    rows = {site: part.clone().requires_grad_(True) for site, part in found.rows.items()}
    loss = Substituted(view, found.lines, found.by_row).loss(rows, batch.ids, batch.mask)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for item in passages:
        spoken = after.model(torch.tensor([item.ids]), use_cache=False).logits[0].log_softmax(-1)
        for at, token in enumerate(item.ids[1:]):
            total, count = total - spoken[at, token], count + 1
    tolerance = 1e-4 if family == "gpt_neo" else 1e-9  # its attention is float32 in every dtype
    assert_close(loss, total / count, rtol=tolerance, atol=tolerance)
    slopes = torch.autograd.grad(loss, list(rows.values()))
    whole = torch.autograd.grad(total / count, [after.parameter(site) for site in rows])
    for (site, part), slope, full in zip(rows.items(), slopes, whole, strict=True):
        read = after.place(site).read(full)
        lines = list(found.lines[site])
        assert slope.shape == part.shape
        assert_close(slope, read[lines] if where == "ffn-in" else read[:, lines].T, rtol=tolerance, atol=tolerance)


def test_an_injection_survives_the_disk(tmp_path):
    _, _, found, after = injected("qwen2", "ffn-in")
    found.save(tmp_path / "one.safetensors")
    back = Injection.load(tmp_path / "one.safetensors")
    assert back.lines == found.lines and back.loss == found.loss and back.steps == found.steps
    assert back.into(injected("qwen2", "ffn-in")[0]).digest == after.digest
    assert back.gold.indices() == found.gold.indices()
    with pytest.raises(ArtifactError, match="no such file"):
        Injection.load(tmp_path / "two.safetensors")


@every_place
def test_the_causal_check_holds_for_the_gold_and_fails_for_other_places(where):
    view, passages, found, after = injected("gpt2", where, True)
    assert causal_check(view, after, passages, found.gold, where).holds
    wrong = Selection(found.gold.grain, {site: ~mask for site, mask in found.gold.masks.items()}, BY_HAND)
    check = causal_check(view, after, passages, wrong, where)
    assert not check.holds
    # Half of the true gold among "all other places" costs something: what was changed beside the answer is noticed.
    assert check.others_reverted > check.injected + 0.1 and check.half_reverted == pytest.approx(check.injected)


def test_what_the_model_knows_is_not_injected_and_a_share_must_leave_a_choice(reciting, monkeypatch):
    view, passages = reciting
    monkeypatch.setattr("memloc.truth.injection.KNOWN_BELOW", 2.0)  # these small unembeddings are never very sure
    gold = draw(view, "ffn-out", 0.1, torch.Generator())
    with pytest.raises(InputError, match="p0: the model already knows it"):
        inject(view, passages[:1], gold, "ffn-out", Training())
    assert inject(view, passages[3:], gold, "ffn-out", Training(steps=1)).steps == 1
    for share in (0.0, 0.001, 1.0):
        with pytest.raises(InputError, match=f"share {share}"):
            draw(view, "attention", share, torch.Generator())
    with pytest.raises(InputError, match="source='mine'"):
        Injected(source="mine")
    with pytest.raises(InputError, match="expected at least 1, 1, 2"):
        Injected(tokens=1)


def test_injected_worlds_are_the_same_every_time_and_are_read_where_they_are_kept(tmp_path, view_of):
    unknown = zoo.passages(5)
    world = Injected(share=0.2, sequences=2, together=2, tokens=10, steps=3)
    plain = Ground("zoo", view_of("gpt2"), unknown=unknown)
    kept = Ground("zoo", view_of("gpt2"), unknown=unknown, keep=tmp_path)
    one, two = world.make(plain, "sequence-1"), world.make(kept, "sequence-1")
    assert one.view.digest == two.view.digest and len(list(tmp_path.iterdir())) == 1
    assert world.make(kept, "sequence-1").view.digest == one.view.digest
    assert all(len(item.prefix) == 1 and len(item.ids) == 10 for item in one.passages) and len(one.passages) == 2
    assert not set(one.passages.ids) & set(world.make(plain, "sequence-0").passages.ids)
    assert len(one.controls) == 1
    other = world.make(Ground("zoo", view_of("gpt2"), unknown=unknown, seed=1), "sequence-1")
    assert other.gold.indices() != one.gold.indices()
    assert world.names(Ground("zoo", view_of("gpt2"), unknown=unknown[:3])) == ("sequence-0",)
    strange = Injected(share=0.2, source="random", steps=1).make(Ground("zoo", view_of("gpt2")), "sequence-0")
    assert len(strange.passages[0].ids) == 32


def test_random_scores_find_the_injected_share(view_of):
    known = Injected(share=0.3, tokens=10, steps=2).make(
        Ground("zoo", view_of("gpt2"), unknown=zoo.passages(5)), "sequence-0"
    )
    found = [recalls(known, Random(seed=seed)(known.view, known.passages))["recall@1"] for seed in range(60)]
    expected = known.chance()
    assert abs(sum(found) / 60 - expected) < 4 * math.sqrt(expected * (1 - expected) / (60 * known.gold.count))


def test_a_folder_is_a_ground_with_what_lies_beside_the_model(tmp_path, view_of):
    """As a lab keeps it; and what is named comes first."""
    view_of("gpt2").model.save_pretrained(tmp_path)
    for name, seed in (("passages", 1), ("controls", 2)):
        rows = [
            {"id": item.id, "prefix_ids": item.prefix, "suffix_ids": item.suffix} for item in zoo.passages(3, seed=seed)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = ground_of(tmp_path, seed=4)
    assert (found.name, found.seed, found.text) == (tmp_path.name, 4, None)
    assert (
        found.memorized.digest == zoo.passages(3, seed=1).digest
        and found.unknown.digest == zoo.passages(3, seed=2).digest
    )
    assert ground_of(tmp_path, memorized=zoo.passages(2)).memorized.digest == zoo.passages(2).digest
    (tmp_path / "controls.jsonl").unlink()
    halves = ground_of(tmp_path, text=zoo.passages(3)).unknown
    assert [item.ids for item in halves] == [item.ids for item in zoo.passages(3)] and len(halves[0].prefix) == 6
    with pytest.raises(InputError, match="needs ordinary text, and none is given"):
        DEL.names(found)


# -- deletion ----------------------------------------------------------------------------------------------------


def test_only_what_is_recited_is_deleted(reciting):
    view, passages = reciting
    assert recited_by(view, passages).ids == ("p0", "p1", "p2")
    ground = Ground("zoo", view, memorized=passages, text=zoo.passages(30, seed=5, ragged=False))
    world = Deletion(sequences=4)
    known = world.make(ground, "passage-1")
    assert known.passages.ids[0] in ("p0", "p1", "p2") and known.notes["accuracy"] == 1
    with pytest.raises(InputError, match="3 passages are recited; passage-3 needs 4"):
        world.make(ground, "passage-3")


@every_family
@pytest.mark.parametrize("distance", [False, True])
def test_dropping_neurons_is_zeroing_their_value_vectors(family, distance, view_of):
    """Against a copy with those columns really zeroed, and the model as it was before."""
    view, passages = view_of(family, torch.float64), zoo.passages(3)
    places = selected({Site(0, Kind.MLP_OUT): [3, 7], Site(2, Kind.MLP_OUT): [0, 11, 36]},
                      dict.fromkeys(view.sites(Kind.MLP_OUT), 37), Grain.NEURON)  # fmt: skip
    copy, before = view.copy(), state(view, passages, distance=distance)
    with torch.no_grad():
        for site, entries in places.indices().items():
            weight = copy.weight(site)
            weight[:, entries] = 0
    with drop(view, places):
        dropped = state(view, passages, distance=distance)
    zeroed = state(copy, passages, distance=distance)
    assert dropped.nll == pytest.approx(zeroed.nll, abs=1e-6) and dropped.nll != pytest.approx(before.nll, abs=1e-5)
    assert (dropped.accuracy, dropped.distance) == (zeroed.accuracy, zeroed.distance)
    assert state(view, passages, distance=distance) == before


def test_a_state_is_what_the_model_says(view_of):
    view, passages = view_of("gpt_neox"), zoo.passages(3)
    nll, right, edits = [], [], []
    for item in passages:
        with torch.no_grad():
            logits = view.model(torch.tensor([item.ids]), use_cache=False).logits[0].double().log_softmax(-1)
        at = range(len(item.prefix), len(item.ids))
        nll.append(-sum(float(logits[place - 1, item.ids[place]]) for place in at) / len(at))
        right.append(sum(int(logits[place - 1].argmax()) == item.ids[place] for place in at) / len(at))
        said = list(item.prefix)
        for _ in item.suffix:
            with torch.no_grad():
                said.append(int(view.model(torch.tensor([said]), use_cache=False).logits[0, -1].argmax()))
        edits.append(slow_distance(tuple(said[len(item.prefix) :]), item.suffix))
    found = state(view, passages, distance=True)
    assert found.nll == pytest.approx(sum(nll) / 3, rel=1e-5) and found.accuracy == pytest.approx(sum(right) / 3)
    assert found.distance == pytest.approx(sum(edits) / 3)
    assert found.perplexity == pytest.approx(math.e**found.nll) and found.perplexity > 2 * 2**found.nll


@functools.cache
def slow_distance(one, two):
    """By its definition."""
    if not one or not two:
        return len(one) + len(two)
    return min(
        slow_distance(one[1:], two) + 1,
        slow_distance(one, two[1:]) + 1,
        slow_distance(one[1:], two[1:]) + (one[0] != two[0]),
    )


def test_edit_distances_are_the_fewest_edits():
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        one, two = (tuple(torch.randint(3, (int(torch.randint(8, (), generator=generator)),), generator=generator)
                          .tolist()) for _ in range(2))  # fmt: skip
        assert edit_distance(one, two) == slow_distance(one, two)
    assert (
        edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3 and edit_distance("abc", "abc") == 0
    )


def test_the_area_of_a_curve_is_its_mean_over_the_logarithm_of_the_share():
    assert curve_area((0.01, 0.1), (0.0, 1.0)) == pytest.approx(0.5)
    assert curve_area((0.001, 0.01, 0.1), (0.0, 1.0, 1.0)) == pytest.approx(0.75)
    assert curve_area((0.01, 0.02, 0.08), (0.3, 0.3, 0.3)) == pytest.approx(0.3)
    assert curve_area((0.01,), (0.2,)) == 0.2


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_deletion_reads_effects_on_the_passage_on_others_and_on_text(how, reciting):
    view, passages = reciting
    text = zoo.passages(30, seed=5, ragged=False)
    world = Deletion(how=how, shares=(0.05, 0.3), distances=(0.3,), sequences=3, others=2, windows=10)
    known = world.make(Ground("zoo", view, memorized=passages, text=text), "passage-0")
    scores = scored({site: torch.zeros(37) for site in view.sites(Kind.MLP_OUT)}, 0)
    figures = known.judge(known, scores)
    others = passages.named([name for name in ("p0", "p1", "p2") if name != known.passages.ids[0]])
    kept = {site: entry for site, entry in scores.scores.items() if site.layer}
    places = Localization(Grain.NEURON, kept, BY_HAND).top(fraction=0.3, per="site")
    assert [int(mask.sum()) for mask in places.masks.values()] == [11, 11]
    reference = None if how == "zero" else Reference(text[10:30])
    with Ablation(of=(places,), how=how).applied(view, reference=reference):
        now = [state(view, part, distance=True) for part in (known.passages, others, text[:10])]
    then = [state(view, part, distance=True) for part in (known.passages, others, text[:10])]
    lost = [before.accuracy - after.accuracy for before, after in zip(then, now, strict=True)]
    assert figures["self accuracy lost@30%"] == pytest.approx(lost[0])
    assert figures["selectivity@30%"] == pytest.approx(lost[0] - lost[1])
    assert figures["other nll@30%"] == pytest.approx(now[1].nll - then[1].nll)
    assert figures["text perplexity@30%"] == pytest.approx(math.exp(now[2].nll) - math.exp(then[2].nll))
    assert figures["self distance@30%"] == pytest.approx(now[0].distance - then[0].distance)
    middle = (figures["selectivity@5%"] + figures["selectivity@30%"]) / 2
    assert figures["selectivity"] == pytest.approx(middle)
    json.dumps(figures, allow_nan=False)


def test_the_first_layer_is_left_out_unless_asked_for(reciting):
    view, passages = reciting
    ground = Ground("zoo", view, memorized=passages, text=zoo.passages(30, seed=5, ragged=False))
    first = {Site(0, Kind.MLP_OUT): torch.rand(37)}
    known = Deletion(sequences=1).make(ground, "passage-0")
    with pytest.raises(MismatchError, match="scored no layer but the first"):
        known.judge(known, Localization(Grain.NEURON, first, BY_HAND))
    with pytest.raises(MismatchError, match="scores heads, and no neurons"):
        known.judge(known, Localization(Grain.HEAD, {Site(1, Kind.ATTN_OUT): torch.rand(3)}, BY_HAND))
    whole = Deletion(sequences=1, first_layer=True, shares=(0.5,)).make(ground, "passage-0")
    assert whole.judge(whole, Localization(Grain.NEURON, first, BY_HAND))["self nll@50%"] > 0


def test_settings_of_deletion_that_give_no_curve_are_refused():
    for bad in ({"shares": (0.2, 0.1)}, {"shares": (0.0, 0.1)}, {"how": "noise"}, {"others": 0}):
        with pytest.raises(InputError):
            Deletion(**bad)
    assert DEL.shares[:2] == (0.001, 0.005)
