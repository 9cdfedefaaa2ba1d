"""Tensors that lie in slices on several processes: read whole, and handed back in slices.

Tensor parallelism keeps a map's neurons or heads apart: a process sees its slice of what enters `mlp.out` and
`attn.out`, and holds its slice of the weight (a DTensor). Fully sharded models keep weights in slices between forwards
and see activations whole. Both are found by looking at a tensor, so nothing distributed is imported for others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


def sliced(tensor: Any) -> bool:
    """Whether `tensor` lies in slices (a DTensor)."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Where it lies in slices this is a copy, and every process must ask."""
    handle: Any = tensor
    found: Tensor = handle.full_tensor() if sliced(tensor) else tensor
    return found


def here(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process."""
    handle: Any = tensor
    found: Tensor = handle.to_local() if sliced(tensor) else tensor
    return found


def fully_sharded(model: nn.Module) -> bool:
    """Whether `model` gathers its weights as it runs (FSDP2); only the whole of it may be called then."""
    return hasattr(model, "unshard") and hasattr(model, "set_reshard_after_forward")


def call(model: nn.Module, module: nn.Module, argument: Tensor) -> Tensor:
    """`module(argument)`, also where `model` is fully sharded and `module` is not to be called by itself."""
    if not fully_sharded(model):
        plain: Tensor = module(argument)
        return plain
    weights = {name: whole(parameter) for name, parameter in module.named_parameters()}
    found: Tensor = torch.func.functional_call(module, weights, (argument,))
    return found


@dataclass(frozen=True)
class Cut:
    """How the last axis of an activation is cut over processes.

    Attributes:
        group: the processes.
        sizes: entries each of them has.
        rank: this one's place among them.
    """

    group: Any
    sizes: tuple[int, ...]
    rank: int

    def join(self, part: Tensor) -> Tensor:
        """All processes' parts `[..., part]` as one; its gradient is expected whole in each of them."""
        found: Tensor = _Join.apply(part, self)  # type: ignore[no-untyped-call]
        return found

    def part(self, joined: Tensor) -> Tensor:
        """This process's part; the gradient of `joined` becomes that of all parts."""
        found: Tensor = _Part.apply(joined, self)  # type: ignore[no-untyped-call]
        return found


def cut(module: nn.Module, side: Literal["input", "output"], tensor: Tensor) -> Cut | None:
    """How `tensor`, which enters or leaves the linear map `module`, is cut; None where it is whole."""
    weight: Any = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not sliced(weight):
        return None
    axis = 1 if side == "input" else 0
    total, mesh = weight.shape[axis], weight.device_mesh
    for dimension, placement in enumerate(weight.placements):
        if tensor.shape[-1] != total and placement.is_shard(axis):
            count = mesh.size(dimension)
            size = -(-total // count)
            sizes = tuple(max(0, min(size, total - size * index)) for index in range(count))
            return Cut(mesh.get_group(dimension), sizes, mesh.get_local_rank(dimension))
    return None


def _gathered(part: Tensor, cut: Cut) -> Tensor:
    import torch.distributed as dist

    size = max(cut.sizes)
    own = torch.nn.functional.pad(part, (0, size - part.shape[-1])).contiguous()
    parts = [torch.empty_like(own) for _ in cut.sizes]
    dist.all_gather(parts, own, group=cut.group)
    return torch.cat([entry[..., :count] for entry, count in zip(parts, cut.sizes, strict=True)], -1)


def _own(joined: Tensor, cut: Cut) -> Tensor:
    start = sum(cut.sizes[: cut.rank])
    return joined.narrow(-1, start, cut.sizes[cut.rank]).contiguous()


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, cut: Cut) -> Tensor:
        ctx.cut = cut
        return _gathered(part, cut)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _own(gradient, ctx.cut), None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor, cut: Cut) -> Tensor:
        ctx.cut = cut
        return _own(joined, cut)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gathered(gradient, ctx.cut), None
