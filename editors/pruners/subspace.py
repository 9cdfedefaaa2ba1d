"""Subspace pruning: take out what memorized passages use of a map and ordinary text does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from editors.base import Request
from editors.deltas import Delta, LowRank, Sparse
from editors.edit import Edit
from editors.pruning.activity import moments_at, root_mean_squares
from editors.pruning.prunings import Among, Kinds, allowed, check_budget, check_choice, highest, need_text, pruning
from memloc.errors import InputError
from memloc.provenance import settings_of
from memloc.sites import Site
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Subspace:
    """Prune weights, or project out directions, that the passages to forget use more than ordinary text does.

    - "set-difference": with A_j the root mean square of input j where a suffix token is predicted (A^f) and over all
      tokens of text (A^b), and S = |W| · A, an entry becomes zero if S^f is in the top share of its row and above S^b.
      So no more than the share is pruned, and less where text uses the same inputs; the notes say how much.
    - "directions": with C_f and C_b the second moments of the map's input, the `rank` vectors v with the largest
      vᵀC_f v / vᵀC_b v, scaled to VᵀC_bV = I, are no longer read: W becomes W (I - C_b V Vᵀ), a change of low rank.
      Of all projections whose result V does not see, it moves the inputs of text least in units of their own spread
      (in the norm xᵀC_b⁻¹x).

    Attributes:
        mode: which.
        share: "set-difference": of the weights that may be pruned, an upper bound.
        among: what competes for it: "row" (the paper's), "matrix" or "model".
        normalized: "set-difference": give every token's vector length one first (as the paper's code does).
        rank: "directions": how many a map.
        damping: "directions": share of C_b's mean diagonal added to its diagonal.
        kinds: "mlp", "mlp-out" (the paper's), "attention" or "all" maps; of no effect with a selection.
        batch_size: rows of a forward pass; no effect beyond rounding.

    A selection restricts: "set-difference" prunes within it; "directions" works on the selected inputs of each map
    alone, and where single weights are selected, only those entries of the change are kept.

    Cost: one forward over the passages and one over the text; "directions" an eigendecomposition of [in, in] a map.

    Source: Chavhan et al. 2024, arXiv:2406.18566, for diffusion models, with denoising steps dropped. Means in the
    place of sums over tokens, so that sets of different size compare, and "directions" are ours.
    """

    mode: Literal["set-difference", "directions"] = "set-difference"
    share: float = 0.01
    among: Among = "row"
    normalized: bool = False
    rank: int = 4
    damping: float = 0.01
    kinds: Kinds = "mlp-out"
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_budget(self.share, self.kinds, self.among)
        check_choice("mode", self.mode, Literal["set-difference", "directions"])
        if self.rank < 1 or self.damping <= 0:
            raise InputError(f"rank {self.rank}, damping {self.damping}: expected at least 1, and above 0")

    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched.

        Raises:
            InputError: no passages to forget, no text to compare with, or nothing that the passages use more.
        """
        request.need_forget(), need_text(request)
        where = allowed(view, request, self.kinds)
        if self.mode == "directions":
            return self._projected(view, request, where)
        masks, notes = self._difference(view, request, where)
        return pruning(view, masks, "subspace", settings_of(self), request, notes=notes)

    def _difference(
        self, view: ModelView, request: Request, where: dict[Site, Tensor]
    ) -> tuple[dict[Site, Tensor], dict[str, Any]]:
        """What is pruned, and for the notes how many were only among the best scored."""
        how: dict[str, Any] = {"normalized": self.normalized, "size": self.batch_size}
        used = root_mean_squares(view, request.need_forget(), list(where), "suffix", **how)
        usual = root_mean_squares(view, need_text(request), list(where), "all", **how)
        scores = {site: view.weight(site).detach().cpu().double().abs() * used[site] for site in where}
        best = highest(scores, where, self.share, self.among)
        masks = {site: mask & (used[site] > usual[site]) for site, mask in best.items()}
        masks = {site: mask for site, mask in masks.items() if bool(mask.any())}
        if not masks:
            raise InputError("no weight in the top share is used more by the passages than by text; raise the share")
        return masks, {"top share": sum(int(mask.sum()) for mask in best.values())}

    def _projected(self, view: ModelView, request: Request, where: dict[Site, Tensor]) -> Edit:
        used = moments_at(view, request.need_forget(), list(where), "suffix", size=self.batch_size)
        usual = moments_at(view, need_text(request), list(where), "all", size=self.batch_size)
        deltas: dict[Site, Delta] = {}
        ratios: dict[str, list[float]] = {}
        for site, mask in sorted(where.items()):
            chosen = mask.any(0)
            at = chosen.nonzero()[:, 0]
            seen = min(self.rank, len(at))
            found, mixing = contrasting(used[site][at][:, at], usual[site][at][:, at], seen, self.damping)
            weight = view.weight(site).detach().cpu().double()
            right = torch.zeros(seen, weight.shape[1], dtype=torch.float64)
            right[:, at] = mixing.directions.T
            change = LowRank((-weight[:, at] @ (found @ mixing.directions)).float(), right.float())
            whole = bool((mask == chosen).all())
            deltas[site] = change if whole else Sparse.of(change.dense(), mask)
            ratios[str(site)] = mixing.ratios
        more: dict[str, Any] = {"deltas": deltas, "notes": {"ratios": ratios}, "counted": False}
        return pruning(view, where, "subspace", settings_of(self), request, **more)


@dataclass(frozen=True)
class Contrast:
    """Directions that one set uses and another does not.

    Attributes:
        directions: V [in, r] float64, with VᵀCV = 1 for the damped C of the other set.
        ratios: vᵀC_f v of each, falling: how many times the other set's mean square.
    """

    directions: Tensor
    ratios: list[float]


def contrasting(used: Tensor, usual: Tensor, rank: int, damping: float) -> tuple[Tensor, Contrast]:
    """The damped `usual` second moment, and the generalised eigenvectors of `used` against it with largest ratio."""
    size = len(usual)
    damped = usual + damping * usual.diagonal().mean() * torch.eye(size, dtype=usual.dtype)
    factor = torch.linalg.cholesky(damped)
    half = torch.linalg.solve_triangular(factor, used, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.T, upper=False)
    values, vectors = torch.linalg.eigh((whitened + whitened.T) / 2)
    top = torch.linalg.solve_triangular(factor.T, vectors[:, -rank:].flip(1), upper=True)
    return damped, Contrast(top, [round(float(value), 4) for value in values[-rank:].flip(0)])
