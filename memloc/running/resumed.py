"""Rows that share what stands left of a change: many tokens continued on cached keys and values, exactly.

In a causal model a changed token cannot reach what came before it. Everything left of it is run once; each changed row
then costs only its own tokens. `cached` is the same for one token and many layers; the prefix map lives on this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from memloc.errors import ModelError
from memloc.proof import TOLERANCE
from memloc.view import ModelView


@dataclass(frozen=True)
class LeftCache:
    """One forward over some rows, and what it takes to run each again from any column on. Made by `LeftCache.of`.

    Attributes:
        view: the model.
        hidden: [n, t, d], after the final norm.
        keys: layer to [n, kv heads, t, head width]; `values` likewise.
    """

    view: ModelView
    hidden: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, view: ModelView, ids: Tensor) -> LeftCache:
        """Run `ids` [n, t], right-padded with anything. Cost: one forward; memory n·t·2·kv width per layer."""
        view.need_causal("what stands left of a change hears of it")
        hidden, cache = _run(view, ids, DynamicCache())
        return cls(view, hidden, *_kept(cache))

    @torch.no_grad()
    def resume(self, rows: Tensor, column: int, ids: Tensor) -> Resumed:
        """Run other tokens from `column` on, behind what stands left of it.

        Args:
            rows: [m] which row each new one continues.
            column: where the new tokens begin, counted from 0.
            ids: [m, s] the new tokens, right-padded with anything.

        Raises:
            ModelError: a row whose first token is the old one does not give there what the whole forward gave, so this
                model cannot be resumed (rows that change at once are not looked at: they prove nothing).
        """
        return Resumed(self.view, *_run(self.view, ids, _left(self.keys, self.values, rows, column)))

    def proves(self, rows: Tensor, column: int, hidden: Tensor) -> None:
        """Hold unchanged positions of resumed rows against the whole forward.

        Args:
            rows: [m] rows whose token at `column` is the old one.
            column: that position.
            hidden: [m, d] what the resumed run gave there.

        Raises:
            ModelError: they differ.
        """
        whole = self.hidden[rows, column]
        if not len(rows):
            return
        gap, scale = float((hidden - whole).abs().max()), max(1.0, float(whole.abs().max()))
        # Not tighter than float32 allows: GPT-Neo's attention is float32 in every dtype.
        if not gap <= max(1e-4, TOLERANCE.get(whole.dtype, 1e-4)) * scale:
            family = self.view.row.family
            raise ModelError(f"{family}: tokens on their cached prefix differ by {gap:.2g} from the whole forward")


@dataclass(frozen=True)
class Resumed:
    """Rows that were continued. Made by `LeftCache.resume`.

    Attributes:
        view: the model.
        hidden: [m, s, d] of the new tokens, after the final norm.
        cache: keys and values of all tokens, old and new.
    """

    view: ModelView
    hidden: Tensor
    cache: DynamicCache

    @torch.no_grad()
    def decode(self, rows: Tensor, keep: int, first: Tensor, length: int) -> Tensor:
        """Greedy continuation of some rows behind their first `keep` tokens, [m, length].

        Args:
            rows: [m] which rows.
            keep: tokens of each, old and new, that stay.
            first: [m] the token that comes next.
            length: tokens to write, `first` counted.

        Cost: one token a row for each written after the first.
        """
        cache, written = _left(*_kept(self.cache), rows, keep), [first]
        for _ in range(length - 1):
            hidden, cache = _run(self.view, written[-1][:, None], cache)
            written.append(self.view.unembed(hidden[:, -1]).argmax(-1))
        return torch.stack(written, 1)


def _left(keys: tuple[Tensor, ...], values: tuple[Tensor, ...], rows: Tensor, column: int) -> DynamicCache:
    # A plain cache keeps every token also where the family's own would keep its sliding window only.
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        if column:
            cache.update(key[rows, :, :column], value[rows, :, :column], layer)
    return cache


def _kept(cache: DynamicCache) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return tuple(layer.keys for layer in cache.layers), tuple(layer.values for layer in cache.layers)


def _run(view: ModelView, ids: Tensor, cache: DynamicCache) -> tuple[Tensor, DynamicCache]:
    column = cache.get_seq_length()
    at = torch.arange(column, column + ids.shape[1], device=ids.device).expand_as(ids)
    # Given also where nothing is padded: without one, transformers warns of rows that end in the pad token.
    everything = ids.new_ones(len(ids), column + ids.shape[1])
    found = view.model.base_model(
        input_ids=ids, attention_mask=everything, position_ids=at, past_key_values=cache, use_cache=True
    )
    return found.last_hidden_state, cache
