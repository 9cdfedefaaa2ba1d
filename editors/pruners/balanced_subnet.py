"""BalancedSubnet: learn which weights to drop so that some passages are lost and others, and text, are kept."""

from __future__ import annotations

from dataclasses import dataclass

from editors.base import Request
from editors.edit import Edit
from editors.pruning.prunings import Kinds, allowed, check_budget, check_choice, kept_rows, pruning
from editors.pruning.trained_masks import Learning, Mixing, learn_masks
from memloc.errors import InputError
from memloc.provenance import settings_of
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class BalancedSubnet:
    """Prune the weights that a learned mask drops, trained to lose some passages and to keep others and text.

    As subnet, with the loss -(1 - w) · NLL(forget) + w · NLL(keep), each a mean over the rows of its side in a batch;
    the rows to keep are `retain` and `text` together. A batch without a row of one side counts the other alone.

    Before any training the mask drops weights at random, which alone harms the model; the notes say how the losses
    were before, under the untrained mask, and at the end, and how many weights training chose.

    Attributes:
        share: of every matrix's weights that may be pruned (exactly ⌊share · n⌋).
        keep_weight: w, in [0, 1].
        epochs: passes over the rows; 0 leaves the untrained mask.
        lr: of SGD on the scores.
        momentum: of SGD.
        decay: weight decay of the scores.
        batch_size: rows a step.
        mixing: "drawn": rows of both sides shuffled together (the paper's; with few passages to forget most batches
            have none); "both": half of every batch of each side, and an epoch is over when every passage to forget
            has been shown.
        kinds: "mlp" (the paper's), "mlp-out", "attention" or "all" maps; of no effect with a selection.

    Cost: a step is one forward, one backward, and a choice over all scores; memory three floats a weight.

    Source: Sakarvadia et al. 2024, arXiv:2410.02159. "both" is ours.
    """

    share: float = 0.05
    keep_weight: float = 0.7
    epochs: int = 10
    lr: float = 0.1
    momentum: float = 0.9
    decay: float = 5e-4
    batch_size: int = 32
    mixing: Mixing = "drawn"
    kinds: Kinds = "mlp"

    def __post_init__(self) -> None:
        check_budget(self.share, self.kinds)
        check_choice("mixing", self.mixing, Mixing)
        self._learning()

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched.

        Raises:
            InputError: no passages to forget, nothing to keep, a row in both, or a share of which nothing is left.
            ModelError: the loss is no longer finite.
        """
        forget, keep = request.need_forget(), kept_rows(request)
        if keep is None:
            raise InputError("balanced-subnet needs passages to retain or text to keep; subnet does without")
        where = allowed(view, request, self.kinds)
        masks, notes = learn_masks(view, where, forget, keep, self._learning(), request.seed)
        return pruning(view, masks, "balanced-subnet", settings_of(self), request, notes=notes)

    def _learning(self) -> Learning:
        common = (self.share, self.epochs, self.lr, self.momentum, self.decay, self.batch_size)
        return Learning(*common, self.keep_weight, self.mixing)
