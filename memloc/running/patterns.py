"""Who attends to whom: attention patterns of every family, whatever kernel runs; and attention short-circuited.

A pattern is read off the model's own arithmetic. A head puts out pattern @ values, so a layer that is run again with
values of one dimension a key, 1 at that key and 0 elsewhere, puts out the pattern itself, `head width` keys at a time.
No kernel has to return anything, the configuration is never touched, and grouped queries, windows, rotations and masks
are whatever the model made of them. Each pattern is then proved: with the true values it must give what the heads
truly put out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memloc import hooks
from memloc.batches import Batch
from memloc.errors import InputError, ModelError
from memloc.proof import TOLERANCE
from memloc.sites import Kind, Site
from memloc.view import ModelView


@dataclass(frozen=True)
class Attention:
    """One forward pass over a batch, and what it takes to read its attention patterns, layer by layer.

    Attributes:
        view: the model.
        batch: the rows.
        values: layer to [n, t, h, head width], what each head mixes; heads of one group share theirs (an expanded view
            where queries are grouped).
        heads: layer to [n, t, h, head width], what each head puts out: what enters `attn.out`.
        entering: layer to [n, t, d], what enters the attention module.
        calls: layer to the rest of what that module was called with.
    """

    view: ModelView
    batch: Batch
    values: Mapping[int, Tensor]
    heads: Mapping[int, Tensor]
    entering: Mapping[int, Tensor]
    calls: Mapping[int, hooks.Call]

    @classmethod
    @torch.no_grad()
    def of(cls, view: ModelView, batch: Batch, layers: Iterable[int] | None = None) -> Attention:
        """Run `batch` once.

        Args:
            view: the model.
            batch: the rows.
            layers: whose patterns will be asked for; by default all.

        Cost: one forward; memory n·t·(d + h·head width + the width of what holds the values) a layer.
        """
        wanted = tuple(range(view.layers)) if layers is None else tuple(layers)
        modules = {layer: attention_module(view, layer) for layer in wanted}
        values, outs = _sites(wanted, Kind.ATTN_V), _sites(wanted, Kind.ATTN_OUT)
        points = {layer: hooks.Point(module, "input") for layer, module in modules.items()}
        with (
            hooks.record(points) as entering,
            hooks.record_calls(modules) as calls,
            view.record(values, side="output") as spoken,
            view.record(outs) as mixed,
        ):
            view.hidden(batch)
        return cls(
            view,
            batch,
            {site.layer: values_per_head(view, site.layer, spoken[site]) for site in values},
            {site.layer: split_heads(view, mixed[site]) for site in outs},
            entering,
            calls,
        )

    @torch.no_grad()
    def pattern(self, layer: int, queries: Tensor | None = None) -> Tensor:
        """Attention of every head, `[n, h, q, t]` (query, key), in the model's dtype; rows beyond a text are 0.

        Args:
            layer: one of those asked for.
            queries: [n, q] positions whose attention is wanted, in each row; by default all, in order.

        Cost: the layer's attention, ⌈t / head width⌉ times; nothing else of the model runs.

        Raises:
            InputError: the layer was not asked for.
            ModelError: the pattern times the values is not what the heads put out.
        """
        if layer not in self.entering:
            raise InputError(f"layer {layer}: its attention was not asked for; there are {sorted(self.entering)}")
        rows, tokens = self.batch.ids.shape
        at = torch.arange(tokens, device=self.batch.ids.device).expand(rows, -1) if queries is None else queries
        real = at < self.batch.read[:, None]
        picked = torch.arange(rows, device=at.device)[:, None], at
        found = self.heads[layer].new_zeros(rows, at.shape[1], self.view.heads, tokens)
        for start in range(0, tokens, self.view.head_width):
            part = self._mixed(layer, start)[picked]
            width = min(self.view.head_width, tokens - start)
            found[..., start : start + width] = part[..., :width]
        found = found.masked_fill_(~real[..., None, None], 0).transpose(1, 2)
        self._prove(layer, found, picked, real)
        return found

    def _mixed(self, layer: int, start: int) -> Tensor:
        """What the heads put out, [n, t, h, head width], were key start + j's value the j-th unit vector."""
        view, call = self.view, self.calls[layer]
        keys = torch.arange(self.batch.ids.shape[1], device=self.batch.ids.device)[:, None]
        wanted = start + torch.arange(view.head_width, device=keys.device)

        def units(site: Site, tensor: Tensor) -> Tensor:
            return with_values(view, site.layer, tensor, (keys == wanted).to(tensor.dtype)[None, :, None])

        out = Site(layer, Kind.ATTN_OUT)
        with (
            view.replace([Site(layer, Kind.ATTN_V)], units, side="output"),
            view.record([out], stop=True) as seen,
        ):
            call.again(attention_module(view, layer), self.entering[layer])
        return split_heads(view, seen[out])

    def _prove(self, layer: int, pattern: Tensor, picked: tuple[Tensor, Tensor], real: Tensor) -> None:
        expected = self.heads[layer][picked][real]
        made = torch.einsum("nhqk,nkhw->nqhw", pattern.double(), self.values[layer].double())[real]
        scale = float(expected.abs().max()) or 1.0
        gap = float((made - expected.double()).abs().max())
        if not gap <= TOLERANCE.get(expected.dtype, 1e-4) * scale:
            raise ModelError(
                f"L{layer}.attn.out: pattern @ values differs by {gap:.2g} from what the heads put out; no pattern of "
                f"{self.view.row.family} can be read this way (memloc/running/patterns.py)"
            )


@contextlib.contextmanager
def short_circuit(
    view: ModelView, layers: Iterable[int], heads: Sequence[int] | Mapping[int, Sequence[int]] | None = None
) -> Iterator[None]:
    """Every position attends to itself alone, in `layers`, for all passes in the block: a head puts out its own value.

    The attention matrix is the identity; value and output projections stay, so attention becomes a map of each token
    by itself. Works token by token on a cache too, and is differentiable.

    Args:
        view: the model.
        layers: which layers.
        heads: which heads of each, or layer to heads; by default all.

    Raises:
        InputError: a layer or head the model has not.

    Source: Menta et al. 2025, "attention short-circuit"; single heads are ours.
    """
    wanted = dict.fromkeys(layers)
    chosen = {layer: _mask(view, layer, heads[layer] if isinstance(heads, Mapping) else heads) for layer in wanted}
    spoken: dict[int, Tensor] = {}

    def hear(site: Site, tensor: Tensor) -> Tensor:
        spoken[site.layer] = tensor
        return tensor

    def cross(site: Site, mixed: Tensor) -> Tensor:
        own = values_per_head(view, site.layer, spoken.pop(site.layer))
        mask = chosen[site.layer].to(mixed.device)[:, None]
        return torch.where(mask, own, split_heads(view, mixed)).reshape(mixed.shape)

    listening = view.replace(_sites(wanted, Kind.ATTN_V), hear, side="output")
    with listening, view.replace(_sites(wanted, Kind.ATTN_OUT), cross):
        yield


def values_per_head(view: ModelView, layer: int, output: Tensor) -> Tensor:
    """Values of every head, `[n, t, h, head width]`, from what the layer's value map put out (fused or not)."""
    rows = view.place(Site(layer, Kind.ATTN_V)).rows
    own = output if rows is None else output[..., rows if isinstance(rows, slice) else list(rows)]
    grouped = own.reshape(*own.shape[:-1], view.kv_heads, view.head_width)
    return grouped.repeat_interleave(view.heads // view.kv_heads, -2)


def with_values(view: ModelView, layer: int, output: Tensor, values: Tensor) -> Tensor:
    """What the layer's value map put out (fused or not) with other values in it; queries and keys stay.

    Args:
        view: the model.
        layer: its layer.
        output: [n, t, width], not written to.
        values: [n, t, kv heads, head width], or of a shape that expands to it.
    """
    rows = view.place(Site(layer, Kind.ATTN_V)).rows
    flat = values.expand(*output.shape[:-1], view.kv_heads, view.head_width).flatten(-2)
    if rows is None:
        return flat
    changed = output.clone()
    changed[..., rows if isinstance(rows, slice) else list(rows)] = flat
    return changed


def split_heads(view: ModelView, mixed: Tensor) -> Tensor:
    """What enters `attn.out`, by head: `[n, t, h, head width]`."""
    return mixed.reshape(*mixed.shape[:-1], view.heads, view.head_width)


def attention_bytes(view: ModelView, rows: int, tokens: int, queries: int) -> int:
    """About what `Attention.of` keeps of all layers, and reading one pattern takes: an upper estimate."""
    heads = view.heads * view.head_width
    kept = view.layers * rows * tokens * (view.width + 5 * heads)
    read = rows * (6 * view.heads * queries * tokens + 8 * tokens * heads + 4 * queries * heads)
    attended = 4 * rows * view.heads * tokens * tokens
    return 8 * (kept + read + attended)


def attention_module(view: ModelView, layer: int) -> nn.Module:
    """The module that does all of the layer's attention, from what enters it to its output projection."""
    path = view.row.attention or view.row.maps[Kind.ATTN_OUT].rpartition(".")[0]
    return view.block(layer).get_submodule(path)


def _sites(layers: Iterable[int], kind: Kind) -> list[Site]:
    return [Site(layer, kind) for layer in layers]


def _mask(view: ModelView, layer: int, heads: Sequence[int] | None) -> Tensor:
    """[h] bool, True at the heads meant."""
    if not 0 <= layer < view.layers:
        raise InputError(f"layer {layer}: the model has {view.layers}, counted from 0")
    if heads is None:
        return torch.ones(view.heads, dtype=torch.bool)
    for head in heads:
        if not 0 <= head < view.heads:
            raise InputError(f"L{layer}: no head {head}; there are {view.heads}, counted from 0")
    mask = torch.zeros(view.heads, dtype=torch.bool)
    mask[list(heads)] = True
    return mask
