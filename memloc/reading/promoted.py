"""What a vector of the residual stream says, read straight through the final norm's gain and the unembedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memloc.errors import ModelError
from memloc.progress import steps
from memloc.reading.attribution import Norm
from memloc.sites import OUTSIDE, Kind, Site
from memloc.view import ModelView

CHUNK = 1 << 24
"""Logits alive at once."""


def no_direct_path(view: ModelView) -> str | None:
    """Why the values of neurons cannot be read straight in this family, or None where they can."""
    if Kind.MLP_OUT in view.row.summed:
        path = view.row.summed[Kind.MLP_OUT]
        return f"{path} norms the stream after every block, so no neuron's value reaches its end"
    if Kind.MLP_OUT not in view.row.added:
        return None
    return f"{view.row.added[Kind.MLP_OUT]} norms what mlp.out writes, so no neuron's value reaches the stream as it is"


@dataclass(frozen=True)
class DirectPath:
    """From the residual stream to logits, as far as it is linear: the final norm's gain (and centring), and no scale.

    The scale is one positive number a position, so it changes no order of tokens; biases say the same of every vector.

    Attributes:
        view: the model.
        norm: its final norm, taken apart.
        unembedding: [v, d], float32 (float64 where the model is).
    """

    view: ModelView
    norm: Norm
    unembedding: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, view: ModelView) -> DirectPath:
        """Of a model. Cost: no block is run.

        Raises:
            ModelError: its blocks norm what they write, so that no neuron's value reaches the stream as it is.
        """
        reason = no_direct_path(view)
        if reason is not None:
            raise ModelError(f"{view.row.family}: {reason}")
        norm = Norm.of(view)
        return cls(view, norm, view.weight(Site(OUTSIDE, Kind.UNEMBED)).detach().to(norm.gain))

    @property
    def dtype(self) -> torch.dtype:
        """Of all that is computed here."""
        return self.norm.gain.dtype

    def logits(self, vectors: Tensor) -> Tensor:
        """What vectors [..., d] say, up to a positive factor each: [..., v]."""
        vectors = vectors.to(self.dtype)
        seen = vectors - vectors.mean(-1, keepdim=True) if self.norm.centre else vectors
        return (seen * self.norm.gain) @ self.unembedding.T

    def towards(self, tokens: Tensor, residual: Tensor) -> Tensor:
        """Directions [k, d]: a vector times one is its share in the logit of `tokens` [k] above the mean logit.

        Args:
            tokens: [k].
            residual: [k, d], the stream before the final norm, whose scale is held.

        Raises:
            ModelError: the final norm is of another kind.
        """
        above = self.unembedding[tokens] - self.unembedding.mean(0)
        return self.norm.pulled_back(above, self.norm.scale(residual, self.view.final_norm(residual)))


@dataclass(frozen=True)
class Promoted:
    """What the values of all neurons say.

    Attributes:
        most: [l, f, m] token ids, the most promoted first.
        least: [l, f, m], the most suppressed first.
        rank: [l, f, q], place of each target of a neuron among all tokens, 0 the most promoted; -1 where it has none.
        norm: [l, f], length of the value.
    """

    most: Tensor
    least: Tensor
    rank: Tensor
    norm: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, path: DirectPath, *, count: int, targets: Tensor) -> Promoted:
        """Read all values, some at a time.

        Args:
            path: to the logits.
            count: tokens kept at either end.
            targets: [l, f, q] token ids, -1 for none.

        Cost: l·f·v·d multiplications, no forward; memory `CHUNK` logits a few times.
        """
        view = path.view
        count = min(count, len(path.unembedding))
        most = torch.zeros(view.layers, view.neurons, count, dtype=torch.long)
        least, rank = torch.zeros_like(most), torch.full(targets.shape, -1)
        norm = torch.zeros(targets.shape[:2], dtype=path.dtype)
        step = max(1, CHUNK // len(path.unembedding))
        pieces = [(site, start) for site in view.sites(Kind.MLP_OUT) for start in range(0, view.neurons, step)]
        for site, start in steps(pieces, "values of neurons"):
            here = (site.layer, slice(start, start + step))
            values = view.weight(site).detach()[:, here[1]].T
            logits = path.logits(values)
            most[here], least[here] = (logits.topk(count, largest=way).indices.cpu() for way in (True, False))
            wanted = targets[here].to(logits.device)
            own = logits.gather(1, wanted.clamp_min(0))
            above = torch.stack([(logits > column[:, None]).sum(1) for column in own.unbind(1)], 1)
            rank[here] = torch.where(wanted >= 0, above, -1).cpu()
            norm[here] = torch.linalg.vector_norm(values.to(path.dtype), dim=1).cpu()
        return cls(most, least, rank, norm)
