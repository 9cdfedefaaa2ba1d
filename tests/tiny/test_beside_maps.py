"""Norms and positions as sites: each parameter of each family has a name, edits reach it, no method does unasked."""

from __future__ import annotations

import pytest
import torch
import zoo
from safetensors.torch import save_file

from editors.deltas import Delta, Dense
from editors.edit import Edit
from editors.hook_form import as_if
from editors.shipping.checkpoint import apply_edit, undo_edit
from editors.shipping.export import export_adapter
from memloc.engines.names import LensNames, NnsightNames
from memloc.errors import InputError
from memloc.provenance import Provenance
from memloc.sites import BESIDE, MAPS, OUTSIDE, Kind, Site, kinds_named
from memloc.view import ModelView


def every_site(view: ModelView) -> list[Site]:
    """All the model has, biases too."""
    layers = {True: range(view.layers), False: (OUTSIDE,)}
    sites = [Site(layer, kind, bias) for kind in Kind for layer in layers[kind.in_block] for bias in (False, True)]
    return [site for site in sites if view.has(site)]


@pytest.mark.parametrize("family", zoo.CONFIGS)
def test_every_parameter_of_every_family_is_reached_by_sites(family, view_of):
    view = view_of(family)
    entries = {name: torch.zeros(parameter.shape, dtype=torch.int) for name, parameter in view.model.named_parameters()}
    for site in every_site(view):
        place = view.place(site)
        if site.kind is Kind.UNEMBED and not site.bias and view.tied(place.parameter):
            continue
        place.write(entries[place.parameter], place.read(entries[place.parameter]) + 1)
    assert {name: (int(hit.min()), int(hit.max())) for name, hit in entries.items()} == dict.fromkeys(entries, (1, 1))


@pytest.mark.parametrize("family", zoo.CONFIGS)
def test_no_method_meets_a_norm_by_accident(family, view_of):
    view = view_of(family)
    assert all(kind.is_map for kind in view.kinds) and len(view.kinds) in (6, 7)
    assert not {site.kind for site in view.sites(*MAPS)} & set(BESIDE)


def test_kinds_by_name_are_maps():
    assert kinds_named("attn.v,mlp.out") == (Kind.ATTN_V, Kind.MLP_OUT)
    with pytest.raises(InputError, match=r"no kind called 'mlp\.norm'; kinds: attn\.q"):
        kinds_named("mlp.norm")


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bloom", "falcon_new", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_edit_of_norms_and_positions_is_applied_and_undone_in_memory_and_on_disk(family, dtype, tmp_path):
    model = zoo.build(family, dtype=dtype)
    model.save_pretrained(tmp_path / "model")
    view = ModelView.open(model)
    generator = torch.Generator().manual_seed(3)
    deltas: dict[Site, Delta] = {
        site: Dense(0.5 * torch.randn(view.weight(site).shape, generator=generator))
        for site in every_site(view)
        if not site.kind.is_map
    }
    edit, before = Edit.of(view, deltas, Provenance("by hand")), view.digest
    with edit.apply(view):
        edited = view.digest
        assert edited != before
    assert view.digest == before
    apply_edit(edit, tmp_path / "model", tmp_path / "edited")
    assert ModelView.open(str(tmp_path / "edited"), prove=False).digest == edited
    undo_edit(edit, tmp_path / "edited", tmp_path / "back")
    assert ModelView.open(str(tmp_path / "back")).digest == before


def test_a_norm_without_parameters_is_no_site(view_of):
    view = view_of("olmo")
    assert not [site for site in every_site(view) if not site.kind.is_map]
    with pytest.raises(InputError, match=r"^L0\.attn\.norm: OlmoLayerNorm holds no such parameter"):
        view.weight(Site(0, Kind.ATTN_NORM))
    with pytest.raises(InputError, match=r"^L0\.mlp\.outnorm: not in Llama"):
        view.module(Site(0, Kind.MLP_OUTNORM))


def test_a_parallel_block_has_one_norm_with_one_name(view_of):
    view = view_of("gptj")
    assert view.has(Site(0, Kind.ATTN_NORM)) and not view.has(Site(0, Kind.MLP_NORM))
    assert view_of("falcon_new").has(Site(0, Kind.MLP_NORM))


def test_other_libraries_names_hooks_and_adapters_refuse_norms(view_of, tmp_path):
    view, site = view_of("gpt2"), Site(0, Kind.ATTN_NORM)
    with pytest.raises(InputError, match="only linear maps have a hook name"):
        LensNames().name(site)
    with pytest.raises(InputError, match="only linear maps have a path"):
        NnsightNames(view.row).name(site)
    with pytest.raises(InputError, match="only maps inside blocks can be changed by hooks"), as_if(view, {site: None}):
        pass
    edit = Edit.of(view, {site: Dense(torch.ones(view.width))}, Provenance("by hand"))
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="changes of linear maps only"):
        export_adapter(edit, tmp_path, tmp_path / "adapter", rank=1)
