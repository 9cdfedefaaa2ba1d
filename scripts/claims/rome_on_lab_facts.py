"""ROME on facts of trained labs, one by one: efficacy, paraphrase, neighbours, with intervals.

    python scripts/claims/rome_on_lab_facts.py LAB [LAB ...] [--facts 20] [--seed 0] [--json FILE] [--set name=value]

Every fact is edited alone, on the untouched model, from its own prompt; nothing else of its record is shown to the
editor. Counted as accuracy (the answer is the likeliest one, every token of it): the new answer after the fact's own
prompt (efficacy), after a phrasing the model never saw for this subject (held-out) and one it did (seen), and the
present answer after prompts about other subjects, among those the model gets right before (neighbours). The second
moments are of the lab's training text, which holds no fact.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from editors.base import Request
from editors.rewriters.rome import Rome
from memloc.batches import pad
from memloc.moments import second_moments
from memloc.passages import Facts, Passages, Prompt, read_jsonl
from memloc.sites import Kind
from memloc.statistics import rate_interval
from memloc.view import ModelView

WINDOWS = 400
"""Windows of 64 tokens that second moments are taken of: 50 tokens a neuron of the demo lab."""


@torch.no_grad()
def says(view: ModelView, asked: Sequence[tuple[Prompt, tuple[int, ...]]]) -> list[bool]:
    """Whether each prompt's likeliest continuation, teacher-forced, is its answer."""
    if not asked:
        return []
    batch = pad([prompt.ids + answer for prompt, answer in asked], [len(prompt.ids) for prompt, _ in asked])
    row, column, token, _ = batch.suffix_index()
    right = view.logits_at(batch, row, column).argmax(-1) == token
    return [bool(right[row == index].all()) for index in range(len(asked))]


def one_lab(folder: Path, count: int, seed: int, settings: dict[str, Any]) -> dict[str, list[bool]]:
    """Verdicts of every prompt, by what they are of."""
    view = ModelView.open(folder)
    facts = Facts.read(folder / "facts.jsonl", view.tokenizer)
    train = [row["text"] for _, row in read_jsonl(folder / "corpus.jsonl") if row.get("split") == "train"]
    random.Random(seed).shuffle(train)
    text = Passages.from_texts(train[: 2 * WINDOWS], view.tokenizer, window=view.context or 64)[:WINDOWS]
    rome = Rome(**{"moment": second_moments(view, text, view.sites(Kind.MLP_OUT)), **settings})
    chosen = random.Random(seed).sample(range(len(facts)), min(count, len(facts)))
    found: dict[str, list[bool]] = {"efficacy": [], "held-out": [], "seen": [], "neighbours": []}
    before = view.digest
    for index in chosen:
        fact = facts[index]
        near = [(neighbor.prompt, neighbor.target) for neighbor in fact.neighbors]
        known = [pair for pair, right in zip(near, says(view, near), strict=True) if right]
        started = time.process_time()
        edit = rome(view, Request(facts=facts[index : index + 1], seed=seed))
        spent = time.process_time() - started
        with edit.apply(view):
            other = [(prompt, fact.target) for prompt in fact.paraphrases]
            row = says(view, [(fact.prompt, fact.target), *other[:2]])
            kept = says(view, known)
        for name, right in zip(("efficacy", "held-out", "seen"), row, strict=False):
            found[name].append(right)
        found["neighbours"] += kept
        note = edit.notes["facts"][0]
        print(
            f"{fact.id}  L{note['layer']} {note['token']:12}  said {row}  neighbours {sum(kept)}/{len(kept)}"
            f"  recalls {note['recalls']}  |δ| {note['value']:.1f}  {spent:.1f} CPU-s",
            file=sys.stderr,
            flush=True,
        )
    if view.digest != before:
        raise SystemExit("the model was not given back as it was")
    return found


def main() -> None:
    """Run, print the table, exit 1 where a demand is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="+", type=Path)
    parser.add_argument("--facts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--set", nargs="*", default=[], metavar="name=value", help="settings of rome")
    args = parser.parse_args()
    settings = {}
    for entry in args.set:
        name, _, value = entry.partition("=")
        settings[name] = ast.literal_eval(value) if value[:1] in "-0123456789(N" else value
    demands = {"efficacy": 0.95, "held-out": 0.85, "seen": None, "neighbours": 0.90}
    total: dict[str, list[bool]] = {name: [] for name in demands}
    for folder in args.labs:
        found = one_lab(folder, args.facts, args.seed, settings)
        print(folder.name, "  ".join(f"{name} {sum(hits)}/{len(hits)}" for name, hits in found.items()), flush=True)
        for name, hits in found.items():
            total[name] += hits
    missed = False
    for name, hits in total.items():
        rate, (low, high) = sum(hits) / max(1, len(hits)), rate_interval(sum(hits), len(hits))
        asked = demands[name]
        verdict = "" if asked is None else f"  demanded {asked:.0%}: {'met' if rate >= asked else 'MISSED'}"
        missed |= asked is not None and rate < asked
        print(f"{name:10} {rate:6.1%}  [{low:.1%}, {high:.1%}]  n = {len(hits)}{verdict}")
    if args.json:
        rows = {name: {"hits": sum(hits), "n": len(hits)} for name, hits in total.items()}
        args.json.write_text(json.dumps({"settings": settings, "labs": len(args.labs), "figures": rows}, indent=1))
    raise SystemExit(int(missed))


if __name__ == "__main__":
    main()
