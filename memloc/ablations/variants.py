"""One passage run again from any block up, in many variants at once: what a change inside costs its suffix.

A change made in one layer leaves the layers below as they were, so a variant starts at the block above. Of the top
block only the positions that predict the suffix are needed: those before them are run as far as their keys and values
and no further, the last token not at all (below the top, leaving it out would cost more than it saves: kernels like
even lengths). All this is exact. Where a change is a multiple of one vector in the stream before the final norm, even
that is done without a matrix product (`FinalNorm`, `Variants.nll_at_the_end`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from memloc import hooks
from memloc.ablations.gates import gate_sites, gated
from memloc.passages import Passage, Passages
from memloc.proof import TOLERANCE
from memloc.sites import OUTSIDE, Grain, Kind, Site
from memloc.view import ModelView


@dataclass(frozen=True)
class Variants:
    """One passage, ready to be run again from any block up.

    Attributes:
        view: the model.
        cut: positions before the first that says a token of the suffix.
        target: [s], the suffix.
        below: layer to [t, d], the residual stream before the block.
        above: layer to [t, d], the stream after it.
        entering: site to [t, width], what enters `mlp.out` and `attn.out`.
        norm: the final norm in closed form, or None where it, or the unembedding, is of another form.
        sums: layer to [t, d], the stream with what `mlp.out` put out, where blocks norm that sum; else empty.
    """

    view: ModelView
    cut: int
    target: Tensor
    below: Mapping[int, Tensor]
    above: Mapping[int, Tensor]
    entering: Mapping[Site, Tensor]
    norm: FinalNorm | None
    sums: Mapping[int, Tensor]
    _calls: Mapping[int, hooks.Call]
    _split: tuple[hooks.Call | None, hooks.Call] | None

    @classmethod
    @torch.no_grad()
    def of(cls, view: ModelView, item: Passage) -> Variants:
        """Run `item` twice, whole and in two parts. Cost: l·(2t - 1) block-tokens; l·t where tokens hear both ways."""
        batch = next(view.batches(Passages((item,))))
        cut, layers = int(batch.first), range(view.layers)
        blocks = {layer: view.block(layer) for layer in layers}
        with (
            view.record(view.sites(Kind.MLP_OUT, Kind.ATTN_OUT)) as entering,
            view.record_blocks(layers, side="input") as below,
            view.record_blocks(layers) as above,
            view.record_sums(Kind.MLP_OUT) as sums,
            hooks.record_calls(blocks) as calls,
        ):
            view.running().hidden(batch)
        target = torch.tensor(item.suffix, device=view.device)
        last = above[view.layers - 1][0, cut : cut + len(target)]
        return cls(
            view,
            cut,
            target,
            {layer: found[0] for layer, found in below.items()},
            {layer: found[0] for layer, found in above.items()},
            {site: found[0] for site, found in entering.items()},
            None if view.row.transform else FinalNorm.fit(view, last),
            {layer: found[0] for layer, found in sums.items()},
            dict(calls),
            _split_calls(view, batch.ids[:, :-1], cut) if view.row.causal else None,
        )

    @property
    def scored(self) -> slice:
        """The positions that predict the suffix."""
        return slice(self.cut, self.cut + len(self.target))

    def nll(self, layer: int, stream: Tensor) -> Tensor:
        """Mean suffix NLL, `[n]` nats per token, were the stream after block `layer` this, `[n, t, d]`."""
        top = self.view.layers - 1
        for index in range(layer + 1, top):
            stream = hooks.first(self._calls[index].again(self.view.block(index), stream))
        return self._nll(self._top(stream) if layer < top else stream[:, self.scored])

    def nll_at_the_end(self, steps: Tensor, directions: Tensor) -> Tensor:
        """Mean suffix NLL, `[n]`, were `steps[n, s] · directions[n, d]` taken from the stream before the final norm.

        s are the positions that predict the suffix. No matrix product but one of `directions` with the unembedding;
        where the norm has no closed form, or what is written passes one of its own, norms and unembedding are run.
        """
        stream = self.above[self.view.layers - 1][self.scored]
        if self.norm is None or Kind.MLP_OUT in self.view.row.added:
            return self._nll(self._less(self.view.layers - 1, steps, directions, self.scored))
        logits = self.norm.logits(stream, steps, directions)
        return self._mean_nll(logits)

    def without_each(self, layer: int, neurons: Tensor) -> Tensor:
        """The stream after block `layer` less what each of `neurons` [n] alone wrote: `[n, t, d]`.

        What `mlp.out` writes is added to the stream as it is, or through a norm: every row's proof shows which.
        """
        site = gate_sites(self.view, Grain.NEURON)[layer]
        values, spoken = self.view.weight(site).detach()[:, neurons].T, self.entering[site][:, neurons].T
        return self._less(layer, spoken, values, slice(None))

    def _less(self, layer: int, steps: Tensor, directions: Tensor, where: slice) -> Tensor:
        """The stream after block `layer`, some positions, had `mlp.out` written `steps[n, s] · directions[n]` less."""
        above, steps, directions = _wide(self.above[layer][where]), _wide(steps)[..., None], _wide(directions)[:, None]
        site, dtype = Site(layer, Kind.MLP_OUT), self.view.dtype
        if self.sums:
            total = torch.addcmul(_wide(self.sums[layer][where]), steps, directions, value=-1).to(dtype)
            return self.view.joined(site, total, torch.zeros_like(total))
        if site.kind not in self.view.row.added:
            return torch.addcmul(above, steps, directions, value=-1).to(dtype)
        out = self.view.module(site)(self.entering[site][where])
        less = self.view.added(site, torch.addcmul(_wide(out), steps, directions, value=-1).to(dtype))
        return (above - _wide(self.view.added(site, out)) + _wide(less)).to(dtype)

    def gated(self, site: Site, gates: Tensor) -> Tensor:
        """The stream after the block of `site`, `[n, t, d]`, were its units multiplied by `[n, u]`. Cost: one block."""
        call, stream = self._calls[site.layer], self.below[site.layer]
        with gated(self.view, {site: gates}):
            block = self.view.block(site.layer)
            return hooks.first(call.again(block, stream.expand(len(gates), *stream.shape)))

    def _top(self, stream: Tensor) -> Tensor:
        """The top block's output at the positions that predict the suffix, `[n, s, d]`."""
        block = self.view.block(self.view.layers - 1)
        if self._split is None:
            return hooks.first(self._calls[self.view.layers - 1].again(block, stream))[:, self.scored]
        before, here = self._split
        past = _Past()
        if before is not None:
            try:
                _call(block, stream[:, : self.cut], before, _Past(stop=True))
            except _Taken as taken:
                past = _Past(taken.keys, taken.values)
        return _call(block, stream[:, self.scored], here, past)

    def _nll(self, stream: Tensor) -> Tensor:
        return self._mean_nll(self.view.unembed(self.view.final_norm(stream)))

    def _mean_nll(self, logits: Tensor) -> Tensor:
        gold = logits.gather(-1, self.target.expand(len(logits), -1)[..., None])[..., 0]
        return (logits.logsumexp(-1) - gold).mean(1)


@dataclass(frozen=True)
class FinalNorm:
    """Final norm and unembedding as arithmetic: logits = W (gain ∘ (x - x̄) / √(mean (x - x̄)² + eps) + shift) + bias.

    Found by what the modules do, not by what they are called.

    Attributes:
        centred: the mean is taken away (LayerNorm), or not (RMSNorm).
        gain: [d].
        eps: under the root.
        unembed: [v, d], W.
        constant: [v], W shift + bias.
    """

    centred: bool
    gain: Tensor
    eps: float
    unembed: Tensor
    constant: Tensor

    @classmethod
    def fit(cls, view: ModelView, stream: Tensor) -> FinalNorm | None:
        """The form that gives what the modules give on `stream` `[s, d]`, or None where there is none."""
        weight = _wide(view.weight(Site(OUTSIDE, Kind.UNEMBED)).detach())
        probe = torch.ones(view.width, dtype=view.dtype, device=view.device)
        probe[1::2] = -1
        asked = torch.stack([probe, -probe, probe + 1, probe / 2**13])
        plus, minus, moved, small = _wide(view.final_norm(asked))
        shift = (plus + minus) / 2
        centred = bool((plus - moved).abs().max() < (plus - shift).abs().max() / 100)
        flat = _wide(probe) - (_wide(probe).mean() if centred else 0)
        square, share = float(flat.square().mean()), float((small - shift).norm() / (plus - shift).norm()) ** 2
        eps = max(0.0, square * (1 - share) / (share * 2.0**26 - 1))
        gain = (plus - shift) * (square + eps) ** 0.5 / flat
        bias = _wide(view.unembed(torch.zeros_like(asked[:1]))[0])
        found = cls(centred, gain, eps, weight, weight @ shift + bias)
        expected = _wide(view.unembed(view.final_norm(stream)))
        none = torch.zeros(1, len(stream)).to(weight)
        gap = (found.logits(stream, none, none.new_zeros(1, view.width))[0] - expected).abs().max()
        # Not tighter than float32 allows: RMSNorm is computed in it in every dtype.
        allowed = max(1e-5, TOLERANCE.get(view.dtype, 1e-4)) * max(1.0, float(expected.abs().max()))
        return found if bool(gap <= allowed) else None

    def logits(self, stream: Tensor, steps: Tensor, directions: Tensor) -> Tensor:
        """Logits `[n, s, v]` of `stream[s] - steps[n, s] · directions[n]`."""
        clean, along, steps = self._flat(stream), self._flat(directions), _wide(steps)
        width = clean.shape[-1]
        # The mean square of a difference, from three numbers: no vector of it is made.
        square = clean.square().mean(-1) - 2 * steps * (along @ clean.T) / width
        square = square + steps.square() * along.square().mean(-1)[:, None]
        root = (square.clamp_min(0) + self.eps).rsqrt()[..., None]
        spoken, taken = (clean * self.gain) @ self.unembed.T, (along * self.gain) @ self.unembed.T
        found = torch.addcmul(spoken, steps[..., None], taken[:, None], value=-1)
        return found.mul_(root).add_(self.constant)

    def _flat(self, vectors: Tensor) -> Tensor:
        vectors = _wide(vectors)
        return vectors - vectors.mean(-1, keepdim=True) if self.centred else vectors


def variant_bytes(view: ModelView, tokens: int, suffix: int) -> int:
    """About what one variant of a passage of `tokens` keeps in memory while it is run: an upper estimate."""
    attention = 3 * view.heads * tokens
    block = 14 * view.width + 4 * view.neurons + 6 * view.heads * view.head_width + attention
    numbers = tokens * block + 3 * suffix * view.vocab
    return numbers * (8 if view.dtype == torch.float64 else 4)


class _Taken(Exception):  # noqa: N818 - a signal, not an error
    """Raised to leave a block once its keys and values are known."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values


class _Past:
    """Keys and values of the positions before, one row a variant. Of a cache, blocks ask one thing only: `update`."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None, *, stop: bool = False) -> None:
        self._keys, self._values, self._stop = keys, values, stop

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values so far with the new ones behind them; or leave the block with the new ones."""
        if self._stop:
            raise _Taken(key_states, value_states)
        if self._keys is None or self._values is None:
            return key_states, value_states
        return torch.cat([self._keys, key_states], -2), torch.cat([self._values, value_states], -2)


def _split_calls(view: ModelView, ids: Tensor, cut: int) -> tuple[hooks.Call | None, hooks.Call]:
    """How the top block is called on the first `cut` positions, and on the rest behind them."""
    cache, top = DynamicCache(), view.layers - 1

    def called(part: Tensor, end: int) -> hooks.Call:
        with hooks.record_calls({top: view.block(top)}) as calls:
            mask = torch.ones_like(ids[:, :end])
            _base(view)(input_ids=part, attention_mask=mask, past_key_values=cache, use_cache=True)
        return calls[top]

    before = called(ids[:, :cut], cut) if cut else None
    return before, called(ids[:, cut:], ids.shape[1])


def _call(block: Any, stream: Tensor, call: hooks.Call, past: _Past) -> Tensor:
    """The block as it was called, on another stream and another past."""
    args = [past if isinstance(value, Cache) else value for value in call.args]
    kwargs = {name: past if isinstance(value, Cache) else value for name, value in call.kwargs.items()}
    return hooks.first(hooks.Call(tuple(args), kwargs, call.rows).again(block, stream))


def _base(view: ModelView) -> Any:
    return getattr(view.model, view.model.base_model_prefix)


def _wide(tensor: Tensor) -> Tensor:
    """float32, or float64 where it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
