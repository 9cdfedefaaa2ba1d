"""Optimal brain surgeon, turned round: the weights without which the passages to forget lose most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from editors.base import Request
from editors.deltas import Delta, Sparse
from editors.edit import Edit
from editors.pruning.fisher_blocks import Estimate, fisher_blocks
from editors.pruning.prunings import Among, Kinds, allowed, check_budget, check_choice, highest, need_text, pruning
from editors.tuning.descent import working_copy
from memloc.passages import Passages
from memloc.provenance import settings_of
from memloc.sites import Site
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Obs:
    """Prune the weights most salient for the passages to forget: ρ_i = w_i² / (2 [F⁻¹]_ii) is largest.

    F is the empirical Fisher information of the passages' suffix tokens, in blocks along its diagonal, damped. ρ_i is
    what removing weight i costs the passages to second order, once the other weights of its block have made up for it
    as well as they can. The surgeon prunes the *least* salient and then makes up for them; here the most salient go,
    and making up for them in the passages' own F would undo the forgetting.

    Attributes:
        share: of the weights that may be pruned.
        among: "matrix", "row" or "model": what competes.
        compensate: "none" (as published for unlearning); "keep": the other weights of a block change so that what is
            kept (`text`, or `retain` without it) loses least, in *its* F; "forget": the surgeon's own update, which
            makes up for the loss of the passages.
        gradients: at most so many suffix tokens, drawn evenly; one gradient each.
        block: weights in a block.
        damping: added to F's diagonal.
        damping_unit: "mean-diagonal" (a share of the matrix's mean diagonal) or "absolute" (the published 1e-7).
            Gradients of what is known by heart are tiny: where an absolute damping outweighs them, the saliency is
            w² times a constant, and the method prunes the largest weights whatever they do. The notes tell.
        kinds: "mlp" (the paper's), "mlp-out", "attention" or "all" maps; of no effect with a selection.
        megabytes: memory for blocks, `block` floats a weight; maps that do not fit together are taken in turn.

    Cost: a backward a gradient, for each group of maps; block³ operations a block.

    Source: Sakarvadia et al. 2024, arXiv:2410.02159; blocks Kurtic et al. 2022, arXiv:2203.07259; the update Hassibi
    and Stork 1993, for several weights at once. Relative damping and "keep" are ours.
    """

    share: float = 0.01
    among: Among = "matrix"
    compensate: Literal["none", "keep", "forget"] = "none"
    gradients: int = 512
    block: int = 50
    damping: float = 0.01
    damping_unit: Literal["mean-diagonal", "absolute"] = "mean-diagonal"
    kinds: Kinds = "mlp"
    megabytes: int = 512

    def __post_init__(self) -> None:
        check_budget(self.share, self.kinds, self.among)
        check_choice("compensate", self.compensate, Literal["none", "keep", "forget"])
        check_choice("damping_unit", self.damping_unit, Literal["mean-diagonal", "absolute"])
        self._estimate(0)

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched.

        Raises:
            InputError: no passages to forget, no text for "keep", or a share of which nothing is left.
        """
        forget, work = request.need_forget(), working_copy(view)
        basis = need_text(request) if self.compensate == "keep" else forget
        where, estimate = allowed(view, request, self.kinds), self._estimate(request.seed)
        scores: dict[Site, Tensor] = {}
        drowned: dict[str, float] = {}
        for group in fisher_blocks(work, where, forget, estimate):
            for site, blocks in group.items():
                mask, weight = where[site], work.weight(site).detach().cpu()
                scores[site] = weight.new_zeros(mask.shape).double()
                scores[site][mask] = weight[mask].double().square() / (2 * blocks.inverse_diagonal())
                mean = float(blocks.fisher.diagonal(dim1=1, dim2=2).double().sum()) / blocks.count
                drowned[str(site)] = float(f"{blocks.damping / mean if mean else 0.0:.4g}")
        masks = highest(scores, where, self.share, self.among)
        deltas = None if self.compensate == "none" else self._made_up(work, where, masks, basis, estimate)
        notes = {"damping over mean diagonal": drowned}
        return pruning(view, masks, "obs", settings_of(self), request, deltas=deltas, notes=notes)

    def _made_up(
        self, work: ModelView, where: dict[Site, Tensor], masks: dict[Site, Tensor], basis: Passages, how: Estimate
    ) -> dict[Site, Delta]:
        """The change of pruned weights and of those that make up for them."""
        deltas: dict[Site, Delta] = {}
        chosen = {site: where[site] for site in masks}
        for group in fisher_blocks(work, chosen, basis, how):
            for site, blocks in group.items():
                mask, weight = where[site], work.weight(site).detach().cpu()
                change = weight.new_zeros(mask.shape).double()
                change[mask] = blocks.compensation(weight[mask], masks[site][mask])
                deltas[site] = Sparse.of(change.float(), change != 0)
        return deltas

    def _estimate(self, seed: int) -> Estimate:
        absolute = self.damping_unit == "absolute"
        return Estimate(self.gradients, self.block, self.damping, absolute, self.megabytes, seed)
