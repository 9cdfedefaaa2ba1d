"""Gradient descent on chosen entries of a model's matrices, and on no other.

Only the masked entries are gathered, stepped and written back, so whatever the optimiser does (momentum, decay), an
entry off the mask keeps its bits. Masking the gradient of an ordinary optimiser does not promise that: with weight
decay it moves every weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from editors.deltas import Delta, Dense, Sparse
from editors.masks import Masks
from memloc.sites import Site
from memloc.view import ModelView


def working_copy(view: ModelView) -> ModelView:
    """A copy to train, in float32 (float64 stays); the model given is untouched."""
    copy = view.copy()
    if view.dtype in (torch.float16, torch.bfloat16):
        copy.model.float()
    return copy


class MaskedAdam:
    """Adam on the masked entries of a model, without weight decay.

    Args:
        view: a working copy; its matrices are changed in place.
        masks: site to bool `[out, in]` (or `[out]`).
        lr: step size, in units of a weight.
        betas: decay of the running mean and mean square of the gradient.
        project: from all trained entries after a step, in the order of `origin`, to what they should be instead.

    Attributes:
        origin: [k] the trained entries as they were.

    Cost: a step is O(masked entries); the backward pass still fills the whole gradient of every touched matrix.

    Source: Kingma and Ba 2015, arXiv:1412.6980.
    """

    def __init__(
        self,
        view: ModelView,
        masks: Masks,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        project: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.view, self.masks = view, dict(sorted(masks.items()))
        self.lr, self.betas, self.eps, self.project = lr, betas, eps, project
        self.steps = 0
        chosen = _stored_masks(view, self.masks)
        self.parameters = list(chosen)
        # A matrix that is trained whole needs no list of its places, which would weigh twice what it does itself.
        self._index = [
            slice(None) if bool(mask.all()) else mask.reshape(-1).nonzero().reshape(-1) for mask in chosen.values()
        ]
        self._sizes = [int(mask.sum()) for mask in chosen.values()]
        self.origin = self._gather(self.parameters)
        self._mean = torch.zeros_like(self.origin)
        self._square = torch.zeros_like(self.origin)

    @property
    def count(self) -> int:
        """How many entries are trained."""
        return len(self.origin)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Gradients for the touched matrices only."""
        with self.view.trainable(self.parameters):
            yield

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        """One step along the gradients in place, which are cleared; `scale` multiplies the step size."""
        self.steps += 1
        slow, slower = self.betas
        gradient = self._gather([_gradient(parameter) for parameter in self.parameters])
        self._mean.lerp_(gradient, 1 - slow)
        self._square.mul_(slower).addcmul_(gradient, gradient, value=1 - slower)
        size = self.lr * scale / (1 - slow**self.steps)
        spread = (self._square / (1 - slower**self.steps)).sqrt_().add_(self.eps)
        moved = self._gather(self.parameters).addcdiv_(self._mean, spread, value=-size)
        moved = moved if self.project is None else self.project(moved)
        for parameter, index, part in zip(self.parameters, self._index, torch.split(moved, self._sizes), strict=True):
            parameter.view(-1)[index] = part
            parameter.grad = None

    def deltas(self, before: ModelView, *, dense: bool = False) -> dict[Site, Delta]:
        """What training changed: site to new minus old, float32, at the masked entries.

        Args:
            before: the model that was copied.
            dense: where a whole matrix was trained, give its change as one, without the list of its places.
        """
        found: dict[Site, Delta] = {}
        for site, mask in self.masks.items():
            change = (self.view.weight(site).detach().double() - before.weight(site).detach().double()).cpu().float()
            found[site] = Dense(change) if dense and bool(mask.all()) else Sparse.of(change, mask)
        return found

    def _gather(self, tensors: list[Tensor] | list[nn.Parameter]) -> Tensor:
        parts = [tensor.detach().reshape(-1)[index] for tensor, index in zip(tensors, self._index, strict=True)]
        return torch.cat(parts)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _stored_masks(view: ModelView, masks: Masks) -> dict[nn.Parameter, Tensor]:
    """Masks in the stored layout, one a parameter: several sites may lie in one fused matrix."""
    stored: dict[nn.Parameter, Tensor] = {}
    for site, mask in masks.items():
        parameter = view.parameter(site)
        if parameter not in stored:
            stored[parameter] = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
        view.place(site).write(stored[parameter], mask.to(parameter.device))
    return stored
