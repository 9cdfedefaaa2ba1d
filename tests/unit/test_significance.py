"""Which places count: calibrated where nothing is there, powerful where something was put."""

from __future__ import annotations

import math

import pytest
import torch

from memloc.errors import InputError, MismatchError
from memloc.provenance import Provenance
from memloc.results.significance import _welch, passage_significance, q_values, set_significance
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site

A, B = Site(0, Kind.MLP_OUT), Site(1, Kind.MLP_OUT)


def drawn(seed, *, planted=0, rows=20, places=300, shift=3.0, name="p"):
    """Scores of unlike spreads at two sites; the first `planted` places of B are shifted by so many spreads."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-2, 2, places)
    scores = {site: torch.randn(rows, places, generator=generator) * spread for site in (A, B)}
    scores[B][:, :planted] += shift * spread[:planted]
    return Localization(Grain.NEURON, scores, Provenance("by hand"), tuple(f"{name}{row}" for row in range(rows)))


def test_welch_is_the_difference_over_its_standard_error():
    rows, label = torch.randn(9, 4, dtype=torch.float64) + 100, torch.tensor([True] * 4 + [False] * 5)
    one, other = rows[label], rows[~label]
    slow = (one.mean(0) - other.mean(0)) / (one.var(0) / 4 + other.var(0) / 5).sqrt()
    torch.testing.assert_close(_welch(rows, label[None])[0], slow)
    assert _welch(torch.ones(9, 1, dtype=torch.float64), label[None]).item() == 0


def test_nothing_is_called_where_there_is_nothing():
    calls = [set_significance(drawn(2 * s), drawn(2 * s + 1), permutations=200).called(0.05).count for s in range(8)]
    assert sum(count > 0 for count in calls) <= 2
    p = torch.cat([entry for entry in set_significance(drawn(50), drawn(51), permutations=200).p.values()])
    assert abs(float((p <= 0.1).double().mean()) - 0.1) < 0.05


def test_planted_places_are_called_and_few_others():
    found = set_significance(drawn(0, planted=20), drawn(1), permutations=300)
    called = found.called(0.05)
    hits = int(called.masks[B][:20].sum())
    assert hits >= 18 and called.count - hits <= 3
    assert called.provenance.settings["false_discovery_rate"] == 0.05
    assert (found.passages, found.controls) == (20, 20)


def test_one_passage_is_told_from_controls():
    memorized, controls = drawn(0, planted=10, shift=12.0), drawn(1, rows=30)
    called = passage_significance(memorized, controls, "p3").called(0.05)
    assert int(called.masks[B][:10].sum()) == 10 and called.count <= 12
    calls = [passage_significance(drawn(3), controls, f"p{row}").called(0.05).count for row in range(10)]
    assert sum(count > 0 for count in calls) <= 3


def test_q_values_are_benjamini_and_hochbergs():
    p = torch.tensor([0.01, 0.5, 0.03, 0.02, 1.0], dtype=torch.float64)
    expected = [0.05, 0.625, 0.05, 0.05, 1.0]
    assert all(math.isclose(one, other) for one, other in zip(q_values(p).tolist(), expected, strict=True))


def test_sides_that_do_not_fit_are_refused():
    whole = drawn(0)
    with pytest.raises(InputError, match="memorized: scores kept per passage are needed, of at least 4"):
        set_significance(whole.mean(), drawn(1))
    with pytest.raises(InputError, match="controls: scores kept per passage"):
        set_significance(whole, drawn(1, rows=3))
    with pytest.raises(MismatchError, match="other sites"):
        set_significance(whole, Localization(Grain.NEURON, {A: torch.ones(4, 300)}, Provenance("x"), tuple("abcd")))
    with pytest.raises(MismatchError, match="another number of places"):
        set_significance(whole, drawn(1, places=10))
