"""Where the suffix is spoken, and the residual stream read after every block as if it were the last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.passages import Passage, Passages
from memloc.view import ModelView

Position = Literal["all", "first", "last"]
Of = Literal["suffix", "prediction"]


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
    def first(self) -> Tensor:
        """[k], the first layer after which the token is on top, counted from 1 (0: before any); l + 1 where never."""
        top = torch.cat([self.rank == 0, torch.ones_like(self.rank[:1], dtype=torch.bool)])
        return top.long().argmax(0)

    @property
    def steady(self) -> Tensor:
        """[k], the first layer after which the token is on top and stays there; l + 1 where it is not on top last."""
        lasting = (self.rank == 0).flip(0).long().cumprod(0).sum(0)
        return len(self.rank) - lasting


@torch.no_grad()
def lens(
    view: ModelView,
    batch: Batch,
    *,
    position: Position = "all",
    of: Of = "suffix",
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
        parts = [
            view.unembed(view.final_norm(part)).argmax(-1) for part in torch.split(streams[-1][row, column], chunk)
        ]
        token = torch.cat(parts)
    read = [_read(view, stream[row, column], token, chunk) for stream in streams]
    return Lens(
        torch.stack([rank for rank, _ in read]), torch.stack([logprob for _, logprob in read]), row, column, token
    )


def lens_bytes(view: ModelView) -> int:
    """Working memory of one position read through the unembedding: an upper estimate."""
    return (4 * view.vocab + 8 * view.width) * (8 if view.dtype == torch.float64 else 4)


def _read(view: ModelView, stream: Tensor, token: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    found = list(_parts(view, stream, token, chunk))
    return torch.cat([rank for rank, _ in found]), torch.cat([logprob for _, logprob in found])


def _parts(view: ModelView, stream: Tensor, token: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    for part, tokens in zip(torch.split(stream, chunk), torch.split(token, chunk), strict=True):
        spoken = view.unembed(view.final_norm(part))
        gold = spoken.gather(1, tokens[:, None])
        yield (spoken > gold).sum(1), gold[:, 0] - spoken.logsumexp(-1)


def lens_table(view: ModelView, passage: Passage, *, of: Of = "suffix") -> dict[str, Any]:
    """One passage through the lens, as plain numbers to draw: layers by positions.

    Args:
        view: the model.
        passage: its suffix is followed.
        of: follow the suffix's tokens, or those the model itself predicts.

    Returns:
        `tokens`: the text of each token followed; `layers`: "embedding", then one name a layer; `rank` and
        `probability`: [layers][tokens]; `first` and `steady`: one layer a token, see `Lens`.
    """
    found = lens(view, next(view.batches(Passages((passage,)))), of=of)
    return {
        "tokens": list(view.spell(found.token.tolist())),
        "layers": ["embedding", *(f"L{layer}" for layer in range(view.layers))],
        "rank": found.rank.tolist(),
        "probability": found.logprob.exp().tolist(),
        "first": found.first.tolist(),
        "steady": found.steady.tolist(),
    }
