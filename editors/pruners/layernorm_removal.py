"""LayerNorm removal: norms lose their gains and biases, by layer; a diagnostic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from editors.base import Request
from editors.deltas import Delta, Dense
from editors.edit import Edit
from memloc.errors import InputError
from memloc.provenance import Provenance, settings_of
from memloc.sites import OUTSIDE, Grain, Kind, Site
from memloc.view import ModelView

BLOCK = "attn.norm,mlp.norm,attn.outnorm,mlp.outnorm"


@dataclass(frozen=True, kw_only=True)
class LayernormRemoval:
    """Set the gains of norms to 1 and their biases to 0: x̂ · γ + β becomes x̂. The normalization itself stays.

    A diagnostic: in models that norm what a block reads, as nearly all language models do, trained without them, more
    was memorized and less generalized; in those that norm what it writes, memorized labels went. Here they are taken
    from a trained model, where everything after was fitted to them.

    Attributes:
        layers: blocks whose norms lose them; by default those of the selection, else all. The final norm and that of
            the embedding go only if `kinds` names them.
        kinds: "attn.norm" and "mlp.norm" (before), "attn.outnorm" and "mlp.outnorm" (behind), "attn.qnorm",
            "attn.knorm", "norm" (the final one), "embed.norm".
        gains: set gains to 1 (stored as 0 in families that store the gain less 1).
        biases: set biases to 0.

    A selection of layers says which blocks. The norm of a parallel block is "attn.norm".

    Cost: none beyond the edit.

    Source: Singhal & Kim 2025, "Impact of Layer Norm on Memorization and Generalization in Transformers" (there with
    training).
    """

    settings_suffice: ClassVar[bool] = True

    layers: tuple[int, ...] = ()
    kinds: str = BLOCK
    gains: bool = True
    biases: bool = True

    @torch.no_grad()
    def __call__(self, view: ModelView, request: Request) -> Edit:
        """The edit; the view's model is untouched.

        Raises:
            InputError: no such layer or norm, a selection of something else than layers, or norms without parameters.
        """
        deltas: dict[Site, Delta] = {}
        exact = {}
        for site in self._sites(view, request):
            live = view.weight(site).detach().cpu()
            meant = torch.full_like(live, 0.0 if site.bias else 1.0 - view.row.norm_offset)
            if not torch.equal(meant, live):
                deltas[site], exact[site] = Dense((meant.double() - live.double()).float()), meant
        if not deltas:
            raise InputError("layernorm-removal: every gain is 1 and every bias 0 there already; nothing is removed")
        provenance = Provenance("layernorm-removal", settings_of(self), None, request.inputs(view))
        return Edit.of(view, deltas, provenance, exact=exact)

    def _sites(self, view: ModelView, request: Request) -> list[Site]:
        layers = self._layers(view, request)
        known = {str(kind): kind for kind in Kind if kind.is_norm}
        names = [name.strip() for name in self.kinds.split(",")]
        for name in names:
            if name not in known:
                raise InputError(f"no norm called {name!r}; norms: {', '.join(known)}")
        parts = [flag for flag, wanted in ((False, self.gains), (True, self.biases)) if wanted]
        found = [
            Site(layer, kind, bias)
            for kind in (known[name] for name in dict.fromkeys(names))
            for layer in (layers if kind.in_block else [OUTSIDE])
            for bias in parts
        ]
        found = [site for site in found if view.has(site)]
        if not found:
            raise InputError(
                f"{view.row.family}: {self.kinds} have no gains or biases in this model that could be removed"
            )
        return found

    def _layers(self, view: ModelView, request: Request) -> list[int]:
        for layer in self.layers:
            if not 0 <= layer < view.layers:
                raise InputError(f"layer {layer}: the model has {view.layers}, counted from 0")
        if request.selection is None:
            return list(self.layers or range(view.layers))
        if request.selection.grain is not Grain.LAYER:
            raise InputError(f"a selection of {request.selection.grain}s names no norms; expected layers")
        chosen = [site.layer for site, mask in request.selection.masks.items() if bool(mask)]
        return sorted({layer for layer in chosen if not self.layers or layer in self.layers})
