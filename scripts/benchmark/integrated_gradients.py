"""Integrated gradients: memloc's one-token form beside a plain loop, in one process, in CPU time.

The plain loop is what the method's definition says: for every suffix token and every layer, one batch of whole
forwards, one row a quadrature point, with the neurons scaled at the last position. Same rule, same nodes.

    python scripts/benchmark/integrated_gradients.py [--model DIR] [--passages FILE] [--prefix 64] [--rounds 3]

Prints the largest difference in float64 and the ratio of CPU times (float32, alternating, the least of the rounds).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from alternating import alternately, keep
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from memloc.gradients.paths import rule
from memloc.localizers.integrated_gradients import IntegratedGradients
from memloc.passages import Passage, Passages
from memloc.sites import Kind
from memloc.view import ModelView


def main() -> None:
    """Compare, print, and fail where the promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder; by default a random model of 6 layers, width 256")
    parser.add_argument("--passages", help="passages for --model")
    parser.add_argument("--prefix", type=int, default=64, help="prefix tokens of the random model's passages")
    parser.add_argument("--suffix", type=int, default=4, help="suffix tokens scored")
    parser.add_argument("--count", type=int, default=2, help="passages")
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    views = {dtype: open_view(given.model, dtype) for dtype in (torch.float64, torch.float32)}
    passages = choose(given, views[torch.float32])
    # Nothing is halved: both sides use the same points.
    method = IntegratedGradients(nodes=given.nodes, halvings=0)

    exact = views[torch.float64]
    mine, plain = fast(exact, passages, method), slow(exact, passages, given.nodes)
    gap = float((mine - plain).abs().max())
    print(f"{len(passages)} passages of {len(passages[0].prefix)}+{len(passages[0].suffix)} tokens, "
          f"{exact.layers} layers, width {exact.width}, {exact.neurons} neurons, {given.nodes} nodes")  # fmt: skip
    print(f"largest score {float(plain.abs().max()):.3g}, largest difference in float64 {gap:.2g}")

    view = views[torch.float32]
    timed = alternately({
        "memloc": lambda: fast(view, passages, method), "plain loop": lambda: slow(view, passages, given.nodes),
    }, given.rounds)  # fmt: skip
    timed.show("memloc")
    keep("equal to 1e-8, at least 10 times less CPU time", gap <= 1e-8, timed.ratio("plain loop", "memloc") >= 10)


def open_view(model: str | None, dtype: torch.dtype) -> ModelView:
    """The folder's model, or a random one with room for opinions."""
    if model is not None:
        return ModelView.open(model, dtype=dtype)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=1000, n_positions=256, n_embd=256, n_layer=6, n_head=8, bos_token_id=0, eos_token_id=0
    )
    model_ = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model_.parameters():
            parameter.mul_(1.0 if parameter.dim() == 1 else 6.0)
    return ModelView.open(model_.to(dtype))


def choose(given: argparse.Namespace, view: ModelView) -> Passages:
    """The first passages of the file, or random ones; suffixes cut to the number of tokens scored."""
    if given.passages is not None:
        found = Passages.read(given.passages, view.tokenizer)[: given.count]
        return Passages(tuple(Passage(item.id, item.prefix, item.suffix[: given.suffix]) for item in found))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(view.vocab, (given.count, given.prefix + given.suffix), generator=generator).tolist()
    return Passages(
        tuple(Passage(f"p{n}", tuple(row[: given.prefix]), tuple(row[given.prefix :])) for n, row in enumerate(ids))
    )


def fast(view: ModelView, passages: Passages, method: IntegratedGradients) -> Tensor:
    """Scores by memloc before they are rounded to float32, [l, n, f]."""
    found = torch.zeros(view.layers, len(passages), view.neurons, dtype=view.dtype)
    with view.frozen():
        for batch in view.batches(passages, size=method.batch_size):
            found[:, list(batch.rows)] = method.integrate(view, batch).scores()
    return found


def slow(view: ModelView, passages: Passages, nodes: int) -> Tensor:
    """The definition, [l, n, f]: a batch of `nodes` whole forwards a layer and suffix token; weights frozen."""
    alphas, weights = (entry.to(view.dtype) for entry in rule("gauss-legendre", nodes))
    found = torch.zeros(view.layers, len(passages), view.neurons, dtype=view.dtype)
    sites = view.sites(Kind.MLP_OUT)
    with view.frozen():
        for number, item in enumerate(passages):
            for step, token in enumerate(item.suffix):
                ids = torch.tensor([item.prefix + item.suffix[:step]])
                with torch.no_grad(), view.record(sites) as seen:
                    view.model(ids, use_cache=False)
                for site in sites:
                    reading = seen[site][0, -1]
                    scaled = (alphas[:, None] * reading).requires_grad_()
                    with view.replace([site], put_last(scaled)):
                        logits = view.model(ids.expand(nodes, -1), use_cache=False, logits_to_keep=1).logits[:, -1]
                    (slope,) = torch.autograd.grad(logits.softmax(-1)[:, token].sum(), scaled)
                    found[site.layer, number] += reading * (weights @ slope) / len(item.suffix)
    return found


def put_last(scaled: Tensor) -> Callable[[object, Tensor], Tensor]:
    """Replace what enters at the last position, row by row."""
    return lambda _, entering: torch.cat([entering[:, :-1], scaled[:, None]], 1)


if __name__ == "__main__":
    main()
