"""Zero-out of all neurons: memloc's variants from the layer up beside a plain loop, in one process, in CPU time.

The plain loop is what the method's definition says: a whole forward a neuron, as many of them in a batch as memloc
runs at once, each row with its own neuron gated off.

    python scripts/benchmark/zero_out.py [--model DIR --passages FILE] [--count 1] [--every 1] [--rounds 3]

Prints the largest difference in float64 and the ratio of CPU times (float32, alternating, the least of the rounds).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from alternating import alternately, keep
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from memloc.ablations.gates import gate_sites, gated
from memloc.batches import pad
from memloc.localizers.zero_out import ZeroOut
from memloc.passages import Passage, Passages
from memloc.view import ModelView


def main() -> None:
    """Compare, print, and fail where the promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a checkpoint folder; by default a random model like the lab's: 4 layers of 128"
    )
    parser.add_argument("--passages", help="passages for --model")
    parser.add_argument("--layers", type=int, default=4, help="of the random model")
    parser.add_argument("--prefix", type=int, default=32, help="tokens, also of the file's passages")
    parser.add_argument("--suffix", type=int, default=32, help="tokens")
    parser.add_argument("--count", type=int, default=1, help="passages")
    parser.add_argument("--rows", type=int, default=32, help="whole forwards in a batch of the plain loop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=2.5, help="the least ratio that passes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    views = {dtype: open_view(given, dtype) for dtype in (torch.float64, torch.float32)}
    passages = choose(given, views[torch.float32])

    exact = views[torch.float64]
    plain = slow(exact, passages[:1], given.rows)
    gap = float((fast(exact, passages[:1]).double() - plain).abs().max())
    print(f"{len(passages)} passages of {given.prefix}+{given.suffix} tokens, {exact.layers} layers, "
          f"width {exact.width}, {exact.neurons} neurons, {exact.vocab} tokens")  # fmt: skip
    print(f"largest score {float(plain.abs().max()):.3g}, largest difference in float64 {gap:.2g} (scores are float32)")

    view = views[torch.float32]
    ways: dict[str, Callable[[], object]] = {
        "memloc": lambda: fast(view, passages),
        "plain loop": lambda: slow(view, passages, given.rows),
    }
    timed = alternately(ways, given.rounds)
    timed.show("memloc")
    equal, cheap = gap <= 1e-6 * max(1.0, float(plain.abs().max())), timed.ratio("plain loop", "memloc") >= given.ratio
    keep(f"equal to float32, at least {given.ratio} times less CPU time", equal, cheap)


def open_view(given: argparse.Namespace, dtype: torch.dtype) -> ModelView:
    """The folder's model, or a random one with room for opinions."""
    if given.model is not None:
        return ModelView.open(given.model, dtype=dtype)
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=1024, n_positions=256, n_embd=128, n_layer=given.layers, n_head=4, **ends)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.dim() == 1 else 6.0)
    return ModelView.open(model.to(dtype))


def choose(given: argparse.Namespace, view: ModelView) -> Passages:
    """The first passages of the file, or random ones."""
    if given.passages is not None:
        return Passages.read(given.passages, view.tokenizer, prefix=given.prefix, suffix=given.suffix)[: given.count]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(view.vocab, (given.count, given.prefix + given.suffix), generator=generator).tolist()
    return Passages(
        tuple(Passage(f"p{n}", tuple(row[: given.prefix]), tuple(row[given.prefix :])) for n, row in enumerate(ids))
    )


def fast(view: ModelView, passages: Passages) -> Tensor:
    """Scores by memloc, [l, n, f]."""
    return torch.stack([scores for _, scores in sorted(ZeroOut()(view, passages).scores.items())])


@torch.no_grad()
def slow(view: ModelView, passages: Passages, rows: int) -> Tensor:
    """The definition, [l, n, f]: whole forwards, `rows` neurons at a time."""
    found = torch.zeros(view.layers, len(passages), view.neurons, dtype=view.dtype)
    every = torch.arange(view.neurons)
    for number, item in enumerate(passages):
        clean = plain_nll(view, item, 1)
        for layer, site in enumerate(gate_sites(view, "neuron")):
            for part in every.split(rows):
                gates = (every != part[:, None]).to(view.dtype)
                with gated(view, {site: gates}):
                    found[layer, number, part] = plain_nll(view, item, len(part)) - clean
    return found


def plain_nll(view: ModelView, item: Passage, rows: int) -> Tensor:
    """Mean suffix NLL [n] as any user would take it: the model's logits, the suffix's log-probabilities."""
    batch = pad([item.ids] * rows, [len(item.prefix)] * rows)
    start = len(item.prefix)
    spoken = view.model(batch.ids, use_cache=False).logits[:, start - 1 : -1].log_softmax(-1)
    return -spoken.gather(-1, batch.ids[:, start:, None])[..., 0].mean(1)


if __name__ == "__main__":
    main()
