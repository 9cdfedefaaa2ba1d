"""Greedy continuations against transformers' generate, one row at a time."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS, case, greedy, mixed_passages, tiny

from memloc.errors import InputError
from memloc.measures.continuation import continue_greedy
from memloc.passages import Passage, Passages
from memloc.view import ModelView


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("size", [1, 3, 50])
def test_rows_of_many_lengths_are_what_generation_says_alone(family, size):
    model, passages = case(family)
    said = continue_greedy(ModelView.open(model), passages, batch_size=size)
    assert said == tuple(greedy(model, item.prefix, len(item.suffix)) for item in passages)


def test_rows_of_one_prefix_length_and_many_suffix_lengths():
    model = tiny("gpt2")
    passages = Passages(tuple(Passage(str(i), (3, i, 7), (1,) * n) for i, n in enumerate((4, 1, 9, 2, 9))))
    said = continue_greedy(ModelView.open(model), passages)
    assert [len(line) for line in said] == [4, 1, 9, 2, 9]
    assert said == tuple(greedy(model, item.prefix, len(item.suffix)) for item in passages)


def test_as_many_tokens_as_asked():
    model, passages = case("llama")
    said = continue_greedy(ModelView.open(model), passages, 5)
    assert said == tuple(greedy(model, item.prefix, 5) for item in passages)


def test_no_end_token_and_no_penalty_of_the_checkpoint_bends_it():
    """generate stops at the end token and obeys the checkpoint's generation_config; a suffix may hold anything."""
    model = tiny("gpt2")
    passages = mixed_passages(model)
    plain = continue_greedy(ModelView.open(model), passages, 8)
    model.generation_config.eos_token_id = plain[0][2]
    model.generation_config.pad_token_id = 0
    model.generation_config.repetition_penalty = 5.0
    assert greedy(model, passages[0].prefix, 8) != plain[0]
    assert continue_greedy(ModelView.open(model), passages, 8) == plain


def test_a_continuation_beyond_the_context_is_refused_by_name():
    model = tiny("gpt2")
    passages = Passages((Passage("long", (1,) * 40, (2,)),))
    view = ModelView.open(model)
    assert len(continue_greedy(view, passages, 8)[0]) == 8
    with pytest.raises(InputError, match="'long': 40 tokens and 9 more, the model's context holds 48"):
        continue_greedy(view, passages, 9)


def test_no_token_is_refused_and_no_passage_gives_none():
    model, passages = case("gpt2")
    with pytest.raises(InputError, match="tokens 0"):
        continue_greedy(ModelView.open(model), passages, 0)
    assert continue_greedy(ModelView.open(model), Passages(())) == ()


def test_gradients_stay_out_of_it():
    model, passages = case("gpt2")
    view = ModelView.open(model)
    with torch.enable_grad():
        continue_greedy(view, passages[:2])
    assert all(parameter.grad is None for parameter in model.parameters())
