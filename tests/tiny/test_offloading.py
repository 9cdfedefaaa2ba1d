"""Models spread over the CPU and disk are read as the same models whole, and what they cannot do is refused."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
import zoo
from torch.testing import assert_close

from editors.base import Request
from editors.cli import main
from editors.pruners.neuron_dropout import NeuronDropout
from editors.shipping.checkpoint import apply_edit
from memloc.errors import ModelError
from memloc.localizers.activation import Activation
from memloc.localizers.activation_gradient import ActivationGradient
from memloc.localizers.grad_activation import GradActivation
from memloc.localizers.random import Random
from memloc.localizers.weight_gradient import WeightGradient
from memloc.localizers.zero_out import ZeroOut
from memloc.measures.extraction import Extraction
from memloc.moments import second_moments
from memloc.view import ModelView

pytest.importorskip("accelerate")
FAMILIES = ("gpt2", "gemma2")


def spread(family, folder):
    """The model whole, and the same with a block on disk and its head's input on the CPU."""
    model = zoo.build(family)
    model.save_pretrained(folder / family)
    view = ModelView.open(folder / family)
    blocks, last = view.row.blocks, view.layers - 1
    names = [name for name, module in model.named_modules() if name and not any(True for _ in module.children())]
    where = {
        name: "disk" if name.startswith((f"{blocks}.0.", f"{blocks}.{last}.", view.row.final_norm)) else "cpu"
        for name in names
    }
    return view, ModelView.open(folder / family, device_map=where)


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    return spread(request.param, tmp_path_factory.mktemp("spread"))


def test_weights_and_answers_are_those_of_the_whole_model(both):
    whole, thin = both
    assert any(parameter.device.type == "meta" for parameter in thin.model.parameters())
    assert thin.digest == whole.digest and thin.device == whole.device
    for site in whole.sites(*whole.kinds):
        assert torch.equal(thin.weight(site), whole.weight(site)) and thin.place(site) == whole.place(site)
    passages = zoo.passages(3)
    assert Extraction()(thin, passages).rows == Extraction()(whole, passages).rows


@pytest.mark.parametrize(
    "localizer", [Random(), Activation(), GradActivation(), ZeroOut(), ActivationGradient(grain="layer")],
    ids=lambda method: type(method).__name__,
)  # fmt: skip
def test_localizers_find_the_same(localizer, both):
    whole, thin = both
    passages = zoo.passages(3)
    found = localizer(thin, passages)
    assert thin.digest == whole.digest
    for site, scores in localizer(whole, passages).scores.items():
        assert_close(found.scores[site], scores, atol=1e-6, rtol=1e-5)


def test_moments_are_the_same(both):
    whole, thin = both
    sites = whole.sites(whole.kinds[-1])
    found, wanted = (second_moments(view, zoo.passages(3), sites) for view in (thin, whole))
    for site in sites:
        assert torch.equal(found.mean(site), wanted.mean(site))


def test_what_needs_all_weights_at_once_says_so(both, tmp_path):
    _, thin = both
    for localizer in (WeightGradient(grain="weight"), cases.made("layer-rewind", both[0], tmp_path)):
        with pytest.raises(ModelError, match=r"needs all weights in memory, and .* is offloaded; load"):
            localizer(thin, zoo.passages(2))
    with pytest.raises(ModelError, match="needs all weights in memory"):
        thin.copy()


def test_an_edit_of_an_offloaded_weight_goes_through_the_file(both, tmp_path):
    whole, thin = both
    asked = Request(selection=Random()(whole, zoo.passages(2)).top(6))
    edit = NeuronDropout()(thin, asked)
    assert edit.digest == NeuronDropout()(whole, asked).digest
    with pytest.raises(ModelError, match=r"offloaded; edit the checkpoint folder instead \(memloc apply\)$"):
        edit.apply(thin)
    assert thin.digest == whole.digest
    apply_edit(edit, Path(whole.name), tmp_path / "edited")
    written = ModelView.open(tmp_path / "edited")
    with edit.apply(whole):
        assert written.digest == whole.digest


def test_the_command_spreads_a_model(tmp_path, capsys):
    zoo.build("qwen3").save_pretrained(tmp_path / "model")
    assert main(["check", str(tmp_path / "model"), "--device-map", "auto", "--json"]) == 0
    assert "in the table" in capsys.readouterr().out
