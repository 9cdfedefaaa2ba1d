"""Shrinkage and the diagnostic, where the truth is known because the keys are drawn from it."""

from __future__ import annotations

import math

import pytest
import torch

from memloc.errors import InputError
from memloc.moment_judgement import judge, judged, shrinkage, shrinkages
from memloc.moments import Moments, Split, towards_identity
from memloc.provenance import Provenance
from memloc.sites import Kind, Site

SITE = Site(0, Kind.MLP_OUT)
WIDTH = 31


def known(width=WIDTH, seed=0):
    """A moment with sizes from 1 to 1000 in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))
    return basis @ torch.diag(torch.logspace(0, 3, width, dtype=torch.float64)) @ basis.T


def drawn(truth, tokens, *, seed=1, repeat=1, share=0.5):
    """Moments of `tokens` keys drawn from `truth`, each `repeat` times in a row, with their halves."""
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(-(-tokens // repeat), len(truth), dtype=torch.float64, generator=generator)
    keys = (fresh @ torch.linalg.cholesky(truth).T).repeat_interleave(repeat, 0)[:tokens]
    cut = round(tokens * share)
    split = Split({SITE: keys[:cut].T @ keys[:cut]}, cut, {SITE: keys[:: max(1, tokens // 32)].float()})
    return Moments({SITE: keys.T @ keys}, tokens, Provenance("moments", {}, None, {}), split)


def distance(moment, truth):
    return float((moment - truth).square().sum())


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_the_share_is_near_the_best_there_is(share):
    """The best: τ of least distance to the truth, which only the test knows; mean over draws."""
    truth = known()
    for tokens in (40, 120, 600):
        said, best = [], []
        for seed in range(24):
            moments = drawn(truth, tokens, seed=seed, share=share)
            grid = torch.linspace(0, 1, 101).tolist()
            best.append(min(grid, key=lambda tau: distance(towards_identity(moments.mean(SITE), tau), truth)))
            said.append(shrinkage(moments, SITE))
        assert sum(said) == pytest.approx(sum(best), rel=0.25)


def test_keys_that_repeat_are_not_taken_for_many():
    """Four times the tokens, each four times over, tell no more. Counted token by token they would seem to."""
    truth = known()
    plain, repeated = drawn(truth, 100), drawn(truth, 400, repeat=4)
    assert shrinkage(repeated, SITE) == pytest.approx(shrinkage(plain, SITE), rel=0.1)
    naive = repeated.sums[SITE] / repeated.count
    fourth = (naive.trace() ** 2 + 2 * naive.square().sum() - naive.square().sum()) / repeated.count
    flat = towards_identity(naive, 1.0)
    assert float(fourth / (naive - flat).square().sum()) < 0.5 * shrinkage(repeated, SITE)


def test_shrinking_keeps_the_trace_and_the_eigenvectors():
    truth = known()
    shrunk = towards_identity(truth, 0.3)
    assert float(shrunk.trace()) == pytest.approx(float(truth.trace()))
    torch.testing.assert_close(shrunk @ truth, truth @ shrunk)
    assert torch.equal(towards_identity(truth, 0.0), truth)
    torch.testing.assert_close(towards_identity(truth, 1.0), torch.eye(WIDTH).double() * truth.diagonal().mean())


def true_excess(moment, truth, keys):
    """Disturbance under the truth of directions from the moment, over the least; one key at a time."""
    ratios = []
    for key in keys.double():
        used, best = torch.linalg.solve(moment, key), torch.linalg.solve(truth, key)
        ratios.append(float((used @ truth @ used) / (used @ key) ** 2 * (best @ key)))
    return sorted(ratios)[len(ratios) // 2] - 1


@pytest.mark.parametrize("times", [4, 10, 40])
def test_the_excess_is_what_an_edit_with_half_the_text_loses_and_more_than_with_all(times):
    """The diagnostic sees two halves; the test knows the truth, and the keys are in neither half."""
    truth = known()
    fresh = torch.randn(32, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    keys = fresh @ torch.linalg.cholesky(truth).T
    said, half, whole = [], [], []
    for seed in range(8):
        moments = drawn(truth, times * WIDTH, seed=seed)
        row = judge(moments, SITE, keys)
        said.append(row.excess)
        first = moments.split.first[SITE] / moments.split.count
        half.append(true_excess(towards_identity(first, min(1, 2 * row.shrinkage)), truth, keys))
        whole.append(true_excess(towards_identity(moments.mean(SITE), row.shrinkage), truth, keys))
    assert sum(said) == pytest.approx(sum(half), rel=0.3)
    assert sum(said) > sum(whole)


def test_more_text_is_better_and_ten_a_neuron_are_enough_for_plain_keys():
    rows = [judge(drawn(known(), times * WIDTH), SITE) for times in (2, 10, 100)]
    assert [row.enough for row in rows] == [False, True, True]
    assert rows[0].excess == math.inf
    assert rows[0].excess > rows[1].excess > rows[2].excess > 0
    assert rows[0].agreement < rows[1].agreement < rows[2].agreement < 1
    assert rows[2].probes == len(drawn(known(), 100 * WIDTH).split.probes[SITE])


def test_effective_rank_counts_directions_of_equal_size():
    flat = torch.diag(torch.tensor([2.0] * 7 + [0.0] * 4, dtype=torch.float64))
    halves = Split({SITE: flat * 5}, 5, {SITE: torch.ones(2, 11)})
    row = judge(Moments({SITE: flat * 10}, 10, Provenance("moments", {}, None, {}), halves), SITE)
    assert row.rank == pytest.approx(7)
    assert row.silent == 4
    assert row.excess == pytest.approx(0, abs=1e-9)


def test_neurons_that_never_fire_are_counted_and_shrinking_makes_the_moment_invertible():
    """Silent neurons make the plain moment exactly singular; a float32 sum may even lose its sign."""
    truth = known()
    moments = drawn(truth, 300)
    dead = torch.ones(WIDTH, dtype=torch.float64)
    dead[[3, 17]] = 0
    mask = torch.outer(dead, dead)
    split = Split({SITE: moments.split.first[SITE] * mask}, moments.split.count, moments.split.probes)
    silent = Moments({SITE: moments.sums[SITE] * mask}, moments.count, moments.provenance, split)
    assert judge(silent, SITE).silent == 2
    assert int(torch.linalg.cholesky_ex(silent.mean(SITE))[1]) > 0
    shrunk = silent.shrunk(shrinkages(silent))
    assert int(torch.linalg.cholesky_ex(shrunk.mean(SITE))[1]) == 0
    assert torch.equal(shrunk.sums[SITE], silent.sums[SITE])


def test_what_cannot_be_judged_is_refused_in_one_line():
    moments = drawn(known(), 50)
    bare = Moments(moments.sums, moments.count, moments.provenance)
    with pytest.raises(InputError, match="hold no halves to be judged by"):
        judged(bare)
    whole = Split(moments.sums, moments.count, moments.split.probes)
    with pytest.raises(InputError, match="of one passage, which has no halves"):
        shrinkage(Moments(moments.sums, moments.count, moments.provenance, whole), SITE)
    with pytest.raises(InputError, match=r"no second moment of L1\.mlp\.out"):
        judge(moments, Site(1, Kind.MLP_OUT))
    with pytest.raises(InputError, match=r"shrinkage 1\.5 of L0\.mlp\.out"):
        moments.shrunk({SITE: 1.5})
    with pytest.raises(InputError, match=r"shrinkage 0\.5 of L4\.mlp\.out"):
        moments.shrunk({Site(4, Kind.MLP_OUT): 0.5})
