"""Closed forms in the number of keys against the f-sized systems they stand for, solved densely."""

import pytest
import torch
from torch.testing import assert_close

from editors.facts.closed_forms import Factor, NullSpace, charge, insert_pairs, rounded
from editors.facts.least_squares import solve_pair
from memloc.errors import InputError

OUT, IN, N = 5, 23, 4


def made(*size, seed):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def problem():
    """Keys, what is missing, and the moment of text that uses some directions a thousand times less than others."""
    text = made(90, IN, seed=1) * torch.logspace(0, -3, IN, dtype=torch.float64)
    return made(IN, N, seed=2), made(OUT, N, seed=3), text.T @ text / len(text)


def change(pairs):
    return pairs.left @ pairs.right


def near(found, wanted, tolerance=1e-9):
    assert float((found - wanted).norm() / wanted.norm()) < tolerance


def test_memit_in_the_number_of_keys_is_memit_in_the_number_of_neurons(problem):
    keys, missing, moment = problem
    weight = 37.0
    slow = missing @ torch.linalg.solve(weight * moment + keys @ keys.T, keys).T
    found = insert_pairs(keys, missing, Factor.of(moment, damping=0), slack=weight)
    near(change(found), slow)
    scaled = insert_pairs(keys, missing, Factor.of(weight * moment, damping=0), slack=1.0)
    near(change(scaled), slow)
    other = insert_pairs(keys, missing, Factor.of(moment, damping=0), slack=weight * 1.01)
    with pytest.raises(AssertionError):
        near(change(other), slow)


def test_alphaedit_in_the_number_of_keys_is_alphaedit_in_the_number_of_neurons(problem):
    """With past keys too; the slow one is the published system, P (K Kᵀ + G) + L2, which is not symmetric."""
    keys, missing, moment = problem
    past = made(IN, 3, seed=4)
    values, vectors = torch.linalg.eigh(moment)
    basis = vectors[:, values < 0.02]
    assert 0 < basis.shape[1] < IN
    projector, ridge = basis @ basis.T, 10.0
    system = projector @ (keys @ keys.T + past @ past.T) + ridge * torch.eye(IN, dtype=torch.float64)
    slow = torch.linalg.solve(system, projector @ keys @ missing.T).T
    space = NullSpace.of(moment, 0.02, relative=False)
    near(change(insert_pairs(keys, missing, space, slack=ridge, held=past)), slow)
    with pytest.raises(AssertionError):
        near(change(insert_pairs(keys, missing, space, slack=ridge)), slow)


def test_alphaedit_moves_what_should_stay_no_more_than_its_threshold_allows(problem):
    keys, missing, moment = problem
    space = NullSpace.of(moment, 0.05)
    assert space.threshold == pytest.approx(0.05 * float(torch.linalg.eigvalsh(moment).mean()))
    delta = change(insert_pairs(keys, missing, space, slack=1e-3))
    drift = float((delta @ moment * delta).sum())
    assert drift <= space.threshold * float(delta.norm()) ** 2
    free = change(insert_pairs(keys, missing, Factor.of(torch.eye(IN), damping=0), slack=1e-3))
    assert float((free @ moment * free).sum()) > space.threshold * float(free.norm()) ** 2
    # A key that lies wholly in the other directions keeps its output to the last bit but rounding.
    used = made(IN, seed=5) - space.solve(made(IN, 1, seed=5))[:, 0]
    assert_close(delta @ used, torch.zeros(OUT, dtype=torch.float64), atol=1e-12, rtol=0)


def test_emmet_meets_every_demand(problem):
    keys, missing, moment = problem
    found = insert_pairs(keys, missing, Factor.of(moment, damping=0))
    assert_close(change(found) @ keys, missing, atol=1e-6, rtol=0)
    short = insert_pairs(keys, missing, Factor.of(moment, damping=0), slack=1e4)
    assert float((change(short) @ keys - missing).abs().max()) > 1e-3


def test_no_other_change_that_meets_the_demand_is_gentler(problem):
    """The optimality conditions of the constrained problem, row by row, as one big linear system."""
    keys, missing, moment = problem
    corner = torch.zeros(N, N, dtype=torch.float64)
    saddle = torch.cat([torch.cat([2 * moment, keys], 1), torch.cat([keys.T, corner], 1)])
    rows = [torch.linalg.solve(saddle, torch.cat([torch.zeros(IN, dtype=torch.float64), row]))[:IN] for row in missing]
    near(change(insert_pairs(keys, missing, Factor.of(moment, damping=0))), torch.stack(rows), 1e-7)


def test_emmet_with_one_fact_is_rome(problem):
    keys, missing, moment = problem
    weight = made(OUT, IN, seed=7)
    value = weight @ keys[:, 0] + missing[:, 0]
    rome = torch.outer(*solve_pair(weight, keys[:, 0], value, moment, damping=1e-3))
    near(change(insert_pairs(keys[:, :1], missing[:, :1], Factor.of(moment, damping=1e-3))), rome)


@pytest.mark.parametrize("count", [2, 20])
def test_protected_keys_enter_as_terms_of_the_moment(problem, count):
    """Few by Woodbury's identity, many by another factor; twice over as well."""
    keys, missing, moment = problem
    held = made(IN, count, seed=8)
    factor = Factor.of(moment, damping=0).holding(held[:, :1], 2.5).holding(held[:, 1:], 2.5)
    assert (factor.keys.shape[1] > 0) == (count == 2)
    slow = missing @ torch.linalg.solve(30 * (moment + 2.5 * held @ held.T) + keys @ keys.T, keys).T
    near(change(insert_pairs(keys, missing, factor, slack=30.0)), slow)
    plain = change(insert_pairs(keys, missing, Factor.of(moment, damping=0), slack=30.0))
    assert float((change(insert_pairs(keys, missing, factor, slack=30.0)) @ held).norm()) < float((plain @ held).norm())


def test_held_keys_do_not_move_where_there_is_no_slack(problem):
    keys, missing, moment = problem
    held = made(IN, 3, seed=9)
    pairs = insert_pairs(keys, missing, Factor.of(moment, damping=0), held=held)
    assert pairs.right.shape == (N, IN)
    assert_close(change(pairs) @ held, torch.zeros(OUT, 3, dtype=torch.float64), atol=1e-8, rtol=0)
    assert_close(change(pairs) @ keys, missing, atol=1e-8, rtol=0)


def test_the_charge_is_what_the_change_costs(problem):
    keys, missing, moment = problem
    factor = Factor.of(moment, damping=0)
    delta = change(insert_pairs(keys, missing, factor))
    near(torch.trace(missing @ charge(keys, factor) @ missing.T), torch.trace(delta @ moment @ delta.T), 1e-5)
    soft = change(insert_pairs(keys, missing, factor, slack=5.0))
    cost = torch.trace(soft @ moment @ soft.T) + float((soft @ keys - missing).norm() ** 2) / 5.0
    near(torch.trace(missing @ charge(keys, factor, 5.0) @ missing.T), cost)


def test_every_key_may_have_a_slack_of_its_own(problem):
    keys, missing, moment = problem
    slack = torch.linspace(0.5, 40.0, N, dtype=torch.float64)
    weighted = keys / slack.sqrt()
    slow = (missing / slack.sqrt()) @ torch.linalg.solve(moment + weighted @ weighted.T, weighted).T
    near(change(insert_pairs(keys, missing, Factor.of(moment, damping=0), slack=slack)), slow)
    cost = torch.trace(slow @ moment @ slow.T) + float(((slow @ keys - missing) ** 2 / slack).sum())
    near(torch.trace(missing @ charge(keys, Factor.of(moment, damping=0), slack) @ missing.T), cost)


def test_more_held_keys_than_entries_count_by_their_moment_alone(problem):
    """Against the f-sized system of a projected least squares."""
    keys, missing, moment = problem
    held = made(IN, 3 * IN, seed=11)
    space = NullSpace.of(moment, 2.0)
    P = space.basis @ space.basis.T
    system = P @ (keys @ keys.T + held @ held.T) @ P + 0.3 * torch.eye(IN, dtype=torch.float64)
    slow = missing @ torch.linalg.solve(system, P @ keys).T
    near(change(insert_pairs(keys, missing, space, slack=0.3, held=held)), slow)


def test_rounded_factors_still_meet_the_demand(problem):
    keys, missing, moment = problem
    pairs = insert_pairs(keys, missing, Factor.of(moment, damping=1e-4))
    delta = rounded(pairs, keys)
    assert delta.rank == N
    exact = delta.left.double() @ delta.right.double() @ keys
    plain = pairs.left.float().double() @ pairs.right.float().double() @ keys
    assert float((exact - missing).abs().max()) < 1e-6
    assert float((exact - missing).abs().max()) <= float((plain - missing).abs().max())


def test_keys_that_are_combinations_of_others_are_refused_without_slack(problem):
    keys, missing, moment = problem
    twice = torch.cat([keys, keys[:, :1]], 1)
    more = torch.cat([missing, missing[:, :1]], 1)
    with pytest.raises(InputError, match=r"^5 keys of 23 entries are combinations of each other"):
        insert_pairs(twice, more, Factor.of(moment))
    assert torch.isfinite(insert_pairs(twice, more, Factor.of(moment), slack=1.0).right).all()


def test_a_singular_moment_and_an_empty_null_space_are_refused(problem):
    keys, missing, _ = problem
    with pytest.raises(InputError, match="the second moment is singular; give more text"):
        Factor.of(torch.zeros(IN, IN))
    with pytest.raises(InputError, match=r"not below the threshold 1e-05; raise the threshold"):
        NullSpace.of(torch.eye(IN), 1e-5)
    with pytest.raises(InputError, match=r"keys \[23, 4\], missing \[5, 3\]; expected"):
        insert_pairs(keys, missing[:, :3], Factor.of(torch.eye(IN)))
