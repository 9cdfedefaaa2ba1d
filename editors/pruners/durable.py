"""Durable pruning: the weights the passages to forget pull on hardest."""

from __future__ import annotations

from dataclasses import dataclass

from editors.base import Request
from editors.edit import Edit
from editors.pruning.prunings import Among, Kinds, allowed, check_budget, highest, pruning
from editors.tuning.descent import working_copy
from memloc import progress
from memloc.gradients.map_gradients import Gathered
from memloc.objectives import suffix_nll
from memloc.provenance import settings_of
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Durable:
    """Prune the weights with the largest |Σ gradient| of the loss of the passages to forget.

    The gradients of all passages' mean suffix NLL are summed before the absolute value is taken, so that weights on
    which passages disagree score low. |g| says nothing of the sign: pruning such a weight may lower the loss too.

    Attributes:
        share: of the weights that may be pruned.
        among: "matrix" (the paper's durable) or "model" (its durable-agg); or "row".
        kinds: "mlp" (the paper's), "mlp-out", "attention" or "all" maps; of no effect with a selection. Only these
            compete: the published durable-agg ranks all tensors and then prunes those of the MLPs, so that how many
            it prunes depends on the others.
        batch_size: passages a pass; no effect beyond rounding.

    Cost: one forward and one backward over the passages; one gradient of the maps; the choice is O(weights).

    Source: Sakarvadia et al. 2024, arXiv:2410.02159, from Zhang et al. 2022, arXiv:2206.10341.
    """

    share: float = 0.01
    among: Among = "matrix"
    kinds: Kinds = "mlp"
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_budget(self.share, self.kinds, self.among)

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched.

        Raises:
            InputError: no passages to forget, or a share of which nothing is left.
        """
        forget, where = request.need_forget(), allowed(view, request, self.kinds)
        gathered = Gathered(working_copy(view), list(where))
        for batch in progress.steps(list(view.batches(forget, size=self.batch_size)), "gradients"):
            gathered.add(batch, suffix_nll)
        scores = {site: found.abs().cpu() for site, found in gathered.by_site().items()}
        return pruning(view, highest(scores, where, self.share, self.among), "durable", settings_of(self), request)
