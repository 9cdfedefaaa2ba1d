"""Direct logit attribution: the parts of the residual stream, each with its share in a token's logit.

The final norm is taken apart by arithmetic, not by its name: shift it, scale it, and see what it does. So a norm that
centres and one that does not, with a gain stored as it is or as its distance from 1, are one case. That the parts make
up the stream is checked in every run, so a family that norms what its sublayers write cannot be read wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.errors import ModelError
from memloc.proof import TOLERANCE
from memloc.reading.readout import Of, Position, spoken_at, wide
from memloc.sites import OUTSIDE, Kind, Site
from memloc.view import ModelView


@dataclass(frozen=True)
class Norm:
    """The final norm as gain ⊙ (x - centre·mean x) / σ(x) + bias.

    Attributes:
        gain: [d].
        bias: [d], zeros where there is none.
        centre: whether the mean is taken away.
        dtype: the model's, which says how exact the rest can be.
    """

    gain: Tensor
    bias: Tensor
    centre: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, view: ModelView) -> Norm:
        """Take the view's final norm apart. Cost: no block is run."""
        return cls.apart(view, view.final_norm)

    @classmethod
    @torch.no_grad()
    def apart(cls, view: ModelView, module: Callable[[Tensor], Tensor]) -> Norm:
        """Take a norm of the stream's width apart, on a handful of vectors.

        Vectors are large, so that what the norm adds under its root vanishes.
        """

        def norm(x: Tensor) -> Tensor:
            return module(x.to(view.device, view.dtype)).to(wide(view.dtype))

        signs = 1.0 - 2.0 * (torch.arange(view.width, dtype=torch.float64) % 2)
        bias = norm(torch.zeros(view.width, dtype=torch.float64))
        probe, shifted = norm(8192 * signs), norm(8192 * (signs + 2))
        change = float((shifted - probe).abs().max())
        centre = change <= TOLERANCE.get(view.dtype, 1e-4) * float((probe - bias).abs().max())
        around = signs - signs.mean() if centre else signs
        unit = (around / around.square().mean().sqrt()).to(bias)
        return cls((probe - bias) / unit, bias, centre, view.dtype)

    def scale(self, before: Tensor, after: Tensor) -> Tensor:
        """σ [k] of streams `before` [k, d], from what the norm made of them, `after` [k, d].

        Raises:
            ModelError: no scale explains the norm, so it is of another kind.
        """
        linear, made = self._gained(before.to(self.gain)), after.to(self.gain) - self.bias
        sigma = linear.square().sum(-1) / (linear * made).sum(-1)
        gap = float((linear / sigma[:, None] - made).abs().max())
        # The gain itself is read through the norm, so its rounding enters twice; some norms are float32 in every dtype.
        allowed = 2 * max(1e-5, TOLERANCE.get(self.dtype, 1e-4))
        if not gap <= allowed * max(1.0, float(made.abs().max())):
            raise ModelError(f"the final norm is no gain, centring and scale: off by {gap:.2g}; nothing is attributed")
        return sigma

    def pulled_back(self, direction: Tensor, sigma: Tensor) -> Tensor:
        """What a part of the stream is to be multiplied with to know its share along `direction` [k, d]."""
        gained = direction.to(self.gain) * self.gain
        return (gained - gained.mean(-1, keepdim=True) if self.centre else gained) / sigma[:, None]

    def _gained(self, stream: Tensor) -> Tensor:
        return self.gain * (stream - stream.mean(-1, keepdim=True) if self.centre else stream)


@dataclass(frozen=True)
class Attribution:
    """Shares of the parts of the stream in each position's logit: k positions.

    `embedding`, `constant` and all of `components` sum to `logit`, up to rounding.

    Attributes:
        components: site (`attn.out` and `mlp.out` of every layer, their biases included, and behind the norm that
            what they put out may pass) to [k].
        embedding: [k], what enters the first block.
        constant: [k], the biases of the final norm and of the unembedding.
        logit: [k], the model's own before any soft cap, minus the vocabulary's mean where centred.
        along: [k, d], the direction each part of the stream is multiplied with.
        row: [k], row of each position in the batch.
        column: [k], the position.
        token: [k], the token read for.
        entering: what entered the sites that were asked for, site to [k, width].
        inside: site to [k, d], of those sites: the direction that what their map puts out is multiplied with. It is
            `along`, but where a norm stands behind the map (its scale held).
    """

    components: Mapping[Site, Tensor]
    embedding: Tensor
    constant: Tensor
    logit: Tensor
    along: Tensor
    row: Tensor
    column: Tensor
    token: Tensor
    entering: Mapping[Site, Tensor]
    inside: Mapping[Site, Tensor]

    def neurons(self, view: ModelView, site: Site) -> Tensor:
        """h_i·(v_i·along), [k, f]: with the bias of `mlp.out` they sum to its component."""
        weight = view.weight(site).detach().to(self.along)
        return self.entering[site].to(self.along) * (self.inside[site] @ weight)

    def heads(self, view: ModelView, site: Site) -> Tensor:
        """What each head adds, [k, h]: with the bias of `attn.out` they sum to its component."""
        return self.neurons(view, site).view(len(self.along), view.heads, view.head_width).sum(-1)


@torch.no_grad()
def attribute(
    view: ModelView,
    norm: Norm,
    batch: Batch,
    *,
    position: Position = "all",
    of: Of = "suffix",
    centre: bool = True,
    entering: Kind | None = None,
) -> Attribution:
    """Direct logit attribution at every position that predicts a suffix token, σ of the whole stream held.

    Args:
        view: the model.
        norm: its final norm, `Norm.of(view)`.
        batch: the rows.
        position: which suffix tokens.
        of: read for the suffix's token, or for the one the model itself predicts there.
        centre: take the vocabulary's mean logit away: what raises all logits alike says nothing.
        entering: keep what enters sites of this kind, for `Attribution.heads` or `Attribution.neurons`.

    Raises:
        ModelError: what the sublayers write does not add up to the stream, or the norm is of another kind.

    Cost: one forward.
    """
    row, column, token = spoken_at(batch, position)
    sites, inner = view.sites(Kind.ATTN_OUT, Kind.MLP_OUT), view.sites(*[entering] if entering else [])
    with (
        view.record(inner, side="output") as bare,
        view.record_added(sites) as written,
        view.record(inner) as inside,
        view.record_blocks([0], side="input") as before,
        view.record_blocks([view.layers - 1]) as after,
    ):
        view.hidden(batch)
    leaving = after[view.layers - 1][row, column]
    parts = {site: written[site][row, column].to(norm.gain) for site in sites}
    embedded = before[0][row, column].to(norm.gain)
    _prove_sum(view, [embedded, *parts.values()], leaving)
    normed = view.final_norm(leaving)
    logits = view.unembed(normed, capped=False).to(norm.gain)
    token = logits.argmax(-1) if of == "prediction" else token
    read, constant = _read(view, norm, token, centre=centre)
    along = norm.pulled_back(read, norm.scale(leaving, normed))
    logit = logits.gather(1, token[:, None])[:, 0] - (logits.mean(-1) if centre else 0)
    components = {site: (part * along).sum(-1) for site, part in parts.items()}
    kept = {site: inside[site][row, column] for site in inner}
    pulls = {site: _inside(view, site, along, bare[site][row, column]) for site in inner}
    share = (embedded * along).sum(-1)
    return Attribution(components, share, constant, logit, along, row, column, token, kept, pulls)


def _inside(view: ModelView, site: Site, along: Tensor, put_out: Tensor) -> Tensor:
    """What `put_out` [k, d] is multiplied with to know its share along `along`, behind the norm it may pass."""
    if site.kind not in view.row.added:
        return along
    behind = Norm.apart(view, partial(view.added, site))
    if behind.bias.any():
        raise ModelError(f"{site}: the norm behind it adds a bias, which no part of its input can be given")
    return behind.pulled_back(along, behind.scale(put_out, view.added(site, put_out)))


def _read(view: ModelView, norm: Norm, token: Tensor, *, centre: bool) -> tuple[Tensor, Tensor]:
    """The tokens' rows of the unembedding [k, d], and what biases add to their logits [k]."""
    unembed = view.weight(Site(OUTSIDE, Kind.UNEMBED)).detach()
    offsets = view.unembed(torch.zeros_like(unembed[:1]), capped=False)[0].to(norm.gain)
    read, offset = unembed[token].to(norm.gain), offsets[token]
    if centre:
        read, offset = read - unembed.mean(0, dtype=norm.gain.dtype), offset - offsets.mean()
    return read, read @ norm.bias + offset


def _prove_sum(view: ModelView, parts: list[Tensor], leaving: Tensor) -> None:
    gap = float((torch.stack(parts).sum(0) - leaving.to(parts[0])).abs().max())
    if not gap <= TOLERANCE.get(view.dtype, 1e-4) * max(1.0, float(leaving.abs().max())):
        raise ModelError(f"{view.row.family}: embedding, attention and MLPs make up the stream but for {gap:.2g}; its "
                         "sublayers' output is changed before it is added, and nothing is attributed")  # fmt: skip
