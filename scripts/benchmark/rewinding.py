"""Rewinding every window of layers: memloc's shared blocks beside a plain loop, in one process, in CPU time.

The plain loop is what the definition says: for every window a second model is assembled from the checkpoint and run
whole. memloc starts each window from the residual stream below it, adds one rewound block at a time to windows of equal
start, and runs only the blocks above.

    python scripts/benchmark/rewinding.py [--layers 12] [--rounds 3]

Prints the largest difference in float64 and the ratio of CPU times.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from alternating import alternately
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from memloc.localizers.layer_rewind import LayerRewind
from memloc.objectives import suffix_nll
from memloc.passages import Passage, Passages
from memloc.view import ModelView


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    view, other = (ModelView.open(model(given.layers, seed).double()) for seed in (0, 1))
    passages = drawn()
    with tempfile.TemporaryDirectory() as folder:
        stored = {name: part.detach().clone() for name, part in other.model.named_parameters()}
        save_file(stored, Path(folder) / "model.safetensors")
        method = LayerRewind(earlier=folder, window=0)
        timed = alternately({
            "memloc": lambda: method(view, passages).notes["rise"], "plain loop": lambda: plain(view, other, passages),
        }, given.rounds)  # fmt: skip
    found, expected = timed.results["memloc"], timed.results["plain loop"]
    gap = max(abs(next(iter(found[name].values())) - value) for name, value in expected.items())
    print(f"{len(expected)} windows of {given.layers} layers, {len(passages)} passages: largest difference {gap:.2g}")
    timed.show("memloc")


@torch.no_grad()
def plain(view: ModelView, other: ModelView, passages: Passages) -> dict[str, float]:
    """A second model for every window, run whole."""

    def loss(model: ModelView) -> float:
        return float(suffix_nll(model, next(model.batches(passages))).mean())

    clean, found = loss(view), {}
    for start in range(view.layers):
        assembled = ModelView(copy.deepcopy(view.model), view.row)
        for stop in range(start, view.layers):
            assembled.block(stop).load_state_dict(other.block(stop).state_dict())
            found[f"L{start}" if start == stop else f"L{start}-L{stop}"] = loss(assembled) - clean
    return found


def model(layers: int, seed: int) -> GPT2LMHeadModel:
    """A random model, width 64."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=512, n_positions=64, n_embd=64, n_layer=layers, n_head=4, bos_token_id=0, eos_token_id=0)
    ).eval()


def drawn() -> Passages:
    """Eight random passages of 24 + 24 tokens."""
    rows = torch.randint(512, (8, 48), generator=torch.Generator().manual_seed(0)).tolist()
    items = (Passage(f"p{index}", tuple(row[:24]), tuple(row[24:])) for index, row in enumerate(rows))
    return Passages(tuple(items), "random")


if __name__ == "__main__":
    main()
