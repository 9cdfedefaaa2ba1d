"""Layer rewind as an edit: layers or components get the very weights of an earlier checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from editors.base import Request
from editors.deltas import Delta, Dense, Sparse
from editors.disk.other_checkpoints import every_site, need_reached, open_other, read_weights
from editors.edit import Edit
from editors.masks import weight_masks
from memloc.errors import InputError
from memloc.provenance import Provenance, digest_json, digest_tensor, settings_of
from memloc.sites import Grain, Site, kinds_named
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class LayerRewind:
    """Put layers or components back to an earlier checkpoint: their weights become its weights, to the bit.

    W becomes W_earlier, cast once to the model's dtype; where adding a float32 difference cannot give those bits, the
    bits it lacks are kept in the edit. A layer is its whole block, norms and biases too; what lies outside the blocks
    stays the model's own. A twin that was trained otherwise is swapped in by naming its folder.

    Attributes:
        earlier: folder of the checkpoint: safetensors, one file or sharded; read tensor by tensor.
        layers: these whole blocks; by default those of the selection, else all.
        kinds: only these maps, with their biases, such as "mlp.in,mlp.out".
        reach: what a selected neuron or head puts back; see `weight_masks`.

    A selection of layers or components names what is put back whole; of weights, neurons or heads, those entries.
    Notes: how far each layer had moved, ‖W_earlier - W‖ / ‖W‖.

    Cost: one reading of the tensors put back.

    Source: Maini et al. 2023, arXiv:2307.09542; Dankers & Titov 2024, arXiv:2408.04965. As an edit: ours.
    """

    settings_suffice: ClassVar[bool] = True

    earlier: str | None = None
    layers: tuple[int, ...] = ()
    kinds: str | None = None
    reach: Literal["columns", "unit"] = "columns"

    @torch.no_grad()
    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched.

        Raises:
            InputError: no checkpoint is named, no such layer or kind, or everything has these weights already.
            CheckpointError, MismatchError: the checkpoint is damaged, or of another architecture.
        """
        if not self.earlier:
            raise InputError("layer-rewind: no earlier checkpoint; name its folder in `earlier`")
        masks = self._masks(view, request)
        other = open_other(view, self.earlier)
        deltas: dict[Site, Delta] = {}
        exact, moved, digests = {}, dict[int, Tensor](), {}
        for site, (old,) in read_weights(view, [other], tuple(masks)):
            live = view.weight(site).detach().cpu()
            meant, mask = old.to(live.dtype), masks[site]
            digests[str(site)] = digest_tensor(old)
            if mask is not None:
                meant = torch.where(mask, meant, live)
            change = meant.double() - live.double()
            tally = torch.stack([change.square().sum(), live.double().square().sum()])
            moved[site.layer] = moved.get(site.layer, torch.zeros(2, dtype=torch.float64)) + tally
            if not torch.equal(meant, live):
                deltas[site] = Dense(change.float()) if mask is None else Sparse.of(change.float(), mask)
                exact[site] = meant
        if not deltas:
            raise InputError(f"{self.earlier} has the model's own weights there; nothing is put back")
        settings = settings_of(replace(self, earlier=None))
        given = {**request.inputs(view), "earlier": digest_json(digests)}
        notes: dict[str, Any] = {
            "moved": {str(layer): float((gap / size.clamp_min(1e-300)).sqrt()) for layer, (gap, size) in moved.items()}
        }
        return Edit.of(view, deltas, Provenance("layer-rewind", settings, None, given), notes=notes, exact=exact)

    def _masks(self, view: ModelView, request: Request) -> dict[Site, Tensor | None]:
        """What is put back: site to the entries that are, None for all."""
        chosen, selection = self.layers, request.selection
        for layer in chosen:
            if not 0 <= layer < view.layers:
                raise InputError(f"layer {layer}: the model has {view.layers}, counted from 0")
        found: dict[Site, Tensor | None]
        if selection is not None and selection.grain is not Grain.LAYER:
            masks = weight_masks(view, selection, reach=self.reach)
            found = {site: None if bool(mask.all()) else mask for site, mask in masks.items()}
        else:
            selected = range(view.layers) if selection is None else _layers(selection.masks)
            found = dict.fromkeys(site for site in every_site(view) if site.kind.in_block and site.layer in selected)
            for layer in selected if self.kinds is None else ():
                need_reached(view, tuple(found), f"{view.row.blocks}.{layer}.")
        wanted = kinds_named(self.kinds) if self.kinds else None
        found = {
            site: mask
            for site, mask in found.items()
            if (not chosen or site.layer in chosen) and (wanted is None or site.kind in wanted)
        }
        if not found:
            raise InputError(
                "layer-rewind: no layer or component is left to put back; widen layers, kinds or selection"
            )
        return found


def _layers(masks: Any) -> set[int]:
    return {site.layer for site, mask in masks.items() if bool(mask)}
