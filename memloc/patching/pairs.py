"""Patching: what happens to a suffix when a place holds another run's activation. Exact, and to first order.

Signs, everywhere: a loss is larger where the suffix is said less well, and an effect is larger where the place matters
more. With `a` the clean activation of a place and `a'` the corrupted one,

    noise    effect = loss(clean run with a' in the place) - loss(clean run)            what breaks it
    denoise  effect = loss(corrupted run) - loss(corrupted run with a in the place)     what restores it

and both are (a' - a)·∂loss/∂a to first order, the gradient taken in the run that is patched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memloc import hooks
from memloc.batches import Batch, pad
from memloc.passages import Passage
from memloc.patching.corruption import Corrupted, added
from memloc.patching.places import Places
from memloc.patching.question import Metric, Question
from memloc.sites import Kind, Site
from memloc.view import ModelView

Direction = Literal["noise", "denoise"]


@dataclass(frozen=True)
class Run:
    """One forward pass with everything patching needs. Made by `Run.of`.

    Attributes:
        batch: the rows.
        entering: layer to [n, t, d], the residual stream before the block; one more after the last.
        values: what stands in each place, site to [n, t, width].
        reads: layer to [n, t, width], queries, keys or values, where heads are patched through them.
        calls: how each block was called.
        hidden: [n, t, d] after the final norm.
    """

    batch: Batch
    entering: tuple[Tensor, ...]
    values: Mapping[Site, Tensor]
    reads: Mapping[int, Tensor]
    calls: Mapping[int, hooks.Call]
    hidden: Tensor

    @classmethod
    def of(
        cls,
        view: ModelView,
        places: Places,
        batch: Batch,
        noise: Tensor | None = None,
        *,
        grad: bool = False,
        inner: contextlib.AbstractContextManager[None] | None = None,
    ) -> Run:
        """Run `batch` once.

        Args:
            view: the model.
            places: what may be patched.
            batch: the rows.
            noise: [n, t, d] added to the embeddings.
            grad: keep the graph from the places up.
            inner: entered last, so that what it replaces is downstream of what is recorded.
        """
        layers, asked = range(view.layers), places.read_sites
        blocks = {layer: view.block(layer) for layer in layers}
        with (
            torch.set_grad_enabled(grad),
            added(view, noise),
            hooks.record_calls(blocks) as calls,
            view.record_blocks(layers, side="input") as before,
            view.record(asked, side="output") as reads,
            hooks.record(places.points(), grad=grad) as values,
            view.record_blocks([view.layers - 1]) as after,
            inner or contextlib.nullcontext(),
        ):
            hidden = view.hidden(batch)
        entering = (*(before[layer] for layer in layers), after[view.layers - 1])
        mine = {site.layer: _rows(view, site, reads[site]) for site in asked}
        return cls(batch, entering, values, mine, calls, hidden)


@dataclass(frozen=True)
class Pair:
    """One passage's clean and corrupted runs, ready to be patched. Made by `Pair.of`.

    Attributes:
        view: the model.
        places: what may be patched.
        question: about the passage.
        calls: how each block is called on one unpadded row; every variant shares it.
        entering: layer to [r, t, d], of the run that is patched; r rows of it, or of the other, or one of each.
        donor: site to [r, t, width], what is put in the places.
        sign: +1 for noise, -1 for denoise.
        clean: the clean run's loss.
        corrupted: the corrupted run's, mean over its rows; None where there is none.
    """

    view: ModelView
    places: Places
    question: Question
    calls: Mapping[int, hooks.Call]
    entering: tuple[Tensor, ...]
    donor: Mapping[Site, Tensor]
    sign: int
    clean: float
    corrupted: float | None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        view: ModelView,
        places: Places,
        passage: Passage,
        corrupted: Corrupted | Mapping[Site, Tensor],
        *,
        direction: Direction,
        metric: Metric,
    ) -> Pair:
        """Run both; the suffix's last token is not run, for nothing is asked of it.

        Args:
            view: the model.
            places: what may be patched.
            passage: the passage.
            corrupted: its corrupted rows, or constants [width] to put in the places.
            direction: which run is patched.
            metric: how it is asked.

        Cost: one forward of the passage and one of each corrupted row; heads through queries, keys or values: one
        more of each row.
        """
        batch = one(view, passage.ids, len(passage.prefix))
        clean = Run.of(view, places, _short(batch))
        question = Question.about(view, metric, batch, clean.hidden)
        loss = float(question.of_copies(clean.hidden)[0])
        if isinstance(corrupted, Mapping):
            constants = constant_run(view, places, clean, corrupted)
            donor = constants.values if not places.read_sites else through(view, places, clean, constants.reads)
            return cls(view, places, question, clean.calls, clean.entering, donor, 1, loss, None)
        count = len(corrupted.ids)
        rows = Batch(
            corrupted.ids.to(view.device), batch.length.expand(count), batch.prefix.expand(count), tuple(range(count))
        )
        noise = None if corrupted.noise is None else corrupted.noise[:, :-1]
        other = Run.of(view, places, _short(rows), noise)
        broken = float(question.of_copies(other.hidden).mean())
        base, donor_run = (clean, other) if direction == "noise" else (other, clean)
        donor = donor_run.values
        if places.read_sites:
            shared = Run(base.batch, base.entering, base.values, base.reads, clean.calls, base.hidden)
            donor = through(view, places, shared, donor_run.reads)
        sign = 1 if direction == "noise" else -1
        return cls(view, places, question, clean.calls, base.entering, donor, sign, loss, broken)

    @property
    def rows(self) -> int:
        """Rows of one variant."""
        return max(len(self.entering[0]), *(len(entry) for entry in self.donor.values()))

    @torch.no_grad()
    def effects(self, site: Site, units: Tensor, *, rows: int) -> Tensor:
        """Effect of each of `units` [v] at a scored site, [v]; at most `rows` rows (one variant's at least) at once."""
        tokens = self.entering[0].shape[1]
        found = []
        for part in torch.split(units, max(1, rows // self.rows)):
            masks = {
                member: self.places.mask(site, part, tokens, self.donor[member].shape[-1])
                for member in self.places.members(site)
            }
            found.append(self.patched(masks))
        return torch.cat(found)

    def union(self, places: Sequence[tuple[Site, int]]) -> dict[Site, Tensor]:
        """One variant that patches all of them: masks for `patched`."""
        tokens = self.entering[0].shape[1]
        found: dict[Site, Tensor] = {}
        for site in self.places.scored:
            units = torch.tensor([unit for other, unit in places if other == site], dtype=torch.long)
            for member in self.places.members(site):
                width = self.donor[member].shape[-1]
                mask = self.places.mask(site, units.to(self.view.device), tokens, width).any(0, keepdim=True)
                found[member] = found[member] | mask if member in found else mask
        return found

    @torch.no_grad()
    def patched(self, masks: Mapping[Site, Tensor]) -> Tensor:
        """Effect of patching all of `masks` at once, [v]: each [v, t or 1, width or 1], True where patched.

        Cost: v rows (times the corrupted ones) through the blocks from the first patched one on.
        """
        # One place of the residual stream needs no run of its own block.
        after = self.places.after_blocks and len(masks) == 1
        start = min(site.layer for site in masks) + after
        variants, rows = len(next(iter(masks.values()))), self.rows
        residual = self.entering[start].expand(variants, rows, *self.entering[start].shape[1:])
        if after:
            (mask,), (site,) = masks.values(), masks
            residual = torch.where(mask[:, None], self.donor[site], residual)

        def change(site: Site, tensor: Tensor) -> Tensor:
            mixed = torch.where(masks[site][:, None], self.donor[site], tensor.view(variants, rows, *tensor.shape[1:]))
            return mixed.flatten(0, 1)

        points = {} if after else {site: self.places.points()[site] for site in masks}
        with hooks.replace(points, change):
            hidden = self._above(start, residual.flatten(0, 1))
        losses = self.question.of_copies(hidden).view(variants, rows).double().mean(1)
        base = self.clean if self.sign > 0 else self.corrupted
        return self.sign * (losses - (base or 0.0))

    def _above(self, start: int, residual: Tensor) -> Tensor:
        for layer in range(start, self.view.layers):
            residual = hooks.first(self.calls[layer].again(self.view.block(layer), residual))
        return self.view.final_norm(residual)


@torch.no_grad()
def through(view: ModelView, places: Places, base: Run, reads: Mapping[int, Tensor]) -> dict[Site, Tensor]:
    """What heads put out in `base` when they have other queries, keys or values: softmax and all, recomputed.

    A head's output depends on its own queries, keys and values only, so all heads are changed at once and each reads
    as if it had been changed alone.

    Args:
        view: the model.
        places: which of the three ("query", "key", "value").
        base: the run whose attention is recomputed; its calls fit its rows, or one row.
        reads: layer to [n or 1, t, width], what is put in their place.

    Cost: one forward.
    """
    found: dict[Site, Tensor] = {}
    for site in places.read_sites:
        out = Site(site.layer, Kind.ATTN_OUT)
        new, call = reads[site.layer], base.calls[site.layer]
        entering = base.entering[site.layer]
        entering = entering.expand(max(len(entering), len(new)), *entering.shape[1:])

        def change(at: Site, output: Tensor, new: Tensor = new) -> Tensor:
            rows = view.place(at).rows
            if rows is None:
                return new.expand_as(output)
            mixed = output.clone()
            mixed[..., rows if isinstance(rows, slice) else list(rows)] = new
            return mixed

        with view.replace([site], change, side="output"), view.record([out]) as seen:
            call.again(view.block(site.layer), entering)
        found[out] = seen[out]
    return found


def one(view: ModelView, ids: tuple[int, ...], prefix: int) -> Batch:
    """A batch of one row."""
    return pad([ids], [prefix], device=view.device)


def _short(batch: Batch) -> Batch:
    """Without the last token, of rows of one length."""
    return Batch(batch.ids[:, :-1], batch.length - 1, batch.prefix, batch.rows)


def constant_run(view: ModelView, places: Places, clean: Run, constants: Mapping[Site, Tensor]) -> Run:
    """A run that never was: the constants at every position."""
    values = {
        site: constants[site].to(value).expand_as(value) for site, value in clean.values.items() if site in constants
    }
    reads = {site.layer: constants[site].to(clean.reads[site.layer]).expand_as(clean.reads[site.layer])
             for site in places.read_sites}  # fmt: skip
    return Run(clean.batch, clean.entering, values, reads, clean.calls, clean.hidden)


def _rows(view: ModelView, site: Site, output: Tensor) -> Tensor:
    rows = view.place(site).rows
    if rows is None:
        return output
    return output[..., rows] if isinstance(rows, slice) else output[..., list(rows)]
