"""MEMIT's solve for n keys of f entries: in the number of keys from one factor, against a dense f-sized solve.

    python scripts/benchmark/closed_form.py [--width 4096] [--keys 10] [--out 1024]

The dense one is what the references do for every batch and layer: an LU solve of λC + K Kᵀ. The factor of C is made
once a model and layer; its time is told apart.
"""

from __future__ import annotations

import argparse

import torch
from alternating import cpu_seconds

from editors.facts.closed_forms import Factor, insert_pairs


def main() -> None:
    """Time both, print the ratio and how far they agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--keys", type=int, default=10)
    parser.add_argument("--out", type=int, default=1024)
    args = parser.parse_args()
    draw = torch.Generator().manual_seed(0)
    text = torch.randn(2 * args.width, args.width, generator=draw, dtype=torch.float64)
    moment, weight = text.T @ text / len(text), 0.02 * args.width
    keys = torch.randn(args.width, args.keys, generator=draw, dtype=torch.float64)
    missing = torch.randn(args.out, args.keys, generator=draw, dtype=torch.float64)
    dense, slow = cpu_seconds(lambda: torch.linalg.solve(weight * moment + keys @ keys.T, keys))
    once, factor = cpu_seconds(lambda: Factor.of(moment))
    whole, pairs = cpu_seconds(lambda: insert_pairs(keys, missing, Factor.of(moment, damping=0), slack=weight))
    fast, _ = cpu_seconds(lambda: insert_pairs(keys, missing, factor, slack=weight))
    error = float((pairs.right.T - slow).norm() / slow.norm())
    print(f"f {args.width}, n {args.keys}, threads {torch.get_num_threads()}: dense {dense:.2f} s, factor once "
          f"{once:.2f} s, solve {fast:.3f} s: {dense / fast:.0f}x with the factor at hand, {dense / whole:.1f}x "
          f"with it; relative difference {error:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
