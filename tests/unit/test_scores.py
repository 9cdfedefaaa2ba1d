import math

import pytest
import torch

from memloc.errors import ArtifactError, InputError, MismatchError
from memloc.provenance import Provenance
from memloc.scores import Localization, Selection, selected
from memloc.sites import Grain, Kind, Site

A, B = Site(0, Kind.MLP_OUT), Site(1, Kind.MLP_OUT)


def localization(a, b, **more):
    return Localization(Grain.NEURON, {B: torch.tensor(b), A: torch.tensor(a)}, Provenance("test"), **more)


def test_top_takes_the_largest_anywhere():
    assert localization([1.0, 9.0, 2.0], [8.0, 0.0, 3.0]).top(2).indices() == {A: [1], B: [0]}


def test_top_per_site_takes_as_many_at_each():
    assert localization([1.0, 9.0, 2.0], [8.0, 0.0, 3.0]).top(1, per="site").indices() == {A: [1], B: [0]}
    assert localization([1.0, 9.0, 8.5], [8.0, 0.0, 3.0]).top(2).indices() == {A: [1, 2]}


def test_ties_go_to_the_lower_layer_then_the_lower_index():
    assert localization([1.0, 1.0, 0.0], [1.0, 1.0, 1.0]).top(3).indices() == {A: [0, 1], B: [0]}


@pytest.mark.parametrize("fraction, count", [(0.5, 3), (1.0, 6), (1e-9, 1)])
def test_a_fraction_counts_all_places_and_takes_at_least_one(fraction, count):
    assert localization([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]).top(fraction=fraction).count == count


@pytest.mark.parametrize(
    "how", [{}, {"count": 1, "fraction": 0.5}, {"count": 7}, {"count": 0}, {"fraction": 0.0}, {"fraction": 1.5}]
)
def test_an_amount_out_of_range_is_refused(how):
    with pytest.raises(InputError, match=r"count|fraction"):
        localization([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]).top(how.get("count"), fraction=how.get("fraction"))


def test_scores_that_are_not_finite_are_refused_by_site():
    with pytest.raises(InputError, match=r"L1\.mlp\.out"):
        localization([1.0], [math.nan])


def test_passages_give_an_axis_and_a_mean():
    found = localization([[1.0, 3.0], [3.0, 5.0]], [[0.0, 0.0], [2.0, 2.0]], passages=("p", "q"))
    torch.testing.assert_close(found.mean().scores[A], torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(found.of("q").scores[B], torch.tensor([2.0, 2.0]))
    with pytest.raises(InputError, match="no scores of passage 'r'"):
        found.of("r")


def test_an_axis_of_another_length_is_refused():
    with pytest.raises(InputError, match="expected 3 passages"):
        localization([[1.0]], [[1.0]], passages=("p", "q", "r"))


def test_a_localization_survives_the_disk(tmp_path):
    found = localization([[1.0, 3.0]], [[0.5, -1.0]], passages=("p",), notes={"gap": 0.25, "rule": "x"})
    found.save(tmp_path / "l.safetensors")
    again = Localization.load(tmp_path / "l.safetensors")
    assert (again.grain, again.passages, again.notes, again.provenance) == (
        found.grain,
        found.passages,
        found.notes,
        found.provenance,
    )
    for site, scores in found.scores.items():
        torch.testing.assert_close(again.scores[site], scores, rtol=0, atol=0)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ArtifactError, match="no such file"):
        Localization.load(tmp_path / "none")


def test_the_control_matches_site_by_site_and_is_seeded():
    chosen = localization([5.0, 4.0, 3.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0, 0.0]).top(4)
    control = chosen.random_like(1)
    assert {site: len(entries) for site, entries in control.indices().items()} == {A: 3, B: 1}
    assert control.indices() == chosen.random_like(1).indices()
    assert len({str(chosen.random_like(seed).indices()) for seed in range(8)}) > 1


def test_the_control_over_the_model_matches_the_total_only():
    chosen = localization([5.0, 4.0, 3.0, 1.0, 1.0], [0.0] * 5).top(5)
    counts = {tuple(len(v) for v in chosen.random_like(s, per="model").indices().values()) for s in range(8)}
    assert chosen.random_like(3, per="model").count == 5 and counts != {(5,)}


def test_the_control_leaves_the_global_generator_alone():
    chosen = localization([5.0, 4.0], [2.0, 0.0]).top(1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    chosen.random_like(0)
    assert torch.equal(before, torch.get_rng_state())


def test_overlap_is_shared_over_either():
    one = selected({A: [0, 1], B: []}, {A: 4, B: 4}, Grain.NEURON)
    two = selected({A: [1, 2], B: [3]}, {A: 4, B: 4}, Grain.NEURON)
    assert one.overlap(two) == 0.25 and one.overlap(one) == 1.0
    with pytest.raises(MismatchError, match="heads"):
        one.overlap(selected({A: [0]}, {A: 4}, Grain.HEAD))


def test_a_selection_by_hand_refuses_an_index_that_is_not_there():
    with pytest.raises(InputError, match="outside the 4"):
        selected({A: [4]}, {A: 4}, Grain.NEURON)


def test_different_grains_are_not_compared():
    one = localization([1.0], [1.0])
    other = Localization(Grain.HEAD, one.scores, Provenance("test"))
    with pytest.raises(MismatchError, match="neuron with head"):
        one.minus(other)


def test_scores_of_positions_end_where_their_passage_does(tmp_path):
    site = Site(0, Kind.MLP_OUT)
    scores = {site: torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]])}
    found = Localization(Grain.POSITION, scores, Provenance("by hand"), ("a", "b"), lengths=(3, 2))
    assert found.of("b").scores[site].tolist() == [4.0, 5.0]
    found.save(tmp_path / "positions.safetensors")
    assert Localization.load(tmp_path / "positions.safetensors").lengths == (3, 2)
    with pytest.raises(InputError, match="3 lengths for 2 passages"):
        Localization(Grain.POSITION, scores, Provenance("by hand"), ("a", "b"), lengths=(3, 2, 1))


def test_a_selection_survives_the_disk(tmp_path):
    chosen = localization([1.0, 9.0, 2.0], [8.0, 0.0, 3.0]).top(2)
    chosen.save(tmp_path / "selection.safetensors")
    loaded = Selection.load(tmp_path / "selection.safetensors")
    assert loaded.indices() == chosen.indices() and loaded.grain == chosen.grain
    assert loaded.provenance == chosen.provenance
    with pytest.raises(ArtifactError, match="holds selection, expected localization"):
        Localization.load(tmp_path / "selection.safetensors")
