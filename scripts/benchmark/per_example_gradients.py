"""Norms of every passage's gradient by every map: memloc's batched pass beside a plain loop, in CPU time.

The plain loop is what everybody writes: one passage at a time, a forward, a backward for all weights, one norm a map.

    python scripts/benchmark/per_example_gradients.py [--model DIR --passages FILE] [--count 32] [--tokens 100]

Prints the largest relative difference in float64 and the ratio of CPU times (float32, alternating, the least of the
rounds).
"""

from __future__ import annotations

import argparse

import torch
from alternating import alternately, keep
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from memloc.localizers.weight_gradient import WeightGradient
from memloc.objectives import suffix_nll
from memloc.passages import Passage, Passages
from memloc.view import ModelView


def main() -> None:
    """Compare, print, and fail where the two differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder; by default a random model")
    parser.add_argument("--passages", help="passages for --model")
    parser.add_argument("--count", type=int, default=32, help="passages")
    parser.add_argument("--tokens", type=int, default=64, help="of a random passage, half of them suffix")
    parser.add_argument("--width", type=int, default=512, help="of the random model")
    parser.add_argument("--layers", type=int, default=6, help="of the random model")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    views = {dtype: open_view(given, dtype) for dtype in (torch.float64, torch.float32)}
    passages = choose(given, views[torch.float32])
    method = WeightGradient(reduce="norm", scale="raw", per_passage=True, batch_size=given.batch_size)

    exact = views[torch.float64]
    few = passages[:4]
    mine, plain = batched(exact, few, method), loop(exact, few)
    gap = float(((mine - plain).abs() / plain).max())
    print(f"{len(passages)} passages of {len(passages[0].ids)} tokens, {exact.layers} layers of width {exact.width}, "
          f"{exact.neurons} neurons, {plain.shape[1]} maps, batches of {method.batch_size}")  # fmt: skip
    print(f"largest relative difference in float64 {gap:.2g} (scores are rounded to float32)")

    view = views[torch.float32]
    ways = {"memloc": lambda: batched(view, passages, method), "plain loop": lambda: loop(view, passages)}
    alternately(ways, given.rounds).show("memloc")
    keep("the norms are those of the loop", gap <= 1e-6)


def open_view(given: argparse.Namespace, dtype: torch.dtype) -> ModelView:
    """The folder's model, or a random one."""
    if given.model is not None:
        return ModelView.open(given.model, dtype=dtype)
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=1000, max_position_embeddings=1024, hidden_size=given.width, intermediate_size=4 * given.width,
        num_hidden_layers=given.layers, num_attention_heads=8, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return ModelView.open(GPTNeoXForCausalLM(config).to(dtype))


def choose(given: argparse.Namespace, view: ModelView) -> Passages:
    """The first passages of the file, or random ones."""
    if given.passages is not None:
        return Passages.read(given.passages, view.tokenizer)[: given.count]
    generator, half = torch.Generator().manual_seed(1), given.tokens // 2
    ids = torch.randint(view.vocab, (given.count, given.tokens), generator=generator).tolist()
    return Passages(tuple(Passage(f"p{n}", tuple(row[:half]), tuple(row[half:])) for n, row in enumerate(ids)))


def batched(view: ModelView, passages: Passages, method: WeightGradient) -> Tensor:
    """Norms by memloc, [n, maps]."""
    found = method(view, passages).scores
    return torch.stack([found[site] for site in view.sites(*view.kinds)], 1).double()


def loop(view: ModelView, passages: Passages) -> Tensor:
    """The definition, [n, maps]: a backward pass a passage for all weights of the maps."""
    sites = view.sites(*view.kinds)
    names = list(dict.fromkeys(view.place(site).parameter for site in sites))
    parameters = [view.model.get_parameter(name) for name in names]
    rows = []
    with view.trainable(parameters):
        for index in range(len(passages)):
            loss = suffix_nll(view, next(view.batches(passages[index : index + 1]))).sum()
            found = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
            places = [view.place(site) for site in sites]
            rows.append(torch.stack([place.read(found[place.parameter]).norm() for place in places]))
    return torch.stack(rows).double()


if __name__ == "__main__":
    main()
