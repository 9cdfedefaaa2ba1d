"""Where a classifier keeps its wrong labels: rewinding, swapping, retraining, flipping, on a noisy long tail.

    python scripts/claims/rewinding_on_classifier.py [--seeds 0,1,2] [--epochs 40] [--items 25] [--json FILE]

Maini et al. 2023 (arXiv:2307.09542), Dankers & Titov 2024 (arXiv:2408.04965) and Stephenson et al. (the opposing
claim K25), on 4000 items of ten classes with a tenth of the labels wrong, and a residual network of six blocks.

K24  memorization is not confined to the last layers: with the output layer, or the last block, rewound to epoch 1 or to
     the epoch of the best test accuracy, at least 90 % of the fit to wrong labels stays; and no single layer removes
     all of it (at least a tenth stays).
K25  (opposed) rewinding the last layer to the best epoch recovers early-stopped generalisation: test accuracy within
     .01 of the best.
K26  a layer reset to its initialisation and retrained on clean items alone, the rest frozen, leaves the wrong labels
     in place: at least half of them fitted, for most layers. (What the reset alone leaves is printed beside it.)
K27  few units carry a wrongly labelled item: greedily silenced, the median number that flips a prediction is smaller
     for wrong labels than for right ones, at most half; and the units lie in at least three blocks. Dropping the units
     that pull most for wrong labels costs the tail of the classes more than the whole test set.
Beside them: swapping windows of blocks from a twin trained on right labels, and gradient accounting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memloc.rewinding.groups import Kept, gradient_accounting, retrain, rewind
from memloc.truth.classification import Labelled, Trained, figures, long_tail, train, units_to_flip


def main() -> None:
    """Train, ask, print a verdict a claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--items", type=int, default=25, help="items of each kind whose prediction is flipped")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for seed in map(int, given.seeds.split(",")):
        start = time.process_time()
        found[seed] = of_seed(seed, given.epochs, given.items)
        print(f"seed {seed}: {time.process_time() - start:.0f} CPU-s", flush=True)
    for claim in next(iter(found.values()))["verdicts"]:
        held = [seed for seed, entry in found.items() if entry["verdicts"][claim]]
        print(f"{claim}: {'holds' if len(held) == len(found) else 'does NOT hold'} ({len(held)} of {len(found)} seeds)")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")


def of_seed(seed: int, epochs: int, items: int) -> dict[str, Any]:
    """Everything of one seed, printed, with a verdict a claim."""
    data, tests = long_tail(seed=seed)
    made = train(data, tests, epochs=epochs, seed=seed)
    end, best = made.history[-1], made.history[made.best]
    print(f"  trained: {told(end)}; best test at epoch {made.best}: {told(best)}")
    rewound = rewinds(made, data, tests)
    last, kept = (rewound["output"], rewound["block 5"]), f"epoch {made.best}"
    retrained = retrains(made, data, tests)
    back = [entry["retrained"]["noisy"] for entry in retrained.values()]
    swaps(made, data, tests, epochs, seed)
    accounts(made, data)
    flips, blocks = flipped(made, data, items, seed)
    dropped = drops(made, data, tests, seed)
    verdicts = {
        "K24 not confined to the last layers": all(
            entry[epoch]["noisy"] >= 0.9 * end["noisy"] for entry in last for epoch in ("epoch 1", kept)
        ) and all(entry[epoch]["noisy"] >= 0.1 for entry in rewound.values() for epoch in ("epoch 1", kept)),
        "K25 (opposed) rewinding the output recovers early stopping":
            rewound["output"][kept]["test"] >= best["test"] - 0.01,
        "K26 wrong labels stay though a layer is trained anew on clean items":
            sum(value >= 0.5 for value in back) > len(back) / 2,
        "K27 fewer units carry a wrong label": flips["wrong"] <= 0.5 * flips["right"],
        "K27 units lie in three blocks or more": blocks >= 3,
        "K27 dropping them costs the tail more": end["tail"] - dropped["tail"] > end["test"] - dropped["test"],
    }  # fmt: skip
    return {"verdicts": verdicts, "end": end, "best": best, "rewound": rewound, "retrained": retrained,
            "flips": flips, "dropped": dropped}  # fmt: skip


def rewinds(made: Trained, data: Labelled, tests: Labelled) -> dict[str, dict[str, dict[str, float]]]:
    """Each layer put back to the initialisation, epoch 1 and the best epoch, printed."""
    sources = [made.kept[epoch] for epoch in dict.fromkeys((0, 1, made.best))]
    found = rewind(made.model, made.model.groups, sources, lambda: figures(made.model, data, tests))
    for group, row in found.items():
        print(f"  rewound {group:>8}: " + "; ".join(f"{name}: {told(entry)}" for name, entry in row.items()))
    return found


def retrains(made: Trained, data: Labelled, tests: Labelled) -> dict[str, dict[str, dict[str, float]]]:
    """Each layer reset to its initialisation and trained on clean items alone, printed."""
    clean = (~data.noisy).nonzero().flatten()
    order = torch.Generator().manual_seed(0)
    batches = [clean[torch.randint(len(clean), (128,), generator=order)] for _ in range(300)]

    def loss(step: int) -> Tensor:
        rows = batches[step]
        return nn.functional.cross_entropy(made.model(data.inputs[rows]), data.labels[rows])

    found = retrain(
        made.model, made.model.groups, made.kept[0], loss, lambda: figures(made.model, data, tests),
        count=len(batches), lr=1e-3,
    )  # fmt: skip
    for group, row in found.items():
        print(f"  retrained {group:>8}: {told(row['retrained'])} (reset: noisy {row['reset']['noisy']:.3f})")
    return found


def swaps(made: Trained, data: Labelled, tests: Labelled, epochs: int, seed: int) -> None:
    """Every window of blocks taken from a twin that was trained on right labels, printed by width."""
    right = Labelled(data.inputs, data.answers, data.answers, data.cluster)
    twin = Kept.of(train(right, tests, epochs=epochs, seed=seed).model, "twin")
    groups, names = made.model.groups, [name for name in made.model.groups if name.startswith("block")]
    for width in range(1, len(names) + 1):
        windows = {
            f"{start}-{start + width - 1}": [part for name in names[start : start + width] for part in groups[name]]
            for start in range(len(names) - width + 1)
        }
        found = rewind(made.model, windows, [twin], lambda: figures(made.model, data, tests))
        cells = [f"{name} {row['twin']['noisy']:.2f}/{row['twin']['clean']:.2f}" for name, row in found.items()]
        print(f"  swapped {width} blocks (noisy/clean): " + ", ".join(cells))


def accounts(made: Trained, data: Labelled) -> None:
    """Gradients of the clean and of the noisy examples in the middle of the training, printed."""
    middle = made.kept[len(made.kept) // 4]
    model = type(made.model)()
    model.load_state_dict(dict(middle.tensors))
    each = nn.functional.cross_entropy(model(data.inputs), data.labels, reduction="none")
    sides = [each[where].sum() / len(each) for where in (~data.noisy, data.noisy)]
    found = gradient_accounting(model, model.groups, *sides)
    cells = [f"{name} {pull.noisy / pull.clean:.2f} ({pull.cosine:+.2f})" for name, pull in found.items()]
    print(f"  {middle.name}: noisy gradient over clean (cosine): " + ", ".join(cells))


def flipped(made: Trained, data: Labelled, items: int, seed: int) -> tuple[dict[str, float], int]:
    """Median number of units that flips a prediction, of wrong and of right labels; blocks the former lie in."""
    generator = torch.Generator().manual_seed(seed)
    others = torch.randperm(len(data.labels), generator=generator)[:256]
    with torch.no_grad():
        fitted = made.model(data.inputs).argmax(1) == data.labels
    found, blocks = {}, set()
    for name, where in (("wrong", fitted & data.noisy), ("right", fitted & ~data.noisy)):
        rows = where.nonzero().flatten()
        chosen = rows[torch.randperm(len(rows), generator=generator)[:items]].tolist()
        taken = [units_to_flip(made.model, data, row, others) for row in chosen]
        found[name] = statistics.median(len(units) for units in taken)
        if name == "wrong":
            blocks = {unit // made.model.hidden for units in taken for unit in units}
    print(
        f"  units to flip: {found['wrong']} of a wrong label, {found['right']} of a right one; blocks {sorted(blocks)}"
    )
    return found, len(blocks)


def drops(made: Trained, data: Labelled, tests: Labelled, seed: int) -> dict[str, float]:
    """A tenth of the units dropped: those that pull most for wrong labels and least for right ones; and at random."""
    gates = torch.ones(len(made.model.up), made.model.hidden, requires_grad=True)
    each = nn.functional.cross_entropy(made.model(data.inputs, gates), data.labels, reduction="none")
    (slope,) = torch.autograd.grad(each[data.noisy].mean() - each[~data.noisy].mean(), gates)
    count = gates.numel() // 10
    orders = {"pulling for wrong labels": (-slope).flatten().argsort(descending=True),
              "random": torch.randperm(gates.numel(), generator=torch.Generator().manual_seed(seed))}  # fmt: skip
    found = {}
    for name, order in orders.items():
        keep = torch.ones(gates.numel())
        keep[order[:count]] = 0
        found[name] = figures(made.model, data, tests, keep.view_as(gates))
        print(f"  a tenth of the units dropped, {name}: {told(found[name])}")
    return found["pulling for wrong labels"]


def told(entry: dict[str, float]) -> str:
    """Figures in one line."""
    return ", ".join(f"{name} {entry[name]:.3f}" for name in ("noisy", "clean", "test", "tail"))


if __name__ == "__main__":
    main()
