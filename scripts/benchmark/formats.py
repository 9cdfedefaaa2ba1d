"""Reading files of the sizes people have: every record checked and named by its line, beside a bare parse.

    python scripts/benchmark/formats.py

Made-up records: 21,919 in CounterFact's shape, 15,000 rows of 200 tokens as .npy, and 100,000 lines of 64 tokens.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from memloc.formats import table


def timed(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of three."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def case(number: int) -> dict[str, Any]:
    """A case of CounterFact's shape and about its size."""
    subject = f"Subject {number}"
    prompts = [f"Some sentence of ordinary length about {subject} that ends before word {n}" for n in range(10)]
    return {
        "case_id": number, "pararel_idx": number,
        "requested_rewrite": {"prompt": "The home of {} is", "relation_id": "P1", "subject": subject,
                              "target_new": {"str": "Rome", "id": "Q1"}, "target_true": {"str": "Oslo", "id": "Q2"}},
        "paraphrase_prompts": prompts[:2], "neighborhood_prompts": prompts, "attribute_prompts": prompts,
        "generation_prompts": prompts,
    }  # fmt: skip


def main() -> None:
    """Write the files, read them both ways, print seconds."""
    with tempfile.TemporaryDirectory() as folder:
        cases, rows, matrix = (Path(folder) / name for name in ("cases.json", "rows.jsonl", "matrix.npy"))
        cases.write_text(json.dumps([case(number) for number in range(21_919)]))
        ids = np.random.default_rng(0).integers(0, 50_000, (100_000, 64))
        rows.write_text("".join(json.dumps({"index": n, "tokens": row.tolist()}) + "\n" for n, row in enumerate(ids)))
        np.save(matrix, np.random.default_rng(0).integers(0, 50_000, (15_000, 200)).astype("uint16"))
        plain: dict[Path, Callable[[], Any]] = {
            cases: lambda: json.loads(cases.read_text()),
            rows: lambda: [json.loads(line) for line in rows.read_text().splitlines()],
            matrix: lambda: np.load(matrix).tolist(),
        }
        for path, parse in plain.items():
            bare, full = timed(parse), timed(lambda path=path: table.read(path).sound())  # type: ignore[misc]
            size = path.stat().st_size / 2**20
            print(f"{path.name}: {size:.0f} MiB; bare parse {bare:.2f} s, read and checked {full:.2f} s")


if __name__ == "__main__":
    main()
