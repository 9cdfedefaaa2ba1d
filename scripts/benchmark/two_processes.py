"""One process against two under torchrun, on the tiny lab: seconds of a localization and of second moments.

    python -m editors.cli lab --size tiny --out out/tiny
    python scripts/benchmark/two_processes.py out/tiny
    torchrun --nproc-per-node 2 scripts/benchmark/two_processes.py out/tiny

The clock starts when all hold the model and stops when all hold the result; the model's loading is told apart.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from memloc import processes, shared_work
from memloc.localizers.zero_out import ZeroOut
from memloc.passages import Passages
from memloc.sites import Kind
from memloc.view import ModelView


def seconds(work: Callable[[], object]) -> float:
    """From when all are ready to when all are done."""
    processes.exchange(None)
    start = time.perf_counter()
    work()
    processes.exchange(None)
    return time.perf_counter() - start


def main(folder: Path) -> None:
    """Load, time, print."""
    start = time.perf_counter()
    view = ModelView.open(folder)
    loaded = time.perf_counter() - start
    passages = Passages.read(folder / "passages.jsonl", view.tokenizer)
    text = Passages(tuple(item for item in passages), "text")
    localizer, sites = ZeroOut(), view.sites(Kind.MLP_OUT, Kind.ATTN_OUT)
    print(f"{processes.count()} processes; the model in {loaded:.2f} s; {len(passages)} passages")
    print("zero-out costs", localizer.cost(view, passages).told(view, passages))
    for name, work in {
        "zero-out": lambda: shared_work.localize(localizer, view, passages),
        "second moments, 20 times": lambda: [shared_work.moments(view, text, sites) for _ in range(20)],
    }.items():
        print(f"{name}: {min(seconds(work) for _ in range(3)):.2f} s, the best of 3")


if __name__ == "__main__":
    processes.run(lambda: main(Path(sys.argv[1])))
    processes.leave(0)
