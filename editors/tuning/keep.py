"""The keep term of gradient editors, on rows that must stay as they are: KL(original ‖ edited), or their NLL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memloc.batches import Batch, pad
from memloc.errors import InputError
from memloc.objectives import divergence, suffix_logprobs
from memloc.view import ModelView


@dataclass
class Source:
    """Rows to keep, of one kind.

    Attributes:
        name: for the notes.
        rows: token ids of each.
        hidden: per row `[t - 1, d]` of the original model after the final norm; None where not yet computed.
    """

    name: str
    rows: list[tuple[int, ...]]
    hidden: list[Tensor | None]

    @classmethod
    def of(cls, name: str, rows: Sequence[Sequence[int]], hidden: Tensor | None = None) -> Source:
        """Rows of two tokens or more, with their hidden states where they are at hand."""
        kept = [index for index, row in enumerate(rows) if len(row) > 1]
        known = [None if hidden is None else hidden[index, : len(rows[index]) - 1] for index in kept]
        return cls(name, [tuple(rows[index]) for index in kept], known)


class Keep:
    """Draws rows in turn from every source and says how far the edited model is from the original on them.

    The original is remembered by its hidden states, so the edited model must have its unembedding.

    Args:
        original: the model as it was, in the dtype of the work; used only here, before training.
        sources: with at least one row each.
        shares: rows a step of each source.
        steps: how many steps will be asked for.
        seed: of the order of rows.
        teach: remember the original; without, only `rows` can be asked for.

    Cost: one forward over the rows that will be drawn and whose hidden states are not known; memory d floats a token
    drawn, against v for its logits.
    """

    def __init__(
        self,
        original: ModelView,
        sources: Sequence[Source],
        shares: Sequence[int],
        *,
        steps: int,
        seed: int,
        teach: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.sources = list(sources)
        self.order = [
            _order(len(source.rows), share * steps, generator) for source, share in zip(sources, shares, strict=True)
        ]
        self.shares = list(shares)
        for source, order in zip(self.sources, self.order, strict=True):
            if teach:
                _teach(original, source, sorted(set(order)))

    def rows(self, step: int) -> list[tuple[int, ...]]:
        """The rows of `step`, as token ids."""
        return [source.rows[index] for source, index in self._drawn(step)]

    def divergence(self, view: ModelView, step: int) -> Tensor:
        """Mean over tokens of KL(original ‖ `view`) on the rows of `step`: scalar, nats; differentiable."""
        hidden = [known for source, index in self._drawn(step) if (known := source.hidden[index]) is not None]
        batch = _batch(view, self.rows(step))
        with torch.no_grad():
            wanted = view.unembed(torch.cat(hidden)).log_softmax(-1)
        return divergence(view, batch, wanted)

    def rise(self, view: ModelView, step: int) -> Tensor:
        """Mean over the same tokens of how much NLL has risen from the original to `view`: scalar, nats.

        Its gradient is that of the rows' NLL; the original's share of it is there so that 0 means "as it was".
        """
        hidden = [known for source, index in self._drawn(step) if (known := source.hidden[index]) is not None]
        batch = _batch(view, self.rows(step))
        _, _, token, _ = batch.suffix_index()
        with torch.no_grad():
            was = view.unembed(torch.cat(hidden)).log_softmax(-1).gather(1, token[:, None]).mean()
        return was - suffix_logprobs(view, batch).sum() / len(token)

    def _drawn(self, step: int) -> list[tuple[Source, int]]:
        return [
            (source, index)
            for source, order, share in zip(self.sources, self.order, self.shares, strict=True)
            for index in order[step * share : (step + 1) * share]
        ]


def _batch(view: ModelView, rows: Sequence[tuple[int, ...]]) -> Batch:
    """Rows whose every token but the first counts."""
    view.need_causal("rows to keep are taught from left to right; name no retain and no text")
    return pad(rows, [1] * len(rows), device=view.device)


def _order(rows: int, wanted: int, generator: torch.Generator) -> list[int]:
    """`wanted` row numbers: every row once before any comes again, in shuffled order."""
    if not rows:
        raise InputError("a keep set without a row of two tokens or more")
    order: list[int] = []
    while len(order) < wanted:
        order += torch.randperm(rows, generator=generator).tolist()
    return order[:wanted]


@torch.no_grad()
def _teach(original: ModelView, source: Source, wanted: Sequence[int], size: int = 32) -> None:
    missing = [index for index in wanted if source.hidden[index] is None]
    for at in range(0, len(missing), size):
        part = missing[at : at + size]
        batch = _batch(original, [source.rows[index] for index in part])
        hidden = original.hidden(batch)
        for place, index in enumerate(part):
            source.hidden[index] = hidden[place, : len(source.rows[index]) - 1].clone()
