"""Knowledge-neuron surgery on facts of trained labs: erase or rewrite located neurons, beside as many at random.

    python scripts/claims/neuron_surgery_on_lab.py LAB [LAB ...] [--facts 10] [--count 20] [--seed 0] [--json FILE]

Every fact is edited alone on the untouched model, at the neurons with the largest integrated gradients of its present
answer after its own prompt (at most `count`), and at as many random neurons of the same layers. Counted as accuracy:
the new answer after the prompt, after its paraphrases, the present answer after its neighbours, and the fact's own
present answer (which erasing should take away); and perplexity of held-out text under the first five edits.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from editors.base import Request
from editors.rewriters.knowledge_neuron_surgery import KnowledgeNeuronSurgery
from memloc.localizers.integrated_gradients import IntegratedGradients
from memloc.measures.facts import FactRecall, pooled
from memloc.measures.perplexity import Perplexity
from memloc.passages import Facts, Passages, read_jsonl
from memloc.scores import Selection
from memloc.view import ModelView

FIGURES = ("efficacy accuracy", "paraphrase accuracy", "neighbour accuracy", "true accuracy")
ARMS = {
    "erase": KnowledgeNeuronSurgery(),
    "amplify x2": KnowledgeNeuronSurgery(mode="amplify"),
    "replace, columns' length": KnowledgeNeuronSurgery(mode="replace"),
    "replace, 4x columns' length": KnowledgeNeuronSurgery(mode="replace", old=4.0, new=4.0),
    "replace, published": KnowledgeNeuronSurgery.published(),
}


def one_arm(
    view: ModelView, facts: Facts, chosen: list[Selection], held: Passages, editor: KnowledgeNeuronSurgery
) -> dict[str, Any]:
    """Every fact edited alone at its own neurons."""
    parts, perplexity = [], []
    for index, selection in enumerate(chosen):
        one = facts[index : index + 1]
        with editor(view, Request(facts=one, selection=selection)).apply(view):
            parts.append(FactRecall()(view, one))
            if index < 5:
                perplexity.append(Perplexity()(view, held)["perplexity"])
    figures = pooled(parts, facts).figures
    shown = {name: [figures[name].value, figures[name].low, figures[name].high] for name in FIGURES}
    return {"figures": shown, "perplexity": sum(perplexity) / len(perplexity)}


def main() -> int:
    """Run every lab."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="+", type=Path)
    parser.add_argument("--facts", type=int, default=10)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    records = []
    for folder in given.labs:
        view = ModelView.open(folder)
        every = Facts.read(folder / "facts.jsonl", view.tokenizer)
        picked = random.Random(given.seed).sample(range(len(every)), min(given.facts, len(every)))
        facts = Facts(tuple(every[at] for at in picked))
        unseen = [row["text"] for _, row in read_jsonl(folder / "corpus.jsonl") if row["split"] == "held-out"]
        held = Passages.from_texts(unseen, view.tokenizer, window=view.context or 64)[:60]
        asked = facts.as_passages("true")
        located = [IntegratedGradients()(view, asked[at : at + 1]).top(given.count) for at in range(len(facts))]
        chance = [selection.random_like(given.seed + at) for at, selection in enumerate(located)]
        clean = Perplexity()(view, held)["perplexity"]
        print(f"\n{folder.name}: {len(facts)} facts one by one, {given.count} neurons each")
        print(f"| | {' | '.join(FIGURES)} | perplexity |\n|{'---|' * (len(FIGURES) + 2)}")
        found = {}
        for name, editor in ARMS.items():
            for where, selections in (("", located), (", random neurons", chance)):
                entry = found[name + where] = one_arm(view, facts, selections, held, editor)
                cells = [f"{value:.2f} ({low:.2f} to {high:.2f})" for value, low, high in entry["figures"].values()]
                drift = 100 * (entry["perplexity"] / clean - 1)
                print(f"| {name}{where} | {' | '.join(cells)} | {drift:+.2f} % |", flush=True)
        records.append({"lab": folder.name, "clean": clean, "found": found})
    if given.json:
        given.json.write_text(json.dumps(records, indent=1), encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
