"""Padding, masks and positions: the one place where it is decided what a model reads and which place says which token.

Padding is on the right. That is exact for every causal model, because no real token can see what follows it; left
padding shifts the learned positions of GPT-2 and GPT-Neo. Models that read both ways are kept from it by a mask.

A causal model reads prefix and suffix, and the place before a token says it. A masked language model reads the prefix,
a mask token in the place of every token of the suffix, and what stands behind it; the place of a token says it, all of
them in one forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memloc.passages import Passage, Passages


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass, right-padded.

    Attributes:
        ids: [n, t] long; 0 where padded.
        length: [n] long, real tokens of each row.
        prefix: [n] long, tokens of each row's prefix.
        rows: index of each row in the set it came from.
        truth: [n, t] long, the tokens themselves where `ids` holds mask tokens in the place of the suffix; None where
            `ids` holds them, for models that read from left to right.
        after: [n] long, tokens read behind the suffix; None where nothing is.
    """

    ids: Tensor
    length: Tensor
    prefix: Tensor
    rows: tuple[int, ...]
    truth: Tensor | None = None
    after: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def read(self) -> Tensor:
        """[n] long, tokens of each row that are read: all but the padding."""
        return self.length if self.after is None else self.length + self.after

    @property
    def mask(self) -> Tensor:
        """[n, t] bool, True at real tokens."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.read[:, None]

    @property
    def first(self) -> Tensor:
        """[n] long, the place that says the first token of each suffix."""
        return self.prefix - 1 if self.truth is None else self.prefix

    @property
    def suffix_mask(self) -> Tensor:
        """[n, t] bool, True at tokens of the suffix."""
        at = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (at >= self.prefix[:, None]) & (at < self.length[:, None])

    @property
    def predicting(self) -> Tensor:
        """[n, t] bool, True at positions whose logits predict a token of the suffix."""
        return self.suffix_mask if self.truth is not None else self.suffix_mask.roll(-1, 1)

    def part(self, places: Sequence[int]) -> Batch:
        """Some of its rows, padded as before."""
        chosen = list(places)
        truth, after = (None if entry is None else entry[chosen] for entry in (self.truth, self.after))
        rows = tuple(self.rows[place] for place in chosen)
        return Batch(self.ids[chosen], self.length[chosen], self.prefix[chosen], rows, truth, after)

    def suffix_index(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Every suffix token as (row, column that predicts it, token id, step in its suffix), each [k]."""
        row, column = self.suffix_mask.nonzero(as_tuple=True)
        step = column - self.prefix[row]
        if self.truth is not None:
            return row, column, self.truth[row, column], step
        return row, column - 1, self.ids[row, column], step


def batches(
    passages: Passages, *, size: int = 32, device: torch.device | str | None = None, cloze: int | None = None
) -> Iterator[Batch]:
    """Passages as batches of at most `size` rows, like lengths together; every row once.

    Args:
        passages: the rows.
        size: at most that many.
        device: where the batches lie.
        cloze: the mask token of a masked language model; None for models that read from left to right.

    Cost: no model call. Order depends on lengths and position only, so the same passages give the same batches.
    """
    order = sorted(range(len(passages)), key=lambda row: (-length_read(passages[row], cloze), row))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        chosen = [passages[row] for row in rows]
        yield (
            _cloze(chosen, rows, cloze, device)
            if cloze is not None
            else pad([item.ids for item in chosen], [len(item.prefix) for item in chosen], rows, device)
        )


def length_read(item: Passage, cloze: int | None = None) -> int:
    """How many tokens of a passage a model reads: what stands behind the suffix only where it reads both ways."""
    return len(item.ids) + (len(item.after) if cloze is not None else 0)


def _cloze(items: Sequence[Passage], rows: Sequence[int], token: int, device: torch.device | str | None) -> Batch:
    whole = pad([item.ids + item.after for item in items], [len(item.prefix) for item in items], rows, device)
    after = torch.tensor([len(item.after) for item in items]).to(device)
    told = Batch(whole.ids, whole.length - after, whole.prefix, whole.rows, whole.ids, after)
    return replace(told, ids=whole.ids.masked_fill(told.suffix_mask, token))


def pad(
    ids: Sequence[Sequence[int]],
    prefix: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> Batch:
    """Rows of token ids as one right-padded batch; without `prefix`, each row is all prefix."""
    sizes = [len(row) for row in ids]
    length, width = torch.tensor(sizes), max(sizes)
    table = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids], dtype=torch.long)
    heads = length if prefix is None else torch.tensor(list(prefix))
    names = tuple(range(len(ids))) if rows is None else tuple(rows)
    return Batch(table.to(device), length.to(device), heads.to(device), names)
