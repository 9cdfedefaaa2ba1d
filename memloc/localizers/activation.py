"""Activations: which neurons or heads speak where the suffix is predicted. The simplest localizer, and a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memloc.costs import Cost, block_tokens, pass_bytes, widest
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.progress import steps
from memloc.provenance import Provenance, settings_of
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Activation:
    """Score of a neuron or head = how much it writes where the suffix is predicted, in the residual stream's units.

    Of a neuron: mean over those positions of |w|·‖v‖, with w what enters `mlp.out` and v [d] its column there. Of a
    head: mean of ‖what it adds to the residual stream‖. What speaks loudly need not speak for this suffix: read these
    scores beside those of a control. One axis of passages.

    Attributes:
        grain: "neuron" or "head".
        values: count ‖v‖ in; otherwise mean |w| alone (a head: the norm of what enters `attn.out`), which changes when
            a neuron's incoming weights are scaled up and its outgoing ones down, though the model does not.
        signed: neurons only: the mean of w, not of |w|, so that silent and negative differ.
        batch_size: passages per forward; no effect on scores.

    Cost: one forward a passage.

    Source: Chang et al. 2024, arXiv:2311.09060, section "Activations"; heads and the sign are ours.
    """

    grain: Literal["neuron", "head"] = "neuron"
    values: bool = True
    signed: bool = False
    batch_size: int = 16

    @torch.no_grad()
    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score places, passage by passage; `contrast` is not used.

        Raises:
            InputError: no passages, or signed heads (a norm has no sign).
        """
        if not passages:
            raise InputError("activation: no passages given")
        if self.signed and self.grain == "head":
            raise InputError("activation: a head's score is a norm and has no sign; leave signed off, or take neurons")
        sites = view.sites(Kind.MLP_OUT if self.grain == "neuron" else Kind.ATTN_OUT)
        size = view.neurons if self.grain == "neuron" else view.heads
        scores = {site: torch.zeros(len(passages), size) for site in sites}
        for batch in steps(list(view.batches(passages, size=self.batch_size)), "activations"):
            with view.record(sites) as seen:
                view.hidden(batch)
            count = (batch.length - batch.prefix)[:, None]
            for site in sites:
                heard = self._heard(view, site, seen[site]) * batch.predicting[..., None]
                scores[site][list(batch.rows)] = (heard.sum(1) / count).cpu().float()
        inputs = {"model": view.digest, "passages": passages.digest}
        provenance = Provenance("activation", settings_of(self), inputs=inputs)
        return Localization(Grain(self.grain), scores, provenance, passages.ids)

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """One forward over the passages, told without running it."""
        rows, tokens = widest(passages, size=self.batch_size)
        kept = 3 * view.layers * rows * tokens * (view.neurons if self.grain == "neuron" else view.heads * view.width)
        memory = pass_bytes(view, rows * tokens, context=tokens) + 8 * kept + 8 * view.width * view.neurons
        results = 8 * view.layers * len(passages) * max(view.neurons, view.heads)
        return Cost(block_tokens(view, passages, size=self.batch_size), bytes=memory + results)

    def _heard(self, view: ModelView, site: Site, entering: Tensor) -> Tensor:
        """Size of every neuron or head at every position, [n, t, f or h]."""
        entering = entering if entering.dtype == torch.float64 else entering.float()
        weight = view.weight(site).detach().to(entering)
        if self.grain == "neuron":
            sized = entering if self.signed else entering.abs()
            return sized * torch.linalg.vector_norm(weight, dim=0) if self.values else sized
        heads = entering.view(*entering.shape[:-1], view.heads, view.head_width)
        if not self.values:
            norms: Tensor = torch.linalg.vector_norm(heads, dim=-1)
            return norms
        # One head at a time: [n, t, d] each, not [n, t, h, d] at once.
        columns = weight.view(len(weight), view.heads, view.head_width)
        written = [
            torch.linalg.vector_norm(heads[..., head, :] @ columns[:, head].T, dim=-1) for head in range(view.heads)
        ]
        return torch.stack(written, -1)
