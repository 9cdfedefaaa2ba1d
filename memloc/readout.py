"""How the residual stream becomes words: the norm frozen as a linear map, and the stream read after every block.

The final norm is taken apart by arithmetic, not by its name: shift it, scale it, and see what it does. So a norm that
centres and one that does not, with a gain stored as it is or as its distance from 1, are one case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.errors import ModelError
from memloc.proof import TOLERANCE
from memloc.sites import OUTSIDE, Kind, Site
from memloc.view import ModelView

Position = Literal["all", "first", "last"]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic: float32, or float64 where the model is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def spoken_at(batch: Batch, position: Position = "all") -> tuple[Tensor, Tensor, Tensor]:
    """Where suffix tokens are predicted, and which: (row, column, token), [k] each.

    Args:
        batch: the rows.
        position: every token of a suffix, its first, or its last.
    """
    row, column, token, step = batch.suffix_index()
    last = batch.length[row] - batch.prefix[row] - 1
    keep = {"all": step >= 0, "first": step == 0, "last": step == last}[position]
    return row[keep], column[keep], token[keep]


def row_means(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Means over each row's positions: `values` [k, ...] with the row of each [k], as [rows, ...]."""
    count = torch.bincount(row, minlength=rows).view(rows, *[1] * (values.dim() - 1))
    return values.new_zeros(rows, *values.shape[1:]).index_add(0, row, values) / count


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
    @torch.no_grad()
    def of(cls, view: ModelView) -> Norm:
        """Take the view's norm apart, on a handful of vectors. Cost: no block is run.

        Vectors are large, so that what the norm adds under its root vanishes.
        """

        def norm(x: Tensor) -> Tensor:
            return view.final_norm(x.to(view.device, view.dtype)).to(wide(view.dtype))

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
        # The gain itself is read through the norm, so its rounding enters twice.
        if not gap <= 2 * TOLERANCE.get(self.dtype, 1e-4) * max(1.0, float(made.abs().max())):
            raise ModelError(f"the final norm is no gain, centring and scale: off by {gap:.2g}; nothing is attributed")
        return sigma

    def pulled_back(self, direction: Tensor, sigma: Tensor) -> Tensor:
        """What a part of the stream is to be multiplied with to know its share along `direction` [k, d]."""
        gained = direction.to(self.gain) * self.gain
        return (gained - gained.mean(-1, keepdim=True) if self.centre else gained) / sigma[:, None]

    def _gained(self, stream: Tensor) -> Tensor:
        return self.gain * (stream - stream.mean(-1, keepdim=True) if self.centre else stream)


@dataclass(frozen=True)
class Direction:
    """The direction of each position's token in its own residual stream, the norm's scale held.

    Attributes:
        along: [k, d]; a part c of the stream adds c·along to the token's logit.
        constant: [k], what the norm's bias and the unembedding's add, whatever the stream.
        logit: [k], the model's own logit of the token (minus the vocabulary's mean logit where centred).
        embedding: [k], the share of what enters the first block.
        row: [k].
        column: [k].
    """

    along: Tensor
    constant: Tensor
    logit: Tensor
    embedding: Tensor
    row: Tensor
    column: Tensor


def direct(
    view: ModelView, norm: Norm, where: tuple[Tensor, Tensor, Tensor], streams: tuple[Tensor, Tensor], *, centre: bool
) -> Direction:
    """How the tokens at `where` are read off the stream.

    Args:
        view: the model.
        norm: its final norm.
        where: (row, column, token), as `spoken_at` gives them.
        streams: [n, t, d] what enters the first block, and what leaves the last.
        centre: take the vocabulary's mean logit away: what raises all logits alike says nothing.
    """
    row, column, token = where
    entering, leaving = (stream[row, column] for stream in streams)
    after = view.final_norm(leaving)
    unembed = view.weight(Site(OUTSIDE, Kind.UNEMBED)).detach()
    none = view.unembed(torch.zeros_like(after[:1]))[0].to(norm.gain)
    logits = view.unembed(after).to(norm.gain)
    logit, offset = logits.gather(1, token[:, None])[:, 0], none[token]
    read = unembed[token].to(norm.gain)
    if centre:
        logit, offset = logit - logits.mean(-1), offset - none.mean()
        read = read - unembed.mean(0, dtype=norm.gain.dtype)
    along = norm.pulled_back(read, norm.scale(leaving, after))
    constant = read @ norm.bias + offset
    return Direction(along, constant, logit, (entering.to(along) * along).sum(-1), row, column)


@dataclass(frozen=True)
class Lens:
    """The stream after every block, read as if it were the last: one row a layer, the first before any block.

    Attributes:
        rank: [l + 1, k], how many tokens have a larger logit than the token; 0 is the top.
        logprob: [l + 1, k], its log-probability in nats.
        row: [k], row of each position in the batch.
        column: [k], the position that predicts it.
        token: [k], the token read for.
    """

    rank: Tensor
    logprob: Tensor
    row: Tensor
    column: Tensor
    token: Tensor

    @property
    def settled(self) -> Tensor:
        """[k], the first layer after which the token is on top, counted from 1 (0: before any); l + 1 where never."""
        top = torch.cat([self.rank == 0, torch.ones_like(self.rank[:1], dtype=torch.bool)])
        return top.long().argmax(0)

    @property
    def kept(self) -> Tensor:
        """[k], the first layer after which the token is on top and stays there; l + 1 where it is not on top last."""
        steady = (self.rank == 0).flip(0).long().cumprod(0).sum(0)
        return len(self.rank) - steady


@torch.no_grad()
def lens(
    view: ModelView,
    batch: Batch,
    *,
    position: Position = "all",
    of: Literal["suffix", "prediction"] = "suffix",
    memory_mb: int = 512,
) -> Lens:
    """The logit lens W_U·LN_f(x^l) at every position that predicts a suffix token: a table of layers by positions.

    Args:
        view: the model.
        batch: the rows.
        position: which suffix tokens.
        of: follow the suffix's token, or the one the model itself predicts there.
        memory_mb: what the logits may take, roughly; no effect on what is read.

    Cost: one forward, and l + 1 unembeddings of the positions.

    Source: nostalgebraist 2020; two phases of memorized predictions: Haviv et al. 2023, arXiv:2210.03588.
    """
    row, column, token = spoken_at(batch, position)
    layers = range(view.layers)
    with view.record_blocks([0], side="input") as before, view.record_blocks(layers) as after:
        view.hidden(batch)
    streams = [before[0], *(after[layer] for layer in layers)]
    chunk = max(1, memory_mb * 2**20 // lens_bytes(view))
    if of == "prediction":
        parts = [view.unembed(view.final_norm(part)).argmax(-1) for part in streams[-1][row, column].split(chunk)]
        token = torch.cat(parts)
    read = [_read(view, stream[row, column], token, chunk) for stream in streams]
    return Lens(torch.stack([rank for rank, _ in read]), torch.stack([logprob for _, logprob in read]), row, column, token)


def lens_bytes(view: ModelView) -> int:
    """Working memory of one position read through the unembedding: an upper estimate."""
    return (4 * view.vocab + 8 * view.width) * (8 if view.dtype == torch.float64 else 4)


def _read(view: ModelView, stream: Tensor, token: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    found = list(_parts(view, stream, token, chunk))
    return torch.cat([rank for rank, _ in found]), torch.cat([logprob for _, logprob in found])


def _parts(view: ModelView, stream: Tensor, token: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    for part, tokens in zip(stream.split(chunk), token.split(chunk), strict=True):
        spoken = view.unembed(view.final_norm(part))
        gold = spoken.gather(1, tokens[:, None])
        yield (spoken > gold).sum(1), gold[:, 0] - spoken.logsumexp(-1)
