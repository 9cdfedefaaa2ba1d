"""Are gradients of memorized passages larger in lower layers? By share and by size, by raw and folded weights.

    python scripts/claims/gradient_layers_on_lab.py LAB [LAB ...] [--snapshots]

Every lab folder is one that `memloc lab` wrote. Compared, passage by passage: those planted at the full dose; controls
never trained on; and what the model itself writes greedily after the controls' prefixes, which nobody taught it, though
its loss is low too. A layer's share is its part of the gradient of all maps of the blocks, by the sum of |g| (the
paper's, for layers) or by norm. The lowest layer's shares are compared by a two-sided permutation test of the means
(20,000 draws); intervals are bootstraps over passages. Sizes stand beside, not divided: they say whose loss is larger.
With --snapshots, the same by norm along the training.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from memloc.localizers.weight_gradient import WeightGradient
from memloc.objectives import suffix_nll
from memloc.passages import Passages
from memloc.running.decoding import continuation
from memloc.sites import Kind, Site
from memloc.statistics import bootstrap_interval
from memloc.view import ModelView

Table = np.ndarray
"""[n, l] float64: a number for every passage and layer."""


def main() -> int:
    """Print tables and verdicts of every lab."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="+", type=Path)
    parser.add_argument("--snapshots", action="store_true", help="also along the training")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for folder in given.labs:
        view = ModelView.open(folder)
        sets = groups(view, folder)
        told = ", ".join(f"{name} {np.mean(losses(view, part)):.3f}" for name, part in sets.items())
        print(f"\n{folder.name}: mean NLL of {told}; {len(sets['memorized'])} passages each")
        for convention in ("raw", "folded"):
            for reduce in ("sum", "norm"):
                found = {name: layers(view, part, convention, reduce) for name, part in sets.items()}
                report(f"{convention} weights, {reduce} of |g|", found)
        if given.snapshots:
            for step in sorted((folder / "snapshots").iterdir()):
                along(ModelView.open(step), step.name, sets)
    return 0


def groups(view: ModelView, folder: Path) -> Mapping[str, Passages]:
    """Memorized, never seen, and the model's own."""
    planted, controls = Passages.read(folder / "passages.jsonl"), Passages.read(folder / "controls.jsonl")
    full = max(item.tags["dose"] for item in planted)
    prefixes = torch.tensor([item.prefix for item in controls])
    length = len(controls[0].suffix)
    written = continuation(view, prefixes, length).ids[:, -length:].tolist()
    own = [dataclasses.replace(item, suffix=tuple(row)) for item, row in zip(controls, written, strict=True)]
    memorized = planted.where(lambda item: item.tags["dose"] == full)
    return {"memorized": memorized, "controls": controls, "own greedy": Passages(tuple(own), "own")}


def losses(view: ModelView, passages: Passages) -> Table:
    """[n] nats per suffix token."""
    found = np.zeros(len(passages))
    with torch.no_grad():
        for batch in view.batches(passages):
            found[list(batch.rows)] = suffix_nll(view, batch).double().numpy()
    return found


def layers(view: ModelView, passages: Passages, convention: str, reduce: str) -> Table:
    """Size of each passage's gradient by the maps of each layer."""
    method = WeightGradient(grain="layer", scale="raw", per_passage=True, reduce=reduce, convention=convention)
    found = method(view, passages).scores
    return np.stack([found[Site(layer, Kind.MLP_OUT)].double().numpy() for layer in range(view.layers)], 1)


def report(title: str, found: Mapping[str, Table]) -> None:
    """One table: shares by layer, the lowest with its interval, sizes."""
    print(f"\n{title}\n| | share by layer | lowest layer, 95 % interval | size by layer |\n|---|---|---|---|")
    shares = {name: part / part.sum(1, keepdims=True) for name, part in found.items()}
    for name, part in found.items():
        low, high = bootstrap_interval(shares[name][:, 0].tolist())
        each = " / ".join(f"{entry:.3f}" for entry in shares[name].mean(0))
        size = " / ".join(f"{entry:.3g}" for entry in part.mean(0))
        print(f"| {name} | {each} | {shares[name][:, 0].mean():.3f} ({low:.3f} to {high:.3f}) | {size} |")
    for other in ("controls", "own greedy"):
        mine, theirs = shares["memorized"][:, 0], shares[other][:, 0]
        size = found["memorized"].mean(0) / found[other].mean(0)
        larger = "larger" if mine.mean() > theirs.mean() else "not larger"
        print(f"lowest layer's share {larger} than of {other}: p {permutation(mine, theirs):.4f}; "
              f"sizes are {' / '.join(f'{entry:.3g}' for entry in size)} of theirs")  # fmt: skip


def along(view: ModelView, name: str, sets: Mapping[str, Passages]) -> None:
    """One line a snapshot: losses and lowest layer's shares."""
    line = []
    for which in ("memorized", "controls"):
        found = layers(view, sets[which], "raw", "norm")
        share = (found / found.sum(1, keepdims=True))[:, 0]
        low, high = bootstrap_interval(share.tolist())
        nll = losses(view, sets[which]).mean()
        line.append(f"{which} NLL {nll:.2f}, lowest layer's share {share.mean():.3f} ({low:.3f} to {high:.3f})")
    print(f"{name}: {'; '.join(line)}", flush=True)


def permutation(mine: Table, theirs: Table, *, draws: int = 20000, seed: int = 0) -> float:
    """Two-sided p of a difference of means, were the labels of passages exchangeable."""
    generator, whole = np.random.default_rng(seed), np.concatenate([mine, theirs])
    seen = abs(mine.mean() - theirs.mean())
    order = generator.permuted(np.tile(np.arange(len(whole)), (draws, 1)), axis=1)[:, : len(mine)]
    first = whole[order].sum(1)
    gaps = np.abs(first / len(mine) - (whole.sum() - first) / len(theirs))
    return float((1 + (gaps >= seen - 1e-15).sum()) / (1 + draws))


if __name__ == "__main__":
    sys.exit(main())
