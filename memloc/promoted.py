"""What a vector of the residual stream says, read straight through the final norm's gain and the unembedding."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from memloc.errors import ModelError
from memloc.progress import steps
from memloc.sites import OUTSIDE, Kind, Site
from memloc.view import ModelView

CHUNK = 1 << 24
"""Logits alive at once."""


@dataclass(frozen=True)
class DirectPath:
    """From the residual stream to logits, as far as it is linear.

    The final norm is gain ⊙ x / scale(x) + bias, x centred or not.

    The scale is one positive number a position, so it changes no order of tokens; biases say the same of every vector.
    Both are left out of what a vector says.

    Attributes:
        view: the model.
        gain: [d], float32 (float64 where the model is).
        centred: the norm takes the mean away (layer norm), or not (root mean square).
        unembedding: [v, d].
    """

    view: ModelView
    gain: Tensor
    centred: bool
    unembedding: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, view: ModelView) -> DirectPath:
        """Found by arithmetic on the final norm itself, and proved on another vector.

        Raises:
            ModelError: the final norm is of neither kind.
        """
        norm = copy.deepcopy(view.model.get_submodule(view.row.final_norm)).double()

        def odd(x: Tensor) -> Tensor:
            """Without the bias; the large factor makes the norm's epsilon nothing."""
            found: Tensor = (norm(1e4 * x) - norm(-1e4 * x)) / 2
            return found

        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(2, view.width, dtype=torch.float64, generator=generator).to(view.device)
        x = x.sign() * (1 + x.abs())
        x = x - x.mean()
        gain = odd(x) * x.square().mean().sqrt() / x
        centred = bool(torch.allclose(odd(x + 1), odd(x), rtol=1e-4, atol=1e-6))
        y = y + 1
        seen = y - y.mean() if centred else y
        if not torch.allclose(odd(y), gain * seen / seen.square().mean().sqrt(), rtol=1e-3, atol=1e-5):
            raise ModelError(f"{view.row.final_norm}: neither a layer norm nor a root mean square norm; cannot read it")
        wide = torch.float64 if view.dtype == torch.float64 else torch.float32
        unembedding = view.weight(Site(OUTSIDE, Kind.UNEMBED)).detach().to(wide)
        return cls(view, gain.to(wide), centred, unembedding)

    def centre(self, vectors: Tensor) -> Tensor:
        """The vectors in the path's dtype, without their mean where the norm takes it away."""
        vectors = vectors.to(self.gain)
        return vectors - vectors.mean(-1, keepdim=True) if self.centred else vectors

    def logits(self, vectors: Tensor) -> Tensor:
        """What vectors [..., d] say, up to a positive factor each: [..., v]."""
        return (self.centre(vectors) * self.gain) @ self.unembedding.T

    def scale(self, residual: Tensor) -> Tensor:
        """What the norm divides residual vectors [..., d] by: [..., 1], its epsilon included."""
        direct = self.centre(residual) * self.gain
        normed = (self.view.final_norm(residual) - self.view.final_norm(-residual)).to(direct) / 2
        largest = direct.abs().argmax(-1, keepdim=True)
        return direct.gather(-1, largest) / normed.gather(-1, largest)

    def towards(self, tokens: Tensor) -> Tensor:
        """Directions [k, d] of the stream along which the logits of `tokens` [k] rise over the vocabulary's mean."""
        above = self.unembedding[tokens] - self.unembedding.mean(0)
        return self.centre(above * self.gain)


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
        norm = torch.zeros(targets.shape[:2], dtype=path.gain.dtype)
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
            norm[here] = torch.linalg.vector_norm(values.to(path.gain), dim=1).cpu()
        return cls(most, least, rank, norm)
