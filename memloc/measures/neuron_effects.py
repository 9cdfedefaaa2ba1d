"""What chosen neurons do: silenced or doubled, how far do they move their fact's answer, and how far all others?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from memloc.batches import Batch
from memloc.errors import InputError
from memloc.measurement import Figure, Measurement
from memloc.measures.figures import figure
from memloc.objectives import suffix_logprobs
from memloc.passages import Passage, Passages
from memloc.progress import tell
from memloc.provenance import Provenance, digest_json
from memloc.scores import Localization, Selection
from memloc.sites import Grain, Kind, Site
from memloc.statistics import bootstrap_interval, ratio_interval
from memloc.view import ModelView

GROUPS = ("fact", "held-out paraphrases", "same answer", "same relation", "unrelated")
FACTORS = {"suppress": 0.0, "amplify": 2.0}


def selections_of(found: Localization) -> dict[str, Selection]:
    """The places each row of a localization keeps, where others score exactly 0 (a fact's knowledge neurons, say).

    Raises:
        InputError: scores are not kept per passage.
    """
    if found.passages is None:
        raise InputError(f"{found.provenance.method}: one score for all passages; selections need an axis of them")
    masks = {name: {site: scores[row] != 0 for site, scores in found.scores.items()}
             for row, name in enumerate(found.passages)}  # fmt: skip
    return {name: Selection(found.grain, entry, found.provenance) for name, entry in masks.items()}


def neuron_effects(
    view: ModelView,
    selections: Mapping[str, Selection],
    asked: Passages,
    *,
    held_out: Passages | None = None,
    site: Literal["activation", "pre-activation"] = "activation",
    group: str = "fact",
    relation: str = "relation",
    per_group: int = 8,
    draws: int = 3,
    seed: int = 0,
    batch_size: int = 64,
) -> Measurement:
    """Silence (h := 0) or double (h := 2h) each fact's neurons where answers are predicted; see whose answers move.

    Every fact is looked at in up to five groups of prompts, each with its own answer:

    - "fact": its own prompts; "held-out paraphrases": its prompts in `held_out`, which had no say in the choice.
    - "same answer": other facts with the very same answer. What moves there is the answer, not the fact.
    - "same relation": other facts of the relation, with another answer. What moves there is the kind of answer.
    - "unrelated": other answer, other relation (any other answer where no relation is tagged).

    Figures, for "suppress" and "amplify" and each group, with one value a fact: the change of the answer's probability;
    "relative", the sum of changes over the sum of probabilities before; "nats", the change of its log-probability;
    "over fact", how far a group moves (mean absolute change) as a share of how far the fact itself does. And
    "expression": the correlation, over the prompts of all groups, of the neurons' mean activation with the
    log-probability of the fact's own answer (its first token). The control is the same for equally many random neurons
    at the same sites: rows are means over some draws.

    Args:
        view: the model.
        selections: fact to its neurons; facts without any are left out, and counted in the provenance.
        asked: the facts' prompts with their answers, tagged with their fact, and relation where known.
        held_out: further prompts of the same facts.
        site: what is multiplied: what enters `mlp.out`, or what leaves `mlp.in`. Silencing is the same for both where
            the activation function maps 0 to 0.
        group: the tag that names a passage's fact; a passage without it is a fact of its own.
        relation: the tag that names a fact's relation.
        per_group: prompts of other facts drawn, for each fact and group.
        draws: of the random control.
        seed: of all that is drawn.
        batch_size: rows of a forward pass.

    Raises:
        InputError: no fact has neurons, selections are not of neurons, or a fact has no prompt.

    Cost: 1 + 3·(1 + draws) forwards over the prompts of all facts' groups.

    Source: Dai et al. 2022, arXiv:2104.08696 (suppress, amplify); the controls: Niu et al. 2024, arXiv:2405.02421.
    """
    chosen = {fact: entry for fact, entry in selections.items() if entry.count}
    if not chosen or any(entry.grain is not Grain.NEURON for entry in chosen.values()):
        raise InputError("neuron effects: no fact has neurons, or what was selected is no neurons")
    jobs = tuple(_jobs(chosen, _Facts(asked, held_out, group, relation), per_group, seed))
    run = _Run(view, jobs, tuple(chosen), site, batch_size)
    rows = run.rows(chosen, "neuron effects")
    twins = [
        run.rows({fact: entry.random_like(_seed(seed, fact, draw)) for fact, entry in chosen.items()}, "random")
        for draw in range(draws)
    ]
    settings = {"site": site, "group": group, "relation": relation, "per_group": per_group, "draws": draws,
                "without_neurons": [fact for fact in selections if fact not in chosen]}  # fmt: skip
    inputs = {"model": view.digest, "passages": asked.digest, "selections": _digest(chosen)}
    inputs |= {} if held_out is None else {"held_out": held_out.digest}
    made = Provenance("neuron-effects", settings, seed, inputs)
    measured = Measurement("neuron-effects", _figures(rows), rows, made)
    if not twins:
        return measured
    beside = tuple(_mean_row(draws_of_one) for draws_of_one in zip(*twins, strict=True))
    return measured.with_control(Measurement("neuron-effects", _figures(beside), beside, made))


@dataclass(frozen=True)
class _Job:
    """One prompt asked under one fact's neurons."""

    fact: str
    group: str
    passage: Passage
    answer: int


class _Facts:
    """Prompts by fact, and which other prompts serve a fact as controls."""

    def __init__(self, asked: Passages, held_out: Passages | None, group: str, relation: str) -> None:
        self._group, self._relation = group, relation
        self.asked = tuple(asked)
        self.held_out = tuple(held_out or ())

    def of(self, fact: str) -> dict[str, list[Passage]]:
        """Group to prompts."""
        own = [item for item in self.asked if self._name(item) == fact]
        if not own:
            raise InputError(f"neuron effects: no prompt asks for {fact!r}; tag it {self._group!r}")
        others = [item for item in self.asked if self._name(item) != fact]
        answers, kind = {item.suffix for item in own}, own[0].tags.get(self._relation)
        same = [item for item in others if item.suffix in answers]
        rest = [item for item in others if item.suffix not in answers]
        akin = [item for item in rest if kind is not None and item.tags.get(self._relation) == kind]
        far = [item for item in rest if kind is None or item.tags.get(self._relation) != kind]
        kept = [item for item in self.held_out if self._name(item) == fact]
        return dict(zip(GROUPS, (own, kept, same, akin, far), strict=True))

    def _name(self, item: Passage) -> str:
        return str(item.tags.get(self._group, item.id))


def _jobs(facts: Mapping[str, Selection], known: _Facts, per_group: int, seed: int) -> Iterator[_Job]:
    for fact in facts:
        groups = known.of(fact)
        answer = groups["fact"][0].suffix[0]
        for name, prompts in groups.items():
            if name not in GROUPS[:2] and len(prompts) > per_group:
                generator = torch.Generator().manual_seed(_seed(seed, fact, GROUPS.index(name)))
                picks = torch.randperm(len(prompts), generator=generator)[:per_group].tolist()
                prompts = [prompts[pick] for pick in sorted(picks)]
            for prompt in prompts:
                yield _Job(fact, name, prompt, answer)


class _Run:
    """All jobs as one set of rows, each under the neurons of its own fact."""

    def __init__(self, view: ModelView, jobs: Sequence[_Job], facts: Sequence[str], site: str, batch_size: int) -> None:
        items = tuple(dataclasses.replace(job.passage, id=f"{index}") for index, job in enumerate(jobs))
        self.view, self.jobs, self.facts = view, jobs, facts
        self.batches = list(view.batches(Passages(items), size=batch_size))
        index = {fact: number for number, fact in enumerate(facts)}
        self._fact = torch.tensor([index[job.fact] for job in jobs], device=view.device)
        self._answer = torch.tensor([job.answer for job in jobs], device=view.device)
        self._kind, self._side = (Kind.MLP_OUT, "input") if site == "activation" else (Kind.MLP_IN, "output")
        if site != "activation" and view.has(Site(0, Kind.MLP_GATE)):
            raise InputError(f"pre-activation: neurons of {view.row.family} are gated and have none; take activation")
        self.before = self._logprobs(None, 1.0)

    def rows(self, chosen: Mapping[str, Selection], label: str) -> tuple[dict[str, Any], ...]:
        """One row a fact, under these neurons."""
        found = self._effects(chosen, label)
        return tuple(_row(self, fact, entry, found) for fact, entry in chosen.items())

    @torch.no_grad()
    def _effects(self, chosen: Mapping[str, Selection], label: str) -> dict[str, Tensor]:
        """Of every job: log-probabilities under either factor, and what expresses its fact."""
        masks: dict[int, Tensor] = {}
        for site in self.view.sites(Kind.MLP_OUT):
            none = torch.zeros(self.view.neurons, dtype=torch.bool)
            mine = [chosen[fact].masks.get(site, none) for fact in self.facts]
            masks[site.layer] = torch.stack(mine).to(self.view.device)
        found = {}
        for done, (name, factor) in enumerate(FACTORS.items()):
            tell(label, done, len(FACTORS), name)
            found[name] = self._logprobs(masks, factor)
        return {**found, **self._expression(masks)}

    @torch.no_grad()
    def _logprobs(self, masks: Mapping[int, Tensor] | None, factor: float) -> Tensor:
        """Log-probability of every job's whole answer [jobs], float64."""
        found = torch.zeros(len(self.jobs), dtype=torch.float64)
        for batch in self.batches:
            change = self._times(batch, masks or {}, factor)
            sites = [Site(layer, self._kind) for layer in masks or ()]
            with self.view.replace(sites, change, side="input" if self._side == "input" else "output"):
                found[list(batch.rows)] = suffix_logprobs(self.view, batch).sum(1).double().cpu()
        return found

    def _times(self, batch: Batch, masks: Mapping[int, Tensor], factor: float) -> Callable[[Site, Tensor], Tensor]:
        where = self._fact[list(batch.rows)]

        def change(site: Site, tensor: Tensor) -> Tensor:
            touched = batch.predicting[..., None] & masks[site.layer][where][:, None]
            return torch.where(touched, tensor * factor, tensor)

        return change

    def _expression(self, masks: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Mean activation of a fact's neurons where each prompt ends, and the log-probability of its answer there."""
        activation = torch.zeros(len(self.jobs), dtype=torch.float64)
        answer = torch.zeros_like(activation)
        count = torch.stack([mask.sum(1) for mask in masks.values()]).sum(0)
        for batch in self.batches:
            rows, end = list(batch.rows), batch.first
            at = torch.arange(len(rows), device=end.device)
            with self.view.record(self.view.sites(Kind.MLP_OUT)) as seen:
                spoken = self.view.logits_at(batch, at, end).log_softmax(-1)
            said = [(seen[site][at, end].double() * masks[site.layer][self._fact[rows]]).sum(1) for site in seen]
            activation[rows] = (torch.stack(said).sum(0) / count[self._fact[rows]]).cpu()
            answer[rows] = spoken.gather(1, self._answer[rows][:, None])[:, 0].double().cpu()
        return {"activation": activation, "answer": answer}


def _row(run: _Run, fact: str, selection: Selection, found: Mapping[str, Tensor]) -> dict[str, Any]:
    """One fact: how its own and others' answers moved."""
    row: dict[str, Any] = {"id": fact, "neurons": selection.count}
    mine = [index for index, job in enumerate(run.jobs) if job.fact == fact]
    for name in GROUPS:
        here = [index for index in mine if run.jobs[index].group == name]
        if not here:
            continue
        before = run.before[here]
        row |= {f"{name}: prompts": len(here), f"{name}: before": float(before.exp().mean())}
        for way in FACTORS:
            change = found[way][here].exp() - before.exp()
            row[f"{way}: {name}"] = float(change.mean())
            row[f"{way}: {name}, moved"] = float(change.abs().mean())
            row[f"{way}: {name}, nats"] = float((found[way][here] - before).mean())
    row["expression"] = _correlation(found["activation"][mine], found["answer"][mine])
    return row


def _mean_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One fact's row, the mean over draws; draws whose neurons never change have no correlation and do not count."""
    found = dict(rows[0])
    for key in rows[0]:
        values = [row[key] for row in rows if key != "id" and math.isfinite(row[key])]
        if values:
            found[key] = sum(values) / len(values)
    return found


def _correlation(one: Tensor, other: Tensor) -> float:
    pair = torch.stack([one - one.mean(), other - other.mean()])
    norms = pair.norm(dim=1).prod()
    return float((pair[0] * pair[1]).sum() / norms) if float(norms) > 0 else math.nan


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    found = {}
    for way in FACTORS:
        for name in GROUPS:
            here = [row for row in rows if f"{way}: {name}" in row]
            for item in _of_group(here, way, name) if here else ():
                found[item.name] = item
    shown = [row["expression"] for row in rows if math.isfinite(row["expression"])]
    if shown:
        mean = sum(shown) / len(shown)
        found["expression"] = figure("expression", mean, len(shown), bootstrap_interval(shown), "correlation")
    return found


def _of_group(rows: Sequence[Mapping[str, Any]], way: str, name: str) -> Iterator[Figure]:
    key, n = f"{way}: {name}", len(rows)
    changes, before = [row[key] for row in rows], [row[f"{name}: before"] for row in rows]
    nats = [row[f"{key}, nats"] for row in rows]
    yield figure(key, sum(changes) / n, n, bootstrap_interval(changes), "probability")
    if sum(before) > 0:
        share = sum(changes) / sum(before)
        yield figure(f"{key}, relative", share, n, ratio_interval(changes, before), "share")
    yield figure(f"{key}, nats", sum(nats) / n, n, bootstrap_interval(nats), "nats")
    moved, own = [row[f"{key}, moved"] for row in rows], [row[f"{way}: fact, moved"] for row in rows]
    if name != "fact" and sum(own) > 0:
        yield figure(f"{key}, over fact", sum(moved) / sum(own), n, ratio_interval(moved, own), "share")


def _seed(seed: int, fact: str, draw: int) -> int:
    return int(digest_json([seed, fact, draw])[:15], 16)


def _digest(chosen: Mapping[str, Selection]) -> str:
    places = {fact: {str(site): found for site, found in entry.indices().items()} for fact, entry in chosen.items()}
    return digest_json(places)
