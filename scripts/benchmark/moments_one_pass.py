"""Second moments of five layers: one pass for all beside a pass a layer, in one process, in CPU time.

The plain way is what editing codes do: for each layer they run the text again, leave the model at that layer, and add
up kᵀk in float32. memloc runs it once, leaves at the highest layer, and adds up half of each symmetric product in
float64.

    python scripts/benchmark/moments_one_pass.py [--layers 10] [--width 256] [--first 4] [--count 5] [--rounds 3]

Prints the largest relative difference of the moments and the ratio of CPU times (alternating, the least of the rounds).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from alternating import alternately, keep
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from memloc.moment_pass import MomentPass
from memloc.passages import Passage, Passages
from memloc.sites import Kind, Site
from memloc.view import ModelView


class _Left(Exception):  # noqa: N818 - not an error: how the plain way leaves a forward
    """The model is left here."""


@torch.no_grad()
def layer_by_layer(view: ModelView, text: Passages, sites: list[Site], rows: int) -> dict[Site, Tensor]:
    """Mean of k kᵀ, one pass over the text for each site."""
    found = {}
    for site in sites:
        total, count, seen = torch.zeros(view.neurons, view.neurons), 0, []

        def leave(_: object, args: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
            seen.append(args[0])
            raise _Left

        hook = view.module(site).register_forward_pre_hook(leave)
        for start in range(0, len(text), rows):
            try:
                view.model(torch.tensor([item.ids for item in text[start : start + rows]]), use_cache=False)
            except _Left:
                keys = seen.pop().reshape(-1, view.neurons)
            total += keys.T @ keys
            count += len(keys)
        hook.remove()
        found[site] = total / count
    return found


def main() -> None:
    """Compare, print, and fail where the promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10, help="of the random model")
    parser.add_argument("--width", type=int, default=256, help="of the random model; four times as many neurons")
    parser.add_argument("--first", type=int, default=4, help="layer")
    parser.add_argument("--count", type=int, default=5, help="layers")
    parser.add_argument("--rows", type=int, default=64, help="passages of 64 tokens in a batch, both ways")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=3.0, help="the least ratio that passes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=1024, n_positions=64, n_embd=given.width, n_layer=given.layers, n_head=4, **ends)
    view = ModelView.open(GPT2LMHeadModel(config).eval())
    sites = [Site(layer, Kind.MLP_OUT) for layer in range(given.first, given.first + given.count)]
    ids = torch.randint(0, 1024, (10 * view.neurons // 64, 64)).tolist()
    text = Passages(tuple(Passage(f"t{index}", tuple(row[:1]), tuple(row[1:])) for index, row in enumerate(ids)))
    collect = MomentPass(tokens=10**9, batch_tokens=64 * given.rows)
    ways: dict[str, Callable[[], object]] = {
        "one pass": lambda: collect(view, text, sites),
        "layer by layer": lambda: layer_by_layer(view, text, sites, given.rows),
    }
    made, plain = collect(view, text, sites), layer_by_layer(view, text, sites, given.rows)
    gap = max(float((made.mean(site) - plain[site]).norm() / plain[site].norm()) for site in sites)
    print(f"{made.count} tokens, layers {sites[0].layer} to {sites[-1].layer} of {view.layers}, {view.neurons} neurons")
    print(f"largest relative difference {gap:.2g} (the plain way sums in float32)")
    timed = alternately(ways, given.rounds)
    timed.show("one pass")
    cheap = timed.ratio("layer by layer", "one pass") >= given.ratio
    keep(f"equal to 1e-5, at least {given.ratio} times less CPU time", gap <= 1e-5, cheap)


if __name__ == "__main__":
    main()
