"""Areas worked out by hand, budgets that mean the same for every grain, plans that say what is wrong with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import build

from editors.masks import share, weight_masks
from editors.trade_offs.budgets import within
from editors.trade_offs.fronts import Judged, Point, area, area_interval, frontier, harmonic
from editors.trade_offs.plan import Plan
from editors.trade_offs.work import largest
from memloc.errors import InputError
from memloc.localizers.random import Random
from memloc.passages import Passage, Passages
from memloc.sites import Kind, Site
from memloc.view import ModelView

SOME = Passages((Passage("p", (1, 2, 3), (4, 5)),))

# -- fronts ------------------------------------------------------------------------------------------------------


def test_the_frontier_holds_what_nothing_beats_in_both():
    points = [Point(0.5, 0.9), Point(0.2, 0.6), Point(0.5, 0.95), Point(0.3, 0.5), Point(0.0, 0.1), Point(0.9, 0.95)]
    assert frontier(points) == [Point(0.0, 0.1), Point(0.2, 0.6), Point(0.5, 0.95)]


@pytest.mark.parametrize(
    ("points", "before", "wanted"),
    [
        ([Point(0.0, 1.0)], 1.0, 1.0),
        ([Point(1.0, 1.0)], 1.0, 0.0),
        ([], 1.0, 0.0),
        ([Point(0.2, 0.6), Point(0.5, 0.9)], 1.0, 0.3 * 0.6 + 0.5 * 0.9),
        ([Point(0.2, 0.6), Point(0.4, 0.9)], 0.8, 0.25 * 0.6 + 0.5 * 0.9),
        ([Point(0.2, 0.6), Point(0.5, 0.9), Point(0.4, 0.1)], 1.0, 0.3 * 0.6 + 0.5 * 0.9),
    ],
)
def test_areas_are_those_of_steps_drawn_by_hand(points, before, wanted):
    assert area(points, before) == pytest.approx(wanted)


def test_there_is_no_area_where_nothing_was_memorized():
    with pytest.raises(InputError, match="nothing to forget"):
        area([Point(0.0, 1.0)], 0.0)


def test_one_thing_lost_costs_all_and_nothing_is_better_than_before():
    before = Judged([1, 1, 1, 0], {"others": [1, 1], "facts": [1, 0]}, 10.0)
    same = Judged([1, 1, 1, 0], {"others": [1, 1], "facts": [1, 1]}, 8.0)
    assert same.point(before) == Point(0.75, 1.0)
    lost = Judged([0, 0, 0, 0], {"others": [0, 0], "facts": [1, 0]}, 10.0)
    assert lost.point(before) == Point(0.0, 0.0)
    half = Judged([0, 0, 0, 0], {"others": [1, 0], "facts": [1, 0]}, 20.0)
    assert half.point(before).utility == pytest.approx(harmonic([0.5, 1.0, 0.5])) == pytest.approx(0.6)
    broken = Judged([0, 0, 0, 0], {"others": [1, 1], "facts": [1, 0]}, float("inf"))
    assert broken.point(before).utility == 0
    with pytest.raises(InputError, match="no group to keep"):
        Judged([0], {}).point(Judged([1], {}))


def test_the_interval_holds_the_area_and_is_wider_for_fewer_rows():
    rng = np.random.default_rng(0)

    def case(n):
        before = Judged([1.0] * n, {"others": [1.0] * n}, 10.0)
        after = Judged(rng.permutation([1.0] * (n // 4) + [0.0] * (n - n // 4)).tolist(), {"others": [1.0] * n}, 10.0)
        return before, after, area([after.point(before)], 1.0)

    widths = []
    for n in (8, 200):
        before, after, value = case(n)
        low, high = area_interval([after], before)
        assert low <= value <= high
        widths.append(high - low)
    assert widths[0] > 2 * widths[1]
    assert area_interval([after], before, seed=1) != area_interval([after], before, seed=2)


# -- budgets -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def view():
    return ModelView.open(build("llama"))


@pytest.mark.parametrize("grain", ["weight", "neuron", "head"])
@pytest.mark.parametrize("budget", [0.02, 0.05])
def test_a_budget_is_a_share_of_the_weights_whatever_the_grain(view, grain, budget):
    found = Random(grain=grain)(view, SOME)
    chosen = within(view, found, budget)
    taken = share(view, weight_masks(view, chosen))
    more = share(view, weight_masks(view, found.top(chosen.count + 1)))
    assert (taken <= budget or chosen.count == 1) and more > budget


def test_a_budget_smaller_than_anything_takes_one_and_a_wrong_one_none(view):
    found = Random(grain="layer")(view, SOME)
    assert within(view, found, 1e-6).count == 1
    for wrong in (0, -1, 1.5):
        with pytest.raises(InputError, match="expected a share of the weights above 0"):
            within(view, found, wrong)


@pytest.mark.parametrize("grain", ["weight", "neuron", "head", "component", "layer"])
def test_the_largest_are_as_many_and_no_other_is_larger(view, grain):
    chosen = Random(grain=grain)(view, SOME).top(2)
    found = largest(view, chosen)
    assert found.count == chosen.count and found.grain == chosen.grain
    if grain == "neuron":
        for site, mask in found.masks.items():
            norms = view.weight(site).detach().norm(dim=0)
            if bool(mask.any()) and not bool(mask.all()):
                assert float(norms[mask].min()) >= float(norms[~mask].max())
    if grain == "weight":
        site = next(site for site, mask in found.masks.items() if bool(mask.any()))
        weight = view.weight(site).detach().abs()
        assert float(weight[found.masks[site]].min()) >= float(weight[~found.masks[site]].max())


# -- plans -------------------------------------------------------------------------------------------------------

PLAN = """
model = "m"
[data]
targets = "t.jsonl"
[data.memorized]
others = "t.jsonl#dose=3"
[[localize]]
name = "weight-gradient"
grain = "neuron"
[[localize]]
name = "weight-gradient"
label = "by weight"
grain = "weight"
[[edit]]
name = "neuron-dropout"
[budgets]
shares = [0.01, 0.1]
seeds = [0, 1]
controls = 2
"""


def read(tmp_path, text):
    (tmp_path / "t.jsonl").write_text("{}\n")
    (tmp_path / "plan.toml").write_text(text)
    return Plan.read(tmp_path / "plan.toml")


def test_a_plan_is_every_pair_at_every_budget_with_its_controls(tmp_path):
    plan = read(tmp_path, PLAN)
    cells = plan.cells()
    assert len(cells) == len(set(cells)) == 2 * 2 * 2 * (1 + 2 + 1)
    assert {cell.control for cell in cells} == {"own", "random", "magnitude"}
    keys = {plan.key(cell, {"targets": "a"}) for cell in cells}
    assert len(keys) == len(cells) and not keys & {plan.key(cell, {"targets": "b"}) for cell in cells}
    other = read(tmp_path, PLAN.replace('grain = "neuron"', 'grain = "head"'))
    assert {other.key(cell, {}) for cell in cells} != {plan.key(cell, {}) for cell in cells}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('label = "by weight"\n', ""), r"two methods are called 'weight-gradient'; give one of them another label"),
        (('shares = [0.01, 0.1]', "shares = [2]"), r"budget 2.0: expected a share"),
        (('shares = [0.01, 0.1]\n', ""), r"expected budgets\.shares"),
        (('name = "neuron-dropout"', 'name = "dropout"'), r"edit\[0\]: name: 'dropout'; expected one of"),
        (('grain = "neuron"', 'grian = "neuron"'), r"localize\[0\]: no key is called 'grian'; did you mean grain\?"),
        (('targets = "t.jsonl"', 'targets = "no.jsonl"'), r"data: targets: .*no\.jsonl'; expected a file"),
        (('controls = 2', 'contrils = 2'), r"budgets: no key is called 'contrils'"),
        (('model = "m"', "model = 3"), r"plan\.toml: model: 3; expected a text"),
        (('[[edit]]\nname = "neuron-dropout"\n', ""), r"plan\.toml: edit: missing; expected at least one table"),
    ],
)  # fmt: skip
def test_a_plan_says_what_is_wrong_with_it(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, PLAN.replace(*change))
    assert str(caught.value).startswith("plan.toml") and "\n" not in str(caught.value)


def test_masks_of_a_selection_are_not_changed_by_looking_for_the_largest(view):
    chosen = Random(grain="neuron")(view, SOME).top(3)
    before = {site: mask.clone() for site, mask in chosen.masks.items()}
    largest(view, chosen)
    assert all(torch.equal(chosen.masks[site], before[site]) for site in before)
    assert Site(0, Kind.MLP_OUT) in before
