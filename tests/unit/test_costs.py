"""What a run takes, told and counted: the counter and the meter against sums made by hand."""

from __future__ import annotations

import torch
import zoo

from memloc.costs import Cost, block_tokens, counted, pass_bytes, widest
from memloc.objectives import suffix_nll
from memloc.sites import Kind, Site
from memloc.view import ModelView


def test_a_forward_takes_every_token_through_every_block_padding_included():
    view, passages = ModelView.open(zoo.build("gpt2")), zoo.passages(3)
    lengths = sorted(len(item.ids) for item in passages)
    assert lengths[0] < lengths[-1]
    with counted(view) as spent:
        for batch in view.batches(passages, size=3):
            view.hidden(batch)
    assert spent.forward == 3 * lengths[-1] * view.layers == block_tokens(view, passages, size=3)
    assert block_tokens(view, passages, size=1) == sum(lengths) * view.layers
    assert (spent.backward, widest(passages, size=3)) == (0, (3, lengths[-1]))


def test_a_backward_counts_only_the_blocks_a_gradient_reaches():
    view, passages = ModelView.open(zoo.build("llama")), zoo.passages(1)
    tokens = len(passages[0].ids)
    for layer in range(view.layers):
        with view.trainable([view.parameter(Site(layer, Kind.MLP_OUT))]), counted(view) as spent:
            suffix_nll(view, next(view.batches(passages))).sum().backward()
        assert spent.backward == tokens * (view.layers - layer)


def test_memory_is_counted_at_its_highest_and_given_back():
    view = ModelView.open(zoo.build("gpt2"))
    with counted(view) as spent:
        one = torch.zeros(1000, 250)
        two = one + 1
        del one
        three = two.view(250, 1000)
        del two, three
        torch.zeros(1000, 250)
    assert spent.bytes == 2 * 4 * 250_000


def test_the_estimate_of_a_pass_is_not_less_than_what_it_takes():
    for family in zoo.FAMILIES:
        view, passages = ModelView.open(zoo.build(family)), zoo.passages(4)
        batch = next(view.batches(passages))
        rows, tokens = batch.ids.shape
        spoken = int(batch.suffix_mask.sum())
        with view.frozen(), torch.no_grad(), counted(view) as spent:
            view.logits_at(batch, *batch.suffix_index()[:2])
        assert spent.bytes <= pass_bytes(view, rows * tokens, context=tokens, unembedded=spoken)
        with view.trainable([view.parameter(Site(0, Kind.MLP_OUT))]), counted(view) as spent:
            suffix_nll(view, batch).sum().backward()
        assert spent.bytes <= pass_bytes(view, rows * tokens, context=tokens, grad=True, unembedded=spoken)


def test_costs_add_up_and_are_told_in_passes_over_the_passages():
    view, passages = ModelView.open(zoo.build("gpt2")), zoo.passages(2, ragged=False)
    one = block_tokens(view, passages, size=2)
    both = Cost(one, bytes=5 << 20) + Cost(2 * one, one, 3 << 20, "at most").times(2)
    assert both == Cost(5 * one, 2 * one, 5 << 20, "at most")
    assert (
        both.told(view, passages)
        == "at most 5 forward and 2 backward passes over 2 passages; working memory up to 5 MB"
    )
