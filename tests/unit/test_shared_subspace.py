from __future__ import annotations

import pytest
import torch
import zoo

from editors.base import Request
from editors.checks import hands_off
from editors.pruners.durable import Durable
from editors.pruners.subspace import Subspace
from editors.pruning.shared_subspace import chance_overlap, overlap, pruned, shared_subspace
from memloc.errors import InputError
from memloc.objectives import suffix_nll
from memloc.passages import Passage, Passages
from memloc.sites import Kind, Site
from memloc.view import ModelView

A, B = Site(0, Kind.MLP_IN), Site(1, Kind.MLP_OUT)


def test_overlap_is_shared_over_either_also_where_a_site_is_missing():
    first = {A: torch.tensor([[True, True, False]]), B: torch.tensor([[True]])}
    second = {A: torch.tensor([[False, True, True]])}
    assert overlap(first, second) == 1 / 4 and overlap(first, first) == 1.0 and overlap({}, {}) == 1.0


def test_chance_is_what_masks_drawn_at_random_give():
    sizes, counts = {A: (11, 13), B: (7, 30)}, {A: (40, 20), B: (12, 90)}
    generator = torch.Generator().manual_seed(0)

    def drawn(which):
        found = {}
        for site, shape in sizes.items():
            flat = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
            flat[torch.randperm(len(flat), generator=generator)[: counts[site][which]]] = True
            found[site] = flat.view(shape)
        return found

    pairs = [(drawn(0), drawn(1)) for _ in range(300)]
    mean = sum(overlap(*pair) for pair in pairs) / len(pairs)
    assert chance_overlap(*pairs[0]) == pytest.approx(mean, rel=0.03)


def test_halves_that_are_nearly_the_same_share_all_and_strangers_do_not():
    """A control that the answer follows the passages: a twin set with other last tokens against strangers."""
    view = ModelView.open(zoo.build("gpt2"))
    first = zoo.passages(3)
    twins = Passages(tuple(Passage(f"{item.id}'", item.prefix, (*item.suffix[:-1], 1)) for item in first))
    strangers = zoo.passages(3, seed=8), zoo.passages(3, seed=9)

    def likely(seen, rows):
        return -float(torch.cat([suffix_nll(seen, batch) for batch in seen.batches(rows)]).detach().mean())

    with hands_off(view):
        found = shared_subspace(view, Durable(share=0.1), Request(), (first, twins), strangers, likely)
    assert found.halves > 2 * found.controls > 4 * found.chance and found.halves > 2 * found.between_controls
    assert found.pruned == found.pruned_controls == 3 * 2 * int(0.1 * 24 * 37)
    assert found.transfer == pytest.approx((found.before - found.other) / (found.before - found.own))
    assert found.to_json()["transfer"] == found.transfer


def test_bad_halves_and_edits_that_are_no_masks_are_refused():
    view = ModelView.open(zoo.build("gpt2"))
    rows, others = zoo.passages(3), (zoo.passages(2, seed=8), zoo.passages(2, seed=9))
    with pytest.raises(InputError, match="the halves share a passage"):
        shared_subspace(view, Durable(), Request(), (rows[:2], rows[1:]), others, lambda *_: 0.0)
    edit = Subspace(mode="directions", rank=1)(view, Request(forget=rows, text=others[0]))
    with pytest.raises(InputError, match="of low rank and picks no weights"):
        pruned(edit)
