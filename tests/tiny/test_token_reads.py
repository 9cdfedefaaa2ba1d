"""Reading at tokens: the same as row by row and whole, whatever the order, the lengths and the size of a group."""

from __future__ import annotations

import pytest
import torch

from editors.facts.contexts import Row
from editors.facts.keys_values import read_at, read_blocks_at
from memloc.batches import pad
from memloc.sites import Kind, Site

SITES = (Site(0, Kind.MLP_OUT), Site(1, Kind.MLP_OUT))
ROWS = (Row((3, 9, 4, 11, 7, 2, 8), 2), Row((5, 6), 1), Row((12, 1, 30, 21, 4, 9, 8, 2, 17), 0), Row((2, 8, 6, 5), 3),
        Row((7, 7, 7, 1, 3), 4))  # fmt: skip


def alone(view, row, side):
    """One whole row, nothing padded, nothing left out."""
    with torch.no_grad(), view.record(SITES, side=side) as seen, view.record_blocks([1]) as blocks:
        view.hidden(pad([row.ids]))
    return {site: seen[site][0, row.at] for site in SITES}, blocks[1][0, row.at]


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "falcon_new", "mixtral"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_rows_are_read_as_if_alone_and_in_their_order(view_of, family, side):
    view = view_of(family, torch.float64)
    expected = [alone(view, row, side) for row in ROWS]
    for size in (1, 2, 64):
        found = read_at(view, SITES, ROWS, side=side, size=size)
        for site in SITES:
            torch.testing.assert_close(found[site], torch.stack([sites[site] for sites, _ in expected]))
        blocks = read_blocks_at(view, 1, ROWS, size=size)
        torch.testing.assert_close(blocks, torch.stack([block for _, block in expected]))


def test_what_stands_behind_the_token_is_read_only_where_it_is_heard(view_of, monkeypatch):
    """A model that reads both ways hears it: there the whole row must be read."""
    longer = Row((*ROWS[0].ids[:3], 40, 41, 42), 2)
    for family, heard in (("gpt2", False), ("bert", True)):
        view, widths = view_of(family), []
        hidden = type(view).hidden
        monkeypatch.setattr(type(view), "hidden", lambda self, batch, hidden=hidden, widths=widths: (
            widths.append(batch.ids.shape[1]), hidden(self, batch))[1])  # fmt: skip
        first, second = (read_at(view, SITES[1:], [row])[SITES[1]] for row in (ROWS[0], longer))
        monkeypatch.undo()
        assert widths == ([7, 6] if heard else [3, 3])
        assert torch.equal(first, second) is not heard


def test_padding_is_by_rows_of_like_lengths(view_of, monkeypatch):
    view, widths = view_of("gpt2"), []
    hidden = type(view).hidden
    monkeypatch.setattr(type(view), "hidden", lambda self, batch: (
        widths.append(tuple(batch.ids.shape)), hidden(self, batch))[1])  # fmt: skip
    read_at(view, SITES[:1], [Row((1,) * length, length - 1) for length in (9, 2, 8, 3)], size=2)
    assert widths == [(2, 3), (2, 9)]


def test_a_batch_is_padded_on_the_right():
    batch = pad([(4, 5, 6), (7,)], [2, 1], [3, 8])
    assert batch.ids.tolist() == [[4, 5, 6], [7, 0, 0]] and batch.ids.dtype == torch.long
    assert (batch.length.tolist(), batch.prefix.tolist(), batch.rows) == ([3, 1], [2, 1], (3, 8))
