from __future__ import annotations

import pytest
import torch
import zoo

from editors.masks import digest, share, weight_masks
from memloc.errors import InputError, MismatchError
from memloc.provenance import Provenance
from memloc.scores import Selection, selected
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView


def look(family: str) -> ModelView:
    return ModelView.open(zoo.build(family))


@pytest.fixture(scope="module")
def view():
    return look("gpt2")


def scalars(grain: Grain, *sites: Site, chosen: bool = True) -> Selection:
    return Selection(grain, {site: torch.tensor(chosen) for site in sites}, Provenance("by hand"))


def test_a_neuron_is_its_column(view):
    site = Site(1, Kind.MLP_OUT)
    masks = weight_masks(view, selected({site: [7, 30]}, {site: view.neurons}, Grain.NEURON))
    assert list(masks) == [site]
    assert masks[site].all(0).nonzero().reshape(-1).tolist() == [7, 30]
    assert int(masks[site].sum()) == 2 * view.width


def shifted(view, masks, shift):
    """A copy of the model with `shift(entries)` added to each site's masked weights."""
    changed = view.copy()
    with torch.no_grad():
        for place, mask in masks.items():
            weight = changed.weight(place).clone()
            weight[mask] += shift(int(mask.sum()))
            changed.place(place).write(changed.parameter(place), weight)
    return changed


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_whole_neuron_is_exactly_what_can_change_its_activation_or_its_say(family):
    """Noise on a unit's mask changes its own activation and no other; noise off it leaves that activation alone."""
    view = look(family)
    site = Site(1, Kind.MLP_OUT)
    masks = weight_masks(view, selected({site: [5]}, {site: view.neurons}, Grain.NEURON), reach="unit")
    batch = next(view.batches(zoo.passages(ragged=False)))
    with view.record([site]) as before:
        view.hidden(batch)
    changed = shifted(view, masks, lambda count: 0.5 * torch.ones(count))
    with changed.record([site]) as after:
        changed.hidden(batch)
    moved = (before[site] - after[site]).abs().amax((0, 1)) > 1e-6
    assert moved.nonzero().reshape(-1).tolist() == [5]
    assert masks[site].all(0).nonzero().reshape(-1).tolist() == [5]


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_whole_head_moves_its_own_output_only(family):
    view = look(family)
    site = Site(1, Kind.ATTN_OUT)
    masks = weight_masks(view, selected({site: [1]}, {site: view.heads}, Grain.HEAD), reach="unit")
    batch = next(view.batches(zoo.passages(ragged=False)))
    with view.record([site]) as before:
        view.hidden(batch)
    noise = torch.Generator()
    changed = shifted(view, masks, lambda count: 0.5 * torch.randn(count, generator=noise.manual_seed(1)))
    with changed.record([site]) as after:
        changed.hidden(batch)
    gap = (before[site] - after[site]).abs().amax((0, 1)).view(view.heads, view.head_width)
    assert (gap.amax(1) > 1e-6).nonzero().reshape(-1).tolist() == [1]


def test_shared_keys_are_taken_only_with_all_their_heads():
    view = look("llama")
    site, key = Site(0, Kind.ATTN_OUT), Site(0, Kind.ATTN_K)
    group = view.heads // view.kv_heads
    one = weight_masks(view, selected({site: [0]}, {site: view.heads}, Grain.HEAD), reach="unit")
    all_ = weight_masks(view, selected({site: list(range(group))}, {site: view.heads}, Grain.HEAD), reach="unit")
    assert key not in one
    assert all_[key].any(1).nonzero().reshape(-1).tolist() == list(range(view.head_width))


def test_a_component_is_its_map_with_its_bias_and_a_layer_all_of_them(view):
    site = Site(0, Kind.MLP_IN)
    component = weight_masks(view, scalars(Grain.COMPONENT, site))
    assert list(component) == [site, Site(0, Kind.MLP_IN, bias=True)]
    assert all(bool(mask.all()) for mask in component.values())
    layer = weight_masks(view, scalars(Grain.LAYER, Site(2, Kind.MLP_OUT)))
    assert {place.kind for place in layer} == set(view.kinds) and {place.layer for place in layer} == {2}
    wanted = sum(p.numel() for name, p in view.model.named_parameters() if ".h.2." in name and "ln_" not in name)
    assert share(view, layer) * sum(p.numel() for p in view.model.parameters()) == pytest.approx(wanted)


def test_weights_are_themselves_and_their_digest_tells_masks_apart(view):
    site = Site(0, Kind.ATTN_K)
    mask = torch.zeros(view.weight(site).shape, dtype=torch.bool)
    mask[3, 11] = True
    found = weight_masks(view, Selection(Grain.WEIGHT, {site: mask}, Provenance("by hand")))
    assert torch.equal(found[site], mask)
    other = mask.clone()
    other[4, 11] = True
    assert digest(found) == digest({site: mask.clone()}) != digest({site: other})


def test_what_names_no_weights_is_refused(view):
    site = Site(0, Kind.MLP_OUT)
    with pytest.raises(InputError, match="selection of directions names no set of weights"):
        weight_masks(view, selected({site: [0]}, {site: 3}, Grain.DIRECTION))
    with pytest.raises(InputError, match="is empty"):
        weight_masks(view, selected({}, {site: view.neurons}, Grain.NEURON))
    with pytest.raises(MismatchError, match=r"L0.mlp.out: mask \[9\], expected \[37\]"):
        weight_masks(view, selected({site: [1]}, {site: 9}, Grain.NEURON))
    with pytest.raises(InputError, match=r"L0.mlp.in: neurons are selected at mlp.out"):
        weight_masks(view, selected({Site(0, Kind.MLP_IN): [1]}, {Site(0, Kind.MLP_IN): 9}, Grain.NEURON))
