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
from editors.facts.asked import Asked, demands_of
from editors.facts.batch_settings import BatchEditor
from editors.facts.closed_forms import Metric, charge, insert_pairs, rounded
from editors.facts.conflicts import refuse_alike, refuse_same
from editors.facts.contexts import Demand, Row, check_context, sample_prefixes
from editors.facts.growth import limited
from editors.facts.joint_values import optimise_jointly
from editors.facts.keys_values import Values, chances, read_at, read_blocks_at, stream_norm
from editors.facts.protected import NOTE, Protected, note_of, protected_rows, second_moment_at
from editors.hook_form import as_if
from memloc import progress
from memloc.errors import InputError
from memloc.moments import Moments, second_moments
from memloc.passages import Facts
from memloc.provenance import Provenance, settings_of
from memloc.sites import Kind, Site
from memloc.view import ModelView


def edited(editor: BatchEditor, view: ModelView, request: Request) -> Edit:
    """The edit that makes all of the request's facts so; the model is as it was, to the bit."""
    view.need_causal("the method lives on what a token cannot hear")
    facts = request.need_facts()
    editor.check()
    refuse_same(facts)
    work = Work.of(editor, view, request, facts)
    deltas, notes = work.solved()
    settings = {**settings_of(editor), "moment": work.source if editor.moment is not None else None}
    made = Provenance(editor.name, settings, request.seed, {**request.inputs(view), "moment": work.source})
    return Edit.of(view, deltas, made, notes=notes)


@dataclass(frozen=True)
class Work:
    """One request at work."""

    editor: BatchEditor
    view: ModelView
    facts: Facts
    demands: tuple[Demand, ...]
    asked: Asked
    layers: tuple[int, ...]
    metrics: Mapping[Site, Metric]
    held: Mapping[Site, Tensor]
    past: tuple[Edit, ...]
    source: str
    energy: Mapping[Site, float]
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, editor: BatchEditor, view: ModelView, request: Request, facts: Facts) -> Work:
        """With everything that is read from the model as it is."""
        layers = editor.layers_of(view)
        sites = [Site(layer, Kind.MLP_OUT) for layer in layers]
        draw = torch.Generator().manual_seed(request.seed)
        prefixes = editor.prefixes
        if prefixes is None:
            prefixes = sample_prefixes(view, editor.lengths, editor.samples, draw, top_k=editor.top_k)
        demands, own = demands_of(editor, view, facts, prefixes, draw)
        check_context(demands, view.context)
        for entry in demands:
            if layers[-1] == view.layers - 1 and all(row.at < len(row.ids) - 1 for row in entry.prompts):
                where = "what the last block puts out at the subject reaches no later token"
                raise InputError(f"fact {entry.id!r}: {where}; edit lower layers, or at prompt-last")
        kept = protected_rows(view, facts, editor.token, request, editor.amounts, draw)
        moments, source = _moments(editor, view, request, sites)
        metrics, held, energy = _metrics(editor, view, sites, moments, kept)
        notes = {"prefixes": list(prefixes), "protected": dict(kept.counts)}
        return cls(editor, view, facts, demands, Asked.of(demands, own, editor.ways), layers, metrics, held,
                   request.past, source, energy, notes)  # fmt: skip

    def solved(self) -> tuple[dict[Site, Delta], dict[str, Any]]:
        """The deltas, and what is worth knowing of them."""
        values = self._values()
        goal = self._goal(values)
        deltas: dict[Site, LowRank] = {}
        for _ in progress.steps(range(self.editor.rounds), "rounds of layers"):
            for order, layer in enumerate(self.layers):
                self._layer(layer, self._share(order), goal, deltas)
        final, grown = limited(self.view, deltas, self.past, self.editor.growth)
        with as_if(self.view, final):
            said = chances(self.view, self.demands)
        facts = [
            {"id": fact.id, "loss": float(values.loss[index]), "updates": int(values.updates[index]),
             "before": float(values.before[index]), "value": float(values.after[index]), "after": said[index]}
            for index, fact in enumerate(self.facts)
        ]  # fmt: skip
        written = [self.asked.rows[row] for row in self.asked.first.tolist()]
        return dict(final), {"facts": facts, "layers": grown, **self.notes, NOTE: note_of(written, self.layers)}

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
            total += part**2 * charge(keys.T, self.metrics[site], self.editor.slack_of(keys)) / self.energy[site]
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
        slack = self.editor.slack_of(keys)
        try:
            pairs = insert_pairs(keys.T, missing.T, self.metrics[site], slack=slack, held=self.held.get(site))
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


def _moments(
    editor: BatchEditor, view: ModelView, request: Request, sites: Sequence[Site]
) -> tuple[Mapping[Site, Tensor], str]:
    if editor.moment is not None:
        found = editor.moment if isinstance(editor.moment, Moments) else Moments.load(editor.moment)
    elif request.text:
        found = second_moments(view, request.text, sites)
    else:
        needs = "needs ordinary text, to know what to leave alone, or second moments; found neither"
        raise InputError(f"{editor.name} {needs}")
    return {site: found.mean(site) for site in sites}, found.digest


def _metrics(
    editor: BatchEditor, view: ModelView, sites: Sequence[Site], moments: Mapping[Site, Tensor], kept: Protected
) -> tuple[dict[Site, Metric], dict[Site, Tensor], dict[Site, float]]:
    """What is cheap at each site, keys whose outputs should not move at all, and mean ‖output‖² over what stays."""
    total = dict(moments)
    for rows, weight in ((kept.named, editor.protect), (kept.said, editor.replay)):
        if rows and weight:
            more = second_moment_at(view, sites, rows)
            total = {site: moment + weight * more[site] for site, moment in total.items()}
    past = read_at(view, sites, kept.past) if kept.past and editor.past_weight else {}
    metrics = {site: editor.metric(moment) for site, moment in total.items()}
    weights = {site: view.weight(site).detach().to("cpu", torch.float64) for site in sites}
    energy = {site: float(((weights[site] @ total[site]) * weights[site]).sum()) for site in sites}
    return *editor.with_past(metrics, past), energy
