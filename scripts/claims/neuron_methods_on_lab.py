"""Neuron methods on a lab model: what silencing their best neurons does, how far they agree, and what they cost.

    python scripts/claims/neuron_methods_on_lab.py LAB [--passages 5] [--random 10] [--joint 20 --step 5]

For the first recited passages of a lab folder, each passage with scores of its own: the rise of its suffix's NLL when
the best 0.1 %, 0.5 % and 1 % of all neurons are silenced, beside as many at random (at the same sites, mean of draws);
Jaccard overlap of the best 1 % between methods; block-tokens and CPU seconds; what the shortlist missed, against all
exact scores; sizes of outlier sets; joint selection beside single scores and random order.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from memloc.ablations.gates import silenced
from memloc.ablations.joint import joint_selection, removal_curves
from memloc.hooks import count_tokens
from memloc.localizers.activation import Activation
from memloc.localizers.hard_concrete import HardConcrete
from memloc.localizers.integrated_gradients import IntegratedGradients
from memloc.localizers.outlier_set import OutlierSet
from memloc.localizers.slimming import Slimming
from memloc.localizers.zero_out import ZeroOut
from memloc.objectives import suffix_nll
from memloc.passages import Passages
from memloc.scores import Localization, Selection
from memloc.view import ModelView

SHARES = (0.001, 0.005, 0.01)
METHODS: dict[str, Any] = {
    "zero-out": ZeroOut(),
    "zero-out shortlist": ZeroOut(mode="shortlist"),
    "integrated-gradients": IntegratedGradients(),
    "slimming": Slimming(),
    "hard-concrete": HardConcrete(),
    "outlier-set": OutlierSet(),
    "activation": Activation(),
}


def main() -> None:
    """Run all and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", type=Path)
    parser.add_argument("--passages", type=int, default=5)
    parser.add_argument("--random", type=int, default=10, help="draws of the random control")
    parser.add_argument("--joint", type=int, default=20, help="units of a joint selection")
    parser.add_argument("--step", type=int, default=5, help="units silenced between two scorings")
    given = parser.parse_args()
    torch.set_num_threads(1)
    view = ModelView.open(given.lab)
    passages = Passages.read(given.lab / "passages.jsonl", view.tokenizer)
    most = max(item.tags["dose"] for item in passages)
    passages = passages.where(lambda item: item.tags["dose"] == most)[: given.passages]
    controls = Passages.read(given.lab / "controls.jsonl", view.tokenizer)
    print(f"{len(passages)} passages, {view.layers} layers of {view.neurons} neurons, "
          f"clean NLL {mean_nll(view, passages):.4f} nats per token")  # fmt: skip
    found = {name: run(name, method, view, passages, controls) for name, method in METHODS.items()}
    effects(view, passages, found, given.random)
    overlaps(passages, found)
    missed(passages, found["zero-out"], found["zero-out shortlist"])
    sets(view, passages, controls, found["outlier-set"])
    for name in ("zero-out shortlist", "integrated-gradients"):
        joint(name, view, passages, given.joint, given.step)


def run(name: str, method: Any, view: ModelView, passages: Passages, controls: Passages) -> Localization:
    """One method on all passages, its cost printed."""
    start = time.process_time()
    with count_tokens([view.block(layer) for layer in range(view.layers)]) as spent:
        found: Localization = method(view, passages, contrast=controls)
    seconds = time.process_time() - start
    each = view.layers * sum(len(item.ids) for item in passages)
    print(f"- {name}: {spent.forward / each:.1f} forward and {spent.backward / each:.1f} backward passes, "
          f"{seconds:.2f} CPU-s")  # fmt: skip
    return found


@torch.no_grad()
def mean_nll(view: ModelView, passages: Passages, chosen: Selection | None = None) -> float:
    """Mean suffix NLL, with the chosen neurons silent."""
    batch = next(view.batches(passages, size=len(passages)))
    if chosen is None:
        return float(suffix_nll(view, batch).mean())
    with silenced(view, chosen):
        return float(suffix_nll(view, batch).mean())


def effects(view: ModelView, passages: Passages, found: dict[str, Localization], draws: int) -> None:
    """Rise of the NLL by method and share, mean over passages, with the random control of the same sites."""
    print("\n| silenced | " + " | ".join(f"best {share:.1%} | random" for share in SHARES) + " |")
    print("|---" * (1 + 2 * len(SHARES)) + "|")
    for name, scores in found.items():
        cells = []
        for share in SHARES:
            own, control = [], []
            for row, item in enumerate(passages):
                here, chosen = passages[row : row + 1], scores.of(item.id).top(fraction=share)
                clean = mean_nll(view, here)
                own.append(mean_nll(view, here, chosen) - clean)
                control += [mean_nll(view, here, chosen.random_like(seed)) - clean for seed in range(draws)]
            cells += [f"{sum(own) / len(own):.3f}", f"{sum(control) / len(control):.3f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")


def overlaps(passages: Passages, found: dict[str, Localization]) -> None:
    """Jaccard index of the best 1 %, mean over passages."""
    print("\n| best 1 % shared | " + " | ".join(found) + " |")
    print("|---" * (1 + len(found)) + "|")
    for name, one in found.items():
        cells = []
        for other in found.values():
            shared = [one.of(i).top(fraction=0.01).overlap(other.of(i).top(fraction=0.01)) for i in passages.ids]
            cells.append(f"{sum(shared) / len(shared):.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


def missed(passages: Passages, exact: Localization, short: Localization) -> None:
    """What the shortlist's audit says, and what is true."""
    mass, whole, hits = 0.0, 0.0, 0
    for name in passages.ids:
        truth, mine = (torch.cat(list(entry.of(name).scores.values())) for entry in (exact, short))
        # Verified and audited are equal to the truth but for rounding; audited ones are few.
        looked = (truth - mine).abs() <= 1e-6
        whole += float(truth.clamp_min(0).sum())
        mass += float(truth[~looked].clamp_min(0).sum())
        hits += len(set(truth.topk(20).indices.tolist()) & set(looked.nonzero()[:, 0].tolist()))
    print(f"\naudit: {dict(short.notes)}")
    print(f"true share of positive score not looked at: {mass / whole:.3f}; of the 20 best by exact score of each "
          f"passage, {hits} of {20 * len(passages)} were looked at")  # fmt: skip


def sets(view: ModelView, passages: Passages, controls: Passages, found: Localization) -> None:
    """Sizes of the sets, by either end, and how many layers they lie in."""
    other = OutlierSet(until="nll")(view, passages, contrast=controls)
    for name, scores in (("exact", found), ("nll", other)):
        layers = []
        for item, size in zip(passages.ids, scores.notes["sizes"], strict=True):
            layers.append(len(scores.of(item).top(size).indices()) if size else 0)
        notes = {key: scores.notes[key] for key in ("sizes", "candidates", "ended")}
        print(f"outlier sets until {name}: {notes}, in layers {layers}, bar {scores.notes['nll_bar']:.2f} nats")


def joint(name: str, view: ModelView, passages: Passages, count: int, step: int) -> None:
    """Joint, single and random order, each passage with its own, mean over passages."""
    points = [point for point in (0, 2, count // 2, count) if point <= count]
    total: dict[str, list[float]] = {}
    for row in range(len(passages)):
        here = passages[row : row + 1]
        chosen = joint_selection(METHODS[name], view, here, count=count, step=step)
        for curve in removal_curves(chosen, view, here, points=points):
            total[curve.name] = [a + b for a, b in zip(total.get(curve.name, [0.0] * 9), curve.nll, strict=False)]
    print(f"\njoint selection by {name}, {step} at a time, NLL after {points} neurons:")
    for way, values in total.items():
        print(f"- {way}: " + ", ".join(f"{value / len(passages):.3f}" for value in values))


if __name__ == "__main__":
    main()
