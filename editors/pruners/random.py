"""Random pruning: weights drawn evenly; the control of equal budget that every pruning needs beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from editors.base import Request
from editors.edit import Edit
from editors.masks import weight_masks
from editors.pruning.prunings import Kinds, allowed, check_budget, how_many, pruning, randomly
from memloc.errors import InputError
from memloc.provenance import settings_of
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Random:
    """Prune weights drawn at random: the control of equal budget.

    - Without a selection: the share of every matrix of `kinds`.
    - With a selection and a share: that share of the selected weights of every matrix.
    - With a selection and no share: as many weights at every site as the selection names there, drawn from the whole
      matrix. (The control of a selection of neurons or heads that keeps units whole is the selection's own random
      twin with neuron-dropout or head-dropout.)

    Attributes:
        share: of the weights that may be pruned; needed where there is no selection.
        kinds: "mlp", "mlp-out", "attention" or "all" maps; of no effect with a selection.

    Cost: no pass through the model.

    Source: a control; the random masks are ours.
    """

    share: float | None = None
    kinds: Kinds = "mlp"

    def __post_init__(self) -> None:
        check_budget(1.0 if self.share is None else self.share, self.kinds)

    @property
    def settings_suffice(self) -> bool:
        """Whether the settings alone say what to prune."""
        return self.share is not None

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched.

        Raises:
            InputError: neither a share nor a selection, or a share of which nothing is left.
        """
        if self.share is not None:
            where = allowed(view, request, self.kinds)
            counts = {site: how_many(self.share, int(mask.sum())) for site, mask in where.items()}
        elif request.selection is not None:
            named = {site: mask for site, mask in weight_masks(view, request.selection).items() if not site.bias}
            where = {site: torch.ones_like(mask) for site, mask in named.items()}
            counts = {site: int(mask.sum()) for site, mask in named.items()}
        else:
            raise InputError("how much should be pruned? give a share, or a selection to match in size")
        if not sum(counts.values()):
            raise InputError(f"a share of {self.share} leaves no weight to prune; ask for more, or select weights")
        return pruning(view, randomly(where, counts, request.seed), "random", settings_of(self), request)
