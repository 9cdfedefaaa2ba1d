"""Ways to do one thing, timed in turn: what the benchmarks here share.

CPU time of this process, not the clock's, so that neighbours on the machine count little; in turn, so that what they
do to caches and frequency falls on all ways alike; the least of the rounds, because noise only adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Timed(Generic[T]):
    """What was measured.

    Attributes:
        seconds: way to CPU seconds, one a round.
        results: way to what it returned in the last round.
    """

    seconds: Mapping[str, list[float]]
    results: Mapping[str, T]

    def least(self, way: str) -> float:
        """The least CPU seconds of a way."""
        return min(self.seconds[way])

    def ratio(self, slow: str, fast: str) -> float:
        """How many times `fast` goes into `slow`."""
        return self.least(slow) / self.least(fast)

    def show(self, fast: str, marks: Mapping[str, str] | None = None) -> None:
        """A line a way, and the ratios to `fast`.

        Args:
            fast: the way the others are compared with.
            marks: way to a remark at the end of its line.
        """
        for way, found in self.seconds.items():
            rounds = ", ".join(f"{entry:.3f}" for entry in found)
            print(f"{way}: {min(found):.3f} CPU-s (rounds: {rounds}){(marks or {}).get(way, '')}")
        others = [way for way in self.seconds if way != fast]
        print("; ".join(f"{way} / {fast}: ratio {self.ratio(way, fast):.2f}" for way in others), flush=True)


def cpu_seconds(work: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds of one call, all threads of this process together, and what it returned."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def alternately(ways: Mapping[str, Callable[[], T]], rounds: int) -> Timed[T]:
    """Run every way once a round."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    results: dict[str, T] = {}
    for _ in range(rounds):
        for way, work in ways.items():
            spent, results[way] = cpu_seconds(work)
            seconds[way].append(spent)
    return Timed(seconds, results)


def keep(promise: str, *held: bool) -> None:
    """Leave with exit status 1 and a line where the promise is not kept."""
    if not all(held):
        raise SystemExit(f"the promise ({promise}) is not kept")
