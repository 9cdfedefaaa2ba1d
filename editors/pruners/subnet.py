"""Subnet: learn which weights to drop so that the passages to forget are lost; nothing is kept on purpose."""

from __future__ import annotations

from dataclasses import dataclass

from editors.base import Request
from editors.edit import Edit
from editors.pruning.prunings import Kinds, allowed, check_budget, pruning
from editors.pruning.trained_masks import Learning, learn_masks
from memloc.provenance import settings_of
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Subnet:
    """Prune the weights that a learned mask drops: exactly the share of every matrix, trained against the passages.

    Every weight has a score s; the forward pass drops the share of each matrix with the smallest |s|, and the gradient
    goes straight through to |s|. Only scores are trained, to make the passages' suffixes less likely: the loss is
    minus their mean NLL. At the end the mask is folded into the weights.

    Before any training the mask drops weights at random, which alone harms the model; training moves some of them.
    The notes say how the losses were before, under the untrained mask, and at the end, and how many weights training
    chose. The random pruner of equal share is the control that counts.

    Attributes:
        share: of every matrix's weights that may be pruned (exactly ⌊share · n⌋).
        epochs: passes over the passages; 0 leaves the untrained mask.
        lr: of SGD on the scores.
        momentum: of SGD.
        decay: weight decay of the scores.
        batch_size: passages a step.
        kinds: "mlp" (the paper's), "mlp-out", "attention" or "all" maps; of no effect with a selection.

    Cost: a step is one forward, one backward, and a choice over all scores; memory three floats a weight.

    Source: Sakarvadia et al. 2024, arXiv:2410.02159; the masks Ramanujan et al. 2020, arXiv:1911.13299.
    """

    share: float = 0.05
    epochs: int = 10
    lr: float = 0.1
    momentum: float = 0.9
    decay: float = 5e-4
    batch_size: int = 32
    kinds: Kinds = "mlp"

    def __post_init__(self) -> None:
        check_budget(self.share, self.kinds)
        self._learning()

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched.

        Raises:
            InputError: no passages to forget, or a share of which nothing is left.
            ModelError: the loss is no longer finite.
        """
        forget, where = request.need_forget(), allowed(view, request, self.kinds)
        masks, notes = learn_masks(view, where, forget, None, self._learning(), request.seed)
        return pruning(view, masks, "subnet", settings_of(self), request, notes=notes)

    def _learning(self) -> Learning:
        return Learning(self.share, self.epochs, self.lr, self.momentum, self.decay, self.batch_size)
