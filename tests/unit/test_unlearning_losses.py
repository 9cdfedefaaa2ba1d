from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from editors.tuning.unlearning_losses import ascent, misdirection, npo, row_mean, row_sum, simnpo

LENGTHS = (5, 1, 3)


def rows(seed: int = 0, padding: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of three suffixes of unequal length, with something in the padding."""
    generator = torch.Generator().manual_seed(seed)
    logs = -4 * torch.rand(3, 5, generator=generator, dtype=torch.float64)
    counted = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    return torch.where(counted, logs, torch.full_like(logs, padding)), counted


def reference(seed: int = 1) -> torch.Tensor:
    return row_sum(*rows(seed))


def slow(name: str, logs: list[list[float]], before: list[float]) -> list[float]:
    """The same by the papers' formulas, token by token; sigmoids and powers written out."""
    found = []
    for tokens, old in zip(logs, before, strict=True):
        total = math.fsum(tokens)
        if name == "ascent":
            found.append(total / len(tokens))
        elif name == "npo":
            found.append(2 / 0.3 * math.log(1 + (math.exp(total) / math.exp(old)) ** 0.3))
        else:
            nll = -total / len(tokens)
            found.append(-2 / 2.5 * math.log(1 / (1 + math.exp(-2.5 * (nll - 0.7)))))
    return found


def fast(name: str, logs: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    if name == "ascent":
        return ascent(logs, counted)
    if name == "npo":
        return npo(logs, counted, reference(), beta=0.3)
    return simnpo(logs, counted, beta=2.5, delta=0.7)


@pytest.mark.parametrize("name", ["ascent", "npo", "simnpo"])
def test_an_objective_is_its_formula(name):
    logs, counted = rows()
    tokens = [logs[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    wanted = torch.tensor(slow(name, tokens, reference().tolist()), dtype=torch.float64)
    assert_close(fast(name, logs, counted), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["ascent", "npo", "simnpo"])
@pytest.mark.parametrize("padding", [0.0, -99.0, -math.inf])
def test_what_stands_in_the_padding_does_not_count(name, padding):
    """A mean over all cells of the batch, as common code takes it, would dilute short rows; infinities would spread."""
    clean, counted = rows()
    found = fast(name, rows(padding=padding)[0], counted)
    assert_close(found, fast(name, clean, counted), rtol=0, atol=0)
    alone = ascent(clean[1:2, :1], counted[1:2, :1])
    assert_close(ascent(clean, counted)[1:2], alone, rtol=0, atol=0)
    assert not torch.isclose(clean[1].mean(), alone[0]), "the diluted mean is another number"


def test_by_hand():
    """Two tokens at log p = -1 and -3 under a reference at -2 in all."""
    logs, counted = torch.tensor([[-1.0, -3.0]]), torch.tensor([[True, True]])
    assert_close(ascent(logs, counted), torch.tensor([-2.0]))
    assert_close(npo(logs, counted, torch.tensor([-2.0]), beta=0.5), torch.tensor([4 * math.log(1 + math.exp(-1.0))]))
    assert_close(npo(logs, counted, torch.tensor([-4.0]), beta=0.1), torch.tensor([20 * math.log(2.0)]))
    assert_close(simnpo(logs, counted, beta=2.0, delta=2.0), torch.tensor([math.log(2.0)]))


def test_npo_takes_the_whole_suffix_and_not_its_mean():
    logs, counted = rows()
    means = 2 / 0.3 * torch.log1p(torch.exp(0.3 * (row_mean(logs, counted) - reference() / torch.tensor(LENGTHS))))
    assert not torch.allclose(npo(logs, counted, reference(), beta=0.3), means)
    length = counted.sum(1).double()
    assert_close(npo(logs, counted, reference(), beta=0.3 / length) / length, means, rtol=1e-12, atol=0)


def test_the_margin_of_simnpo_is_inside_and_per_token():
    """δ shifts the NLL per token before β scales it: with NLL = δ the pull is half, whatever β."""
    logs = torch.full((1, 7), -1.5, dtype=torch.float64, requires_grad=True)
    counted = torch.ones(1, 7, dtype=torch.bool)
    for beta in (0.5, 2.5):
        (slope,) = torch.autograd.grad(simnpo(logs, counted, beta=beta, delta=1.5).sum(), logs)
        assert_close(slope.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_npo_pulls_as_ascent_at_first_and_fades():
    logs, counted = rows()
    logs.requires_grad_(True)
    for gap, wanted in ((0.0, 1.0), (-100.0, 2 / (1 + math.exp(10)))):
        old = row_sum(logs, counted).detach() - gap
        (slope,) = torch.autograd.grad(npo(logs, counted, old, beta=0.1).sum(), logs)
        assert_close(slope, wanted * counted.double(), rtol=1e-9, atol=0)


def test_misdirection_is_a_mean_over_counted_positions():
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    towards = torch.randn(7, generator=generator, dtype=torch.float64)
    _, counted = rows()
    wanted = []
    for row, length in enumerate(LENGTHS):
        far = [float(sum((hidden[row, t, i] - towards[i]) ** 2 for i in range(7))) / 7 for t in range(length)]
        wanted.append(math.fsum(far) / length)
    assert_close(misdirection(hidden, counted, towards), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)
    assert not torch.allclose(
        misdirection(hidden, torch.ones_like(counted), towards)[1:], torch.tensor(wanted[1:]).double()
    )
