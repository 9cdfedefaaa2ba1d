"""Editors of one backward pass on facts of trained labs: MEND's network one by one, UltraEdit all at once.

    python scripts/claims/one_pass_editors_on_lab.py LAB [LAB ...] [--train 80] [--judge 20] [--steps 600] [--seed 0]
        [--folder FOLDER] [--json FILE]

The network is trained on some of the lab's facts and judged on others that it never saw, each edited alone on the
untouched model. Beside it: an untrained network (a step along the normalised gradient, with the step size that serves
it best of several), and a random edit of the trained one's sites, ranks and norms. Counted as accuracy: the new answer
after the fact's own prompt, after its paraphrases, and the present answer after its neighbours. UltraEdit normalises
by what it has seen, and the lab's answers are of one token, so it edits the judged facts together.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from editors.base import Request
from editors.control import random_like
from editors.edit import Edit
from editors.rewriters.mend import Mend
from editors.rewriters.ultraedit import UltraEdit
from editors.tuning.hypernet_training import Training
from memloc.measures.facts import FactRecall, pooled
from memloc.measures.perplexity import Perplexity
from memloc.passages import Facts, Passages, read_jsonl
from memloc.view import ModelView

FIGURES = ("efficacy accuracy", "paraphrase accuracy", "neighbour accuracy")
STEPS = (0.001, 0.003, 0.01, 0.03)
"""Step sizes of the untrained network that are tried."""
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
"""lr of UltraEdit that are tried."""


def judged(view: ModelView, facts: Facts, held: Passages, editor: Callable[[Facts], Edit]) -> dict[str, Any]:
    """Every fact edited alone and measured; perplexity under the first five edits."""
    parts, perplexity, start = [], [], time.process_time()
    spent = 0.0
    for index in range(len(facts)):
        one, start = facts[index : index + 1], time.process_time()
        edit = editor(one)
        spent += time.process_time() - start
        with edit.apply(view):
            parts.append(FactRecall()(view, one))
            if index < 5:
                perplexity.append(Perplexity()(view, held)["perplexity"])
    found = pooled(parts, facts)
    shown = {name: [figure.value, figure.low, figure.high] for name, figure in found.figures.items()}
    return {"figures": shown, "perplexity": sum(perplexity) / len(perplexity), "cpu s": spent / len(facts)}


def show(name: str, found: dict[str, Any], clean: float) -> None:
    """One line."""
    cells = []
    for figure in FIGURES:
        value, *interval = found["figures"].get(figure, [float("nan")])
        cells.append(f"{value:.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""))
    drift = 100 * (found["perplexity"] / clean - 1)
    print(f"| {name} | {' | '.join(cells)} | {drift:+.2f} % | {found['cpu s']:.2f} |", flush=True)


def one_lab(folder: Path, given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All editors on one lab."""
    view = ModelView.open(folder)
    every = Facts.read(folder / "facts.jsonl", view.tokenizer)
    order = random.Random(given.seed).sample(range(len(every)), min(len(every), given.train + given.judge))
    train, judge = (Facts(tuple(every[at] for at in part)) for part in (order[: given.train], order[given.train :]))
    unseen = [row["text"] for _, row in read_jsonl(folder / "corpus.jsonl") if row["split"] == "held-out"]
    windows = Passages.from_texts(unseen, view.tokenizer, window=view.context or 64)
    text, held = windows[0::2][:200], windows[1::2][:100]
    clean = Perplexity()(view, held)["perplexity"]
    path, start = scratch / f"{folder.name}.mend.safetensors", time.process_time()
    Training(steps=given.steps, seed=given.seed)(view, train, text, path)
    seconds = time.process_time() - start
    print(
        f"\n{folder.name}: trained on {len(train)} facts, {given.steps} steps, {seconds:.0f} cpu s; {len(judge)} judged"
    )
    print(f"| | {' | '.join(FIGURES)} | perplexity | cpu s a fact |\n|{'---|' * 6}")

    def mend(where: Path) -> Callable[[Facts], Edit]:
        return lambda one: Mend(trained=str(where))(view, Request(facts=one))

    found = {"trained": judged(view, judge, held, mend(path))}
    found["random edit"] = judged(view, judge, held, lambda one: random_like(mend(path)(one), view, given.seed))
    for alpha in STEPS:
        plain = scratch / f"{folder.name}.{alpha}.safetensors"
        Training(steps=0, alpha=alpha, seed=given.seed)(view, train, text, plain)
        found[f"untrained, alpha {alpha}"] = judged(view, judge, held, mend(plain))
    together = {}
    for rate in RATES:
        edit = UltraEdit(lr=rate)(view, Request(facts=judge))
        with edit.apply(view):
            shown = {name: [item.value] for name, item in FactRecall()(view, judge).figures.items()}
            together[f"ultraedit, {len(judge)} at once, lr {rate}"] = {
                "figures": shown, "perplexity": Perplexity()(view, held)["perplexity"], "cpu s": 0.0}  # fmt: skip
    for name, entry in {**found, **together}.items():
        show(name, entry, clean)
    return {"lab": folder.name, "clean": clean, "train cpu s": seconds, "found": {**found, **together}}


def main() -> int:
    """Run every lab."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="+", type=Path)
    parser.add_argument("--train", type=int, default=80)
    parser.add_argument("--judge", type=int, default=20)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the networks are kept (default: nowhere)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        records = [one_lab(folder, given, given.folder or Path(scratch)) for folder in given.labs]
    if given.json:
        given.json.write_text(json.dumps(records, indent=1), encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
