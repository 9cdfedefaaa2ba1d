"""Where the defaults of slimming and hard-concrete come from: a small grid on a lab model.

    python scripts/claims/learned_mask_defaults.py LAB [--passages 5]

For every setting, on the last recited passages of the lab (others than `neuron_methods_on_lab.py` reports on): the mean
rise of a passage's NLL when the best 0.5 % and 1 % of all neurons by its own mask are silenced. The rule: the setting
with the largest sum of both is the default.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch

from memloc.ablations.gates import silenced
from memloc.localizers.hard_concrete import HardConcrete
from memloc.localizers.slimming import Slimming
from memloc.objectives import suffix_nll
from memloc.passages import Passages
from memloc.view import ModelView

SHARES = (0.005, 0.01)
GRID: tuple[Any, ...] = (
    *(
        Slimming(penalty=penalty, stop=stop)
        for penalty, stop in itertools.product((50.0, 200.0, 800.0, 3000.0), (0.3, 0.5, 0.7))
    ),
    *(
        HardConcrete(penalty=penalty, stop=stop)
        for penalty, stop in itertools.product((20.0, 100.0, 500.0, 2000.0), (0.3, 0.5))
    ),
    *(HardConcrete(start=start) for start in (0.2, 0.5)),
    HardConcrete(learning_rate=0.02),
    HardConcrete(temperature=0.67),
    Slimming(learning_rate=0.02),
)


def main() -> None:
    """Print one line a setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", type=Path)
    parser.add_argument("--passages", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    view = ModelView.open(given.lab)
    passages = Passages.read(given.lab / "passages.jsonl", view.tokenizer)
    most = max(item.tags["dose"] for item in passages)
    passages = passages.where(lambda item: item.tags["dose"] == most)[-given.passages :]
    for method in GRID:
        rises = rise(view, passages, method)
        told = ", ".join(f"{share:.1%}: {value:.3f}" for share, value in zip(SHARES, rises, strict=True))
        print(f"{sum(rises):.3f} ({told}) {method}", flush=True)


@torch.no_grad()
def rise(view: ModelView, passages: Passages, method: Any) -> list[float]:
    """Mean rise of the NLL at each share."""
    found, total = method(view, passages), torch.zeros(len(SHARES))
    for row, item in enumerate(passages):
        batch = next(view.batches(passages[row : row + 1]))
        for index, share in enumerate(SHARES):
            with silenced(view, found.of(item.id).top(fraction=share)):
                total[index] += float(suffix_nll(view, batch))
            total[index] -= float(suffix_nll(view, batch))
    return (total / len(passages)).tolist()


if __name__ == "__main__":
    main()
