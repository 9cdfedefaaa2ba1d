from __future__ import annotations

import pytest
import torch
import zoo
from torch.testing import assert_close

from editors.base import Request
from editors.checks import check_inside, hands_off
from editors.deltas import Dense, Sparse
from editors.masks import weight_masks
from editors.rewriters.constrained_fine_tune import ConstrainedFineTune
from editors.rewriters.fine_tune import FineTune
from editors.rewriters.gradient_ascent import GradientAscent
from editors.rewriters.gradient_difference import GradientDifference
from editors.rewriters.npo import Npo
from editors.rewriters.rmu import Misdirect, Rmu
from editors.rewriters.simnpo import Simnpo
from editors.tuning.ball import Ball
from editors.tuning.band import Band
from editors.tuning.descent import working_copy
from editors.tuning.keep import Keep, Source
from editors.tuning.teaching import one_position_nll
from editors.tuning.training import mean_logprob, numbered_cycle
from editors.tuning.unlearning import reference_sums
from memloc.errors import InputError
from memloc.objectives import suffix_logprobs
from memloc.passages import Fact, Facts, Passage, Passages, Prompt
from memloc.provenance import Provenance
from memloc.running.decoding import continuation
from memloc.scores import Selection, selected
from memloc.sites import OUTSIDE, Grain, Kind, Site
from memloc.view import ModelView

QUICK = {"steps": 25, "lr": 1e-2, "replay": 32, "keep_rows": 6}
TEXT = zoo.passages(8, seed=3, suffix=9)
KEEPING = {"gradient-difference": GradientDifference, "npo": Npo, "simnpo": Simnpo}


@pytest.fixture(scope="module")
def view() -> ModelView:
    return ModelView.open(zoo.build("gpt2"))


def recited(view: ModelView, count: int = 3, *, prefix: int = 6, suffix: int = 5) -> Passages:
    """Passages a random model recites: its own greedy continuations, cut to unequal lengths."""
    start = torch.randint(zoo.VOCAB, (count, prefix), generator=torch.Generator().manual_seed(7))
    rows = continuation(view, start, suffix).ids.tolist()
    cut = [tuple(row[prefix : len(row) - index % 2]) for index, row in enumerate(rows)]
    return Passages(tuple(Passage(f"r{i}", tuple(row[:prefix]), cut[i]) for i, row in enumerate(rows)))


def weights(view: ModelView, share: float = 0.3) -> Selection:
    generator = torch.Generator().manual_seed(0)
    masks = {site: torch.rand(view.weight(site).shape, generator=generator) < share for site in view.sites(*view.kinds)}
    return Selection(Grain.WEIGHT, masks, Provenance("by hand"))


def facts() -> Facts:
    """Two facts with new answers of two tokens."""
    made = [
        Fact(f"f{i}", "{} x", "s", Prompt((5, 9, 2 + i, 7), (0, 1), "s x"), (41, 11 + i), (17,), " a", " b")
        for i in range(2)
    ]
    return Facts(tuple(made), "two")


@pytest.mark.parametrize("name", KEEPING)
def test_objectives_take_the_targets_into_the_band(name, view):
    targets = recited(view)
    request = Request(forget=targets, text=TEXT, retain=zoo.passages(3), selection=weights(view))
    edit = KEEPING[name](**{**QUICK, "steps": 60}, keep_weight=1.0, floor=-4.0, close=10.0)(view, request)
    assert edit.notes["stopped"] and edit.notes["in band"] + edit.notes["over-forgotten"] == 3
    with edit.apply(view):
        assert (reference_sums(view, targets) <= -4.0 * torch.tensor([len(i.suffix) for i in targets]) + 1e-3).all()


def test_without_a_selection_whole_matrices_change_and_their_deltas_are_dense(view):
    request = Request(forget=recited(view), text=TEXT)
    edit = GradientDifference(**{**QUICK, "steps": 2, "lr": 1e-3}, floor=-8.0)(view, request)
    maps = set(view.sites(*view.kinds))
    assert {site for site in edit.deltas if not site.bias} == maps
    assert all(isinstance(delta, Dense) for delta in edit.deltas.values())
    request = Request(forget=recited(view), text=TEXT, selection=weights(view))
    edit = GradientDifference(**{**QUICK, "steps": 2}, floor=-8.0)(view, request)
    assert all(isinstance(delta, Sparse) for delta in edit.deltas.values())
    check_inside(edit, weight_masks(view, weights(view)))


def test_a_target_in_the_band_is_let_go_and_followed_down_when_all_steps_are_taken(view):
    targets, selection = recited(view), weights(view)
    request = Request(forget=targets, text=TEXT, selection=selection)
    let_go = GradientAscent(steps=40, lr=1e-2, floor=-4.0)(view, request).notes
    followed = GradientAscent(steps=40, lr=1e-2, floor=-4.0, stop="steps")(view, request).notes
    assert let_go["steps"] < followed["steps"] == 40
    assert followed["log p"][0] < let_go["log p"][0] - 2
    assert followed["over-forgotten"] == 3 and followed["too deep"] > let_go["too deep"] + 1


def test_the_alarm_says_how_far_below_unseen_text_a_target_is(view):
    targets = recited(view)
    band = Band.of(view, targets, TEXT, None)
    assert_close(band.upper, 0.8 * mean_logprob(view, TEXT), rtol=1e-6, atol=0)
    pieces = []
    for item in TEXT:
        with torch.no_grad():
            logs = suffix_logprobs(view, next(view.batches(Passages((item,)))))[0].tolist()
        middle = sorted(len(target.suffix) for target in targets)[1]
        size = min(middle, len(logs))
        pieces += [sum(logs[at : at + size]) / size for at in range(0, len(logs) - size + 1, size)]
    assert_close(band.lower, float(torch.tensor(pieces).double().quantile(0.01)), rtol=1e-5, atol=0)
    assert band.report(view, targets)["over-forgotten"] == 0
    shallow = Band(-1e-6, -1e-3).report(view, targets)
    means = reference_sums(view, targets) / torch.tensor([len(item.suffix) for item in targets])
    assert shallow["over-forgotten"] == int((means < -1e-3).sum()) > 0
    assert_close(shallow["too deep"], -1e-3 - float(means.min()), rtol=1e-5, atol=1e-9)
    assert Band.of(view, targets, None, None) == Band(-4.0, None)


def test_reference_probabilities_are_of_the_original_and_in_order(view):
    targets = recited(view, 5)
    found = reference_sums(view, targets, size=2)
    for index, item in enumerate(targets):
        with torch.no_grad():
            alone = suffix_logprobs(view, next(view.batches(Passages((item,))))).sum()
        assert_close(float(found[index]), float(alone), rtol=1e-4, atol=1e-5)
    cycle = numbered_cycle(view, targets, 2, seed=0)
    seen = []
    for _ in range(3):
        batch, rows = next(cycle)
        for place, row in enumerate(rows):
            assert tuple(batch.ids[place, : batch.length[place]].tolist()) == targets[row].ids
        seen += rows
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_padding_does_not_dilute_the_keep_term(view):
    """The mean is over tokens: the same rows, padded by a longer one that is counted apart, give the same sum."""
    rows = [tuple(item.ids) for item in zoo.passages(3)]
    changed = working_copy(view)
    with torch.no_grad():
        changed.parameter(Site(1, Kind.MLP_OUT)).mul_(1.3)

    def total(part: list[tuple[int, ...]], what: str) -> float:
        keep = Keep(view, [Source.of("rows", part)], [len(part)], steps=1, seed=0)
        with torch.no_grad():
            return float(getattr(keep, what)(changed, 0)) * sum(len(row) - 1 for row in part)

    for what in ("divergence", "rise"):
        assert_close(total(rows, what), sum(total([row], what) for row in rows), rtol=1e-4, atol=1e-5)


def test_the_rise_of_the_nll_starts_at_nothing(view):
    keep = Keep(view, [Source.of("rows", [tuple(item.ids) for item in zoo.passages(3)])], [2], steps=2, seed=0)
    with torch.no_grad():
        assert abs(float(keep.rise(view, 1))) < 1e-5


def test_published_settings_are_the_published_ones():
    assert (Npo.published().beta, Npo.published().per_token, Npo.published().stop) == (0.1, False, "steps")
    assert (Simnpo.published().beta, Simnpo.published().delta, Simnpo.published().forget_weight) == (2.5, 0.0, 0.1375)
    assert GradientDifference.published().keep == "nll" and GradientDifference.published(lr=1.0).lr == 1.0
    assert Rmu.published().layer == 7 and Rmu.published().keep_weight == 1200
    assert ConstrainedFineTune.published("gpt-j").epsilon == 5e-5
    assert FineTune.published().convention == "one-position"


def test_published_forms_run(view):
    request = Request(forget=recited(view), retain=zoo.passages(3), text=TEXT, selection=weights(view))
    for method in (*KEEPING.values(), Rmu):
        small = {"steps": 2, "target_rows": 2, "keep_rows": 2}
        edit = method.published(**small, **({"layer": 1} if method is Rmu else {}))(view, request)
        assert edit.notes["steps"] == 2 and not edit.notes["stopped"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_fine_tuning_teaches_every_token_of_the_answer(family):
    view = ModelView.open(zoo.build(family))
    edit = FineTune(lr=2e-2, steps=80, enough=1.2)(view, Request(facts=facts()))
    assert edit.notes["stopped"] and {site.kind for site in edit.deltas} == {Kind.MLP_OUT}
    with edit.apply(view):
        for fact in facts():
            said = continuation(view, torch.tensor([fact.prompt.ids]), 2).ids[0, -2:].tolist()
            assert tuple(said) == fact.target


def test_reading_all_tokens_off_one_position_does_not_teach_their_order(view):
    new = facts().as_passages("new")
    batch = next(view.batches(new))
    second, chance = torch.tensor([new[row].suffix[1] for row in batch.rows]), {}
    for convention in ("teacher-forced", "one-position"):
        edit = FineTune(lr=2e-2, steps=60, convention=convention)(view, Request(facts=facts()))
        with edit.apply(view), torch.no_grad():
            spoken = view.logits_at(batch, torch.arange(2), batch.prefix - 1).softmax(-1)
            chance[convention] = spoken.gather(1, second[:, None])
    assert bool((chance["one-position"] > 3 * chance["teacher-forced"]).all()), "it is wanted where the first belongs"


def test_the_loss_off_one_position_is_its_formula(view):
    new = facts().as_passages("new")
    batch = next(view.batches(new))
    with torch.no_grad():
        found = one_position_nll(view, batch)
        for row, index in enumerate(batch.rows):
            logs = view.logits(batch)[row, len(new[index].prefix) - 1].log_softmax(-1)
            assert_close(found[row], -(logs[new[index].suffix[0]] + logs[new[index].suffix[1]]) / 2)


def test_fine_tuning_on_passages_teaches_the_models_own_alternative(view):
    targets = recited(view)
    edit = FineTune(lr=1e-2, steps=60)(view, Request(forget=targets))
    before = mean_logprob(view, targets)
    with edit.apply(view):
        assert mean_logprob(view, targets) < before - 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["inf", "l2"])
def test_the_ball_holds_for_the_weights_as_they_are_stored(norm, dtype):
    view = ModelView.open(zoo.build("gpt2", dtype=dtype))
    edit = ConstrainedFineTune(lr=1e-1, steps=6, epsilon=0.05, norm=norm)(view, Request(facts=facts()))
    width, site = edit.notes["epsilon"], Site(0, Kind.MLP_OUT)
    assert set(edit.deltas) == {site, Site(0, Kind.MLP_OUT, bias=True)}
    old = {at: view.weight(at).detach().double() for at in edit.deltas}
    with edit.apply(view):
        far = {at: (view.weight(at).detach().double() - old[at]).abs() for at in edit.deltas}
    spacing = torch.finfo(dtype).eps
    if norm == "inf":
        rounding = (
            2 * spacing * max(float(value.abs().max()) for value in old.values()) if dtype is torch.float32 else 0
        )
        assert max(float(value.max()) for value in far.values()) <= width + rounding
        assert float((far[site] > 0.5 * width).double().mean()) > 0.5, "steps of twice the ball end at its rim"
    else:
        total = sum(float(value.square().sum()) for value in far.values()) ** 0.5
        slack = spacing * sum(float(value.square().sum()) for value in old.values()) ** 0.5
        assert 0.5 * width < total <= width + slack


def test_without_the_ball_the_weights_leave_it(view):
    edit = FineTune(lr=1e-1, steps=6)(view, Request(facts=facts(), selection=weights(view)))
    ball = ConstrainedFineTune(lr=1e-1, steps=6, epsilon=0.05)(view, Request(facts=facts(), selection=weights(view)))
    assert max(float(delta.dense().abs().max()) for delta in edit.deltas.values()) > 2 * ball.notes["epsilon"]


def test_the_ends_of_the_ball_are_the_outermost_numbers_inside():
    """Against a walk from number to number of the dtype."""
    origin = torch.randn(41, generator=torch.Generator().manual_seed(0)).bfloat16()
    ball = Ball.around(origin.float(), torch.bfloat16, 0.02, "inf")
    for start, low, high in zip(origin, ball.low, ball.high, strict=True):
        for end, way in ((low, -9.0), (high, 9.0)):
            at, to = start, torch.tensor(way, dtype=torch.bfloat16)
            while abs(float(torch.nextafter(at, to)) - float(start)) <= 0.02:
                at = torch.nextafter(at, to)
            assert float(at) == float(end)
    with pytest.raises(InputError, match=r"smaller than the spacing of every bfloat16 weight"):
        Ball.around(torch.ones(3), torch.bfloat16, 1e-5, "inf")


def test_misdirection_steers_targets_and_holds_the_rest(view):
    targets, layer = recited(view), 1
    request = Request(forget=targets, text=TEXT, retain=zoo.passages(3))
    edit = Rmu(**{**QUICK, "steps": 60}, layer=layer, stop="steps")(view, request)
    assert {site.layer for site in edit.deltas} == {0, 1} and {site.kind for site in edit.deltas} == {Kind.MLP_OUT}
    first, *_, last = edit.notes["history"]
    assert last[1] < 0.5 * first[1] or last[1] < 0.5
    before = mean_logprob(view, targets), mean_logprob(view, TEXT)
    with edit.apply(view):
        assert mean_logprob(view, targets) < before[0] - 0.5
        assert abs(mean_logprob(view, TEXT) - before[1]) < 0.1


def test_training_towards_nowhere_runs_no_block_above(view):
    """The forward is left at the steered block: hooks above it never fire."""
    method, work = Rmu(layer=1, target_rows=4), working_copy(view)
    step = Misdirect(method, work, 1, recited(work), Band(-4.0, None), None, 0)
    ran: list[int] = []
    handles = [work.block(at).register_forward_hook(lambda *_, at=at: ran.append(at)) for at in range(work.layers)]
    step.hidden(next(step.batches))
    for handle in handles:
        handle.remove()
    assert 0 in ran and 2 not in ran
    assert_close(float(step.towards.norm()), step.unit**0.5 * work.width**0.5, rtol=1e-5, atol=0)
    assert bool((step.towards >= 0).all())


def test_only_what_lies_at_or_below_the_steered_block_can_change(view):
    request = Request(forget=recited(view), text=TEXT, selection=weights(view))
    edit = Rmu(**{**QUICK, "steps": 2}, layer=1)(view, request)
    assert {site.layer for site in edit.deltas} == {0, 1}
    site = Site(2, Kind.MLP_OUT)
    above = selected({site: [0, 2]}, {site: view.neurons}, Grain.NEURON)
    with pytest.raises(InputError, match="the selection lies above block 1"):
        Rmu(**QUICK, layer=1)(view, Request(forget=recited(view), text=TEXT, selection=above))


def test_the_model_given_and_the_global_generator_are_left_alone(view):
    request = Request(forget=recited(view), text=TEXT, selection=weights(view))
    with hands_off(view):
        one = Npo(**{**QUICK, "steps": 2}, floor=-8.0)(view, request)
        other = Npo(**{**QUICK, "steps": 2}, floor=-8.0)(
            view, Request(forget=recited(view), text=TEXT, selection=weights(view), seed=1)
        )
    assert one.digest != other.digest


def test_refusals_say_what_is_missing(view):
    targets = recited(view)
    with pytest.raises(InputError, match="needs passages to forget"):
        GradientAscent()(view, Request(text=TEXT))
    with pytest.raises(InputError, match="needs facts to change, or passages"):
        FineTune()(view, Request(text=TEXT))
    with pytest.raises(InputError, match="'r0' is both to change and to retain"):
        Npo(**QUICK, floor=-8.0)(view, Request(forget=targets, retain=targets))
    with pytest.raises(InputError, match="nothing to do: every target is at -0"):
        Simnpo(floor=-1e-3)(view, Request(forget=zoo.passages(2)))
    with pytest.raises(InputError, match="nothing to do: every target is said already"):
        FineTune(enough=100.0)(view, Request(facts=facts()))
    with pytest.raises(InputError, match="layer 9: the model has 3"):
        Rmu(layer=9)(view, Request(forget=targets))
    with pytest.raises(InputError, match=r"L7\.mlp\.out: not in GPT-2 with 3 layers"):
        ConstrainedFineTune(layer=7)(view, Request(facts=facts()))
    embedding = Site(OUTSIDE, Kind.EMBED)
    whole = Selection(Grain.WEIGHT, {embedding: torch.ones(view.weight(embedding).shape, dtype=torch.bool)},
                      Provenance("by hand"))  # fmt: skip
    with pytest.raises(InputError, match="embed: only maps inside blocks"):
        GradientAscent()(view, Request(forget=targets, selection=whole))
    for method, settings, words in (
        (GradientAscent, {"steps": 0}, "steps 0: expected at least 1"),
        (GradientAscent, {"floor": 0.5}, "floor 0.5: expected nats below 0"),
        (Npo, {"beta": 0.0}, "beta 0.0: expected above 0"),
        (Simnpo, {"delta": -1.0}, "delta of 0 or more"),
        (GradientDifference, {"forget_weight": 0.0}, "forget_weight 0.0: expected above 0"),
        (GradientDifference, {"keep_rows": 0}, "keep_rows 0: expected at least 1"),
        (Rmu, {"coefficient": 0.0}, "coefficient 0.0: expected above 0"),
        (ConstrainedFineTune, {"epsilon": 0.0}, "epsilon 0.0: expected above 0"),
        (FineTune, {"lr": 0.0}, "expected lr above 0"),
    ):
        with pytest.raises(InputError, match=words):
            method(**settings)
    with pytest.raises(InputError, match="no ball was published for 'bert'"):
        ConstrainedFineTune.published("bert")
