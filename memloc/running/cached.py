"""One position run again and again on its cached prefix: exact, and as many times cheaper as the prefix has tokens.

In a causal model a change at position c cannot reach what came before it, so the logits at c need one token only, given
the keys and values of the tokens before. A change made at one layer leaves the layers below as they were, so a row
starts at the layer it was changed at. Both are exact. Integrated gradients lives on this. Where tokens hear both ways
only the second holds, and whole rows are run: `whole`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from memloc import hooks
from memloc.batches import Batch
from memloc.errors import ModelError
from memloc.proof import TOLERANCE
from memloc.running.whole import WholeRows
from memloc.sites import Kind, Site
from memloc.view import ModelView


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
        keys: layer to [n, kv heads, t, head width]; `values` likewise. Empty where tokens hear both ways.
        sums: layer to [n, t, d], the stream with what `mlp.out` put out, where blocks norm that sum; else empty.
        calls: layer to how its block was called; empty where keys and values are kept.
    """

    view: ModelView
    batch: Batch
    neurons: Mapping[int, Tensor]
    written: Mapping[int, Tensor]
    residual: Mapping[int, Tensor]
    hidden: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    sums: Mapping[int, Tensor] = field(default_factory=dict)
    calls: Mapping[int, hooks.Call] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, view: ModelView, batch: Batch) -> Prefill:
        """Run `batch` once. Cost: one forward; memory n·t·(f + 2d + 2·kv width) per layer."""
        sites = view.sites(Kind.MLP_OUT)
        blocks = {} if view.row.causal else {layer: view.block(layer) for layer in range(view.layers)}
        # A plain cache keeps every token also where the family's own would keep its sliding window only.
        cache = DynamicCache()
        with (
            view.record(sites) as entering,
            view.record(sites, side="output") as leaving,
            view.record_blocks(range(view.layers)) as residual,
            view.record_sums(Kind.MLP_OUT) as sums,
            hooks.record_calls(blocks) as calls,
        ):
            hidden = _filled(view, batch, cache) if view.row.causal else view.hidden(batch)
        return cls(
            view,
            batch,
            {site.layer: entering[site] for site in sites},
            {site.layer: _without_bias(view, site, leaving[site]) for site in sites},
            residual,
            hidden,
            tuple(layer.keys for layer in cache.layers),
            tuple(layer.values for layer in cache.layers),
            sums,
            calls,
        )

    def column(self, column: int, row: int) -> Column | WholeRows:
        """Position `column`, ready to be run again.

        Args:
            column: position, counted from 0.
            row: any row of the batch that is real there; its clean hidden state is recomputed as a check.

        Raises:
            ModelError: one token on the cached prefix does not give what the whole forward gave.
        """
        if not self.view.row.causal:
            return WholeRows(self, column, self.calls)
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
        # Not tighter than float32 allows: GPT-Neo's attention is float32 in every dtype.
        if not gap <= max(1e-4, TOLERANCE.get(whole.dtype, 1e-4)) * max(1.0, float(whole.abs().max())):
            family = self.view.row.family
            raise ModelError(f"{family}: one token on its cached prefix differs by {gap:.2g} from the whole forward")
        return Column(self, column, calls)


@dataclass(frozen=True)
class Column:
    """One position of a prefilled batch. Made by `Prefill.column`."""

    prefill: Prefill
    column: int
    calls: Mapping[int, hooks.Call]

    def hidden(self, rows: Tensor, layers: list[int], changed: Tensor) -> Tensor:
        """After the final norm, `[i, q, d]`, were the residual stream after those blocks this; differentiable.

        Item by item: each joins at the block above the one it was changed at, which is half the work of running all.

        Args:
            rows: [i] rows of the batch.
            layers: of each item, the block after which it was changed; ascending.
            changed: [i, q, d], q variants of the residual stream at this position.
        """
        view, items = self.prefill.view, changed.shape[0]
        running = changed[:0]
        for layer in range(layers[0], view.layers):
            if len(running):
                running = self._block(layer, running, rows[: len(running)])
            above = sum(entry <= layer for entry in layers)
            running = torch.cat([running, changed[len(running) : above]]) if above > len(running) else running
        return view.final_norm(running.view(items, *changed.shape[1:]))

    def _block(self, layer: int, running: Tensor, rows: Tensor) -> Tensor:
        keys = self.prefill.keys[layer][rows, :, : self.column]
        values = self.prefill.values[layer][rows, :, : self.column]
        tokens = running.reshape(-1, 1, running.shape[-1])
        call = on_cache(self.calls[layer], _Past(keys, values))
        return hooks.first(call.again(self.prefill.view.block(layer), tokens)).view(running.shape)


def _filled(view: ModelView, batch: Batch, cache: DynamicCache) -> Tensor:
    """After the final norm; keys and values go to `cache`."""
    everything = torch.ones_like(batch.ids)
    found: Tensor = view.model.base_model(
        input_ids=batch.ids, attention_mask=everything, past_key_values=cache, use_cache=True
    ).last_hidden_state
    return found


def on_cache(call: hooks.Call, past: Any) -> hooks.Call:
    """The call on another past."""
    args = tuple(past if isinstance(value, Cache) else value for value in call.args)
    kwargs = {name: past if isinstance(value, Cache) else value for name, value in call.kwargs.items()}
    return hooks.Call(args, kwargs, call.rows)


class _Past:
    """The prefixes of i items, each shared by its variants: one copy a block is made when the new token joins.

    Of a cache, blocks ask one thing only: `update`.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix with the new token's behind them."""
        return _join(self._keys, key_states), _join(self._values, value_states)


def _join(past: Tensor, new: Tensor) -> Tensor:
    """Prefixes [i, h, c, w] and new tokens [i·q, h, 1, w] as [i·q, h, c + 1, w]."""
    items, heads, length, width = past.shape
    variants = len(new) // items
    shared = past[:, None].expand(items, variants, heads, length, width)
    return torch.cat([shared, new.view(items, variants, heads, 1, width)], dim=-2).flatten(0, 1)


def _without_bias(view: ModelView, site: Site, output: Tensor) -> Tensor:
    bias = Site(site.layer, site.kind, bias=True)
    return output - view.weight(bias) if view.has(bias) else output
