"""Task vectors: add or take away what fine-tuning changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

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
class TaskVector:
    """Add a multiple of what a training changed: θ + scale (θ_finetuned - θ_base); below 0 it is forgotten.

    To forget passages, fine-tune a copy on them until it recites nothing else, and take that step back from the model.
    Or, where a checkpoint from before they were learned is at hand, name it as `base`: scale -1 is that checkpoint.

    Attributes:
        finetuned: folder of θ_finetuned; by default the model itself.
        base: folder of θ_base; by default the model itself.
        scale: no unit. MUSE took -5 for fine-tuned news.

    A selection restricts the change to its layers' maps, components, or entries; without one, embeddings, positions,
    norms and biases change too (a tied embedding once). A difference of low rank, as a merged adapter leaves it, stays
    one.

    Cost: one reading of each checkpoint; memory of the deltas.

    Source: Ilharco et al. 2023, arXiv:2212.04089; on text: Shi et al. 2024 (MUSE), arXiv:2407.06460.
    """

    settings_suffice: ClassVar[bool] = True

    finetuned: str | None = None
    base: str | None = None
    scale: float = -1.0

    def __post_init__(self) -> None:
        if self.scale == 0:
            raise InputError("scale 0 changes nothing; below 0 forgets, above 0 adds")

    @torch.no_grad()
    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched.

        Raises:
            InputError: no checkpoint is named, or the two have the same weights.
            CheckpointError, MismatchError: a checkpoint is damaged, or of another architecture or vocabulary.
        """
        folders = [folder for folder in (self.finetuned, self.base) if folder]
        if not folders:
            raise InputError("task-vector: no checkpoint; name the folder of `finetuned`, of `base`, or both")
        masks = None if request.selection is None else weight_masks(view, request.selection)
        sites = every_site(view) if masks is None else tuple(masks)
        if masks is None:
            need_reached(view, sites)
        snapshots = [open_other(view, folder) for folder in folders]
        deltas: dict[Site, Delta] = {}
        digests: dict[str, list[str]] = {}
        for site, parts in steps(read_weights(view, snapshots, sites), "task-vector", len(sites)):
            live, given = view.weight(site).detach().cpu(), iter(parts)
            digests[str(site)] = [digest_tensor(part) for part in parts]
            after = next(given) if self.finetuned else live
            before = next(given) if self.base else live
            change = self.scale * (after.double() - before.double())
            if bool(change.any()):
                deltas[site] = smallest(change, live, None if masks is None else masks[site])
        deltas = {site: delta for site, delta in deltas.items() if delta.touched}
        if not deltas:
            raise InputError("task-vector: the two checkpoints have the same weights there; there is no difference")
        settings = settings_of(replace(self, finetuned=None, base=None))
        settings |= {"finetuned": bool(self.finetuned), "base": bool(self.base)}
        inputs = {**request.inputs(view), "checkpoints": digest_json(digests)}
        return Edit.of(view, deltas, Provenance("task-vector", settings, None, inputs), shared=True)
