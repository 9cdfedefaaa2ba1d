"""Knowledge neurons against a slow protocol of whole forwards, and what their removal does on the tiny lab."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
import zoo
from torch.testing import assert_close

from memloc.batches import batches
from memloc.checks import check_localizer
from memloc.errors import InputError, ModelError
from memloc.gradients.ways import activation_of
from memloc.localizers.integrated_gradients import IntegratedGradients
from memloc.localizers.knowledge_neurons import CONVENTIONS, KnowledgeNeurons
from memloc.measures.neuron_effects import neuron_effects, selections_of
from memloc.passages import Facts, Passages
from memloc.scores import selected
from memloc.sites import Grain, Kind, Site
from memloc.truth.planted import plant
from memloc.view import ModelView

every_family = pytest.mark.parametrize("family", zoo.FAMILIES)
UNGATED = ("gpt2", "gpt_neo", "gpt_neox")
GATED = tuple(sorted({*zoo.FAMILIES} - {*UNGATED}))

# Reference rules, written out: points and weights of m = 5.
RULES = {
    "riemann-right": ([0.2, 0.4, 0.6, 0.8, 1.0], [0.2] * 5),
    "riemann-left": ([0.0, 0.2, 0.4, 0.6, 0.8], [0.2] * 5),
    "inclusive": ([0.0, 0.25, 0.5, 0.75, 1.0], [0.2] * 5),
}


def tagged(count=6, prompts=3, **more):
    """Random passages in which `prompts` at a time ask for one fact of one relation."""
    items = [
        dataclasses.replace(item, tags={"fact": f"f{index // prompts}", "relation": "r", **more})
        for index, item in enumerate(zoo.passages(count))
    ]
    return Passages(tuple(items), "tagged")


def slow_scores(view, passage, quadrature, site="activation"):
    """[l, f] float64: whole forwards on the truncated text, one point of one layer at a time."""
    kind, side = (Kind.MLP_OUT, "input") if site == "activation" else (Kind.MLP_IN, "output")
    found = torch.zeros(view.layers, view.neurons, dtype=torch.float64)
    for step, token in enumerate(passage.suffix):
        ids = torch.tensor([passage.prefix + passage.suffix[:step]])
        for place in view.sites(kind):
            with torch.no_grad(), view.record([place], side=side) as seen:
                view.model(ids, use_cache=False)
            reading = seen[place][0, -1]
            for alpha, weight in zip(*RULES[quadrature], strict=True):
                scaled = (alpha * reading).requires_grad_()

                def change(_, tensor, scaled=scaled):
                    return torch.cat([tensor[:, :-1], scaled[None, None]], 1)

                with view.replace([place], change, side=side):
                    gold = view.model(ids, use_cache=False).logits[0, -1].softmax(-1)[token]
                (slope,) = torch.autograd.grad(gold, scaled)
                found[place.layer] += weight * slope * reading
    return found / len(passage.suffix)


# -- scores ------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("quadrature", ["riemann-left", "inclusive"])
def test_scores_equal_a_slow_implementation(family, quadrature, view_of):
    view, passages = view_of(family, torch.float64), zoo.passages(2, suffix=2)
    method = KnowledgeNeurons(quadrature=quadrature, nodes=5)
    batch = next(batches(passages, size=2))
    with view.frozen():
        found = method.integrate(view, batch).scores()
    for row, index in enumerate(batch.rows):
        expected = slow_scores(view, passages[index], quadrature)
        assert float(expected.abs().max()) > 1e-4
        assert_close(found[:, row], expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("family", UNGATED)
@pytest.mark.parametrize("quadrature", ["riemann-right", "inclusive"])
def test_pre_activations_are_scaled_on_request(family, quadrature, view_of):
    """EleutherAI's convention on GPT models: the output of c_fc is scaled, not what enters c_proj."""
    view, passages = view_of(family, torch.float64), zoo.passages(2, suffix=2)
    method = KnowledgeNeurons(quadrature=quadrature, nodes=5, site="pre-activation")
    batch = next(batches(passages, size=2))
    with view.frozen():
        found = method.integrate(view, batch).scores()
        other = dataclasses.replace(method, site="activation").integrate(view, batch).scores()
    for row, index in enumerate(batch.rows):
        expected = slow_scores(view, passages[index], quadrature, "pre-activation")
        assert_close(found[:, row], expected, atol=1e-8, rtol=0)
    assert float((found - other).abs().max()) > 1e-4, "the two sites are two scores"


@pytest.mark.parametrize("family", UNGATED)
@pytest.mark.parametrize("method", [IntegratedGradients, KnowledgeNeurons])
def test_the_battery_holds_for_pre_activations(method, family, view_of):
    rough = method(site="pre-activation", quadrature="inclusive", memory_mb=1)
    check_localizer(rough, view_of(family), zoo.passages(3), contrast=zoo.passages(2, seed=9))


@pytest.mark.parametrize("family", GATED)
def test_gated_neurons_have_no_pre_activation(family, view_of):
    with pytest.raises(InputError, match="gated neuron is a product of two maps"):
        KnowledgeNeurons(site="pre-activation")(view_of(family), zoo.passages(2))


def test_the_activation_function_is_found_by_arithmetic(view_of):
    view = view_of("gpt2", torch.float64)
    before = torch.linspace(-3, 3, 12, dtype=torch.float64).view(2, 6)
    found = activation_of(view, 1, before, torch.nn.functional.gelu(before, approximate="tanh"))
    assert_close(found(before), torch.nn.functional.gelu(before, approximate="tanh"))
    with pytest.raises(ModelError, match=r"L1: no module turns what leaves mlp\.in"):
        activation_of(view, 1, before, before.tanh())


@pytest.mark.parametrize(
    ("family", "site"),
    [*((family, "activation") for family in zoo.FAMILIES), *((family, "pre-activation") for family in UNGATED)],
)
def test_integrals_are_complete_within_a_percent_by_default(family, site, view_of):
    notes = IntegratedGradients(site=site)(view_of(family), zoo.passages(4)).notes
    assert notes["completeness_gap"] < 0.01


def test_pre_activation_scores_sum_to_what_silencing_takes_away(view_of):
    """GELU(0) is 0: silencing before and after the activation function are one."""
    view, passages = view_of("gpt2", torch.float64), zoo.passages(1)
    sums = [
        IntegratedGradients(position="first", tolerance=1e-5, site=site)(view, passages).scores
        for site in ("activation", "pre-activation")
    ]
    for place in sums[0]:
        assert_close(sums[0][place].sum(), sums[1][place].sum(), atol=1e-5, rtol=1e-4)


# -- the protocol ------------------------------------------------------------------------------------------------


def slow_protocol(view, passages, threshold, share, quadrature):
    """Fact to {(layer, neuron): mean score}, by hand, with no round of the share and nothing shared."""
    found = {}
    for fact in dict.fromkeys(item.tags["fact"] for item in passages):
        scores = [slow_scores(view, item, quadrature) for item in passages if item.tags["fact"] == fact]
        counts = Counter(
            (layer, neuron)
            for entry in scores
            for layer in range(view.layers)
            for neuron in range(view.neurons)
            if entry[layer, neuron] >= threshold * entry.max()
        )
        kept = [place for place, count in counts.items() if count >= share * len(scores)]
        found[fact] = {place: float(sum(entry[place] for entry in scores) / len(scores)) for place in kept}
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_facts_neurons_are_those_of_a_slow_protocol(family, view_of):
    view, passages = view_of(family, torch.float64), tagged()
    method = KnowledgeNeurons(
        threshold=0.1, share=0.6, rounds=0, min_prompts=1, drop_shared=False, quadrature="riemann-right", nodes=5
    )
    found = method(view, passages)
    expected = slow_protocol(view, passages, 0.1, 0.6, "riemann-right")
    assert found.passages == ("f0", "f1") and found.grain is Grain.NEURON
    assert all(1 < len(places) < view.neurons for places in expected.values()), "a test of something"
    for fact, places in expected.items():
        scores = torch.zeros(view.layers, view.neurons, dtype=torch.float64)
        for place, score in places.items():
            scores[place] = score
        mine = torch.stack([entry for _, entry in sorted(found.of(fact).scores.items())])
        assert_close(mine.double(), scores, atol=1e-8, rtol=1e-7)


def test_the_notes_tell_thresholds_ranks_and_shares(view_of):
    found = KnowledgeNeurons(threshold=0.1, aim_most=3)(view_of("gpt2"), tagged(9))
    relation = found.notes["relations"]["r"]
    assert relation["facts"] == 3 and 0.4 <= relation["share"] <= 1.0
    gone = {tuple(entry[:2]) for entry in relation["shared"]}
    for row, told in enumerate(found.notes["facts"]):
        assert told["prompts"] == [f"p{3 * row + index}" for index in range(3)] and told["bar"] > 0
        scores = [entry[2] for entry in told["neurons"]]
        assert scores == sorted(scores, reverse=True)
        for layer, neuron, score, prompts in told["neurons"]:
            assert prompts == 3 and (layer, neuron) not in gone
            assert score == pytest.approx(float(found.scores[Site(layer, Kind.MLP_OUT)][row, neuron]))
        chosen = selections_of(found)[told["fact"]]
        assert chosen.count == len(scores)
    assert found.notes["neurons_per_fact"] == sum(len(told["neurons"]) for told in found.notes["facts"]) / 3
    assert sum(found.notes["neurons_by_layer"]) == 3 * found.notes["neurons_per_fact"]


def test_shared_neurons_are_dropped_or_only_told(view_of):
    easy = KnowledgeNeurons(threshold=0.05, share=0.3, rounds=0, min_prompts=1)
    kept = dataclasses.replace(easy, drop_shared=False)(view_of("gpt2"), tagged(9))
    dropped = easy(view_of("gpt2"), tagged(9))
    common = kept.notes["relations"]["r"]["shared"]
    assert common == dropped.notes["relations"]["r"]["shared"] and common
    for layer, neuron, count in common:
        place = Site(layer, Kind.MLP_OUT)
        assert int((kept.scores[place][:, neuron] != 0).sum()) == count >= 2
        assert not dropped.scores[place][:, neuron].any()


def test_passages_without_tags_are_facts_of_their_own(view_of):
    view, passages = view_of("gpt2"), zoo.passages(3)
    found = KnowledgeNeurons()(view, passages)
    whole = IntegratedGradients()(view, passages)
    assert found.passages == passages.ids and found.notes["relations"] == {}
    most = torch.stack([scores.amax(1) for scores in whole.scores.values()]).amax(0)[:, None]
    for site, scores in whole.scores.items():
        assert_close(found.scores[site], scores * (scores >= 0.2 * most))


def test_negative_prompts_take_neurons_away(view_of):
    """The very same prompts as negative ones leave nothing; those of one fact leave the other's alone."""
    view, passages = view_of("gpt2"), tagged()
    method = KnowledgeNeurons(threshold=0.1, drop_shared=False)
    plain = selections_of(method(view, passages))
    assert all(entry.count for entry in plain.values())
    own = passages.where(lambda item: item.tags["fact"] == "f0")
    after = selections_of(method(view, passages, contrast=own))
    assert after["f0"].count == 0 and after["f1"].overlap(plain["f1"]) == 1
    bare = Passages(tuple(dataclasses.replace(item, tags={}) for item in own))
    every = method(view, passages, contrast=bare)
    assert selections_of(every)["f0"].count == 0 and "contrast" in every.provenance.inputs


@every_family
def test_the_planted_neuron_is_the_facts(family):
    planted = plant(ModelView.open(zoo.build(family, tie_word_embeddings=False)))
    items = [dataclasses.replace(item, tags={"fact": "secret", "relation": "r"}) for item in planted.passages]
    found = KnowledgeNeurons()(planted.view, Passages(tuple(items)))
    assert selections_of(found)["secret"].indices() == {planted.site: [planted.neuron]}


def test_conventions_are_settings_of_the_method(view_of):
    for settings in CONVENTIONS.values():
        assert KnowledgeNeurons(**settings)(view_of("gpt2"), tagged(3)).count


def test_settings_that_cannot_be_used_are_refused():
    with pytest.raises(InputError, match=r"share 0\.0, shared 0\.1"):
        KnowledgeNeurons(share=0.0)
    with pytest.raises(InputError, match="min_prompts 0"):
        KnowledgeNeurons(min_prompts=0)
    with pytest.raises(InputError, match="expected at least 1 each"):
        KnowledgeNeurons(nodes=0)


# -- effects -----------------------------------------------------------------------------------------------------


def slow_probability(view, passage, places, factor):
    """Probability of the whole suffix, one token at a time, neurons multiplied at the last position of each text."""
    total, cut = 1.0, list(passage.prefix)
    masks = {site: torch.isin(torch.arange(view.neurons), torch.tensor(found)) for site, found in places.items()}
    history = []
    for token in passage.suffix:
        history.append(len(cut) - 1)

        def change(site, tensor, at=tuple(history)):
            changed = tensor.clone()
            for column in at:
                changed[:, column, masks[site]] = tensor[:, column, masks[site]] * factor
            return changed

        with torch.no_grad(), view.replace(list(masks), change):
            total *= float(view.model(torch.tensor([cut]), use_cache=False).logits[0, -1].softmax(-1)[token])
        cut.append(token)
    return total


def test_effects_are_what_a_slow_intervention_does(view_of):
    view, passages = view_of("llama", torch.float64), tagged(6, prompts=2)
    found = KnowledgeNeurons(drop_shared=False, threshold=0.1)(view, passages)
    chosen = selections_of(found)
    measured = neuron_effects(view, chosen, passages, draws=1, batch_size=5)
    for row in measured.rows:
        mine = [item for item in passages if item.tags["fact"] == row["id"]]
        places = chosen[row["id"]].indices()
        before = sum(slow_probability(view, item, places, 1.0) for item in mine) / 2
        assert row["fact: before"] == pytest.approx(before, rel=1e-6)
        for way, factor in (("suppress", 0.0), ("amplify", 2.0)):
            after = sum(slow_probability(view, item, places, factor) for item in mine) / 2
            assert row[f"{way}: fact"] == pytest.approx(after - before, rel=1e-5, abs=1e-12)


def test_the_control_depends_on_the_seed_and_not_on_batches(view_of):
    view, passages = view_of("gpt2"), tagged(4, prompts=2)
    chosen = selections_of(KnowledgeNeurons(drop_shared=False, threshold=0.1)(view, passages))
    three = neuron_effects(view, chosen, passages, draws=3).control
    again = neuron_effects(view, chosen, passages, draws=3, batch_size=1).control
    other = neuron_effects(view, chosen, passages, draws=3, seed=1).control
    for row, twin, far in zip(three.rows, again.rows, other.rows, strict=True):
        assert row["neurons"] == chosen[row["id"]].count
        name = "suppress: fact, nats"
        assert row[name] == pytest.approx(twin[name], abs=1e-4)
        assert row[name] != pytest.approx(far[name], abs=1e-3)
    assert neuron_effects(view, chosen, passages, draws=0).control is None


def test_each_prompt_serves_one_group_only(view_of):
    """Three facts of one relation, two of them with one answer, and a fourth elsewhere."""
    view = view_of("gpt2")
    answers, relations = [(5,), (5,), (8,), (9,)], ["r", "r", "r", "s"]
    items = [
        dataclasses.replace(item, suffix=answers[index], tags={"fact": f"f{index}", "relation": relations[index]})
        for index, item in enumerate(zoo.passages(4))
    ]
    hand = selected({Site(1, Kind.MLP_OUT): [3, 4]}, {Site(1, Kind.MLP_OUT): view.neurons}, Grain.NEURON)
    held = Passages((dataclasses.replace(items[0], id="again", prefix=items[3].prefix),))
    (row,) = neuron_effects(view, {"f0": hand}, Passages(tuple(items)), held_out=held).rows
    names = ("fact", "held-out paraphrases", "same answer", "same relation", "unrelated")
    assert [row[f"{name}: prompts"] for name in names] == [1, 1, 1, 1, 1] and row["neurons"] == 2
    with pytest.raises(InputError, match="no prompt asks for 'f9'"):
        neuron_effects(view, {"f9": hand}, Passages(tuple(items)))
    with pytest.raises(InputError, match="no fact has neurons"):
        neuron_effects(view, {}, Passages(tuple(items)))
    with pytest.raises(InputError, match="one score for all passages"):
        selections_of(KnowledgeNeurons()(view, Passages(tuple(items))).mean())


@pytest.fixture(scope="module")
def lab(tiny_lab):
    view = ModelView.open(tiny_lab)
    facts = Facts.read(tiny_lab / "facts.jsonl", view.tokenizer).as_passages(paraphrases=True)
    # The first paraphrase of a fact is the phrasing it was never trained with.
    kept = facts.where(lambda item: item.id.endswith("/1"))
    return view, facts.where(lambda item: item.id not in kept.ids), kept


def test_knowledge_neurons_move_their_fact_more_than_random_ones_do(lab):
    view, asked, held_out = lab
    found = KnowledgeNeurons(drop_shared=False)(view, asked)
    assert found.notes["completeness_gap"] < 0.01
    measured = neuron_effects(view, selections_of(found), asked, held_out=held_out, draws=2)
    control = measured.control
    name = "suppress: fact"
    assert measured.figures[name].high < control.figures[name].low, "intervals apart"
    assert measured[name] < 0 and measured["suppress: held-out paraphrases"] < 0
    assert measured["suppress: unrelated, over fact"] < 1
    assert measured.to_json() == type(measured).from_json(measured.to_json()).to_json()
    again = neuron_effects(view, selections_of(found), asked, held_out=held_out, draws=2, batch_size=7)
    assert again[name] == pytest.approx(measured[name], abs=1e-5)
