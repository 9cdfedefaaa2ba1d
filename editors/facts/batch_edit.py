"""Many facts at once: values of all in one batch, then layer by layer keys, what is missing, and a closed form.

The editors of this kind (MEMIT, EMMET, AlphaEdit) differ in one thing: which directions of a map's input are cheap, and
what a miss may cost. Everything else is here. Layers below are changed by hooks while those above are worked out; no
weight is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from editors.base import Request
from editors.deltas import Delta, LowRank, add
from editors.edit import Edit
from editors.facts.closed_forms import Factor, Metric, charge, insert_pairs, rounded
from editors.facts.conflicts import refuse_alike, refuse_same
from editors.facts.contexts import Demand, Row, Token, check_context, demand, row_of, sample_prefixes
from editors.facts.growth import limited
from editors.facts.joint_values import optimise_jointly
from editors.facts.keys_values import Descent, Values, chances, optimise_values, read_at, read_blocks_at
from editors.facts.own_words import recalls, shared_ways
from editors.facts.protected import NOTE, Protected, note_of, protected_rows, second_moment_at
from editors.hook_form import as_if
from memloc import progress
from memloc.errors import InputError
from memloc.moments import Moments, second_moments
from memloc.passages import Facts
from memloc.provenance import Provenance, settings_of
from memloc.sites import Kind, Site
from memloc.view import ModelView

Spread = Literal["even", "sqrt", "first-last", "last"]


@dataclass(frozen=True, kw_only=True)
class BatchEditor:
    """Settings that all editors of many facts share, and what they do with them.

    Attributes:
        layers: blocks whose MLPs are changed, upwards; () for those between `depths`.
        depths: relative depths (0 the first block, 1 the last) between which blocks are changed.
        token: where to edit: the subject's last token, or the prompt's.
        spread: what share of what is missing each layer brings: 1/(layers left) ("even", MEMIT), 1/√ of that ("sqrt",
            PMET), half at the first and the rest at the last and nothing between ("first-last", BLUE), all at the last.
        rounds: how often the layers are gone through; what a round left missing is asked for in the next. The rank
            grows with it.
        ways: the model's own ways to a fact (`recalls`) get a key each ("each"), or are averaged into one ("mean").
        steps: passes of the search for values, the last of which only evaluates.
        lr: Adam's step size.
        clamp: a value's change is kept below this many times the norm of the clean output.
        weight_decay: weight of its norm / ‖clean output‖² in the loss.
        kl_weight: weight of the change of the answer to "{subject} is a", in nats; at subject-last only.
        stop_below: a fact's search ends when its loss is below.
        price: weight of the drift that the closed form will charge for the values (of what should stay, in shares of
            the maps' outputs) in the search for them, all facts together; 0 searches for each by itself, as published.
        damping: share of the moment's mean diagonal added to its diagonal.
        samples: how many prefixes of each length the model writes.
        lengths: of these prefixes in tokens, the start token included.
        top_k: each sampled token is one of the k likeliest.
        recalls: at most how many of the model's own ways to each fact are used.
        protect: weight of the mean k kᵀ over named facts and passages, and over namesakes, against that of text.
        namesakes: for each fact so many prompts about other subjects are made up and protected.
        replay: weight of the mean k kᵀ over the model's own sentences against that of text.
        sentences: how many sentences the model writes.
        sentence_length: of them, in tokens.
        past: weight of each key of edits already made, in shares of an average token of text.
        growth: an edit that would make a map's change (edits already made included) larger than this share of its
            norm is scaled down to it, and says so; None for no limit.
        prefixes: texts instead of the model's own; () for none.
        moment: second moments instead of those of the request's text: a `Moments`, or the path of a saved one.
    """

    layers: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.3, 1.0)
    token: Token = "prompt-last"
    spread: Spread = "even"
    rounds: int = 1
    ways: Literal["each", "mean"] = "each"
    steps: int = 40
    lr: float = 0.1
    clamp: float = 4.0
    weight_decay: float = 1e-3
    kl_weight: float = 0.0625
    stop_below: float = 0.1
    price: float = 10.0
    damping: float = 1e-2
    samples: int = 2
    lengths: tuple[int, ...] = (5, 10)
    top_k: int = 5
    recalls: int = 8
    protect: float = 1.0
    namesakes: int = 24
    replay: float = 1.0
    sentences: int = 1200
    sentence_length: int = 16
    past: float = 1.0
    growth: float | None = None
    prefixes: tuple[str, ...] | None = None
    moment: Any = None

    name: ClassVar[str] = ""

    def metric(self, moment: Tensor) -> Metric:
        """Which directions of a map's input are cheap, from what should stay."""
        raise NotImplementedError

    def slack_of(self, keys: Tensor) -> float:
        """What a miss of these keys `[n, f]` may cost."""
        raise NotImplementedError

    def with_past(
        self, metrics: Mapping[Site, Metric], past: Mapping[Site, Tensor]
    ) -> tuple[dict[Site, Metric], dict[Site, Tensor]]:
        """The metrics with the keys `[m, f]` of edits already made, and the keys that are to be held outright."""
        held = {site: keys.T * self.past**0.5 for site, keys in past.items()}
        found = dict(metrics)
        for site, keys in held.items():
            metric = found[site]
            if isinstance(metric, Factor):
                # An average token of text weighs k C⁻¹ k = f in all, one of m keys as much as its share of a mean.
                found[site] = metric.holding(keys, 1 / len(keys))
        return found, {site: keys for site, keys in held.items() if not isinstance(found[site], Factor)}

    def edited(self, view: ModelView, request: Request) -> Edit:
        """The edit that makes all of the request's facts so; the model is as it was, to the bit."""
        facts = request.need_facts()
        self._check()
        refuse_same(facts)
        work = Work.of(self, view, request, facts)
        deltas, notes = work.solved()
        settings = {**settings_of(self), "moment": work.source if self.moment is not None else None}
        made = Provenance(self.name, settings, request.seed, {**request.inputs(view), "moment": work.source})
        return Edit.of(view, deltas, made, notes=notes)

    @property
    def descent(self) -> Descent:
        """The settings of the search for values."""
        return Descent(steps=self.steps, lr=self.lr, clamp=self.clamp, weight_decay=self.weight_decay,
                       kl_weight=self.kl_weight, stop_below=self.stop_below)  # fmt: skip

    def _check(self) -> None:
        least = {"rounds": 1, "steps": 1, "lr": 0, "clamp": 0, "weight_decay": 0, "kl_weight": 0, "damping": 0,
                 "samples": 0, "namesakes": 0, "protect": 0, "replay": 0, "sentences": 0, "sentence_length": 2,
                 "recalls": 0, "past": 0, "top_k": 1}  # fmt: skip
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(f"{self.name}: {name} is {getattr(self, name)}, expected {value} or more")
        if self.growth is not None and self.growth <= 0:
            raise InputError(f"{self.name}: growth is {self.growth}, expected above 0, or none")
        if len(self.depths) != 2 or not 0 <= self.depths[0] <= self.depths[1] <= 1:
            raise InputError(f"{self.name}: depths are {self.depths}, expected two between 0 and 1, the lower first")

    def layers_of(self, view: ModelView) -> tuple[int, ...]:
        """The blocks that are changed, upwards."""
        found = tuple(sorted(set(self.layers)))
        if not found:
            low, high = (round(depth * (view.layers - 1)) for depth in self.depths)
            found = tuple(range(low, high + 1))
        for layer in found:
            view.block(layer)
        if self.spread == "last":
            return found[-1:]
        return (found[0], found[-1]) if self.spread == "first-last" and len(found) > 2 else found


@dataclass(frozen=True)
class Asked:
    """The rows at which keys are read, and how they are averaged.

    Attributes:
        rows: of all facts.
        mean: [n, rows] float64, each line one key's weights.
        first: [n] the row at which what is missing is measured.
        fact: [n] whose key it is.
    """

    rows: tuple[Row, ...]
    mean: Tensor
    first: Tensor
    fact: Tensor

    @classmethod
    def of(cls, demands: Sequence[Demand], own: Sequence[int], ways: str) -> Asked:
        """Half of a key is the bare prompt's and half that of the others, as MEMIT does.

        Args:
            demands: the facts.
            own: how many of each one's last prompts are the model's own ways to it.
            ways: "each" gives those a key of their own.
        """
        rows: list[Row] = []
        lines: list[list[tuple[int, float]]] = []
        fact = []
        for index, (entry, count) in enumerate(zip(demands, own, strict=True)):
            start, alone = len(rows), count if ways == "each" else 0
            rows += entry.prompts
            rest = range(start + 1, len(rows) - alone)
            half = 0.5 if len(rest) else 1.0
            lines.append([(start, half), *((row, (1 - half) / len(rest)) for row in rest)])
            lines += [[(row, 1.0)] for row in range(len(rows) - alone, len(rows))]
            fact += [index] * (1 + alone)
        mean = torch.zeros(len(lines), len(rows), dtype=torch.float64)
        for line, parts in enumerate(lines):
            for row, weight in parts:
                mean[line, row] = weight
        return cls(tuple(rows), mean, torch.tensor([parts[0][0] for parts in lines]), torch.tensor(fact))

    def keys(self, demands: Sequence[Demand]) -> list[list[int]]:
        """For every fact the key of each of its prompts, and of its essence that of the bare prompt."""
        weight = (self.mean > 0).double()
        of_row = weight.argmax(0).tolist()
        found, start = [], 0
        for entry in demands:
            mine = of_row[start : start + len(entry.prompts)]
            start += len(entry.prompts)
            found.append(mine + mine[:1] * (entry.essence is not None))
        return found


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
        demands, own = _demands(editor, view, facts, prefixes, draw)
        check_context(demands, view.context)
        for entry in demands:
            if layers[-1] == view.layers - 1 and all(row.at < len(row.ids) - 1 for row in entry.prompts):
                where = "what the last block puts out at the subject reaches no later token"
                raise InputError(f"fact {entry.id!r}: {where}; edit lower layers, or at prompt-last")
        kept = protected_rows(view, facts, editor.token, keep=request.keep_facts, retain=request.retain,
                              past=request.past, others=editor.namesakes if editor.protect else 0,
                              sentences=editor.sentences if editor.replay else 0, length=editor.sentence_length,
                              generator=draw)  # fmt: skip
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
        if self.view.row.added.get(site.kind):
            # Behind the map stands a norm: what the map puts out and the stream are not to one scale.
            clean = read_at(self.view, [site], bare, side="output")[site]
        else:
            clean = read_blocks_at(self.view, site.layer, bare)
        scale = clean.norm(dim=1).float()
        if not self.editor.price:
            found = optimise_values(self.view, site.layer, self.demands, scale, self.editor.descent)
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
        clean = read_blocks_at(self.view, site.layer, rows)
        change = values.change.double()
        if not self.view.row.added.get(site.kind):
            return clean + change
        written = read_at(self.view, [site], rows, side="output")[site]
        return clean + self._added(site, written + change) - self._added(site, written)

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
            missing = share * (goal - read_blocks_at(self.view, top, self._first))
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


def _demands(
    editor: BatchEditor, view: ModelView, facts: Facts, prefixes: Sequence[str], draw: torch.Generator
) -> tuple[tuple[Demand, ...], list[int]]:
    """The facts as rows, and how many of each one's rows are the model's own ways to it."""
    found, own = [], []
    essence = editor.token == "subject-last" and editor.kl_weight > 0
    ways = [recalls(view, fact, editor.recalls, draw, top_k=2 * editor.top_k)
            for fact in progress.steps(facts, "ways to the facts")]  # fmt: skip
    for fact, mine in zip(facts, shared_ways(view, facts, ways, editor.recalls), strict=True):
        asked = demand(fact, view.tokenizer, prefixes, editor.token, essence=essence)
        rows = tuple(dict.fromkeys(row_of(prompt, editor.token) for prompt in mine))
        found.append(Demand(asked.id, asked.prompts + rows, asked.target, asked.essence))
        own.append(len(rows))
    return tuple(found), own


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
    past = read_at(view, sites, kept.past) if kept.past and editor.past else {}
    metrics = {site: editor.metric(moment) for site, moment in total.items()}
    weights = {site: view.weight(site).detach().to("cpu", torch.float64) for site in sites}
    energy = {site: float(((weights[site] @ total[site]) * weights[site]).sum()) for site in sites}
    return *editor.with_past(metrics, past), energy
