"""Greedy pruning with one weight a gradient, as published, and with several: the same weights, the same forgetting?

    python scripts/claims/greedy_in_steps.py LAB [LAB ...] [--share 0.0005] [--targets 10]

Printed for several numbers of gradients: CPU seconds, the overlap (intersection over union) of the pruned weights with
those of one weight a gradient, and the mean NLL of the passages to forget after it, in nats per token.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from editors.base import Request
from editors.demo.material import material
from editors.pruners.greedy import Greedy
from editors.pruning.shared_subspace import overlap, pruned
from memloc.view import ModelView

ROUNDS = (10**9, 50, 10, 1)


def main() -> None:
    """Prune, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="+", type=Path)
    parser.add_argument("--share", type=float, default=0.0005)
    parser.add_argument("--targets", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for lab in given.labs:
        view = ModelView.open(lab)
        data = material(lab, view, targets=given.targets)
        request = Request(forget=data.targets, retain=data.named)
        published = None
        for rounds in ROUNDS:
            start = time.process_time()
            edit = Greedy(share=given.share, backwards=rounds)(view, request)
            seconds = time.process_time() - start
            published = published or edit
            same = overlap(pruned(published), pruned(edit))
            print(
                f"{lab.name}: {edit.notes['backwards']:>4} gradients, {edit.count} weights, {seconds:6.1f} s, overlap "
                f"{same:.2f}, NLL {edit.notes['before']:.2f} -> {edit.notes['after']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
