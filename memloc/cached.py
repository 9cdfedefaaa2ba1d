"""One position run again and again on its cached prefix: exact, and as many times cheaper as the prefix has tokens.

In a causal model a change at position c cannot reach what came before it, so the logits at c need one token only, given
the keys and values of the tokens before. A change made at one layer leaves the layers below as they were, so a row
starts at the layer it was changed at. Both are exact. Integrated gradients lives on this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from memloc import hooks
from memloc.batches import Batch
from memloc.errors import ModelError
from memloc.sites import Kind, Site
from memloc.view import TOLERANCE, ModelView


@dataclass(frozen=True)
class Prefill:
    """One forward pass over a batch, and what it takes to run any position of it again as a single token.

    Attributes:
        view: the model.
        batch: the rows.
        neurons: layer to [n, t, f], what enters `mlp.out`.
        written: layer to [n, t, d], what `mlp.out` writes, its bias left out.
        residual: layer to [n, t, d], the residual stream after the block.
        hidden: [n, t, d], after the final norm.
        keys: layer to [n, kv heads, t, head width]; `values` likewise.
    """

    view: ModelView
    batch: Batch
    neurons: Mapping[int, Tensor]
    written: Mapping[int, Tensor]
    residual: Mapping[int, Tensor]
    hidden: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, view: ModelView, batch: Batch) -> Prefill:
        """Run `batch` once. Cost: one forward; memory n·t·(f + 2d + 2·kv width) per layer."""
        sites = view.sites(Kind.MLP_OUT)
        # A plain cache keeps every token also where the family's own would keep its sliding window only.
        cache = DynamicCache()
        with (
            view.record(sites) as entering,
            view.record(sites, side="output") as leaving,
            view.record_blocks(range(view.layers)) as residual,
        ):
            found = view.model.base_model(input_ids=batch.ids, past_key_values=cache, use_cache=True)
        return cls(
            view,
            batch,
            {site.layer: entering[site] for site in sites},
            {site.layer: _without_bias(view, site, leaving[site]) for site in sites},
            residual,
            found.last_hidden_state,
            tuple(layer.keys for layer in cache.layers),
            tuple(layer.values for layer in cache.layers),
        )

    def column(self, column: int, row: int) -> Column:
        """Position `column`, ready to be run again.

        Args:
            column: position, counted from 0.
            row: any row of the batch that is real there; its clean hidden state is recomputed as a check.

        Raises:
            ModelError: one token on the cached prefix does not give what the whole forward gave.
        """
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            if column:
                cache.update(keys[row : row + 1, :, :column], values[row : row + 1, :, :column], layer)
        blocks = {layer: self.view.block(layer) for layer in range(self.view.layers)}
        ids = self.batch.ids[row : row + 1, column : column + 1]
        at = torch.full_like(ids, column)
        with torch.no_grad(), hooks.record_calls(blocks) as calls:
            found = self.view.model.base_model(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True)
        alone, whole = found.last_hidden_state[0, 0], self.hidden[row, column]
        gap = float((alone - whole).abs().max())
        if not gap <= 10 * TOLERANCE.get(whole.dtype, 1e-4) * max(1.0, float(whole.abs().max())):
            family = self.view.row.family
            raise ModelError(f"{family}: one token on its cached prefix differs by {gap:.2g} from the whole forward")
        return Column(self, column, calls)


@dataclass(frozen=True)
class Column:
    """One position of a prefilled batch. Made by `Prefill.column`."""

    prefill: Prefill
    column: int
    calls: Mapping[int, hooks.Call]

    def hidden(self, rows: Tensor, changed: Mapping[int, Tensor]) -> Tensor:
        """After the final norm, `[len(changed), p, q, d]`, were the residual after those blocks these; differentiable.

        Layer by layer, rows join at the block above the one they were changed at: half the work of running all.

        Args:
            rows: [p] rows of the batch.
            changed: layer to [p, q, d], q variants of the residual stream at this position after that block.

        Returns:
            One entry a layer, in the order of `changed`, which must ascend.
        """
        view = self.prefill.view
        layers = list(changed)
        many, variants, width = next(iter(changed.values())).shape
        running = next(iter(changed.values())).new_zeros(0, width)
        for layer in range(layers[0], view.layers):
            if len(running):
                running = self._block(layer, running, rows, many, variants)
            if layer in changed:
                running = torch.cat([running, changed[layer].reshape(-1, width)])
        return view.final_norm(running).view(len(layers), many, variants, width)

    def _block(self, layer: int, running: Tensor, rows: Tensor, many: int, variants: int) -> Tensor:
        keys = self.prefill.keys[layer][rows, :, : self.column]
        values = self.prefill.values[layer][rows, :, : self.column]
        past, call = _Past(keys, values, variants), self.calls[layer]
        args = [past if isinstance(value, Cache) else value for value in call.args]
        kwargs = {name: past if isinstance(value, Cache) else value for name, value in call.kwargs.items()}
        return hooks.first(self.prefill.view.block(layer)(running[:, None], *args, **kwargs))[:, 0]


class _Past:
    """The prefix of p rows, shared by all their variants: one copy a block is made when the new token joins.

    Of a cache, blocks ask one thing only: `update`.
    """

    def __init__(self, keys: Tensor, values: Tensor, variants: int) -> None:
        self._keys, self._values, self._variants = keys, values, variants

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix with the new token's behind them."""
        return self._join(self._keys, key_states), self._join(self._values, value_states)

    def _join(self, past: Tensor, new: Tensor) -> Tensor:
        many, heads, length, width = past.shape
        layers = len(new) // (many * self._variants)
        shape = (layers, many, self._variants, heads)
        shared = past[None, :, None].expand(*shape, length, width)
        return torch.cat([shared, new.view(*shape, 1, width)], dim=-2).flatten(0, 2)


def _without_bias(view: ModelView, site: Site, output: Tensor) -> Tensor:
    bias = Site(site.layer, site.kind, bias=True)
    return output - view.weight(bias) if view.has(bias) else output
