"""The parts of verification against slow, independent versions: permutations, buckets, controls, distances, sheets."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
import zoo

from editors.deltas import Dense, LowRank, Sparse
from editors.edit import Edit
from editors.verification import judging, writing
from editors.verification.heard_otherwise import longest_run
from editors.verification.magnitude import magnitude_like
from editors.verification.material import folds
from editors.verification.quantised import GROUP, buckets, moved_share, rounded
from editors.verification.relearning import points
from editors.verification.scores import Heard, Scores, joined
from memloc.errors import ArtifactError, InputError
from memloc.passages import Passage, Passages
from memloc.provenance import Provenance
from memloc.report import Entry, Report, Sheet
from memloc.report.markdown import render_markdown
from memloc.sites import Kind, Site
from memloc.view import ModelView

MADE = Provenance("test", {}, 0, {})


@pytest.fixture(scope="module")
def view():
    return ModelView.open(zoo.build("llama"))


def welch(one, other):
    spread = np.var(one, ddof=1) / len(one) + np.var(other, ddof=1) / len(other)
    return (np.mean(one) - np.mean(other)) / math.sqrt(spread)


def test_the_p_of_the_largest_t_is_that_of_every_labelling():
    """All 56 ways to call 3 of 8 rows targets, each with its largest t over two columns."""
    generator = np.random.default_rng(4)
    rows = generator.normal(size=(8, 2))
    rows[:3, 1] += 1.5
    largest = []
    for chosen in itertools.combinations(range(8), 3):
        rest = [row for row in range(8) if row not in chosen]
        largest.append(max(welch(rows[list(chosen), column], rows[rest, column]) for column in (0, 1)))
    exact = np.mean(np.array(largest) >= largest[0] - 1e-12)
    column, p = judging.permuted(rows[:3], rows[3:], 20_000, seed=1)
    assert column == 1 and p == pytest.approx(exact, abs=0.01)
    assert judging.permuted(rows[:3] + 99, rows[3:], 999, seed=1)[1] < 0.05  # and a plain difference is found


def test_permutations_seldom_cry_wolf():
    generator = np.random.default_rng(0)
    small = [judging.permuted(*np.split(generator.normal(size=(20, 6)), [8]), 199, seed)[1] for seed in range(200)]
    assert np.mean(np.array(small) <= 0.05) == pytest.approx(0.05, abs=0.04)


def test_auc_counts_pairs():
    one, other = np.array([1.0, 2.0, 2.0]), np.array([0.0, 2.0])
    pairs = [(a > b) + 0.5 * (a == b) for a in one for b in other]
    assert judging.auc(one, other) == pytest.approx(sum(pairs) / 6)


def scores(targets, controls, recited=None):
    parts = []
    for name, rows in (("t", targets), ("c", controls)):
        hits = None if recited is None else np.array([[recited and name == "t" and at == 0] for at in range(len(rows))])
        parts.append(Heard(tuple(f"{name}{at}" for at in range(len(rows))), np.array(rows, float)[:, None], hits))
    return Scores.of(["as given"], parts)


SPREAD = [0.1 * at for at in range(-5, 6)]
NEVER = [value - 5 for value in SPREAD]


@pytest.mark.parametrize(
    ("level", "direct", "word"),
    [(-5.0, False, "gone"), (-3.0, False, "hidden"), (-0.5, True, "not removed"), (-3.0, True, "hidden"),
     (-8.0, True, "over-forgotten"), (-8.0, False, "gone")],
)  # fmt: skip
def test_verdicts_follow_from_the_level(level, direct, word):
    before = scores([value - 0.5 for value in SPREAD], NEVER)
    found = judging.judged("x", "X", "Tried.", scores([v + level for v in SPREAD], NEVER), before, direct=direct)
    assert found.verdict == word
    assert found.left.value == pytest.approx((level + 5) / 4.5)
    assert found.left.low <= found.left.value <= found.left.high


def test_one_target_written_whole_is_proof_unless_it_was_taught():
    before, after = scores([0.0] * 11, NEVER, False), scores(NEVER, NEVER, True)
    assert judging.judged("x", "X", "", after, before).verdict == "hidden"
    assert judging.judged("x", "X", "", after, before, taught=True).verdict == "gone"


def test_a_wide_interval_tells_nothing():
    wide = [-9.0, -1.0, -9.0, -1.0, -5.0]
    assert judging.judged("x", "X", "", scores(wide, NEVER), scores([-0.5] * 5, NEVER)).verdict == "cannot tell"


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_buckets_are_those_of_a_loop(bits):
    weight = torch.randn(3, GROUP + 7, generator=torch.Generator().manual_seed(1))
    weight[1, :GROUP] = 0
    codes, scale = buckets(weight, bits)
    most = 2 ** (bits - 1) - 1
    for row in range(3):
        for group, part in enumerate((weight[row, :GROUP], weight[row, GROUP:])):
            unit = float(part.abs().max()) / most or 1.0
            expected = [max(-most, min(most, round(float(value) / unit))) for value in part]
            assert codes[row, group, : len(part)].tolist() == expected
            assert float(scale[row, group]) == pytest.approx(unit)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_rounding_changes_a_copy_by_at_most_half_a_bucket(family):
    """Also where maps are fused or stored the other way round."""
    original = ModelView.open(zoo.build(family))
    copy = rounded(original, 4)
    for site in original.sites(*original.kinds):
        before, after = original.weight(site).detach(), copy.weight(site).detach()
        _, scale = buckets(before, 4)
        assert bool(((after - before).abs() <= 0.5001 * scale.max()).all()) and bool((after != before).any())
    again = rounded(copy, 4)
    for site in copy.sites(*copy.kinds):
        torch.testing.assert_close(again.weight(site), copy.weight(site), rtol=1e-5, atol=1e-7)


def test_the_share_that_moves_is_counted_in_buckets(view):
    site = Site(1, Kind.MLP_OUT)
    centred = rounded(view, 4)
    weight = centred.weight(site).detach()
    codes, scale = buckets(weight, 4)
    step = (scale * (codes.abs() < 6)).expand_as(codes).flatten(1)[:, : weight.shape[1]]
    half = torch.zeros_like(step)
    half[::2] = step[::2]
    moves = Edit.of(centred, {site: Dense(half)}, MADE)
    assert moved_share(moves, centred, 4) == 1
    assert moved_share(Edit.of(centred, {site: Dense(0.2 * step)}, MADE), centred, 4) == 0


def test_the_magnitude_control_shrinks_the_largest_by_as_much(view):
    first, second, third = Site(0, Kind.MLP_OUT), Site(1, Kind.MLP_OUT), Site(0, Kind.ATTN_OUT)
    shapes = {site: tuple(view.weight(site).shape) for site in (first, second, third)}
    generator = torch.Generator().manual_seed(2)
    sparse = torch.zeros(shapes[first])
    sparse.view(-1)[torch.randperm(sparse.numel(), generator=generator)[:5]] = 0.1
    factors = [torch.randn(shapes[second][0], 2, generator=generator), torch.randn(2, shapes[second][1])]
    deltas = {first: Sparse.of(sparse), second: LowRank(*factors), third: Dense(torch.randn(shapes[third]) * 0.01)}
    edit = Edit.of(view, deltas, MADE)
    control = magnitude_like(edit, view)
    for site, delta in edit.deltas.items():
        assert type(control.deltas[site]) is type(delta) and control.deltas[site].touched == delta.touched
        assert control.deltas[site].norm() == pytest.approx(delta.norm(), rel=1e-4)
    weight = view.weight(first).detach()
    where = control.deltas[first].dense() != 0
    assert float(weight.abs()[where].min()) >= float(weight.abs()[~where].max())
    assert bool((control.deltas[first].dense()[where].sign() == -weight[where].sign()).all())
    largest = torch.linalg.svdvals(view.weight(second).detach().double())[:2].square().sum().sqrt()
    shrunk = control.deltas[second].dense().double()
    caught = -float((shrunk * view.weight(second).detach()).sum()) / float(shrunk.norm())
    assert caught == pytest.approx(float(largest), rel=0.01)  # no other two directions hold as much


def test_distances_are_those_of_plain_recursion():
    def slow(one, other):
        if not one or not other:
            return len(one) + len(other)
        return min(slow(one[1:], other) + 1, slow(one, other[1:]) + 1, slow(one[1:], other[1:]) + (one[0] != other[0]))

    for one, other in (((1, 2, 3), (1, 3)), ((), (1,)), ((1, 2, 3, 4), (4, 3, 2)), ((5, 5), (5, 5))):
        assert writing.levenshtein(one, other) == slow(one, other)
    assert writing.repeated((1, 2, 3, 4) * 3) == pytest.approx(1 - 4 / 9) and writing.repeated((1, 2)) == 0
    assert writing.entropy((7, 7, 7)) == 0 and writing.entropy((1, 2)) == pytest.approx(math.log(2))
    assert longest_run((1, 2, 3, 4), (9, 2, 3, 1)) == 2


def test_writing_is_alike_under_no_edit_and_not_under_a_large_one(view):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, view.vocab, (4, 12), generator=generator).tolist()
    text = Passages(tuple(Passage(str(at), tuple(row[:1]), tuple(row[1:])) for at, row in enumerate(rows)))
    prompts = writing.prompts_of(text, prefix=5, suffix=7)
    assert [len(item.prefix) for item in prompts] == [5] * 4
    measure = writing.Writing.of(view, prompts)
    assert measure(view, prompts)["agreement"] == 1 and measure(view, prompts)["edit distance"] == 0
    noise = Dense(torch.randn(view.weight(Site(1, Kind.MLP_OUT)).shape, generator=generator) * 5)
    with Edit.of(view, {Site(1, Kind.MLP_OUT): noise}, MADE).apply(view):
        assert measure(view, prompts)["agreement"] < 1
    with pytest.raises(ValueError, match="other prompts"):
        measure(view, prompts[:2])


def test_halves_are_whole_and_steps_are_powers():
    items = Passages(tuple(Passage(str(at), (1,), (2,)) for at in range(7)))
    first, second = folds(items, 3)
    assert sorted(first.ids + second.ids) == sorted(items.ids) and len(first) == 3
    assert folds(items, 3)[0].ids == first.ids and folds(items, 4)[0].ids != first.ids
    assert points(16) == (0, 1, 2, 4, 8, 16) and points(6) == (0, 1, 2, 4, 6) and points(1) == (0, 1)


def test_scores_survive_json_and_come_back_in_order():
    made = scores([1.0, 2.0], [0.0, -1.0, 3.0], True)
    again = Scores.from_json(json.loads(json.dumps(made.to_json())))
    assert again.to_json() == made.to_json()
    halves = [made.controls.rows(np.array([2, 0])), made.controls.rows(np.array([1]))]
    assert joined(halves, made.controls.ids).score.tolist() == made.controls.score.tolist()
    with pytest.raises(ArtifactError, match="not scores of a probe"):
        Scores.from_json({"ways": []})


def test_a_sheet_is_shown_in_both_forms_and_refuses_ragged_rows():
    sheet = Sheet(title="Found <b>", columns=("what", "how much"),
                  rows=[(Entry(text="a|b", kind="text"), Entry(text="3 %", below="of 9", tone="bad"))])  # fmt: skip
    report = Report(title="t", sheets=(sheet,))
    data = report.to_json()
    assert "a\\|b" in render_markdown(data) and "Found &lt;b&gt;" in render_markdown(data)
    with pytest.raises(InputError, match="Found: a row of 1 entries under 2 columns"):
        Sheet(title="Found", columns=("a", "b"), rows=[(Entry(text="x"),)])
