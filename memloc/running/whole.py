"""One position run again and again in models that read both ways: whole rows, from the changed layer up.

What changes at one position reaches every other there, so no prefix can be kept; only the layers below the change can.
`cached` does the same for models that read from left to right, with one token a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memloc import hooks

if TYPE_CHECKING:
    from memloc.running.cached import Prefill


@dataclass(frozen=True)
class WholeRows:
    """One position of a batch that was run once. Made by `Prefill.column`.

    Attributes:
        prefill: the batch's run.
        column: the position.
        calls: layer to how its block was called on the batch.
    """

    prefill: Prefill
    column: int
    calls: Mapping[int, hooks.Call]

    def hidden(self, rows: Tensor, layers: list[int], changed: Tensor) -> Tensor:
        """After the final norm, `[i, q, d]`, were the residual stream after those blocks this; differentiable.

        Args:
            rows: [i] rows of the batch.
            layers: of each item, the block after which it was changed; ascending.
            changed: [i, q, d], q variants of the residual stream at this position.
        """
        view, variants = self.prefill.view, changed.shape[1]
        every = rows.repeat_interleave(variants)
        running = self._with(layers[0], rows[:0], changed[:0])
        for layer in range(layers[0], view.layers):
            if len(running):
                call = self.calls[layer].of_rows(every[: len(running)])
                running = hooks.first(call.again(view.block(layer), running))
            first, end = len(running) // variants, sum(entry <= layer for entry in layers)
            if end > first:
                running = torch.cat([running, self._with(layer, rows[first:end], changed[first:end])])
        return view.final_norm(running[:, self.column].view(changed.shape))

    def _with(self, layer: int, rows: Tensor, changed: Tensor) -> Tensor:
        """The stream of `rows` [i] after a block, [i · q, t, d], changed at the position."""
        stream = self.prefill.residual[layer][rows].repeat_interleave(changed.shape[1], 0)
        at = torch.tensor([self.column], device=stream.device)
        return stream.index_copy(1, at, changed.flatten(0, 1)[:, None])
