"""Many facts at once: values of all in one batch, then layer by layer keys, what is missing, and a closed form.

The editors of this kind (MEMIT, EMMET, AlphaEdit, PMET) differ in which directions of a map's input are cheap, in what
a miss may cost and in how values are searched for. Everything else is here. Layers below are changed by hooks while
those above are worked out; no weight is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from editors.base import Request
from editors.deltas import Delta, LowRank, add
from editors.edit import Edit
from editors.facts.asked import Asked
from editors.facts.batch_settings import BatchEditor
from editors.facts.closed_forms import Metric, charge, insert_pairs, rounded
from editors.facts.conflicts import refuse_alike
from editors.facts.contexts import Demand, Row
from editors.facts.ground import Ground, refuse_unheard
from editors.facts.growth import limited
from editors.facts.held import Lost, Watch
from editors.facts.joint_values import optimise_jointly
from editors.facts.keys_values import Values, chances, read_at, read_blocks_at, stream_norm
from editors.facts.moments_given import moments_of
from editors.facts.protected import NOTE, Protected, note_of
from editors.hook_form import as_if
from memloc import progress
from memloc.errors import InputError
from memloc.moments import Moments
from memloc.passages import Facts
from memloc.sites import Kind, Site
from memloc.view import ModelView

STRICTER = 10.0
"""By how much less a miss may cost of a fact that a pass has missed."""


@dataclass(frozen=True)
class Work:
    """One request at work."""

    editor: BatchEditor
    view: ModelView
    facts: Facts
    demands: tuple[Demand, ...]
    asked: Asked
    layers: tuple[int, ...]
    kept: Protected
    metrics: Mapping[Site, Metric]
    beside: Mapping[Site, Tensor]
    past: tuple[Edit, ...]
    energy: Mapping[Site, float]
    strict: Tensor
    held: frozenset[Row] = frozenset()
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, editor: BatchEditor, view: ModelView, request: Request, facts: Facts, moments: Moments | None = None
    ) -> Work:
        """With everything that is read from the model as it is.

        Raises:
            InputError: a fact that does not fit or cannot be reached; neither text nor moments.
        """
        layers = editor.layers_of(view)
        refuse_unheard(view, facts, editor.place, layers)
        if moments is None:
            sites = [Site(layer, Kind.MLP_OUT) for layer in layers]
            moments = moments_of(editor.name, editor.moment, view, request, sites)
        return cls.on(Ground.of(editor, view, request, facts, moments), layers)

    @classmethod
    def on(cls, ground: Ground, layers: tuple[int, ...]) -> Work:
        """Work at `layers`, with what stands in `ground` for the token it was laid at."""
        stays = ground.stays([Site(layer, Kind.MLP_OUT) for layer in layers])
        asked = Asked.of(ground.demands, ground.own, ground.editor.ways)
        notes = {"prefixes": list(ground.prefixes), "protected": dict(ground.kept.counts)}
        return cls(ground.editor, ground.view, ground.facts, ground.demands, asked, layers, ground.kept,
                   stays.metrics, stays.beside, ground.past, stays.energy,
                   strict=torch.ones(len(asked.mean), dtype=torch.float64), notes=notes)  # fmt: skip

    def solved(self) -> tuple[dict[Site, Delta], dict[str, Any]]:
        """The deltas, and what is worth knowing of them."""
        work, values, seen = self, self._values(), list[dict[str, int]]()
        deltas = work._once(values)
        watch = Watch.of(self.view, self.kept, self.demands) if self.editor.passes > 1 else None
        while watch is not None and len(seen) + 1 < self.editor.passes:
            lost, missed = watch.lost(deltas), watch.missed(deltas)
            seen.append({**lost.counts, "missed": len(missed)})
            again = work._pressed(lost, missed)
            if again is work:
                break
            work, values = again, again._values()
            deltas = work._once(values)
        final, grown = limited(self.view, deltas, self.past, self.editor.growth)
        with as_if(self.view, final):
            said = chances(self.view, self.demands)
        facts = [
            {"id": fact.id, "loss": float(values.loss[index]), "updates": int(values.updates[index]),
             "before": float(values.before[index]), "value": float(values.after[index]), "after": said[index]}
            for index, fact in enumerate(self.facts)
        ]  # fmt: skip
        written = [self.asked.rows[row] for row in self.asked.first.tolist()]
        notes = {"passes": seen, **self.notes, NOTE: note_of(written, self.layers, self.kept.others)}
        return dict(final), {"facts": facts, "layers": grown, **notes}

    def _once(self, values: Values) -> dict[Site, LowRank]:
        """The change of each layer, lowest first."""
        goal = self._goal(values)
        deltas: dict[Site, LowRank] = {}
        for _ in progress.steps(range(self.editor.rounds), "rounds of layers"):
            for order, layer in enumerate(self.layers):
                self._layer(layer, self._share(order), goal, deltas)
        return deltas

    def _pressed(self, lost: Lost, missed: Sequence[int]) -> Work:
        """The same with what was lost held besides, and what was missed asked for more strictly; itself if nothing."""
        work = self._holding(lost.named, self.editor.hold)._holding(lost.said, self.editor.hold_own)
        if not missed:
            return work
        again = torch.isin(self.asked.fact, torch.tensor(missed))
        return replace(work, strict=torch.where(again, self.strict * STRICTER, self.strict))

    def _holding(self, rows: Sequence[Row], weight: float) -> Work:
        """The same, the keys at `rows` held besides, but for those that are."""
        fresh = [row for row in rows if row not in self.held]
        if not fresh or not weight:
            return self
        keys = read_at(self.view, list(self.metrics), fresh)
        metrics, beside = self.editor.holding(self.metrics, keys, weight)
        both = {site: torch.cat([self.beside[site], more], 1) if site in self.beside else more
                for site, more in beside.items()}  # fmt: skip
        held = self.held | frozenset(fresh)
        return replace(self, metrics=metrics, beside={**self.beside, **both}, held=held)

    def _share(self, order: int) -> float:
        left = len(self.layers) - order
        return 1 / left**0.5 if self.editor.spread == "sqrt" else 1 / left

    def _values(self) -> Values:
        site = Site(self.layers[-1], Kind.MLP_OUT)
        bare = [entry.prompts[0] for entry in self.demands]
        scale = stream_norm(self.view, site.layer, bare)
        if not self.editor.price:
            found = self.editor.search(self.view, site.layer, self.demands, scale)
            return replace(found, change=found.change[self.asked.fact])
        keys, price = self.asked.keys(self.demands), self._price()
        return optimise_jointly(self.view, site.layer, self.demands, keys, price, scale, self.editor.descent)

    def _price(self) -> Tensor:
        """What the closed forms will charge for values, `[n, n]`: each layer's drift in shares of its own output."""
        sites = [Site(layer, Kind.MLP_OUT) for layer in self.layers]
        read = read_at(self.view, sites, self.asked.rows)
        total = torch.zeros(len(self.asked.mean), len(self.asked.mean), dtype=torch.float64)
        left = 1.0
        for order, site in enumerate(sites):
            part = left * self._share(order)
            left -= part
            keys = self.asked.mean @ read[site]
            total += (
                part**2
                * charge(keys.T, self.metrics[site], self.editor.slack_of(keys) / self.strict)
                / self.energy[site]
            )
        return self.editor.price * total

    def _goal(self, values: Values) -> Tensor:
        """What the last layer's block should put out at each key's first row, `[n, d]` float64."""
        site, rows = Site(self.layers[-1], Kind.MLP_OUT), self._first
        clean, change = self._clean, values.change.double()
        if not self.view.row.added.get(site.kind):
            return clean + change
        written = read_at(self.view, [site], rows, side="output")[site]
        return clean + self._added(site, written + change) - self._added(site, written)

    @cached_property
    def _clean(self) -> Tensor:
        """What the last layer's block puts out at each key's first row before anything is changed."""
        return read_blocks_at(self.view, self.layers[-1], self._first)

    @property
    def _first(self) -> list[Row]:
        return [self.asked.rows[row] for row in self.asked.first.tolist()]

    def _added(self, site: Site, output: Tensor) -> Tensor:
        weight = self.view.weight(site)
        return self.view.added(site, output.to(weight.device, weight.dtype)).detach().to("cpu", torch.float64)

    def _layer(self, layer: int, share: float, goal: Tensor, deltas: dict[Site, LowRank]) -> None:
        """One layer's part of what is missing, added to `deltas`."""
        site, top = Site(layer, Kind.MLP_OUT), self.layers[-1]
        with as_if(self.view, deltas):
            keys = self.asked.mean @ read_at(self.view, [site], self.asked.rows)[site]
            now = read_blocks_at(self.view, top, self._first) if deltas else self._clean
            missing = share * (goal - now)
            missing = self._as_output(site, missing)
        if layer == top:
            refuse_alike(self.facts, self.asked.fact, keys, site)
        slack = self.editor.slack_of(keys) / self.strict
        try:
            pairs = insert_pairs(keys.T, missing.T, self.metrics[site], slack=slack, held=self.beside.get(site))
        except InputError as error:
            raise InputError(f"{site}: {error}") from None
        delta = rounded(pairs, keys.T)
        deltas[site] = add(deltas[site], delta) if site in deltas else delta  # type: ignore[assignment]

    def _as_output(self, site: Site, missing: Tensor) -> Tensor:
        """What `site` should put out in addition for the stream to gain `missing`.

        The same, but where a norm stands behind the map: there the output is scaled as a norm of its present length
        scales it, so a layer's share is met to first order, and in full once the output has the wanted direction.
        """
        if not self.view.row.added.get(site.kind):
            return missing
        written = read_at(self.view, [site], self._first, side="output")[site]
        gain = self._added(site, torch.ones(1, written.shape[1]))
        return missing * written.pow(2).mean(1, keepdim=True).sqrt() / gain
