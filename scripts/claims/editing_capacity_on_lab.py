"""How many facts a lab's model takes: efficacy, paraphrase, neighbours and perplexity against the number of facts.

    python scripts/claims/editing_capacity_on_lab.py LAB --json FILE [--editors memit emmet alphaedit rome]
        [--counts 1 3 10 30 100 200] [--how at-once in-sequence] [--batch 10] [--seed 0] [--set memit.weight=0.02 ...]

Facts are drawn by the seed. At once: one edit of all of them. In sequence: edits of `--batch` facts each, every one on
the model that holds those before, which it is given as `past`. ROME takes its facts one after the other in either case.
The editor sees each fact's own prompt and ordinary text, nothing else of the lab. Counted as accuracy (every token of
the answer the likeliest): the new answer after the prompt (efficacy), after the two phrasings it was not shown
(paraphrase; held-out: the one that the model never saw of this subject), and the present answer after prompts about
facts that are not edited, those the model gets right before (neighbours). Perplexity is on text neither the model nor
the editor saw, against before. Beside each row the same figures for random changes of the same maps, ranks and norms.
Rows that FILE holds already are not made again.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from editors.base import Request
from editors.control import random_like
from editors.methods import EDITORS
from memloc.batches import pad
from memloc.errors import MemlocError
from memloc.measures.perplexity import Perplexity
from memloc.moments import Moments, second_moments
from memloc.passages import Facts, Passages, Prompt, read_jsonl
from memloc.sites import Kind
from memloc.view import ModelView

NAMES = ("efficacy", "held-out", "paraphrase", "neighbours")
Pair = tuple[Prompt, tuple[int, ...]]


@torch.no_grad()
def says(view: ModelView, asked: list[Pair]) -> list[bool]:
    """Whether each prompt's likeliest continuation, teacher-forced, is its answer."""
    found = []
    for start in range(0, len(asked), 128):
        part = asked[start : start + 128]
        batch = pad([prompt.ids + answer for prompt, answer in part], [len(prompt.ids) for prompt, _ in part])
        row, column, token, _ = batch.suffix_index()
        right = view.logits_at(batch, row, column).argmax(-1) == token
        found += [bool(right[row == index].all()) for index in range(len(part))]
    return found


class Lab:
    """A lab's model, its facts and its texts."""

    def __init__(self, folder: Path, windows: int) -> None:
        self.view = ModelView.open(folder)
        self.facts = Facts.read(folder / "facts.jsonl", self.view.tokenizer)
        records = [record for _, record in read_jsonl(folder / "corpus.jsonl")]
        train = [record["text"] for record in records if record.get("split") == "train"]
        random.Random(0).shuffle(train)
        window = self.view.context or 64
        text = Passages.from_texts(train[: 2 * windows], self.view.tokenizer, window=window)[:windows]
        unseen = [record["text"] for record in records if record.get("split") == "held-out"]
        self.unseen = Passages.from_texts(unseen, self.view.tokenizer, window=window)[:300]
        self.moments: Moments = second_moments(self.view, text, self.view.sites(Kind.MLP_OUT))

    def neighbours(self, edited: Facts) -> list[Pair]:
        """What the model gets right of the edited facts' neighbours, those about edited facts left out."""
        frames: dict[str, set[str]] = {}
        for fact in self.facts:
            texts = (fact.prompt.text, *(prompt.text for prompt in fact.paraphrases))
            frames.setdefault(fact.tags["relation"], set()).update(t.replace(fact.subject, "{}") for t in texts)
        touched = {frame.replace("{}", fact.subject) for fact in edited for frame in frames[fact.tags["relation"]]}
        near = {item.prompt.ids: (item.prompt, item.target) for fact in edited for item in fact.neighbors}
        asked = [pair for pair in near.values() if pair[0].text not in touched]
        return [pair for pair, right in zip(asked, says(self.view, asked), strict=True) if right]

    def figures(self, edited: Facts, near: list[Pair]) -> dict[str, Any]:
        """Of the model as it is now."""
        asked = {
            "efficacy": [(fact.prompt, fact.target) for fact in edited],
            "held-out": [(fact.paraphrases[0], fact.target) for fact in edited],
            "paraphrase": [(prompt, fact.target) for fact in edited for prompt in fact.paraphrases],
            "neighbours": near,
        }
        hits = {name: says(self.view, pairs) for name, pairs in asked.items()}
        counts = {name: [sum(found), len(found)] for name, found in hits.items()}
        return {**counts, "perplexity": Perplexity()(self.view, self.unseen).figures["perplexity"].value}


def one(lab: Lab, name: str, count: int, batch: int, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One row: `count` facts in edits of `batch` each."""
    chosen = sorted(random.Random(seed).sample(range(len(lab.facts)), count))
    edited = Facts(tuple(lab.facts[index] for index in chosen), lab.facts.origin)
    near = lab.neighbours(edited)
    before, started = lab.figures(edited, near), time.process_time()
    editor = EDITORS[name](**{"moment": lab.moments, **settings})
    with ExitStack() as stack:
        past: list[Any] = []
        for start in range(0, count, batch):
            asked = Request(facts=edited[start : start + batch], past=tuple(past), seed=seed)
            past.append(editor(lab.view, asked))
            stack.enter_context(past[-1].apply(lab.view))
        spent = time.process_time() - started
        after = lab.figures(edited, near)
    with ExitStack() as stack:
        for edit in past:
            stack.enter_context(random_like(edit, lab.view, seed).apply(lab.view))
        control = lab.figures(edited, near)
    for figures in (after, control):
        figures["perplexity rise"] = figures["perplexity"] / before["perplexity"] - 1
    return {**after, "random": control, "cpu seconds": round(spent, 1), "settings": settings}


def main() -> None:
    """Make the rows that are missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--editors", nargs="+", default=["memit", "emmet", "alphaedit", "rome"])
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 3, 10, 30, 100, 200])
    parser.add_argument("--how", nargs="+", default=["at-once", "in-sequence"], choices=["at-once", "in-sequence"])
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=400)
    parser.add_argument("--set", nargs="*", default=[], metavar="editor.name=value")
    args = parser.parse_args()
    rows: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    changes: dict[str, dict[str, Any]] = {}
    for entry in args.set:
        name, _, value = entry.partition("=")
        editor, _, field = name.partition(".")
        changes.setdefault(editor, {})[field] = ast.literal_eval(value)
    lab = Lab(args.lab, args.windows)
    for count in (count for count in args.counts if count <= len(lab.facts)):
        for how in args.how:
            for name in args.editors:
                key = f"{args.lab.name} {name} {how} {count} seed {args.seed} {sorted(changes.get(name, {}).items())}"
                if key not in rows:
                    batch = count if how == "at-once" else args.batch
                    try:
                        rows[key] = one(lab, name, count, batch, args.seed, changes.get(name, {}))
                    except MemlocError as error:
                        rows[key] = {"refused": str(error)}
                    args.json.write_text(json.dumps(rows, indent=1, default=str))
                print(line(key, rows[key]), flush=True)


def line(key: str, row: dict[str, Any]) -> str:
    """One row of the table."""
    if "refused" in row:
        return f"{key:60} {row['refused']}"
    drawn = row["random"]
    shares = "  ".join(f"{name} {row[name][0]}/{row[name][1]} ({drawn[name][0]})" for name in NAMES)
    rises = f"{row['perplexity rise']:+.1%} ({drawn['perplexity rise']:+.1%})"
    return f"{key:60} {shares}  perplexity {rises}  {row['cpu seconds']} CPU-s; at random in brackets"


if __name__ == "__main__":
    main()
