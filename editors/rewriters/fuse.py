"""Fusing checkpoints: what all of them know stays, what one alone has memorized fades."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from editors.base import Request
from editors.deltas import Delta
from editors.disk.other_checkpoints import every_site, need_reached, open_other, read_weights, smallest
from editors.edit import Edit
from editors.masks import weight_masks
from memloc.errors import InputError
from memloc.progress import steps
from memloc.provenance import Provenance, digest_json, digest_tensor, settings_of
from memloc.sites import Site
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Fuse:
    """Average the model with other checkpoints of its architecture: θ = Σ c_k θ_k, every parameter.

    Knowledge that all of them share stays; what one alone has memorized fades. The averages make sense between models
    that were fine-tuned from one start; models trained from different starts have different coordinates, and their
    average is noise (so are fresh ones).

    Attributes:
        others: folders of the other checkpoints; safetensors, one file or sharded, read tensor by tensor.
        weights: c, the model's own first, then those of `others`; they sum to 1. By default all are equal.
        mean: "arithmetic", or "geometric": sign(Σ c_k θ_k) Π |θ_k|^c_k, which is 0 where any is 0.

    A selection restricts the average to its layers' maps, components, or entries; without one, embeddings, positions,
    norms and biases are averaged too (a tied embedding once).

    Cost: one reading of every checkpoint; memory of the deltas.

    Source: Zaman et al. 2024, "Fuse to Forget", arXiv:2311.07682. The sign of the geometric mean is ours.
    """

    settings_suffice: ClassVar[bool] = True

    others: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    mean: Literal["arithmetic", "geometric"] = "arithmetic"

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != 1 + len(self.others):
            raise InputError(
                f"{len(self.weights)} weights for the model and {len(self.others)} others; give one each, its own first"
            )
        if self.weights and not math.isclose(math.fsum(self.weights), 1, abs_tol=1e-6):
            raise InputError(f"weights sum to {math.fsum(self.weights):g}, not 1; differences are added by task-vector")
        if self.mean not in ("arithmetic", "geometric"):
            raise InputError(f"mean {self.mean!r}: expected 'arithmetic' or 'geometric'")

    @torch.no_grad()
    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched.

        Raises:
            InputError: no other checkpoint, or all have the model's own weights.
            CheckpointError, MismatchError: a checkpoint is damaged, or of another architecture or vocabulary.
        """
        if not self.others:
            raise InputError("fuse: no other checkpoint; name their folders in `others`")
        masks = None if request.selection is None else weight_masks(view, request.selection)
        sites = every_site(view) if masks is None else tuple(masks)
        if masks is None:
            need_reached(view, sites)
        snapshots = [open_other(view, folder) for folder in self.others]
        shares = self.weights or (1 / (1 + len(snapshots)),) * (1 + len(snapshots))
        deltas: dict[Site, Delta] = {}
        digests: dict[str, list[str]] = {}
        for site, parts in steps(read_weights(view, snapshots, sites), "fuse", len(sites)):
            live = view.weight(site).detach().cpu()
            digests[str(site)] = [digest_tensor(part) for part in parts]
            change = self._mean([live, *parts], shares) - live.double()
            if bool(change.any()):
                deltas[site] = smallest(change, live, None if masks is None else masks[site])
        deltas = {site: delta for site, delta in deltas.items() if delta.touched}
        if not deltas:
            raise InputError("fuse: the other checkpoints have the model's own weights there; there is nothing to do")
        settings = settings_of(replace(self, others=(), weights=())) | {"weights": list(shares)}
        given = {**request.inputs(view), "others": digest_json(digests)}
        return Edit.of(view, deltas, Provenance("fuse", settings, None, given), shared=True)

    def _mean(self, parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
        total = torch.zeros(parts[0].shape, dtype=torch.float64)
        logs = total.clone()
        for part, share in zip(parts, shares, strict=True):
            total += share * part.double()
            # 0 · log 0 is 0 here: a checkpoint of no weight has no say.
            logs += share * part.double().abs().log() if share else 0
        return total if self.mean == "arithmetic" else total.sign() * logs.exp()
