"""Greedy pruning: again and again the weights whose removal, to first order, helps most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from editors.base import Request
from editors.edit import Edit
from editors.pruning.prunings import Kinds, allowed, check_budget, how_many, kept_rows, largest, pruning
from editors.pruning.trained_masks import Switched, mean_nll, mixed_batches, row_weights, unspent
from memloc import progress
from memloc.errors import InputError
from memloc.provenance import settings_of
from memloc.sites import Site
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """Prune, a few weights at a time, those whose removal lowers the loss most, and look again.

    The loss is L = -(1 - w) · NLL(forget) + w · NLL(keep), each a mean over the rows of its side in a drawn batch; the
    rows to keep are `retain` and `text` together (without any, w counts for nothing). Removing a weight changes L by
    about -W · ∂L/∂W, so the weights with the largest W · ∂L/∂W go, wherever they are; then the gradient is taken anew.

    Attributes:
        share: of the weights that may be pruned, all maps together.
        backwards: gradients taken, each pruning an equal part of the share; at most one a weight, and as many as
            weights is the published method, which prunes a single weight a gradient.
        enough: nats per token; pruning ends, short of the share, once the mean NLL of the passages to forget is above
            it. By default the whole share is pruned, which forgets far more than is asked for.
        keep_weight: w, below 1.
        batch_size: rows of a gradient, half of them to forget and half to keep, as far as there are so many.
        kinds: "mlp", "mlp-out", "attention" or "all" maps; of no effect with a selection. (The published method may
            also prune embeddings and norms.)

    Cost: `backwards` times two forwards and one backward. The published method takes one a pruned weight, hours for
    a model of billions; scripts/claims/greedy_in_steps.py compares the two.

    Source: Sakarvadia et al. 2024, arXiv:2410.02159, after Maini et al. 2023, arXiv:2307.09542. Several weights a
    gradient, the end at `enough`, and the balance of the sides by w in the place of row counts, are ours.
    """

    share: float = 0.01
    backwards: int = 100
    enough: float | None = None
    keep_weight: float = 0.5
    batch_size: int = 32
    kinds: Kinds = "mlp"

    def __post_init__(self) -> None:
        check_budget(self.share, self.kinds)
        if self.backwards < 1 or self.batch_size < 1 or not 0 <= self.keep_weight < 1:
            found = f"backwards {self.backwards}, batch_size {self.batch_size}, keep_weight {self.keep_weight}"
            raise InputError(f"{found}: expected at least 1, at least 1, and a share below 1")
        if self.enough is not None and self.enough <= 0:
            raise InputError(f"enough {self.enough}: expected nats per token above 0")

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched.

        Raises:
            InputError: no passages to forget, a row both to forget and to keep, or a share of which nothing is left.
            ModelError: the loss is no longer finite.
        """
        forget, keep, where = request.need_forget(), kept_rows(request), allowed(view, request, self.kinds)
        budget = self._budget(where)
        switched, gone = Switched(view, where), {site: torch.zeros_like(mask) for site, mask in where.items()}
        rounds = min(self.backwards, budget)
        notes: dict[str, float] = {"before": mean_nll(switched.view, forget), "backwards": 0}
        epochs = mixed_batches(switched.view, forget, keep, size=self.batch_size, mixing="both", seed=request.seed)
        batches = (entry for epoch in epochs for entry in epoch)
        for count in progress.steps(_spread(budget, rounds), "greedy"):
            batch, forgotten = next(batches)
            weights = row_weights(forgotten, self.keep_weight if keep else 0.0)
            slopes = switched.gradients(batch, weights)
            scores = {site: slope * switched.original[site].cpu() for site, slope in slopes.items()}
            notes["backwards"] += 1
            _take(scores, unspent(where, gone), gone, count)
            switched.switch_off(gone)
            notes["after"] = mean_nll(switched.view, forget)
            if self.enough is not None and notes["after"] > self.enough:
                break
        masks = {site: mask for site, mask in gone.items() if bool(mask.any())}
        return pruning(view, masks, "greedy", settings_of(self), request, notes=notes)

    def _budget(self, where: dict[Site, Tensor]) -> int:
        total = sum(int(mask.sum()) for mask in where.values())
        if not how_many(self.share, total):
            raise InputError(f"a share of {self.share:g} of {total} weights is none; ask for more")
        return how_many(self.share, total)


def _spread(budget: int, rounds: int) -> list[int]:
    """A budget as so many parts, as equal as they can be."""
    return [budget * (index + 1) // rounds - budget * index // rounds for index in range(rounds)]


def _take(scores: dict[Site, Tensor], left: dict[Site, Tensor], gone: dict[Site, Tensor], count: int) -> None:
    """Mark the `count` best-scored entries of `left`, over all sites, as gone; the earlier among equals."""
    sites = sorted(left)
    flat = torch.cat([scores[site].masked_fill(~left[site], -torch.inf).reshape(-1) for site in sites])
    chosen = largest(flat, count)
    for site, part in zip(sites, torch.split(chosen, [left[site].numel() for site in sites]), strict=True):
        gone[site] |= part.view(left[site].shape)
