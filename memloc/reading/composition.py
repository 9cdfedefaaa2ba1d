"""How a layer speaks: whether its output says what one of its neurons says, and what that does to the residual stream.

Looked at where passages predict their suffix, at some of those positions, spread evenly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.passages import Passages
from memloc.reading.promoted import DirectPath, Promoted

CHUNK = 256
"""Positions unembedded at once."""

SHARES = (
    "composition",
    "composition_dealt",
    "composition_of_ten",
    "active",
    "kept",
    "taken_over",
    "compromise",
    "agrees_with_final",
)


@dataclass(frozen=True)
class Heard:
    """One layer at k positions.

    Attributes:
        neurons: [k, f], what enters `mlp.out`.
        written: [k, d], what `mlp.out` writes.
        residual: [k, d], the stream after the block.
    """

    neurons: Tensor
    written: Tensor
    residual: Tensor


def chosen(passages: Passages, count: int) -> list[set[int]]:
    """At most `count` of all suffix tokens, evenly spread in their order: of each passage, the steps chosen."""
    total = sum(len(item.suffix) for item in passages)
    wanted = iter(sorted({index * total // min(count, total) for index in range(min(count, total))}))
    found, start, following = [], 0, next(wanted, -1)
    for item in passages:
        steps = set()
        while start <= following < start + len(item.suffix):
            steps.add(following - start)
            following = next(wanted, -1)
        found.append(steps)
        start += len(item.suffix)
    return found


def chosen_index(batch: Batch, steps: list[set[int]]) -> Tensor:
    """Which of `batch.suffix_index` are chosen: [k] bool."""
    row, _, _, step = batch.suffix_index()
    return torch.tensor(
        [at in steps[batch.rows[index]] for index, at in zip(row.tolist(), step.tolist(), strict=True)],
        device=batch.ids.device,
    )


@torch.no_grad()
def shares(path: DirectPath, promoted: Promoted, heard: Mapping[int, Heard]) -> Tensor:
    """Of how many of k positions it holds, layer by layer: [l, 8], in the order of `SHARES`; float64 sums.

    composition: the top token of the layer's output is the top token of none of its active values (neurons above 0);
    composition_dealt: what that would be were values dealt to neurons at random, its expectation, exactly: the more
    neurons are awake, the more tokens they cover by chance. composition_of_ten: it is the top token of none of the ten
    that write most, each by its sign. active: share of neurons above 0. kept, taken_over, compromise: the stream's top
    token with the layer's output in it is the one without it; or else the output's own; or neither.
    agrees_with_final: it is the model's final one.
    """
    last = heard[max(heard)].residual
    table = torch.zeros(len(heard), len(SHARES), dtype=torch.float64)
    for start in range(0, len(last), CHUNK):
        piece = slice(start, start + CHUNK)
        final = _lens(path, last[piece])
        for layer, here in heard.items():
            part = Heard(here.neurons[piece], here.written[piece], here.residual[piece])
            table[layer] += _piece(path, promoted, layer, part, final)
    return table


def _piece(path: DirectPath, promoted: Promoted, layer: int, here: Heard, final: Tensor) -> Tensor:
    own = path.logits(here.written).argmax(-1)
    with_it, without = _lens(path, here.residual), _lens(path, here.residual - here.written)
    most, least = (table[layer, :, 0].to(own.device) for table in (promoted.most, promoted.least))
    awake = here.neurons > 0
    says = most == own[:, None]
    said = (says & awake).any(1)
    size = here.neurons.abs().to(path.dtype) * promoted.norm[layer].to(path.dtype)
    ten = size.topk(min(10, size.shape[1]), dim=1).indices
    by_sign = torch.where(here.neurons.gather(1, ten) > 0, most[ten], least[ten])
    kept, taken = with_it == without, (with_it == own) & (with_it != without)
    dealt = _none_drawn(len(most), says.sum(1), awake.sum(1))
    columns = [~said, dealt, ~(by_sign == own[:, None]).any(1), awake.double().mean(1), kept, taken, ~kept & ~taken]
    columns.append(with_it == final)
    return torch.stack([column.double().sum().cpu() for column in columns])


def _none_drawn(size: int, marked: Tensor, drawn: Tensor) -> Tensor:
    """Chance that none of `marked` [k] among `size` is in `drawn` [k] taken without putting back: [k] float64."""
    marked, drawn = marked.double(), drawn.double()
    rest = size - marked - drawn
    whole = torch.full_like(rest, size)
    ways = torch.lgamma(whole - marked + 1) + torch.lgamma(whole - drawn + 1)
    ways = ways - torch.lgamma(rest.clamp_min(0) + 1) - torch.lgamma(whole + 1)
    return torch.where(rest >= 0, ways.exp(), 0)


def _lens(path: DirectPath, residual: Tensor) -> Tensor:
    """The token the stream would end in, were the model to end here: [k]."""
    return path.view.unembed(path.view.final_norm(residual)).argmax(-1)
