"""Models that lie in slices on two processes are read as the same models whole."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from test_processes import torchrun
from torch import nn

from memloc import slices

pytestmark = pytest.mark.xdist_group("processes")
HERE = Path(__file__).parent


@pytest.mark.parametrize("kind", ["parallel", "sharded"])
def test_a_model_in_slices_is_read_as_the_whole_one(kind, tmp_path):
    done = torchrun(HERE / "sliced_models.py", kind, tmp_path)
    assert done.stdout.splitlines() == [f"{kind} {family} read the same" for family in ("llama", "gpt_neox")], (
        done.stderr
    )


def pretend(weight: torch.Tensor, axis: int, count: int) -> nn.Linear:
    """A map whose weight says it lies in slices along `axis`."""
    module = nn.Linear(*reversed(weight.shape))
    mesh = types.SimpleNamespace(size=lambda _: count, get_group=lambda _: None, get_local_rank=lambda _: count - 1)
    module.weight.device_mesh = mesh
    module.weight.placements = (types.SimpleNamespace(is_shard=lambda dim: dim == axis),)
    return module


def test_unequal_slices_are_counted_as_they_lie():
    found = slices.cut(pretend(torch.zeros(5, 7), 1, 3), "input", torch.zeros(2, 4, 1))
    assert found is not None and (found.sizes, found.rank) == ((3, 3, 1), 2)


def test_what_is_whole_is_not_cut():
    module = pretend(torch.zeros(5, 7), 1, 3)
    assert slices.cut(module, "input", torch.zeros(2, 4, 7)) is None
    assert slices.cut(module, "output", torch.zeros(2, 4, 5)) is None
    assert slices.cut(nn.Linear(7, 5), "input", torch.zeros(2, 4, 7)) is None


def test_a_part_is_this_process_s_own():
    found = slices.cut(pretend(torch.zeros(5, 7), 1, 3), "input", torch.zeros(1, 1))
    assert found is not None
    assert torch.equal(found.part(torch.arange(7.0)), torch.tensor([6.0]))


def test_an_offloaded_model_is_sent_to_its_file():
    import zoo

    from memloc.errors import ModelError
    from memloc.view import ModelView

    model = zoo.build("gpt2")
    model.transformer.h[1].mlp.to("meta")
    with pytest.raises(ModelError, match=r"is offloaded \(on the meta.*edit its checkpoint with `memloc apply`"):
        ModelView.open(model)
