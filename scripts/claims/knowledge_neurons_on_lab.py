"""Knowledge neurons and the logit lens on a trained lab: what holds of K10, K11 and K12, with intervals.

    python scripts/claims/knowledge_neurons_on_lab.py LAB [--model FOLDER] [--seed 0] [--draws 3]

Neurons are found in the phrasings a fact was trained with, and tried on the one it never was. Suppressing and
amplifying are compared with as many random neurons at the same sites. The lens follows the tokens the model itself
predicts, on recited passages and on controls, once over all positions and once over those it is sure of, for a sure
prediction settles earlier whatever its source.

`--model` takes another checkpoint than the lab's own: a snapshot, where facts are not yet certain and can be amplified.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from memloc.lab.facts import RELATIONS
from memloc.localizers.integrated_gradients import IntegratedGradients
from memloc.localizers.knowledge_neurons import KnowledgeNeurons
from memloc.measures.neuron_effects import FACTORS, GROUPS, neuron_effects, selections_of
from memloc.passages import Fact, Facts, Passage, Passages, encode
from memloc.reading.readout import lens
from memloc.scores import Localization
from memloc.statistics import bootstrap_interval
from memloc.view import ModelView

SURE = 0.9
"""Probability from which the model counts as sure of what it predicts."""


def asked(view: ModelView, fact: Fact, held_out: str) -> Iterator[tuple[bool, Passage]]:
    """A fact in every phrasing of its relation, and whether it was trained with it."""
    for index, phrasing in enumerate(RELATIONS[fact.tags["relation"]][0]):
        ids = encode(view.tokenizer, phrasing.format(fact.subject)).ids
        tags = {"fact": fact.id, "relation": fact.tags["relation"]}
        yield phrasing != held_out, Passage(f"{fact.id}/{index}", ids, fact.target_true, tags)


def gaps(found: Localization) -> str:
    """The completeness gap, for people."""
    return f"largest {found.notes['completeness_gap']:.4f}, mean {found.notes['completeness_gap_mean']:.5f}"


def neurons(view: ModelView, facts: Facts, seed: int, draws: int) -> None:
    """K11 and K12."""
    known = [pair for fact in facts for pair in asked(view, fact, fact.tags["held_out"])]
    trained = Passages(tuple(item for seen, item in known if seen))
    held_out = Passages(tuple(item for seen, item in known if not seen))
    print(f"{len(facts)} facts, {len(trained)} trained phrasings, {len(held_out)} held out")
    whole = IntegratedGradients()(view, trained)
    for site, scores in whole.scores.items():
        print(f"  {site}: silencing it takes {float(scores.sum(1).mean()):.3f} of the answer's probability away")
    print(f"completeness gap: {gaps(whole)}; points a path {whole.notes['points_mean']:.1f}")
    for drop in (False, True):
        found = KnowledgeNeurons(drop_shared=drop)(view, trained)
        notes, chosen = found.notes, selections_of(found)
        none = sum(not entry.count for entry in chosen.values())
        print(f"\nrelation-shared neurons {'dropped' if drop else 'kept'}: {notes['neurons_per_fact']:.2f} neurons "
              f"a fact, by layer {notes['neurons_by_layer']}; facts with none {none}")  # fmt: skip
        for name, relation in notes["relations"].items():
            print(f"  {name}: share {relation['share']}, {relation['neurons_per_fact']:.1f} a fact before, "
                  f"{len(relation['shared'])} shared")  # fmt: skip
        measured = neuron_effects(view, chosen, trained, held_out=held_out, seed=seed, draws=draws)
        names = [
            f"{way}: {group}{kind}" for way in FACTORS for group in GROUPS for kind in ("", ", nats", ", over fact")
        ]
        for name in [*names, "expression"]:
            if name in measured.figures:
                mine, other = measured.figures[name], measured.control.figures[name] if measured.control else None
                beside = "" if other is None else f"   random {other.value:+.3f} [{other.low:+.3f}, {other.high:+.3f}]"
                print(f"  {name:<48} {mine.value:+.3f} [{mine.low:+.3f}, {mine.high:+.3f}] n={mine.n}{beside}")


@torch.no_grad()
def settled(view: ModelView, passages: Passages) -> torch.Tensor:
    """How the token that is predicted comes up, position by position: [k, 5 + l].

    Columns: its passage, its final probability, the layer after which it first is on top, that from which it stays
    there, and its probability at the embedding and after each layer.
    """
    found = []
    for batch in view.batches(passages, size=32):
        seen = lens(view, batch, of="prediction")
        row = torch.tensor(batch.rows)[seen.row]
        found.append(torch.stack([row, seen.logprob[-1].exp(), seen.first, seen.steady, *seen.logprob.exp()], 1))
    return torch.cat(found)


def phases(view: ModelView, groups: dict[str, Passages]) -> None:
    """K10's second half, and Haviv et al.: are recited tokens promoted earlier than others?"""
    print("\nlayer after which the predicted token is on top (0: the embedding), means over passages")
    for sure in (0.0, SURE):
        for name, passages in groups.items():
            table = settled(view, passages)
            table = table[table[:, 1] >= sure]
            rows = [table[table[:, 0] == row] for row in table[:, 0].unique()]
            line = [f"  {name:<10} p>={sure}: {len(table)} positions of {len(rows)} passages"]
            for label, column in (("first on top", 2), ("on top from", 3)):
                values = [float(row[:, column].mean()) for row in rows]
                low, high = bootstrap_interval(values)
                line.append(f"{label} {sum(values) / max(1, len(values)):.2f} [{low:.2f}, {high:.2f}]")
            line.append("probability by layer " + " ".join(f"{value:.2f}" for value in table[:, 4:].mean(0).tolist()))
            print(", ".join(line))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    view = ModelView.open(given.model or given.lab)
    passages = Passages.read(given.lab / "passages.jsonl", view.tokenizer)
    controls = Passages.read(given.lab / "controls.jsonl", view.tokenizer)
    often = passages.where(lambda item: item.tags["dose"] == max(other.tags["dose"] for other in passages))
    neurons(view, Facts.read(given.lab / "facts.jsonl", view.tokenizer), given.seed, given.draws)
    print(f"\nrecited passages: completeness gap: {gaps(IntegratedGradients()(view, often))}")
    phases(view, {"recited": often, "controls": controls})


if __name__ == "__main__":
    main()
