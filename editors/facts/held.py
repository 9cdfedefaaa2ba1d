"""What an edit would change against its will: found by trying it on what should stay, and held when it is made again.

A mean over everything that should stay spends its strength evenly, also on the many answers that the edit would not
have moved. Those that it does move are known once it was tried; their keys are held one by one. Ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from editors.deltas import Delta
from editors.facts.contexts import Row
from editors.facts.protected import Protected
from editors.hook_form import as_if
from memloc.batches import pad
from memloc.sites import Site
from memloc.view import ModelView


class Lost(NamedTuple):
    """Rows at which an answer was lost, at the tokens whose outputs are to be held.

    Attributes:
        rows: of those named and of the model's own sentences.
        named: how many of them are named, or namesakes.
        said: how many are tokens of the model's own sentences.
    """

    rows: tuple[Row, ...]
    named: int
    said: int


def lost(view: ModelView, kept: Protected, deltas: Mapping[Site, Delta]) -> Lost:
    """Where the likeliest token is another one with `deltas`; no weight is touched.

    Cost: two forwards of everything protected.
    """
    asked = [Row(row.ids, at) for row, at in zip(kept.named, kept.asked, strict=True)]
    every = (*asked, *kept.said)
    before = likeliest(view, every)
    with as_if(view, deltas):
        changed = (likeliest(view, every) != before).nonzero()[:, 0].tolist()
    named = [kept.named[index] for index in changed if index < len(asked)]
    said = [kept.said[index - len(asked)] for index in changed if index >= len(asked)]
    return Lost((*named, *said), len(named), len(said))


@torch.no_grad()
def likeliest(view: ModelView, rows: Sequence[Row], *, size: int = 256) -> Tensor:
    """The likeliest next token behind each row's token, `[n]` on the CPU. Rows of the same ids share a forward."""
    places: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        places.setdefault(row.ids, []).append(index)
    found = torch.zeros(len(rows), dtype=torch.long)
    texts = sorted(places, key=len)
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        batch = pad(part, device=view.device)
        mine = [index for ids in part for index in places[ids]]
        line = torch.tensor([order for order, ids in enumerate(part) for _ in places[ids]], device=view.device)
        at = torch.tensor([rows[index].at for index in mine], device=view.device)
        found[mine] = view.logits_at(batch, line, at).argmax(-1).cpu()
    return found
