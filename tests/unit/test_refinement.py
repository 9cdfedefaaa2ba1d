"""What prompts agree in, and what a relation shares, by hand."""

from __future__ import annotations

import pytest
import torch

from memloc.errors import InputError
from memloc.results.refinement import agreed, coarse, refine, shared


def test_a_place_passes_where_its_score_reaches_the_bar_and_lies_above_zero():
    scores = torch.tensor([-5.0, 0.0, 0.2, 0.19, 1.0])
    assert coarse(scores, 0.2, "share") == (pytest.approx(0.2), (2, 4))
    assert coarse(scores, 0.19, "absolute")[1] == (2, 3, 4)
    assert coarse(scores, 0.6, "quantile")[1] == (2, 4), "3 of 5 places lie below 0.2"
    assert coarse(-scores.abs(), 0.2, "share")[1] == (), "nothing speaks for an answer that all speak against"
    with pytest.raises(InputError, match=r"threshold 1\.5 as a quantile"):
        coarse(scores, 1.5, "quantile")


def test_places_pass_in_a_share_of_the_prompts_and_in_some_at_least():
    prompts = [(1, 2, 3), (1, 2), (1,), (1, 4)]
    assert agreed(prompts, 0.5) == (1, 2)
    assert agreed(prompts, 0.5, strict=True) == (1,)
    assert agreed(prompts, 0.25) == (1, 2, 3, 4)
    assert agreed(prompts, 0.25, least=3) == (1,)
    assert agreed([(1, 2)], 0.7, least=3) == (1, 2), "a fact with one prompt has no other to agree with"
    assert agreed([], 0.7) == ()


@pytest.mark.parametrize(("share", "n", "count"), [(0.55, 20, 11), (0.7, 10, 7), (0.35, 20, 7), (0.15, 20, 3)])
def test_a_share_of_the_prompts_is_exact_whatever_the_last_bit(share, n, count):
    prompts = [(9,)] * count + [()] * (n - count)
    assert agreed(prompts, share) == (9,) and agreed(prompts, share, strict=True) == ()
    assert agreed([*prompts[1:], ()], share) == ()


def fact(counts, n=20):
    """A fact of n prompts whose place i passes in counts[i] of them."""
    return [tuple(place for place, count in enumerate(counts) if prompt < count) for prompt in range(n)]


def test_the_share_rises_until_a_fact_has_few_enough():
    """7 places at .7, 7 at .75, 4 at .8: two rounds."""
    found = refine({"a": fact([20, 20, 20, 16, 15, 15, 15, 3])})
    assert (found.share, found.rounds, found.mean) == (0.8, 2, 4)
    assert found.kept == {"a": (0, 1, 2, 3)}


def test_the_share_falls_until_facts_have_enough_on_average():
    """At .7 one and none, at .65 two and one, at .6 two and two."""
    facts = {"a": fact([14, 13]), "b": fact([13, 12])}
    found = refine(facts)
    assert (found.share, found.rounds, found.mean) == (0.6, 2, 2)
    assert found.kept == {"a": (0, 1), "b": (0, 1)}
    assert refine(facts, rounds=1).kept == {"a": (0, 1), "b": (0,)}
    assert refine(facts, rounds=0).kept == {"a": (0,), "b": ()}


def test_the_share_stops_after_its_rounds_and_at_its_ends():
    many = {"a": fact([20] * 9)}
    assert (refine(many).share, refine(many).rounds) == (1.0, 6)
    assert (refine(many, rounds=9).share, refine(many, rounds=9).rounds) == (1.0, 6)
    assert refine(many, rounds=9, strict=True).share == 0.95, "more than all prompts is nothing"
    none = {"a": fact([0])}
    assert (refine(none).share, refine(none).mean) == (0.4, 0)
    assert refine({"a": fact([20, 20, 20])}).rounds == 0


def test_few_prompts_must_all_agree():
    assert refine({"a": [(1, 2), (1, 2), (2, 3)]}, rounds=6).kept == {"a": (2,)}
    assert refine({"a": [(1, 2), (1, 2), (2, 3)]}, rounds=6, least=2).kept == {"a": (1, 2)}


def test_what_many_facts_keep_is_the_relations():
    kept = {str(index): (7,) if index < 4 else (5, index + 10) for index in range(20)}
    assert shared(kept, 0.1) == {5: 16, 7: 4}
    assert list(shared(kept, 0.1)) == [5, 7], "most shared first"
    assert shared(kept, 0.25) == {5: 16}
    assert shared({"a": (1, 2), "b": (2,)}, 0.1) == {2: 2}, "one fact shares nothing"
