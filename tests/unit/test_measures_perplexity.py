"""Perplexity against transformers' own loss on rows one at a time."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import CONFIGS, case

from memloc.errors import InputError
from memloc.measures.perplexity import Perplexity
from memloc.passages import Passages
from memloc.view import ModelView


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_token_counts_once_whatever_its_window(family):
    model, passages = case(family)
    found = Perplexity(batch_size=4)(ModelView.open(model), passages)
    total, tokens, by_row = 0.0, 0, []
    for item in passages:
        ids = torch.tensor([item.ids])
        labels = ids.clone()
        labels[0, : len(item.prefix)] = -100
        with torch.no_grad():
            loss = model(ids, labels=labels).loss.item()
        by_row.append(loss)
        total, tokens = total + loss * len(item.suffix), tokens + len(item.suffix)
    assert [row["nll"] for row in found.rows] == pytest.approx(by_row, rel=1e-5)
    assert found["nll"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    # The mean of the windows' perplexities, which is often printed instead, is another number.
    assert abs(sum(map(math.exp, by_row)) / len(by_row) / found["perplexity"] - 1) > 0.05


def test_batch_size_and_order_do_not_matter():
    model, passages = case("gpt2")
    view = ModelView.open(model)
    whole, other = Perplexity()(view, passages), Perplexity(batch_size=1)(view, Passages(passages.items[::-1]))
    assert other["nll"] == pytest.approx(whole["nll"], rel=1e-12)
    assert [row["id"] for row in other.rows] == list(passages.ids)[::-1]


def test_the_interval_holds_the_figure_and_is_of_the_same_unit():
    model, passages = case("gpt2")
    figures = Perplexity()(ModelView.open(model), passages).figures
    for name in ("perplexity", "nll"):
        assert figures[name].low < figures[name].value < figures[name].high
    assert figures["perplexity"].low == pytest.approx(math.exp(figures["nll"].low))


def test_one_passage_has_no_interval():
    model, passages = case("gpt2")
    figure = Perplexity()(ModelView.open(model), passages[:1]).figures["perplexity"]
    assert (figure.low, figure.high, figure.n) == (None, None, 1)


def test_an_empty_batch_is_refused():
    with pytest.raises(InputError, match="batch_size 0"):
        Perplexity(batch_size=0)
