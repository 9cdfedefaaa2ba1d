"""Curvature and SVD pruning against slow versions: loops over pairs, explicit sums, float64."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch.testing import assert_close

from editors.base import Request
from editors.deltas import Dense, LowRank, Sparse
from editors.pruners.curvature import Curvature
from editors.pruners.svd import Svd
from editors.pruning.curvature_pairs import kept_factors, passage_energies
from editors.pruning.spectra import dearest, most_of, taken_out
from memloc.errors import InputError
from memloc.gradients.curvature import curvature_factors
from memloc.localizers.random import Random
from memloc.sites import Kind, Site

TEXT = zoo.passages(12, seed=5, prefix=14)
FORGET = zoo.passages(3)


def slow_kept(price, keep):
    """Pairs that stay: the largest first, one by one, until they hold `keep` of all."""
    pairs = sorted((float(price[i, j]), -i, -j) for i in range(price.shape[0]) for j in range(price.shape[1]))
    stay, held, total = torch.zeros(price.shape, dtype=torch.bool), 0.0, sum(value for value, _, _ in pairs)
    while held < keep * total:
        value, i, j = pairs.pop()
        stay[-i, -j], held = True, held + value
    return stay


def slow_weight(view, site, keep, *, loss=False, seed=0):
    """The published formula, pair by pair: the sum over pairs that stay of C_ij u_i v_jᵀ."""
    factors = curvature_factors(view, TEXT, [site], seed=seed)
    (read_energy, read), (write_energy, write) = (
        torch.linalg.eigh(part.mean(site)) for part in (factors.read, factors.pull)
    )
    weight = view.weight(site).detach().double()
    coordinates = torch.stack([torch.stack([u @ weight @ v for v in read.T]) for u in write.T])
    price = write_energy.clamp_min(0)[:, None] * read_energy.clamp_min(0)[None, :]
    stay = slow_kept(price * coordinates**2 if loss else price, keep)
    found = torch.zeros_like(weight)
    for i, j in stay.nonzero().tolist():
        found += coordinates[i, j] * torch.outer(write[:, i], read[:, j])
    return found


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("price", ["curvature", "loss"])
def test_the_map_keeps_the_pairs_that_hold_the_price(family, price, view_of):
    view = view_of(family, torch.float64)
    for kind in (Kind.ATTN_V, Kind.MLP_OUT):
        site = Site(1, kind)
        edit = Curvature(keep=0.7, price=price, kinds=str(kind), layers=(1,))(view, Request(text=TEXT))
        assert set(edit.deltas) == {site}
        found = view.weight(site).detach() + edit.deltas[site].dense()
        assert_close(found, slow_weight(view, site, 0.7, loss=price == "loss"), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(found, slow_weight(view, site, 0.9, loss=price == "loss"), atol=1e-3)


def test_the_restricted_edit_takes_pairs_by_pull_per_curvature_within_the_budget(view_of):
    view, sites = view_of("qwen3", torch.float64), (Site(1, Kind.MLP_GATE), Site(1, Kind.MLP_OUT))
    edit = Curvature(keep=0.9, aim="forget", kinds="mlp.gate,mlp.out", layers=(1,))(
        view, Request(text=TEXT, forget=FORGET)
    )
    factors = curvature_factors(view, TEXT, sites)
    energies = {site: torch.zeros(view.weight(site).shape, dtype=torch.float64) for site in sites}
    for item in FORGET:
        logits = view.model(torch.tensor([item.ids]), use_cache=False).logits[0]
        at = range(len(item.prefix) - 1, len(item.ids) - 1)
        loss = -sum(logits[t].log_softmax(-1)[item.ids[t + 1]] for t in at) / len(item.suffix)
        gradients = torch.autograd.grad(loss, [view.parameter(site) for site in sites])
        whole = sum(part.square().sum() for part in gradients)
        for site, part in zip(sites, gradients, strict=True):
            basis = factors.basis(site)
            energies[site] += (basis.write.T @ part @ basis.read).square() / whole / len(FORGET)
    for site in sites:
        basis = factors.basis(site)
        price = torch.outer(basis.write_energy, basis.read_energy)
        ratio, budget = energies[site] / price, 0.1 * float(price.sum())
        gone, spent = torch.zeros(price.shape, dtype=torch.bool), 0.0
        for flat in ratio.flatten().argsort(descending=True).tolist():
            if spent + float(price.flatten()[flat]) > budget:
                break
            gone.view(-1)[flat], spent = True, spent + float(price.flatten()[flat])
        left = basis.coordinates(view.weight(site).detach()).masked_fill(gone, 0)
        assert_close(view.weight(site) + edit.deltas[site].dense(), basis.weight(left), atol=1e-5, rtol=1e-5)
        assert edit.notes["forget"][str(site)] == pytest.approx(float(energies[site][gone].sum()), rel=1e-6)


def test_shares_of_the_passages_gradient_sum_to_one_whatever_the_batch(view_of):
    view = view_of("gpt2", torch.float64)
    sites = view.sites(*view.kinds)
    factors = curvature_factors(view, TEXT, sites)
    bases = {site: factors.basis(site) for site in sites}
    whole, single = (passage_energies(view, FORGET, bases, size=size) for size in (3, 1))
    assert sum(float(part.sum()) for part in whole.values()) == pytest.approx(1)
    for site in sites:
        assert_close(whole[site], single[site])


def test_the_restricted_edit_spares_more_of_the_text_for_the_same_pull():
    """Within a budget no set of pairs takes more: against random sets of the same price."""
    generator = torch.Generator().manual_seed(2)
    gain, price = (torch.rand(7, 9, generator=generator, dtype=torch.float64) ** 3 for _ in range(2))
    mask = dearest(gain, price, 0.2 * float(price.sum()))
    assert 0 < float(price[mask].sum()) <= 0.2 * float(price.sum())
    for _ in range(200):
        order = torch.randperm(63, generator=generator)
        within = price.flatten()[order].cumsum(0) <= float(price[mask].sum())
        assert float(gain.flatten()[order[within]].sum()) < float(gain[mask].sum())
    assert not bool(dearest(torch.zeros(2, 2), torch.ones(2, 2), 9.0).any())


def test_the_fewest_entries_that_hold_a_share():
    values = torch.tensor([[1.0, 4.0, 0.0], [3.0, 2.0, 0.0]])
    assert most_of(values, 0.65).tolist() == [[False, True, False], [True, False, False]]
    assert int(most_of(values, 1.0).sum()) == 4 and int(most_of(values, 0.0).sum()) == 0
    with pytest.raises(InputError, match=r"share 1\.5: expected between 0 and 1"):
        most_of(values, 1.5)


@pytest.mark.parametrize(("rows", "columns", "form"), [((2, 5), range(9), LowRank), (range(6), range(9), Dense)])
def test_what_is_taken_out_is_written_in_the_smaller_form(rows, columns, form):
    generator = torch.Generator().manual_seed(1)
    write, _ = torch.linalg.qr(torch.randn(11, 6, generator=generator, dtype=torch.float64))
    read, _ = torch.linalg.qr(torch.randn(13, 9, generator=generator, dtype=torch.float64))
    core = torch.zeros(6, 9, dtype=torch.float64)
    for i in rows:
        for j in columns:
            core[i, j] = 1 + i * j
    found = taken_out(write, core, read)
    assert isinstance(found, form)
    assert_close(found.dense().double(), -write @ core @ read.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_svd_leaves_the_nearest_matrix_of_the_rank_that_holds_the_energy(family, view_of):
    view, site = view_of(family), Site(2, Kind.MLP_OUT)
    edit = Svd(energy=0.6, kinds="mlp.out", layers=(2,))(view, Request())
    left, sizes, right = torch.linalg.svd(view.weight(site).detach().double())
    rank, held = 0, 0.0
    while held < 0.6 * float(sizes.square().sum()):
        held, rank = held + float(sizes[rank] ** 2), rank + 1
    wanted = sum(sizes[k] * torch.outer(left[:, k], right[k]) for k in range(rank))
    assert_close(view.weight(site).detach().double() + edit.deltas[site].dense(), wanted, atol=1e-5, rtol=1e-5)
    assert edit.notes["kept directions"][str(site)] == [rank, len(sizes)]


def test_a_selection_says_where_the_change_is_written(view_of):
    view = view_of("qwen3")
    chosen = Random(grain="weight")(view, FORGET).top(fraction=0.1)
    whole = Svd(energy=0.5, kinds=",".join(view.kinds))(view, Request())
    edit = Svd(energy=0.5)(view, Request(selection=chosen))
    for site, delta in edit.deltas.items():
        assert isinstance(delta, Sparse)
        wanted = whole.deltas[site].dense() * chosen.masks[site]
        assert_close(delta.dense(), wanted, atol=1e-6, rtol=1e-4)
    one = Random(grain="component", kinds="attn.k,attn.out")(view, FORGET).top(2)
    named = {site for site, mask in one.masks.items() if bool(mask)}
    assert set(Curvature(keep=0.8)(view, Request(text=TEXT, selection=one)).deltas) == named


def test_factors_are_kept_for_the_very_model_text_and_settings(view_of, tmp_path, monkeypatch):
    view, editor = view_of("gpt2"), Curvature(keep=0.8, cache=str(tmp_path / "kept"))
    fresh = Curvature(keep=0.8)(view, Request(text=TEXT))
    first = editor(view, Request(text=TEXT))
    (kept,) = (tmp_path / "kept").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr("editors.pruning.curvature_pairs.curvature_factors", lambda *_, **__: pytest.fail("made again"))
        again = editor(view, Request(text=TEXT))
    assert fresh.digest == first.digest == again.digest and fresh.provenance == again.provenance
    editor(view, Request(text=TEXT[:8]))
    editor(view, Request(text=TEXT, seed=1))
    assert len(list((tmp_path / "kept").iterdir())) == 3
    kept.write_bytes(kept.read_bytes()[:100])
    assert editor(view, Request(text=TEXT)).digest == first.digest
    assert kept.stat().st_size > 100
    with pytest.raises(InputError, match="is a file; curvature factors are kept in a folder"):
        kept_factors(view, TEXT, view.sites(Kind.MLP_IN), folder=kept)


@pytest.mark.parametrize(
    ("make", "request_of", "told"),
    [
        (lambda: Curvature(), lambda: Request(forget=FORGET), "ordinary text .* is needed"),
        (lambda: Curvature(aim="forget"), lambda: Request(text=TEXT), "needs passages to forget"),
        (lambda: Curvature(keep=1.0), lambda: Request(text=TEXT), r"keep 1\.0: expected from 0 to below 1"),
        (lambda: Curvature(layers=(3,)), lambda: Request(text=TEXT), "layer 3: the model has 3, counted from 0"),
        (lambda: Curvature(kinds="mlp.gate"), lambda: Request(text=TEXT), "no map of kinds mlp.gate in any layer"),
        (lambda: Svd(energy=1.0), lambda: Request(), r"energy 1\.0: expected from 0 to below 1"),
        (lambda: Svd(kinds="mlp.norm"), lambda: Request(), r"no kind called 'mlp\.norm'"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(make, request_of, told, view_of):
    with pytest.raises(InputError, match=told):
        make()(view_of("gpt2"), request_of())
