"""The prefix map beside plain loops, in one process, in CPU time.

The plain loop exchanges one prefix token at a time and decodes the suffix greedily by whole forwards; the second one
decodes on cached keys and values, as libraries do. All three count the suffix tokens decoded right before the first
mistake, with the same exchanges.

    python scripts/benchmark/prefix_map.py [--model DIR --passages FILE[#key=value]] [--count 4] [--rounds 3]

Fails where a count differs, or where the map takes more than a fifth of the plain loop's CPU time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from alternating import alternately, keep
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from memloc.flags import DataFile
from memloc.passages import Passage, Passages
from memloc.patching.perturbation import Exchanges, recited
from memloc.running.decoding import continuation
from memloc.view import ModelView


def main() -> None:
    """Compare, print, and fail where the promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder; by default a random model of 6 layers, width 256")
    parser.add_argument("--passages", help="passages for --model")
    parser.add_argument("--count", type=int, default=4, help="passages")
    parser.add_argument("--alternatives", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    view, passages = material(given)
    exchanges = Exchanges(alternatives=given.alternatives)
    ways: dict[str, Callable[[], list[Tensor]]] = {
        "memloc": lambda: [found.exact for found in exchanges.maps(view, passages)],
        "plain loop": lambda: [plain(view, item, exchanges, whole) for item in passages],
        "plain loop, cached": lambda: [plain(view, item, exchanges, cached) for item in passages],
    }
    timed = alternately(ways, given.rounds)
    counts = {name: torch.cat([entry.reshape(-1) for entry in found]) for name, found in timed.results.items()}
    shape = passages[0]
    print(f"{len(passages)} passages of {len(shape.prefix)}+{len(shape.suffix)} tokens, {view.layers} layers, "
          f"width {view.width}, {given.alternatives} alternatives")  # fmt: skip
    same = {name: torch.equal(found, counts["memloc"]) for name, found in counts.items()}
    timed.show("memloc", {name: ", other counts" for name, found in same.items() if not found})
    cheap = timed.ratio("plain loop", "memloc") >= 5
    keep("the same counts, at least 5 times less CPU time", cheap, *same.values())


def material(given: argparse.Namespace) -> tuple[ModelView, Passages]:
    """The folder's model and passages, or a random model and what it recites."""
    if given.model is not None:
        view, data = ModelView.open(given.model), DataFile.parse(given.passages)
        return view, Passages.read(data.path, view.tokenizer).where(data.keeps)[: given.count]
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=1000, n_positions=256, n_embd=256, n_layer=6, n_head=8, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.dim() == 1 else 6.0)
    view = ModelView.open(model)
    ids = torch.randint(view.vocab, (given.count, 64), generator=torch.Generator().manual_seed(1)).tolist()
    return view, recited(
        view, Passages(tuple(Passage(f"p{n}", tuple(row[:32]), tuple(row[32:])) for n, row in enumerate(ids)))
    )


def whole(view: ModelView, prefix: Tensor, length: int) -> list[int]:
    """Greedy decoding, a whole forward a token."""
    ids = prefix
    for _ in range(length):
        with torch.no_grad():
            logits = view.model(ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    found: list[int] = ids[0, prefix.shape[1] :].tolist()
    return found


def cached(view: ModelView, prefix: Tensor, length: int) -> list[int]:
    """Greedy decoding on cached keys and values."""
    found: list[int] = continuation(view, prefix, length).ids[0, prefix.shape[1] :].tolist()
    return found


def plain(
    view: ModelView, item: Passage, exchanges: Exchanges, decode: Callable[[ModelView, Tensor, int], list[int]]
) -> Tensor:
    """[p, a] tokens right before the first mistake, one exchange at a time."""
    tokens = exchanges.draw(view.vocab, item)
    found = torch.zeros_like(tokens)
    for at in range(tokens.shape[0]):
        for which in range(tokens.shape[1]):
            prefix = torch.tensor([item.prefix])
            prefix[0, at] = tokens[at, which]
            for mine, true in zip(decode(view, prefix, len(item.suffix)), item.suffix, strict=True):
                if mine != true:
                    break
                found[at, which] += 1
    return found


if __name__ == "__main__":
    main()
