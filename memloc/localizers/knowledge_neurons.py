"""Knowledge neurons: the few that several ways of asking for one fact have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memloc.costs import Cost
from memloc.errors import InputError
from memloc.gradients.paths import Integral
from memloc.passages import Passages
from memloc.progress import steps
from memloc.provenance import Provenance, settings_of
from memloc.reading.readout import wide
from memloc.results.refinement import Places, Refinement, Unit, agreed, coarse, mean_count, refine, shared
from memloc.scores import Localization
from memloc.sites import Grain, Kind
from memloc.view import ModelView

CONVENTIONS: Mapping[str, Mapping[str, Any]] = {
    "paper": {"quadrature": "riemann-right", "nodes": 20, "drop_shared": False},
    "hunter": {"quadrature": "riemann-left", "nodes": 20, "drop_shared": False},
    "eleutherai": {
        "quadrature": "inclusive", "nodes": 20, "site": "pre-activation", "threshold": 0.3, "share": 0.5,
        "strict": True, "rounds": 0, "min_prompts": 1, "drop_shared": False,
    },
}  # fmt: skip
"""Settings with which `KnowledgeNeurons` does what a reference does: the paper; its authors' public code; EleutherAI's
on GPT models (on encoders it takes the "activation" site). The first two drop shared neurons only to edit facts."""


@dataclass(frozen=True, kw_only=True)
class KnowledgeNeurons(Integral):
    """Score of a neuron = its mean share in the probability of a fact's answer; 0 where the fact's prompts disagree.

    Passages with the same tag `group` ask for one fact in several ways (`memloc localize --facts FILE --paraphrases`);
    one without the tag is a fact of its own. For every prompt, integrated gradients of the answer's probability, as
    `integrated-gradients` takes them, in probability per neuron. A neuron passes in a prompt where its score reaches
    the threshold; it is the fact's where it passes in enough of its prompts. That share is moved, relation by
    relation, until a fact has `aim_least` to `aim_most` neurons on average. Neurons that many facts of a relation have
    belong to the relation (its syntax, its kind of answer) and are dropped. One axis of facts, called by their tag.

    The notes list every fact's neurons, best first, as [layer, neuron, score, prompts it passed in], with the mean bar
    they had to pass; every relation's share as it ended, and its shared neurons. Nothing is random.

    Attributes:
        position: which tokens of the answer count: "all" (mean), "first" or "last".
        site: "activation", what enters `mlp.out`; or "pre-activation", what leaves `mlp.in` (not of gated neurons).
        nodes: quadrature points of a path, and of each half where one is halved.
        quadrature: "gauss-legendre"; "riemann-right" (the paper's), "riemann-left" (its authors' code) or "inclusive"
            (a later public code, which counts both ends twice), of `nodes` points each.
        tolerance: Gauss-Legendre only: halve a stretch of a path where its own gap is too large for this share in all.
        halvings: and so many times at most.
        threshold: what a score must reach in a prompt; and it must lie above 0.
        threshold_unit: "share" of the prompt's largest score, "absolute", or "quantile" of the prompt's scores.
        share: of a fact's prompts in which a neuron must pass, at the start.
        strict: in more than that share, not in just so many.
        min_prompts: and in so many prompts at least; in all, where a fact has fewer.
        share_step: by how much the share moves in a round.
        rounds: how often it moves at most; 0 leaves it. It stays also where passages name no relation.
        aim_least: fewest neurons a fact is to have on average.
        aim_most: and most.
        shared: a neuron that this share of a relation's facts have, and two of them at least, is the relation's.
        drop_shared: drop those; otherwise they are only listed in the notes.
        group: the tag that names a passage's fact.
        relation: the tag that names a fact's relation.
        batch_size: passages prefilled together; no effect on scores.
        memory_mb: working memory the one-token rows may take, roughly; no effect on scores.

    Cost: that of integrated gradients of all passages (and of the contrast set).

    Source: Dai et al. 2022, arXiv:2104.08696; `CONVENTIONS` holds the settings of its public codes. Facts are told
    from the kind of answer by the two controls of `neuron_effects` (Niu et al. 2024, arXiv:2405.02421).
    """

    threshold: float = 0.2
    threshold_unit: Unit = "share"
    share: float = 0.7
    strict: bool = False
    min_prompts: int = 3
    share_step: float = 0.05
    rounds: int = 6
    aim_least: float = 2.0
    aim_most: float = 5.0
    shared: float = 0.1
    drop_shared: bool = True
    group: str = "fact"
    relation: str = "relation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1 or not 0 < self.shared <= 1 or self.threshold < 0:
            raise InputError(f"share {self.share}, shared {self.shared}, threshold {self.threshold}: expected shares "
                             "above 0 and at most 1, and a threshold of at least 0")  # fmt: skip
        if self.min_prompts < 1 or self.rounds < 0 or not self.share_step > 0 or self.aim_least > self.aim_most:
            raise InputError(f"min_prompts {self.min_prompts}, rounds {self.rounds}, share_step {self.share_step}, "
                             f"aim {self.aim_least} to {self.aim_most}: expected at least 1, at least 0, above 0, and "
                             "a range")  # fmt: skip

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score all neurons, fact by fact.

        Args:
            view: the model.
            passages: prompts and answers.
            contrast: negative prompts: a neuron that passes in enough of them is not the fact's. Those tagged with a
                fact count against that fact, those without the tag against every fact.

        Raises:
            InputError: no passages, one the model cannot take (named), or a site the family has not.
        """
        if not passages:
            raise InputError("knowledge-neurons: no passages given")
        asked = self._ask(view, passages)
        kept, relations = self._refined(passages, asked)
        if contrast:
            kept = self._without(kept, contrast, self._ask(view, contrast))
        means = asked.totals / torch.tensor([len(rows) for rows in asked.facts.values()]).to(asked.totals)[:, None]
        scores = torch.zeros_like(means)
        for index, places in enumerate(kept.values()):
            layers, neurons = _spread(places, view.neurons)
            scores[layers, index, neurons] = means[layers, index, neurons]
        told = [_told(passages, asked, fact, scores[:, index], kept[fact]) for index, fact in enumerate(kept)]
        by_layer = Counter(place // view.neurons for places in kept.values() for place in places)
        notes = {
            "completeness_gap": max(asked.gaps),
            "completeness_gap_mean": sum(asked.gaps) / len(passages),
            "neurons_per_fact": mean_count(kept),
            "neurons_by_layer": [by_layer[layer] for layer in range(view.layers)],
            "relations": relations,
            "facts": told,
        }
        inputs = {"model": view.digest, "passages": passages.digest}
        inputs |= {"contrast": contrast.digest} if contrast else {}
        made = Provenance("knowledge-neurons", settings_of(self), inputs=inputs)
        found = {site: scores[site.layer] for site in view.sites(Kind.MLP_OUT)}
        return Localization(Grain.NEURON, found, made, tuple(kept), notes)

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """Exact where no path can be halved; otherwise what the unhalved paths take, "at least"."""
        spent, facts = self.taken(view, passages), len(self._facts(passages))
        if contrast:
            spent, facts = spent + self.taken(view, contrast), facts + len(self._facts(contrast))
        return replace(spent, bytes=spent.bytes + 40 * view.layers * (facts + self.batch_size) * view.neurons)

    def _facts(self, passages: Passages) -> dict[str, list[int]]:
        """Fact to its rows, in order of first mention; a passage without the tag is a fact called by its id."""
        facts: dict[str, list[int]] = {}
        for row, item in enumerate(passages):
            facts.setdefault(str(item.tags.get(self.group, item.id)), []).append(row)
        return facts

    def _ask(self, view: ModelView, passages: Passages) -> _Asked:
        """Integrated gradients of every prompt; kept of each is what passes, and of each fact the sum."""
        facts = self._facts(passages)
        index = {row: number for number, rows in enumerate(facts.values()) for row in rows}
        totals = torch.zeros(view.layers, len(facts), view.neurons, dtype=wide(view.dtype), device=view.device)
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        gaps: dict[int, float] = {}
        with view.frozen():
            for batch in steps(list(view.batches(passages, size=self.batch_size)), "knowledge neurons"):
                path = self.integrate(view, batch)
                scores = path.scores()
                where = torch.tensor([index[row] for row in batch.rows], device=view.device)
                totals = totals.index_add(1, where, scores)
                gaps |= dict(zip(batch.rows, path.gaps().tolist(), strict=True))
                for row, prompt in zip(batch.rows, scores.transpose(0, 1).flatten(1).cpu(), strict=True):
                    found[row] = coarse(prompt, self.threshold, self.threshold_unit)
        bars, passed = zip(*(found[row] for row in range(len(passages))), strict=True)
        return _Asked(facts, totals, passed, bars, [gaps[row] for row in range(len(passages))])

    def _refined(self, passages: Passages, asked: _Asked) -> tuple[dict[str, Places], dict[str, Any]]:
        """What every fact keeps, and what is to be said of every relation."""
        groups: dict[str, list[str]] = {}
        kept: dict[str, Places] = dict.fromkeys(asked.facts, ())  # in the order of facts, whatever the relations
        told: dict[str, Any] = {}
        for fact, rows in asked.facts.items():
            relation = passages[rows[0]].tags.get(self.relation)
            if relation is None:
                kept |= self._agree(asked, [fact], rounds=0).kept
            else:
                groups.setdefault(str(relation), []).append(fact)
        for relation, members in groups.items():
            found = self._agree(asked, members, rounds=self.rounds)
            common = shared(found.kept, self.shared)
            gone = common if self.drop_shared else {}
            kept |= {fact: tuple(entry for entry in found.kept[fact] if entry not in gone) for fact in members}
            size = asked.totals.shape[-1]
            told[relation] = {
                "facts": len(members), "share": found.share, "rounds": found.rounds, "neurons_per_fact": found.mean,
                "shared": [[*divmod(place, size), count] for place, count in common.items()],
            }  # fmt: skip
        return kept, told

    def _agree(self, asked: _Asked, facts: Sequence[str], *, rounds: int) -> Refinement:
        prompts = {fact: [asked.passed[row] for row in asked.facts[fact]] for fact in facts}
        return refine(
            prompts,
            share=self.share,
            step=self.share_step,
            rounds=rounds,
            aim=(self.aim_least, self.aim_most),
            least=self.min_prompts,
            strict=self.strict,
        )

    def _without(self, kept: Mapping[str, Places], contrast: Passages, asked: _Asked) -> dict[str, Places]:
        """What stays of every fact's places when negative prompts have spoken."""
        common = [asked.passed[row] for row, item in enumerate(contrast) if self.group not in item.tags]
        found = {}
        for fact, places in kept.items():
            own = [asked.passed[row] for row in asked.facts.get(fact, ()) if self.group in contrast[row].tags]
            gone = {*agreed(common, self.share, strict=self.strict), *agreed(own, self.share, strict=self.strict)}
            found[fact] = tuple(place for place in places if place not in gone)
        return found


@dataclass(frozen=True)
class _Asked:
    """What prompts said.

    Attributes:
        facts: fact to the rows of its prompts.
        totals: [l, facts, f], scores summed over a fact's prompts.
        passed: of every prompt, the places that passed.
        bars: what they had to pass.
        gaps: completeness gap of every prompt.
    """

    facts: Mapping[str, Sequence[int]]
    totals: Tensor
    passed: Sequence[Places]
    bars: Sequence[float]
    gaps: Sequence[float]


def _told(passages: Passages, asked: _Asked, fact: str, scores: Tensor, places: Places) -> dict[str, Any]:
    """A fact's neurons, best first, with scores [l, f]; what they had to pass, and in how many prompts they did."""
    rows = asked.facts[fact]
    counts = Counter(place for row in rows for place in asked.passed[row])
    said = [
        [*divmod(place, scores.shape[1]), float(scores.flatten()[place]), counts[place]]
        for place in sorted(places, key=lambda place: -float(scores.flatten()[place]))
    ]
    bar = sum(asked.bars[row] for row in rows) / len(rows)
    return {"fact": fact, "prompts": [passages[row].id for row in rows], "bar": bar, "neurons": said}


def _spread(places: Places, size: int) -> tuple[list[int], list[int]]:
    return [place // size for place in places], [place % size for place in places]
