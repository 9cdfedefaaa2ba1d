"""Magnitude pruning: the smallest or the largest weights, whatever they are for; a control of equal budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from editors.base import Request
from editors.edit import Edit
from editors.masks import Masks, weight_masks
from editors.pruning.prunings import Among, Kinds, allowed, check_budget, check_choice, highest, pruning
from memloc.errors import InputError
from memloc.provenance import settings_of
from memloc.sites import Site
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """Prune the smallest (or largest) weights by |w|: the control that knows nothing of what is to be forgotten.

    - Without a selection: the share of the maps of `kinds`.
    - With a selection and a share: that share of the selected weights.
    - With a selection and no share: as many weights at every site as the selection names there, chosen from the whole
      matrix: the control of equal budget of a pruner that prunes the selection.

    Attributes:
        share: of the weights that may be pruned; needed where there is no selection.
        order: "smallest" (the usual pruning) or "largest".
        among: what competes: the weights of a matrix, of a row, or of the model.
        kinds: "mlp", "mlp-out", "attention" or "all" maps; of no effect with a selection.

    Cost: no pass through the model; one pass over the weights.

    Source: Han et al. 2015, arXiv:1506.02626.
    """

    share: float | None = None
    order: Literal["smallest", "largest"] = "smallest"
    among: Among = "matrix"
    kinds: Kinds = "mlp"

    def __post_init__(self) -> None:
        check_budget(1.0 if self.share is None else self.share, self.kinds, self.among)
        check_choice("order", self.order, Literal["smallest", "largest"])

    @property
    def settings_suffice(self) -> bool:
        """Whether the settings alone say what to prune."""
        return self.share is not None

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched.

        Raises:
            InputError: neither a share nor a selection, or a share of which nothing is left.
        """
        return pruning(view, self._chosen(view, request), "magnitude", settings_of(self), request)

    def _chosen(self, view: ModelView, request: Request) -> dict[Site, Tensor]:
        if self.share is not None:
            where = allowed(view, request, self.kinds)
            return highest(self._scores(view, where), where, self.share, self.among)
        if request.selection is None:
            raise InputError("how much should be pruned? give a share, or a selection to match in size")
        found: dict[Site, Tensor] = {}
        for site, mask in weight_masks(view, request.selection).items():
            if not site.bias:
                whole = {site: mask.new_ones(mask.shape)}
                found |= highest(self._scores(view, whole), whole, int(mask.sum()) / mask.numel(), "matrix")
        if not found:
            raise InputError("the selection names biases only, and biases are never pruned")
        return found

    def _scores(self, view: ModelView, where: Masks) -> dict[Site, Tensor]:
        sign = -1.0 if self.order == "smallest" else 1.0
        return {site: sign * view.weight(site).detach().cpu().float().abs() for site in where}
