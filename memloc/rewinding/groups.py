"""Rewinding, swapping and retraining groups of parameters of any torch module; nothing is written into it.

Works wherever there are named groups of parameters, a source of other values for them (an earlier checkpoint, a twin
that was trained apart) and a function that says how well the module does: language models and classifiers alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from memloc import offloading
from memloc.errors import InputError, MismatchError, ModelError
from memloc.progress import steps

T = TypeVar("T")
Groups = Mapping[str, Sequence[str]]
"""Name of a group to the names of its parameters."""


class Earlier(Protocol):
    """Where other values of a module's parameters come from: one tensor at a time."""

    @property
    def name(self) -> str:
        """What to call it."""
        ...

    def tensor(self, parameter: str) -> Tensor:
        """The value of one parameter."""
        ...


@dataclass(frozen=True)
class Kept:
    """Values kept in memory, such as a state dict copied along a training.

    Attributes:
        name: what to call them.
        tensors: parameter to value.
    """

    name: str
    tensors: Mapping[str, Tensor]

    def tensor(self, parameter: str) -> Tensor:
        """The value of one parameter.

        Raises:
            MismatchError: it was not kept.
        """
        if parameter not in self.tensors:
            raise MismatchError(f"{self.name} keeps no {parameter}; it was taken of another model")
        return self.tensors[parameter]

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Kept:
        """A copy of a module's parameters as they are now."""
        return cls(name, {key: entry.detach().clone() for key, entry in module.named_parameters()})


class _Around(nn.Module):
    """Holds a module, so that any work that uses it can be called with some of its parameters substituted."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def substituted(module: nn.Module, tensors: Mapping[str, Tensor], work: Callable[[], T]) -> T:
    """What `work()` returns while `module` has these tensors in the place of its parameters.

    No parameter is written: the module looks at other tensors for the time of the call, gradients flow into them, and
    it is as before however the call ends.
    """
    if offloading.hooked(module):
        raise ModelError("tensors cannot stand in for weights that are loaded for each call; load the model whole")
    return cast(T, functional_call(_Around(module), {f"inner.{name}": part for name, part in tensors.items()}, (work,)))


def values(module: nn.Module, names: Iterable[str], earlier: Earlier) -> dict[str, Tensor]:
    """Earlier values of some parameters, in the module's dtype and on its device.

    Raises:
        MismatchError: a shape differs.
    """
    found = {}
    for name in names:
        live, old = module.get_parameter(name), earlier.tensor(name)
        if old.shape != live.shape:
            raise MismatchError(
                f"{earlier.name}: {name} is {list(old.shape)}, the model's is {list(live.shape)}; "
                "it is a checkpoint of another architecture"
            )
        found[name] = old.to(device=live.device, dtype=live.dtype)
    return found


@torch.no_grad()
def rewind(
    module: nn.Module,
    groups: Groups,
    earlier: Sequence[Earlier],
    evaluate: Callable[[], Mapping[str, float]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Put each group back to each earlier value, alone, and evaluate: the matrix [groups × checkpoints].

    A group is critical for memorization where the memorized suffers and the rest holds. One group's tensors are in
    memory at a time.

    Args:
        module: the trained module, in the mode it is to be judged in.
        groups: what is rewound together.
        earlier: checkpoints, or twins to swap from.
        evaluate: figures of `module` as it stands; called once a group and checkpoint.

    Returns:
        Group, then checkpoint's name, then figure.

    Source: Maini et al. 2023, arXiv:2307.09542 (rewinding); Dankers & Titov 2024, arXiv:2408.04965 (swapping).
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for group in steps(list(groups), "rewinding"):
        found[group] = {}
        for source in earlier:
            tensors = values(module, groups[group], source)
            found[group][source.name] = dict(substituted(module, tensors, evaluate))
    return found


def descend(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    loss: Callable[[int], Tensor],
    *,
    count: int,
    lr: float,
    compose: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Train these tensors in the place of the module's parameters by Adam; everything else is frozen and unwritten.

    Args:
        module: what `loss` runs.
        tensors: where training starts; they are copied, in float32 (float64 stays).
        loss: of a step's number, a scalar.
        count: steps.
        lr: Adam's.
        compose: from the trained tensors to those that stand in the module, where they are not the same (rows of a
            fused matrix); by default a cast to the module's dtype.

    Returns:
        What stands in the module after the last step, as `compose` gives it, detached.
    """
    leaves = {name: _master(part) for name, part in tensors.items()}
    made = compose or (lambda parts: {name: part.to(module.get_parameter(name).dtype) for name, part in parts.items()})
    optimizer = torch.optim.Adam(leaves.values(), lr=lr)
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        # Frozen, so that no graph is kept below the lowest tensor that is trained.
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for step in range(count):
            with torch.enable_grad():
                value = substituted(module, made(leaves), partial(loss, step))
                gradients = torch.autograd.grad(value, list(leaves.values()))
            for leaf, gradient in zip(leaves.values(), gradients, strict=True):
                leaf.grad = gradient
            optimizer.step()
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    with torch.no_grad():
        return {name: part.detach() for name, part in made(leaves).items()}


def retrain(
    module: nn.Module,
    groups: Groups,
    earlier: Earlier,
    loss: Callable[[int], Tensor],
    evaluate: Callable[[], Mapping[str, float]],
    *,
    count: int = 100,
    lr: float = 1e-3,
) -> dict[str, dict[str, dict[str, float]]]:
    """Reset each group, train it alone on what `loss` says (clean examples only), and see what comes back.

    Where the memorized is there afterwards although it is not trained on, the rest of the network held it, and the
    group was redundant for it. Compare with "reset": it may never have been gone.

    Returns:
        Group, then "reset" and "retrained", then figure.

    Source: Maini et al. 2023, arXiv:2307.09542. Their script trains every parameter; here the rest is frozen.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for group in steps(list(groups), "retraining"):
        reset = values(module, groups[group], earlier)
        trained = descend(module, reset, loss, count=count, lr=lr)
        with torch.no_grad():
            found[group] = {
                "reset": dict(substituted(module, reset, evaluate)),
                "retrained": dict(substituted(module, trained, evaluate)),
            }
    return found


@dataclass(frozen=True)
class Pull:
    """How two losses pull on one group of parameters.

    Attributes:
        clean: norm of the clean examples' gradient over the number of parameters in the group.
        noisy: that of the noisy (memorized) examples'.
        cosine: between the two gradients; 0 where one vanishes.
    """

    clean: float
    noisy: float
    cosine: float


def gradient_accounting(module: nn.Module, groups: Groups, clean: Tensor, noisy: Tensor) -> dict[str, Pull]:
    """Compare, group by group, the gradients of the clean and of the noisy examples' loss; no `.grad` is touched.

    Args:
        module: whose parameters require gradients.
        groups: what is compared.
        clean: scalar loss of the clean examples, their share of the batch counted in.
        noisy: that of the noisy ones.

    Source: Maini et al. 2023, arXiv:2307.09542.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    if not names:
        raise InputError("gradient accounting: the groups name no parameter")
    parameters = [module.get_parameter(name) for name in names]
    sides = []
    for loss in (clean, noisy):
        parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        sides.append(dict(zip(names, parts, strict=True)))
    return {group: _pull(*(torch.cat([side[name].flatten() for name in members]) for side in sides))
            for group, members in groups.items()}  # fmt: skip


def _pull(clean: Tensor, noisy: Tensor) -> Pull:
    norms = float(clean.norm()), float(noisy.norm())
    cosine = float(clean @ noisy) / (norms[0] * norms[1]) if all(norms) else 0.0
    return Pull(norms[0] / len(clean), norms[1] / len(noisy), cosine)


def _master(tensor: Tensor) -> Tensor:
    wide = tensor.detach().clone() if tensor.dtype == torch.float64 else tensor.detach().float().clone()
    return wide.requires_grad_(True)
