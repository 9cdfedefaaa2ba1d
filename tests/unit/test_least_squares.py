import pytest
import torch

from editors.facts.least_squares import insert_pair, solve_pair, whiten
from memloc.errors import InputError

OUT, IN = 5, 7


@pytest.fixture
def problem():
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(*size, generator=draw, dtype=torch.float64) for size in [(OUT, IN), (IN,), (OUT,), (40, IN)]]
    weight, key, value, text = made
    return weight, key, value, text.T @ text / len(text)


def test_demand_is_met(problem):
    weight, key, value, moment = problem
    left, right = solve_pair(weight, key, value, moment)
    torch.testing.assert_close((weight + torch.outer(left, right)) @ key, value, rtol=0, atol=1e-12)


def test_rounded_factors_still_meet_the_demand(problem):
    weight, key, value, moment = problem
    delta = insert_pair(weight, key, value, moment)
    change = delta.left.double() @ delta.right.double()
    torch.testing.assert_close((weight + change) @ key, value, rtol=0, atol=1e-6)
    assert delta.left.shape == (OUT, 1) and delta.right.shape == (1, IN)
    assert torch.linalg.matrix_rank(change) == 1


def test_no_other_update_is_gentler(problem):
    """Against the optimality conditions, written out entry by entry and solved as one big linear system.

    Minimise trace(D C Dᵀ) over vec(D) subject to D key = demand; the Lagrangian's saddle point is unique.
    """
    weight, key, value, moment = problem
    damped = moment + 1e-4 * moment.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    quadratic = torch.block_diag(*[2 * damped] * OUT)
    demand = torch.block_diag(*[key[None]] * OUT)
    corner = torch.zeros(OUT, OUT, dtype=torch.float64)
    saddle = torch.cat([torch.cat([quadratic, demand.T], 1), torch.cat([demand, corner], 1)])
    asked = torch.cat([torch.zeros(OUT * IN, dtype=torch.float64), value - weight @ key])
    slow = torch.linalg.lstsq(saddle, asked[:, None], driver="gelsd").solution[: OUT * IN, 0].view(OUT, IN)
    torch.testing.assert_close(torch.outer(*solve_pair(weight, key, value, moment)), slow, rtol=1e-9, atol=1e-9)


def test_another_direction_meets_the_same_demand_less_gently(problem):
    weight, key, value, moment = problem
    other = key + 0.3 * torch.arange(IN, dtype=torch.float64)

    def cost(pair):
        change = torch.outer(*pair)
        return float((change @ moment * change).sum())

    plain = solve_pair(weight, key, value, moment, damping=0)
    skewed = solve_pair(weight, key, value, moment, damping=0, toward=other)
    torch.testing.assert_close((weight + torch.outer(*skewed)) @ key, value, rtol=0, atol=1e-11)
    assert cost(skewed) > 1.01 * cost(plain)


def test_the_published_form_is_the_same_algebra(problem):
    """Published: u = C⁻¹k / ‖C⁻¹k‖, v = (target - W k_p) / (k_p · u): the mean key in u, the bare one elsewhere."""
    weight, bare, value, moment = problem
    mean = bare + 0.1
    unit = torch.linalg.inv(moment) @ mean
    unit = unit / unit.norm()
    published = torch.outer((value - weight @ bare) / (bare @ unit), unit)
    ours = torch.outer(*solve_pair(weight, bare, value, moment, damping=0, toward=mean))
    torch.testing.assert_close(ours, published, rtol=1e-9, atol=1e-9)


def test_scale_of_the_moment_does_not_matter(problem):
    weight, key, value, moment = problem
    once, more = (torch.outer(*solve_pair(weight, key, value, scale * moment)) for scale in (1, 1000))
    torch.testing.assert_close(once, more, rtol=1e-10, atol=1e-12)


def test_a_key_that_text_uses_more_is_moved_less(problem):
    weight, key, value, moment = problem
    common = torch.linalg.eigh(moment).eigenvectors[:, -1]

    def moved(extra):
        left, right = solve_pair(weight, key, value, moment + extra * torch.outer(common, common))
        return float((torch.outer(left, right) @ common).norm())

    assert moved(100) < 0.1 * moved(0)


def test_singular_moment_needs_damping(problem):
    weight, key, value, moment = problem
    dead = moment.clone()
    dead[2] = dead[:, 2] = 0
    with pytest.raises(InputError, match="singular; give more text, or a damping above 0"):
        insert_pair(weight, key, value, dead, damping=0)
    assert insert_pair(weight, key, value, dead).rank == 1


def test_hopeless_demands_are_refused(problem):
    weight, key, value, moment = problem
    with pytest.raises(InputError, match="the key is zero"):
        insert_pair(weight, torch.zeros(IN), value, moment)
    with pytest.raises(InputError, match="orthogonal"):
        along = torch.tensor([1.0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
        across = torch.tensor([0.0, 1, 0, 0, 0, 0, 0], dtype=torch.float64)
        insert_pair(weight, across, value, torch.eye(IN), toward=along)
    with pytest.raises(InputError, match=r"expected \[out, in\]"):
        insert_pair(weight.T, key, value, moment)
    with pytest.raises(InputError, match="second moment"):
        insert_pair(weight, key, value, moment[:3, :3])


def test_whitening_solves_for_many_keys_at_once(problem):
    *_, moment = problem
    keys = torch.randn(IN, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(moment @ whiten(keys, moment, damping=0), keys, rtol=1e-9, atol=1e-10)
