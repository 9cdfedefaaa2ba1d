from __future__ import annotations

import hashlib
import itertools
import math

import pytest
import torch
from small_models import FORMS, delta_for
from torch.testing import assert_close

from editors import deltas as module
from editors.deltas import Dense, LowRank, Sparse, add, from_tensors
from editors.packing import pack_index, pack_repair, unpack_index, unpack_repair
from editors.rounding import cast, noise
from memloc.errors import ArtifactError, InputError

SHAPE = (7, 11)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def same_bits(found, expected):
    return found.shape == expected.shape and bool((found.view(torch.int32) == expected.view(torch.int32)).all())


def test_low_rank_entries_are_sums_in_order_and_one_cast():
    """The reference is Python's own floats: IEEE double, one term after the other."""
    delta = LowRank(torch.randn(5, 6), torch.randn(6, 3) * 1e3)
    left, right = delta.left.tolist(), delta.right.tolist()
    rows = []
    for row in left:
        totals = [0.0] * 3
        for factor, term in zip(row, right, strict=True):
            totals = [total + factor * entry for total, entry in zip(totals, term, strict=True)]
        rows.append(totals)
    assert same_bits(delta.dense(), torch.tensor(rows, dtype=torch.float64).float())


@pytest.mark.parametrize("piece", [1, 12, 1 << 18])
def test_low_rank_bits_do_not_depend_on_the_piece_or_the_threads(piece, monkeypatch):
    delta = LowRank(torch.randn(13, 40), torch.randn(40, 9))
    expected, threads = delta.dense(), torch.get_num_threads()
    monkeypatch.setattr(module, "PIECE", piece)
    torch.set_num_threads(2)
    try:
        assert same_bits(delta.dense(), expected)
    finally:
        torch.set_num_threads(threads)


def test_a_blas_product_would_not_do():
    """The control: float32 matmul gives other bits, so the test above can fail."""
    delta = LowRank(torch.randn(13, 40), torch.randn(40, 9))
    assert not same_bits(delta.left @ delta.right, delta.dense())


@pytest.mark.parametrize("first, second", list(itertools.product(FORMS, FORMS)))
def test_sum_and_negative_agree_with_the_dense_ones(first, second):
    a, b = delta_for(SHAPE, first, seed=1), delta_for(SHAPE, second, seed=2)
    assert_close(add(a, b).dense(), a.dense() + b.dense())
    assert_close((-a).dense(), -a.dense(), rtol=0, atol=0)
    assert_close(add(a, -a).dense(), torch.zeros(SHAPE), rtol=0, atol=1e-15)


def test_sums_stay_small_until_that_is_larger_than_dense():
    low, sparse = LowRank(torch.randn(7, 1), torch.randn(1, 11)), delta_for(SHAPE, "sparse")
    assert isinstance(add(low, low), LowRank)
    assert isinstance(add(sparse, -sparse), Sparse)
    many = low
    for _ in range(5):
        many = add(many, low)
    assert isinstance(many, Dense)
    assert_close(many.dense(), 6 * low.dense())


@pytest.mark.parametrize("form", FORMS)
def test_norm_pieces_and_tensors_tell_the_same_matrix(form, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 13)
    delta = delta_for(SHAPE, form, seed=3)
    whole, count = torch.full(SHAPE, math.nan), 0
    for piece in delta.pieces():
        assert piece.start == count
        whole[piece.rows if piece.columns is None else (piece.rows, piece.columns)] = piece.values
        count += piece.values.numel()
    assert count == delta.touched
    assert_close(torch.nan_to_num(whole), delta.dense(), rtol=0, atol=0)
    assert delta.norm() == pytest.approx(float(delta.dense().double().norm()), rel=1e-6)
    again = from_tensors(type(delta).__name__.lower(), SHAPE, delta.tensors())
    assert_close(again.dense(), delta.dense(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: LowRank(torch.ones(3, 2), torch.ones(3, 4)), "expected .out, r., .r, in."),
        (lambda: Dense(torch.tensor([[1.0, math.nan]])), "not finite"),
        (lambda: Dense(torch.ones(2, 2, 2)), "expected .out, in. or .out."),
        (lambda: Sparse((2, 3), torch.tensor([1, 1]), torch.ones(2)), "must rise"),
        (lambda: Sparse((2, 3), torch.tensor([1, 6]), torch.ones(2)), "outside the 6"),
        (lambda: Sparse((2, 3), torch.tensor([-1]), torch.ones(1)), "outside the 6"),
        (lambda: Sparse((2, 3), torch.tensor([1]), torch.ones(2)), "one position a value"),
        (lambda: add(Dense(torch.ones(2, 3)), Dense(torch.ones(3, 2))), "cannot add"),
        (lambda: from_tensors("dense", (2, 3), {"values": torch.ones(3, 2)}), "expected .2, 3."),
        (lambda: from_tensors("cubic", (2, 3), {}), "cubic"),
    ],
)
def test_a_delta_that_cannot_be_is_refused(make, said):
    with pytest.raises(InputError, match=said):
        make()


@pytest.mark.parametrize("total, share", [(1000, 0.0), (1000, 0.5), (200_000, 0.001), (200_000, 0.02), (64, 1.0)])
def test_packed_positions_come_back(total, share):
    index = (torch.rand(total, generator=torch.Generator().manual_seed(1)) < share).nonzero().reshape(-1)
    form, data = pack_index(index, total)
    assert_close(unpack_index(form, data, len(index), total, "here"), index)
    assert len(data) < total / 8 + 100
    for cut in (data[:-5], data[:4] + b"xx" + data[6:], b""):
        with pytest.raises(ArtifactError, match="here"):
            unpack_index(form, cut, len(index), total, "here")


def test_packed_positions_of_another_form_are_refused():
    with pytest.raises(ArtifactError, match="upgrade"):
        unpack_index("morse", b"", 0, 10, "here")


def test_packed_repairs_come_back_and_zeros_cost_nothing():
    repair = torch.randint(-300, 300, (1001,), dtype=torch.int32)
    planes = unpack_repair(pack_repair(repair), 1001, 4, "here")
    assert_close(torch.from_numpy(planes.T.copy()).view(torch.int32).reshape(-1), repair)
    assert pack_repair(torch.zeros(5, dtype=torch.int16)) == b""


def philox(key: tuple[int, int], block: int) -> list[int]:
    """One block of Philox4x64-10, straight from the paper: ten rounds of two wide products."""
    words, (low, high), full = [block, 0, 0, 0], key, (1 << 64) - 1
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [second >> 64 ^ words[1] ^ low, second & full, first >> 64 ^ words[3] ^ high, first & full]
        low, high = low + 0x9E3779B97F4A7C15 & full, high + 0xBB67AE8584CAA73B & full
    return words


def test_noise_is_philox_keyed_by_seed_and_site():
    key = hashlib.sha256(b"7:L3.mlp.out").digest()
    pair = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:16], "little")
    longs = [*philox(pair, 1), *philox(pair, 2)]
    words = [half for long in longs for half in (long & 0xFFFFFFFF, long >> 32)]
    assert (noise(16, seed=7, name="L3.mlp.out") * 2**32).to(torch.int64).tolist() == words


def test_noise_differs_by_seed_and_by_site():
    drawn = [noise(5, seed=seed, name=name).tolist() for seed in (7, 8) for name in ("L3.mlp.out", "L3.mlp.in")]
    assert len({tuple(row) for row in drawn}) == 4


@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 1001])
def test_noise_is_addressed_by_its_position(start):
    assert_close(noise(40, seed=1, name="x", start=start), noise(1100, seed=1, name="x")[start : start + 40])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-39])
def test_stochastic_rounding_takes_a_neighbour_and_keeps_the_mean(dtype, scale):
    values = scale * torch.linspace(-3, 3, 41).repeat_interleave(4000)
    found = cast(values, dtype, rounding="stochastic", seed=1, name="x").double()
    nearest = values.to(dtype).double()
    step = (found - nearest).abs().view(41, -1).amax(1)
    least = 2.0**-133 if dtype == torch.bfloat16 else 2.0**-24
    spacing = (values.double().abs() * torch.finfo(dtype).eps).clamp(min=least).view(41, -1)[:, 0]
    assert bool((step <= spacing * 1.01).all())
    mean = found.view(41, -1).mean(1)
    assert bool(((mean - values.double().view(41, -1)[:, 0]).abs() <= 5 * spacing / math.sqrt(4000)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_stochastic_rounding_leaves_what_the_dtype_holds(dtype):
    values = torch.randn(500).to(dtype)
    wide = values.to(torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(cast(wide, dtype, rounding="stochastic", seed=3, name="x"), values)


def test_an_unknown_rounding_is_refused():
    with pytest.raises(InputError, match="expected 'nearest' or 'stochastic'"):
        cast(torch.ones(2), torch.bfloat16, rounding="up")
