"""The least change under inequality demands, its dual, its rank, against slow dense versions."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from editors.tuning.least_change import Metric, dual, gram
from memloc.errors import InputError


def moment(size: int, seed: int) -> torch.Tensor:
    rows = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.T @ rows / len(rows)


def demands(count: int, out: int, read: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(count, read, generator=generator, dtype=torch.float64)
    return keys, torch.randn(count, out, generator=generator, dtype=torch.float64)


def test_the_dual_meets_the_optimality_conditions():
    keys, pulls = demands(9, 5, 7, 0)
    table = (keys @ keys.T) * (pulls @ pulls.T)
    asked = torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = dual(table, asked, sweeps=20000, close=1e-13)
    slack = table @ found - asked
    assert bool((found >= 0).all()) and bool((slack > -1e-8).all())
    assert_close(found * slack, torch.zeros(9, dtype=torch.float64), atol=1e-8, rtol=0)
    assert bool((found > 1e-9).any()) and bool((found == 0).any()), "a weak case"


def test_the_dual_is_an_ordinary_solve_where_every_demand_binds():
    table = torch.eye(4, dtype=torch.float64) * 2 + 0.1
    asked = torch.tensor([1.0, 2.0, 3.0, 2.5], dtype=torch.float64)
    assert_close(dual(table, asked, sweeps=5000, close=1e-14), torch.linalg.solve(table, asked))


def test_contradicting_demands_need_the_ridge():
    keys, pulls = demands(1, 3, 4, 2)
    keys, pulls = keys.repeat(2, 1), torch.cat([pulls, -pulls])
    table = (keys @ keys.T) * (pulls @ pulls.T)
    asked = torch.ones(2, dtype=torch.float64)
    assert float(dual(table, asked, ridge=0.1).max()) < 20 / float(table[0, 0])
    assert float(dual(table, asked, sweeps=50).max()) > 20 / float(table[0, 0])


def test_the_change_moves_what_was_asked_with_the_least_energy():
    """Against a dense solve: minimise ½ vec(D)ᵀ (G ⊗ A) vec(D) with all demands met exactly, by its own KKT system."""
    out, read, count = 5, 7, 4
    keys, pulls = demands(count, out, read, 3)
    first, second = moment(read, 4), moment(out, 5)
    metric = Metric.of(first, second, damping=0.0, pull_damping=0.0)
    white = metric.whitened(keys, pulls)
    asked = torch.tensor([1.0, 0.5, 2.0, 1.5], dtype=torch.float64)
    table = gram([white])
    weight = torch.linalg.solve(table, asked)
    found = metric.change(*white, weight)
    rows = torch.stack([torch.outer(pull, key).reshape(-1) for pull, key in zip(pulls, keys, strict=True)])
    hessian = torch.kron(second, first)
    top = torch.cat([hessian, rows.T], 1)
    bottom = torch.cat([rows, torch.zeros(count, count, dtype=torch.float64)], 1)
    right = torch.cat([torch.zeros(out * read, dtype=torch.float64), asked])
    slow = torch.linalg.solve(torch.cat([top, bottom]), right)[: out * read].view(out, read)
    assert_close(found.left.double() @ found.right.double(), slow, atol=1e-5, rtol=1e-5)
    assert_close(metric.energy(found), float((second @ slow @ first @ slow.T).trace()), rtol=1e-5, atol=0)


def test_a_cut_change_is_the_nearest_of_its_rank_by_the_metric():
    keys, pulls = demands(6, 5, 7, 6)
    metric = Metric.of(moment(7, 7), moment(5, 8), damping=0.01, pull_damping=0.1)
    white = metric.whitened(keys, pulls)
    weight = torch.ones(6, dtype=torch.float64)
    whole, cut = metric.change(*white, weight), metric.change(*white, weight, 2)
    assert (whole.rank, cut.rank) == (5, 2)

    def distance(other: torch.Tensor) -> float:
        gap = whole.left.double() @ whole.right.double() - other
        return float((metric.pull.T @ gap @ metric.read).norm())

    values = torch.linalg.svdvals((white[1] * weight[:, None]).T @ white[0])
    assert_close(distance(cut.left.double() @ cut.right.double()), float(values[2:].norm()), rtol=1e-4, atol=0)
    plain, scales, other = torch.linalg.svd(whole.dense().double(), full_matrices=False)
    naive = plain[:, :2] * scales[:2] @ other[:2]
    assert distance(naive) > distance(cut.left.double() @ cut.right.double()) * 1.01


def test_a_singular_moment_is_refused():
    with pytest.raises(InputError, match=r"what maps read is singular; give more text"):
        Metric.of(torch.zeros(3, 3), moment(2, 9), damping=0.0, pull_damping=0.1)
