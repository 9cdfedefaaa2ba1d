"""What test_sliced_models.py runs under torchrun: models that lie in slices beside the same model whole."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
import zoo
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from editors.deltas import LowRank
from editors.edit import Edit
from memloc import slices
from memloc.batches import pad
from memloc.errors import ModelError
from memloc.localizers.activation import Activation
from memloc.localizers.grad_activation import GradActivation
from memloc.moments import second_moments
from memloc.provenance import Provenance
from memloc.sites import Kind, Site
from memloc.view import ModelView

SIZES: dict[str, Any] = {"intermediate_size": 36, "vocab_size": 54}
WHOLE = {"llama": SIZES, "gpt_neox": {**SIZES, "num_attention_heads": 4}}


def parallel(family: str, folder: Path) -> Any:
    """Tensor parallel, as transformers loads it."""
    warnings.simplefilter("ignore")
    return transformers.AutoModelForCausalLM.from_pretrained(folder / family, tp_plan="auto", dtype=torch.float64)


def sharded(family: str, folder: Path) -> Any:
    """Fully sharded: every block, then the rest."""
    model = zoo.build(family, dtype=torch.float64, **WHOLE[family])
    for block in model.get_submodule(ModelView.open(model).row.blocks):
        fully_shard(block)
    return fully_shard(model)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-9, atol=1e-9)


def gradients(view: ModelView, side: Any) -> dict[Site, tuple[Tensor, Tensor]]:
    """What flows through every map, and the gradient there."""
    batch = pad([list(range(3, 12)), list(range(20, 26))], device=view.device)
    with view.frozen(), view.record(view.sites(*view.kinds), side=side, grad=True) as seen:
        view.logits(batch).logsumexp(-1).sum().backward()
    return {site: (tensor, tensor.grad) for site, tensor in seen.items()}


def doubled(view: ModelView) -> Tensor:
    """Logits where the second neuron from the end, in the last process's slice, is doubled."""
    gain = torch.ones(view.neurons, dtype=torch.float64)
    gain[-2] = 2
    with torch.no_grad(), view.replace([Site(1, Kind.MLP_OUT)], lambda _, tensor: tensor * gain):
        return view.logits(pad([[3, 4, 5]], device=view.device))


def read_the_same(view: ModelView, plain: ModelView) -> None:
    assert view.digest == plain.digest and view.neurons == plain.neurons
    for site in view.sites(*view.kinds):
        same(view.weight(site), plain.weight(site))
    for side in ("input", "output"):
        found = gradients(view, side)
        for site, (tensor, gradient) in gradients(plain, side).items():
            same(found[site][0], tensor)
            same(found[site][1], gradient)
    same(doubled(view), doubled(plain))
    sites, text = view.sites(Kind.MLP_OUT, Kind.ATTN_OUT), zoo.passages(3)
    sums = second_moments(view, text, sites[:2]).sums
    for site, expected in second_moments(plain, text, sites[:2]).sums.items():
        same(sums[site], expected)
    assert view.digest == plain.digest
    for localizer in (Activation(), Activation(grain="head"), GradActivation(), GradActivation(grain="head")):
        expected = localizer(plain, text).scores
        for site, scores in localizer(view, text).scores.items():
            torch.testing.assert_close(scores, expected[site], rtol=1e-5, atol=1e-7)


def refuse_to_be_written(view: ModelView, plain: ModelView) -> None:
    """An edit can be made on slices, and is that of the whole model; it is written through the checkpoint only."""
    site = Site(1, Kind.MLP_OUT)
    delta = LowRank(torch.ones(view.width, 1), torch.ones(1, view.neurons))
    edit = Edit.of(view, {site: delta}, Provenance("by hand"))
    assert edit.digest == Edit.of(plain, {site: delta}, Provenance("by hand")).digest
    before = view.digest
    try:
        edit.apply(view)
    except ModelError as error:
        assert "lies in slices on several processes; save the edit, then" in str(error)
    else:
        raise AssertionError("the edit was written")
    assert view.digest == before


def main(kind: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    for family, sizes in WHOLE.items():
        plain = zoo.build(family, dtype=torch.float64, **sizes)
        if dist.get_rank() == 0:
            copy.deepcopy(plain).save_pretrained(folder / family)
        dist.barrier()
        model = parallel(family, folder) if kind == "parallel" else sharded(family, folder)
        view = ModelView.open(model)
        assert slices.sliced(view.parameter(Site(1, Kind.MLP_OUT)))
        read_the_same(view, ModelView.open(plain))
        refuse_to_be_written(view, ModelView.open(plain))
        if dist.get_rank() == 0:
            print(kind, family, "read the same")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
