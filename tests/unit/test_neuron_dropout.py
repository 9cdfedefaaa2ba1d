from __future__ import annotations

import pytest
import torch
import zoo
from torch.testing import assert_close

from editors.base import Request
from editors.checks import check_editor
from editors.masks import weight_masks
from editors.pruners.neuron_dropout import NeuronDropout
from editors.pruning.silencing import inputs, mean_inputs
from memloc.errors import InputError
from memloc.provenance import Provenance
from memloc.scores import Selection, selected
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView

TEXT = zoo.passages(5, seed=3)


def neurons(view: ModelView) -> Selection:
    sites = {Site(0, Kind.MLP_OUT): [1, 8, 36], Site(2, Kind.MLP_OUT): [0]}
    return selected(sites, {site: view.neurons for site in sites}, Grain.NEURON)


def heads(view: ModelView) -> Selection:
    return selected({Site(1, Kind.ATTN_OUT): [0, 2]}, {Site(1, Kind.ATTN_OUT): view.heads}, Grain.HEAD)


def logits_when_replaced(view, selection, value):
    """The model with the chosen inputs replaced: `value(site, tensor)` gives what they become."""

    def change(site, tensor):
        return torch.where(inputs(view, selection, site), value(site, tensor), tensor)

    batch = next(view.batches(TEXT))
    with torch.no_grad(), view.replace(list(selection.masks), change):
        return view.logits(batch)


@pytest.mark.parametrize("choose", [neurons, heads])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_edited_model_equals_the_hooked_one(family, choose):
    view = ModelView.open(zoo.build(family))
    batch, selection = next(view.batches(TEXT)), choose(view)
    values = {
        "zero": lambda site, tensor: torch.zeros_like(tensor),
        "scale": lambda site, tensor: -0.7 * tensor,
    }
    if all(view.has(Site(site.layer, site.kind, bias=True)) for site in selection.masks):
        means = mean_inputs(view, tuple(selection.masks), TEXT)
        values["mean"] = lambda site, tensor: means[site].to(tensor.dtype).expand_as(tensor)
    with torch.no_grad():
        untouched = view.logits(batch)
        for mode, value in values.items():
            edit = NeuronDropout(mode=mode, factor=-0.7)(view, Request(selection=selection, text=TEXT))
            wanted = logits_when_replaced(view, selection, value)
            with edit.apply(view):
                found = view.logits(batch)
            scale = float(wanted.abs().max())
            assert_close(found[batch.mask] / scale, wanted[batch.mask] / scale, rtol=0, atol=1e-6)
            assert float((untouched - wanted).abs().max()) > 1e-3 * scale, "the replacement itself must matter"


def test_the_mean_is_over_real_tokens_only():
    view = ModelView.open(zoo.build("gpt2"))
    site = Site(1, Kind.MLP_OUT)
    mean = mean_inputs(view, (site,), TEXT, size=5)[site]
    rows = []
    for item in TEXT:
        with view.record([site]) as seen:
            view.hidden(next(view.batches(TEXT.named([item.id]))))
        rows.append(seen[site][0].double())
    assert_close(mean, torch.cat(rows).mean(0), rtol=1e-5, atol=1e-6)
    assert_close(mean, mean_inputs(view, (site,), TEXT, size=2)[site], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["zero", "scale"])
def test_keeps_an_editors_promises(mode, dtype, tmp_path):
    view = ModelView.open(zoo.build("gpt2", dtype=dtype))
    request = Request(selection=neurons(view))
    edit = check_editor(NeuronDropout(mode=mode), view, request, tmp_path, masks=weight_masks(view, neurons(view)))
    assert edit.count == 4 * view.width
    with NeuronDropout()(view, request).apply(view):
        assert not view.weight(Site(0, Kind.MLP_OUT))[:, [1, 8, 36]].any(), "silenced is exactly zero in every dtype"


def test_refusals_say_what_to_do():
    view = ModelView.open(zoo.build("llama"))
    request = Request(selection=neurons(view), text=TEXT)
    with pytest.raises(
        InputError, match=r"L0.mlp.out has no bias to hold a constant; use mode zero or scale, or the hook form"
    ):
        NeuronDropout(mode="mean")(view, request)
    with pytest.raises(InputError, match="needs ordinary text"):
        NeuronDropout(mode="mean")(ModelView.open(zoo.build("gpt2")), Request(selection=neurons(view)))
    with pytest.raises(InputError, match="selection of components cannot be silenced"):
        part = Selection(Grain.COMPONENT, {Site(0, Kind.MLP_OUT): torch.tensor(True)}, Provenance("by hand"))
        NeuronDropout()(view, Request(selection=part))
    with pytest.raises(InputError, match="factor 1 changes nothing"):
        NeuronDropout(mode="scale", factor=1.0)
