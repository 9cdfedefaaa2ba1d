"""What pruners share: budgets, ties, restrictions, controls of equal budget; units silenced as an edit and by hooks."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch.testing import assert_close

from editors.base import Request
from editors.checks import check_inside, hands_off
from editors.masks import weight_masks
from editors.pruners.balanced_subnet import BalancedSubnet
from editors.pruners.durable import Durable
from editors.pruners.greedy import Greedy
from editors.pruners.head_dropout import HeadDropout
from editors.pruners.magnitude import Magnitude
from editors.pruners.neuron_dropout import NeuronDropout
from editors.pruners.obs import Obs
from editors.pruners.random import Random
from editors.pruners.subnet import Subnet
from editors.pruners.subspace import Subspace
from editors.pruning.prunings import highest, how_many, kept_rows
from editors.pruning.silencing import drawn_inputs
from memloc.errors import InputError, ModelError
from memloc.localizers.random import Random as RandomScores
from memloc.provenance import Provenance
from memloc.scores import Selection, selected
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView

FORGET, RETAIN, TEXT = zoo.passages(3), zoo.passages(2, seed=4), zoo.passages(6, seed=5)
A, B = Site(0, Kind.MLP_IN), Site(1, Kind.MLP_OUT)


def weights_chosen(view: ModelView, fraction: float = 0.4) -> Selection:
    return RandomScores(grain="weight")(view, FORGET).top(fraction=fraction)


def slow_highest(scores, where, part, among):
    """One entry at a time, from a sorted list of (minus score, site, entry)."""
    groups: dict[object, list[tuple[float, Site, int]]] = {}
    for site in sorted(where):
        width = where[site].shape[1]
        for place in range(where[site].numel()):
            if where[site].flatten()[place]:
                key = {"model": 0, "matrix": site, "row": (site, place // width)}[among]
                groups.setdefault(key, []).append((-float(scores[site].flatten()[place]), site, place))
    found = {site: torch.zeros_like(mask) for site, mask in where.items()}
    for entries in groups.values():
        for _, site, place in sorted(entries)[: int(round(part * len(entries), 6))]:
            found[site].view(-1)[place] = True
    return {site: mask for site, mask in found.items() if mask.any()}


@pytest.mark.parametrize("among", ["matrix", "row", "model"])
@pytest.mark.parametrize("part", [0.1, 0.37, 1.0])
def test_the_best_scored_share_is_that_of_a_sorted_list_also_among_equals(among, part):
    generator = torch.Generator().manual_seed(0)
    shapes = {A: (5, 11), B: (7, 4)}
    scores = {site: torch.randint(0, 6, shape, generator=generator).float() for site, shape in shapes.items()}
    where = {site: torch.rand(shape, generator=generator) < 0.7 for site, shape in shapes.items()}
    where[A][2] = False
    wanted = slow_highest(scores, where, part, among)
    if not wanted:
        return
    found = highest(scores, where, part, among)
    assert found.keys() == wanted.keys() and all(torch.equal(found[site], wanted[site]) for site in wanted)


def test_a_share_that_is_whole_but_for_rounding_is_whole():
    assert [how_many(part, count) for part, count in ((0.29, 100), (0.1, 30), (0.7, 10), (0.05, 19), (1, 7))] == [
        29, 3, 7, 0, 7,
    ]  # fmt: skip


def test_nothing_to_prune_and_scores_that_are_no_numbers_are_refused():
    where, scores = {A: torch.ones(2, 3, dtype=torch.bool)}, {A: torch.ones(2, 3)}
    with pytest.raises(InputError, match=r"^a share of 0\.1 of 6 weights, taken per row, is none; ask for more$"):
        highest(scores, where, 0.1, "row")
    scores[A][1, 2] = torch.nan
    with pytest.raises(ModelError, match=r"^L0\.mlp\.in: scores that are not finite"):
        highest(scores, where, 0.5, "row")
    where[A][1, 2] = False
    assert highest(scores, where, 0.5, "matrix")[A].sum() == 2, "what does not compete does not count"


EDITORS = (
    Magnitude(share=0.3), Random(share=0.3), Durable(share=0.3), Subspace(share=0.5), Greedy(share=0.2, backwards=2),
    Obs(share=0.3, gradients=3, block=5), Subnet(share=0.3, epochs=1), BalancedSubnet(share=0.3, epochs=1),
    Obs(share=0.1, gradients=3, block=5, compensate="forget"), Subspace(mode="directions", rank=2),
)  # fmt: skip


@pytest.mark.parametrize("editor", EDITORS, ids=lambda editor: type(editor).__name__)
@pytest.mark.parametrize("grain", ["weight", "neuron", "head", "component", "layer"])
def test_a_selection_of_any_grain_restricts_every_pruner(editor, grain, view_of_gpt2):
    view = view_of_gpt2
    selection = RandomScores(grain=grain)(view, FORGET).top(fraction=0.4)
    where = {site: mask for site, mask in weight_masks(view, selection).items() if not site.bias}
    with hands_off(view):
        edit = editor(view, Request(forget=FORGET, retain=RETAIN, text=TEXT, selection=selection))
    check_inside(edit, where)
    if isinstance(editor, Magnitude | Random | Durable):
        wanted = {str(site): how_many(0.3, int(mask.sum())) for site, mask in where.items()}
        assert edit.notes["by site"] == wanted and edit.notes["pruned"] == sum(wanted.values())


def test_a_selection_of_biases_or_of_embeddings_is_refused(view_of_gpt2):
    bias = Site(0, Kind.MLP_OUT, bias=True)
    only = Selection(Grain.WEIGHT, {bias: torch.ones(24, dtype=torch.bool)}, Provenance("by hand"))
    for editor in (Magnitude(share=0.5), Magnitude(), Durable()):
        with pytest.raises(InputError, match="biases only, and biases are never pruned"):
            editor(view_of_gpt2, Request(forget=FORGET, selection=only))
    embed = view_of_gpt2.sites(Kind.EMBED)[0]
    outside = Selection(Grain.WEIGHT, {embed: torch.ones(53, 24, dtype=torch.bool)}, Provenance("by hand"))
    with pytest.raises(InputError, match="embed: only maps inside blocks can be pruned"):
        Durable()(view_of_gpt2, Request(forget=FORGET, selection=outside))


@pytest.mark.parametrize("order", ["smallest", "largest"])
def test_magnitude_prunes_the_ends_of_a_sorted_list(order, view_of_gpt2):
    edit = Magnitude(share=0.1, order=order)(view_of_gpt2, Request())
    assert {site.kind for site in edit.deltas} == {Kind.MLP_IN, Kind.MLP_OUT}
    for site, delta in edit.deltas.items():
        weight = view_of_gpt2.weight(site).detach()
        sizes = sorted(weight.abs().flatten().tolist(), reverse=order == "largest")
        count = weight.numel() // 10
        gone = weight[delta.dense() != 0].abs()
        assert len(gone) == count
        assert sorted(gone.tolist(), reverse=order == "largest") == sizes[:count]


@pytest.mark.parametrize("control", [Magnitude(), Random()], ids=["magnitude", "random"])
def test_a_control_prunes_as_many_weights_at_every_site_as_the_selection_names(control, view_of_gpt2):
    chosen = weights_chosen(view_of_gpt2, 0.03)
    named = {site: int(mask.sum()) for site, mask in weight_masks(view_of_gpt2, chosen).items()}
    edit = control(view_of_gpt2, Request(selection=chosen, seed=3))
    assert {site: delta.touched for site, delta in edit.deltas.items()} == named
    shared = sum(int((edit.deltas[site].dense() != 0)[chosen.masks[site]].sum()) for site in named)
    assert shared < 0.2 * sum(named.values()), "it is not the selection itself"
    with edit.apply(view_of_gpt2):
        for site, delta in edit.deltas.items():
            assert not view_of_gpt2.weight(site)[delta.dense() != 0].any()


def test_random_pruning_is_even_and_follows_its_seed(view_of_gpt2):
    first, again, other = (Random(share=0.5)(view_of_gpt2, Request(seed=seed)) for seed in (1, 1, 2))
    assert first.digest == again.digest != other.digest
    where = torch.cat([delta.dense().flatten() != 0 for delta in first.deltas.values()])
    count = len(where)
    assert int(where.sum()) == sum(view_of_gpt2.weight(site).numel() // 2 for site in first.deltas)
    assert abs(float(where[: count // 2].float().mean()) - 0.5) < 0.03


def test_how_much_must_be_said_and_settings_are_checked(view_of_gpt2):
    for editor in (Magnitude(), Random()):
        with pytest.raises(InputError, match=r"^how much should be pruned\? give a share, or a selection to match"):
            editor(view_of_gpt2, Request())
    for make, words in (
        (lambda: Magnitude(share=0.0), r"share 0\.0: expected above 0"),
        (lambda: Durable(share=1.5), r"share 1\.5"),
        (lambda: Durable(among="layer"), "among 'layer': expected one of matrix, row, model"),
        (lambda: Obs(kinds="mlps"), "kinds 'mlps': expected one of mlp, mlp-out, attention, all"),
        (lambda: Obs(damping=0.0), "damping 0.0: expected at least 1, and damping above 0"),
        (lambda: Subspace(rank=0), "rank 0"),
        (lambda: Subnet(momentum=1.0), "momentum 1.0"),
        (lambda: BalancedSubnet(keep_weight=1.1), "keep_weight 1.1"),
        (lambda: Greedy(backwards=0), "backwards 0"),
        (lambda: HeadDropout(mode="noise"), "mode 'noise': expected 'zero', 'mean', 'scale' or 'resample'"),
    ):
        with pytest.raises(InputError, match=words):
            make()
    with pytest.raises(InputError, match="needs ordinary text"):
        Subspace()(view_of_gpt2, Request(forget=FORGET))
    with pytest.raises(InputError, match="subnet does without"):
        BalancedSubnet()(view_of_gpt2, Request(forget=FORGET))
    with pytest.raises(InputError, match="both to forget and to keep"):
        kept_rows(Request(forget=FORGET, retain=FORGET[1:2]))


def test_rows_to_keep_may_share_names_between_sets():
    kept = kept_rows(Request(retain=RETAIN, text=TEXT))
    assert kept is not None and len(kept) == len(RETAIN) + len(TEXT) == len(set(kept.ids))
    assert kept_rows(Request()) is None


# -- units -----------------------------------------------------------------------------------------------------------


def units(view: ModelView, grain: str) -> Selection:
    if grain == "neuron":
        sites = {Site(0, Kind.MLP_OUT): [1, 8, 36], Site(2, Kind.MLP_OUT): [0]}
        return selected(sites, {site: view.neurons for site in sites}, Grain.NEURON)
    return selected({Site(1, Kind.ATTN_OUT): [0, 2]}, {Site(1, Kind.ATTN_OUT): view.heads}, Grain.HEAD)


@pytest.mark.parametrize("mode", ["zero", "scale", "mean", "resample"])
@pytest.mark.parametrize("grain", ["neuron", "head"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_the_hook_form_of_every_mode_is_the_edit(family, grain, mode):
    view = ModelView.open(zoo.build(family, dtype=torch.float64))
    editor = (NeuronDropout if grain == "neuron" else HeadDropout)(mode=mode, factor=-0.7)
    request = Request(selection=units(view, grain), text=TEXT, seed=5)
    batch = next(view.batches(FORGET))
    with torch.no_grad():
        plain = view.logits(batch)
        with hands_off(view), editor.hooked(view, request):
            hooked = view.logits(batch)
        assert float((hooked - plain).abs().max()) > 1e-4
        biased = all(view.has(Site(site.layer, site.kind, bias=True)) for site in request.selection.masks)
        if mode in ("mean", "resample") and not biased:
            with pytest.raises(InputError, match="has no bias to hold a constant; use mode zero or scale, or the hook"):
                editor(view, request)
            return
        with editor(view, request).apply(view):
            edited = view.logits(batch)
    assert_close(hooked[batch.mask], edited[batch.mask], rtol=0, atol=2e-6)


def test_resampling_takes_the_values_of_one_token_for_all_sites():
    view = ModelView.open(zoo.build("gpt2"))
    sites = (Site(0, Kind.MLP_OUT), Site(2, Kind.MLP_OUT))
    every: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
    for index in range(len(TEXT)):
        with view.record(sites) as seen:
            view.hidden(next(view.batches(TEXT[index : index + 1])))
        for site in sites:
            every[site] += list(seen[site][0].double())
    drawn = []
    for seed in range(6):
        found = drawn_inputs(view, sites, TEXT, seed=seed)
        places = []
        for site in sites:
            gaps = torch.stack([(row - found[site]).abs().max() for row in every[site]])
            assert gaps.min() < 1e-5
            places.append(int(gaps.argmin()))
        assert places[0] == places[1], "the same token at every site"
        drawn.append(places[0])
    assert len(set(drawn)) > 3


def test_a_silenced_head_leaves_the_shared_keys_and_values_to_the_others():
    view = ModelView.open(zoo.build("llama"))
    assert view.kv_heads < view.heads
    site = Site(1, Kind.ATTN_OUT)
    selection = selected({site: [1]}, {site: view.heads}, Grain.HEAD)
    edit = HeadDropout()(view, Request(selection=selection))
    assert set(edit.deltas) == {site} and edit.notes["heads"] == {"L1.attn.out": [1]}
    columns = (edit.deltas[site].dense() != 0).any(0).nonzero()[:, 0].tolist()
    assert columns == list(range(view.head_width, 2 * view.head_width))
    batch = next(view.batches(TEXT))
    with view.record([site]) as before:
        view.hidden(batch)
    with edit.apply(view), view.record([site]) as after:
        view.hidden(batch)
    assert torch.equal(before[site], after[site]), "what its neighbours of the group hand on is untouched"


def test_heads_only_are_heads(view_of_gpt2):
    with pytest.raises(InputError, match=r"a selection of neurons cannot be silenced; expected heads"):
        HeadDropout()(view_of_gpt2, Request(selection=units(view_of_gpt2, "neuron")))
    with pytest.raises(InputError, match="mode resample needs ordinary text"):
        HeadDropout(mode="resample")(view_of_gpt2, Request(selection=units(view_of_gpt2, "head")))


@pytest.fixture(scope="module")
def view_of_gpt2() -> ModelView:
    return ModelView.open(zoo.build("gpt2"))
