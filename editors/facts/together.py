"""Rows of tokens that share their texts: each text is run once, and read at all the tokens that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from editors.facts.contexts import Row
from memloc.batches import Batch, pad
from memloc.view import ModelView


class Part(NamedTuple):
    """Some texts at once, and where they are read.

    Attributes:
        rows: which of the rows these are.
        batch: their texts, each once.
        line: [k] the text of each row.
        at: [k] and its token.
    """

    rows: list[int]
    batch: Batch
    line: Tensor
    at: Tensor


def together(view: ModelView, rows: Sequence[Row], *, size: int = 256) -> Iterator[Part]:
    """Rows of the same ids share a text; `size` texts at once, the shortest first."""
    places: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault(row.ids, []).append(index)
    texts = sorted(places, key=len)
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        mine = [index for ids in part for index in places[ids]]
        line = torch.tensor([order for order, ids in enumerate(part) for _ in places[ids]], device=view.device)
        at = torch.tensor([rows[index].at for index in mine], device=view.device)
        yield Part(mine, pad(part, device=view.device), line, at)


@torch.no_grad()
def likeliest(view: ModelView, rows: Sequence[Row], *, size: int = 256) -> Tensor:
    """The likeliest next token behind each row's token, `[n]` on the CPU."""
    found = torch.zeros(len(rows), dtype=torch.long)
    for part in together(view, rows, size=size):
        found[part.rows] = view.logits_at(part.batch, part.line, part.at).argmax(-1).cpu()
    return found
