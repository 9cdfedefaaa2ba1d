"""memloc compare: do localizations agree, and would other passages have given the same?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memloc.errors import InputError
from memloc.terminal import Terminal

if TYPE_CHECKING:
    from memloc.scores import Localization


def flags(parser: argparse.ArgumentParser) -> None:
    """Add its flags."""
    parser.add_argument("file", nargs="+", type=Path, help="localizations; one alone is asked about its stability")
    parser.add_argument("--at", default="10,50,100", help="sizes of the sets of best places (default: 10,50,100)")
    parser.add_argument("--persistence", type=float, default=0.98, help="p of rank-biased overlap (default: 0.98)")
    parser.add_argument("--by-layer", action="store_true", help="compare sums of layers, which any two methods have")


def run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    """Every pair's agreement, and the stability of each that keeps its passages."""
    from memloc.results import agreement
    from memloc.scores import Localization

    sizes = _sizes(arguments.at)
    named = {name: Localization.load(path) for name, path in _names(arguments.file).items()}
    if arguments.by_layer:
        named = {name: agreement.by_layer(entry) for name, entry in named.items()}
    pairs = [
        entry.to_json() for entry in agreement.agreements(named, at=sizes, persistence=arguments.persistence)
    ]  # fmt: skip
    if pairs:
        rows = [_row(entry, top) for entry in pairs for top in entry["top"]]
        columns = ["first", "second", "best k", "Jaccard", "by chance", "rank-biased overlap", "Spearman"]
        terminal.table(f"agreement over {pairs[0]['places']} places", columns, rows)
    steady = [row for name, entry in named.items() for row in _stability(name, entry, sizes)]
    if steady:
        columns = ["localization", "best k", "Jaccard of halves", "5 %", "95 %", "by chance", "passages"]
        terminal.table("stability: one half of the passages against the other", columns, steady)
    if not pairs and not steady:
        raise InputError("one localization without scores per passage: there is nothing to compare it with")
    terminal.result({"pairs": pairs, "stability": [_stable(row) for row in steady]})


def _row(entry: dict[str, Any], top: dict[str, Any]) -> list[Any]:
    both = [entry["rank_biased_overlap"], entry["spearman"]]
    return [entry["first"], entry["second"], top["k"], top["jaccard"], top["chance"], *both]


def _stability(name: str, found: Localization, sizes: list[int]) -> list[list[Any]]:
    from memloc.results.agreement import stability

    if found.passages is None or len(found.passages) < 4 or found.lengths is not None:
        return []
    fits = [stability(found, k=k) for k in sizes if k <= found.count]
    return [[name, row.k, row.mean, row.low, row.high, row.chance, row.passages] for row in fits]


def _stable(row: list[Any]) -> dict[str, Any]:
    keys = ["localization", "k", "jaccard", "low", "high", "chance", "passages"]
    return dict(zip(keys, row, strict=True))


def _names(paths: list[Path]) -> dict[str, Path]:
    """Files by the shortest name that tells them apart."""
    stems = {path.stem: path for path in paths}
    return stems if len(stems) == len(paths) else {str(path): path for path in paths}


def _sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--at {text}: expected whole numbers such as 10,50,100") from None
