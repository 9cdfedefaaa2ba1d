"""Padding, masks and positions: the one place where "left or right" is decided. It is right.

Right padding is exact for every causal model, because no real token can see what follows it; left padding shifts
the learned positions of GPT-2 and GPT-Neo.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memloc.passages import Passages


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass, right-padded.

    Attributes:
        ids: [n, t] long; 0 where padded.
        length: [n] long, real tokens of each row.
        prefix: [n] long, tokens of each row's prefix.
        rows: index of each row in the set it came from.
    """

    ids: Tensor
    length: Tensor
    prefix: Tensor
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def mask(self) -> Tensor:
        """[n, t] bool, True at real tokens."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.length[:, None]

    @property
    def suffix_mask(self) -> Tensor:
        """[n, t] bool, True at tokens of the suffix."""
        at = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (at >= self.prefix[:, None]) & (at < self.length[:, None])

    @property
    def predicting(self) -> Tensor:
        """[n, t] bool, True at positions whose logits predict a token of the suffix."""
        return self.suffix_mask.roll(-1, 1)

    def suffix_index(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Every suffix token as (row, column that predicts it, token id, step in its suffix), each [k]."""
        row, column = self.suffix_mask.nonzero(as_tuple=True)
        return row, column - 1, self.ids[row, column], column - self.prefix[row]


def batches(passages: Passages, *, size: int = 32, device: torch.device | str | None = None) -> Iterator[Batch]:
    """Passages as batches of at most `size` rows, like lengths together; every row once.

    Cost: no model call. Order depends on lengths and position only, so the same passages give the same batches.
    """
    order = sorted(range(len(passages)), key=lambda row: (-len(passages[row].ids), row))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        chosen = [passages[row] for row in rows]
        yield pad([item.ids for item in chosen], [len(item.prefix) for item in chosen], rows, device)


def pad(
    ids: Sequence[Sequence[int]],
    prefix: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> Batch:
    """Rows of token ids as one right-padded batch; without `prefix`, each row is all prefix."""
    length = torch.tensor([len(row) for row in ids])
    table = torch.zeros(len(ids), int(length.max()), dtype=torch.long)
    for index, row in enumerate(ids):
        table[index, : len(row)] = torch.tensor(row)
    heads = length if prefix is None else torch.tensor(list(prefix))
    names = tuple(range(len(ids))) if rows is None else tuple(rows)
    return Batch(table.to(device), length.to(device), heads.to(device), names)
