"""The proof of an engine: on one small forward it must say what plain hooks say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from memloc.batches import Batch, pad
from memloc.engines.engine import HOOKS
from memloc.engines.lens import BridgeEngine
from memloc.errors import ModelError
from memloc.proof import TOLERANCE
from memloc.sites import Kind

if TYPE_CHECKING:
    from memloc.view import ModelView


def prove_engine(view: ModelView, bridge: Any = None) -> None:
    """Check that the view's engine, or the bridge it came from, agrees with plain hooks on the same parameters.

    It cannot where a bridge's copies of a fused map and the map itself have been edited apart.

    Raises:
        ModelError: names the first place that differs and by how much.
    """
    if bridge is not None and view.engine.name == HOOKS:
        other = view.running(BridgeEngine(bridge, view.model))
    elif view.engine.name != HOOKS:
        other = view
    else:
        return
    generator = torch.Generator().manual_seed(0)
    length = min(6, view.context or 6)
    batch = pad(torch.randint(view.vocab, (2, length), generator=generator).tolist(), device=view.device)
    _same(view.running(), other, batch)


def _same(plain: ModelView, other: ModelView, batch: Batch) -> None:
    # Experts' neurons are no module's input, and no other engine visits them.
    sites = [s for s in plain.sites(Kind.ATTN_OUT, Kind.MLP_OUT) if plain.point(s, None, "input").inside is None]
    with torch.no_grad():
        with plain.record(sites) as wanted:
            ends = plain.logits(batch)
        with other.record(sites) as found:
            told = other.logits(batch)
    places = [(str(site), wanted[site], found[site]) for site in sites] + [("logits", ends, told)]
    for name, mine, theirs in places:
        largest = float(mine.double().abs().max())
        away = float((mine.double() - theirs.double()).abs().max())
        if not away <= TOLERANCE.get(plain.dtype, 1e-4) * max(largest, 1e-6):
            raise ModelError(
                f"{name}: {other.engine.name} and plain hooks differ by {away:.2g} on the same parameters; one "
                "side of a fused map was edited, of which bridges keep copies (build the bridge anew), or "
                "TransformerLens runs this family otherwise (give the transformers model, engine hooks)"
            )
