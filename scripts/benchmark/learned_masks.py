"""Learned masks: all passages in one run beside one passage after another, in one process, in CPU time.

Two loops stand beside memloc's run. "alone": memloc's own, one passage at a time, which shows what sharing a batch is
worth by itself. "plain loop": what one writes first, and what the public code does in kind: one passage at a time, all
weights left as they are (with gradients), logits of all positions, torch's Adam, all steps whether done or not.

    python scripts/benchmark/learned_masks.py [--model DIR --passages FILE] [--count 16] [--steps 20] [--rounds 3]

Prints the largest difference of masks in float64 and the ratios of CPU times (float32, alternating, least of rounds).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from alternating import alternately, keep
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from memloc.ablations.gates import gate_sites, gated
from memloc.localizers.slimming import TIE, Slimming
from memloc.passages import Passage, Passages
from memloc.view import ModelView


def main() -> None:
    """Compare and print; fail where the masks differ or one run is no cheaper than many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder; by default a random model like the tiny lab's")
    parser.add_argument("--passages", help="passages for --model")
    parser.add_argument("--prefix", type=int, default=32, help="tokens, also of the file's passages")
    parser.add_argument("--suffix", type=int, default=32, help="tokens")
    parser.add_argument("--count", type=int, default=16, help="passages")
    parser.add_argument("--steps", type=int, default=20, help="of each mask")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    views = {dtype: open_view(given.model, dtype) for dtype in (torch.float64, torch.float32)}
    passages = choose(given, views[torch.float32])
    method = Slimming(steps=given.steps, stop=0, batch_size=given.count)

    exact, few = views[torch.float64], passages[:2]
    gap = float((together(exact, few, method) - plain(exact, few, method)).abs().max())
    shape = f"{exact.layers} layers, width {exact.width}, {exact.neurons} neurons"
    print(f"{len(passages)} passages of {given.prefix}+{given.suffix} tokens, {given.steps} steps, {shape}")
    print(f"largest difference of masks in float64 {gap:.2g} (ties are ordered by up to {TIE:g})")

    view = views[torch.float32]
    ways: dict[str, Callable[[], object]] = {
        "one run": lambda: together(view, passages, method),
        "alone": lambda: [together(view, passages[row : row + 1], method) for row in range(len(passages))],
        "plain loop": lambda: plain(view, passages, method),
    }
    timed = alternately(ways, given.rounds)
    timed.show("one run")
    keep("the same masks, for less", gap <= 1.1 * TIE, timed.ratio("alone", "one run") >= 1)


def open_view(model: str | None, dtype: torch.dtype) -> ModelView:
    """The folder's model, or a random one."""
    if model is not None:
        return ModelView.open(model, dtype=dtype)
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=512, n_positions=256, n_embd=64, n_layer=2, n_head=2, **ends)
    return ModelView.open(GPT2LMHeadModel(config).to(dtype))


def choose(given: argparse.Namespace, view: ModelView) -> Passages:
    """The first passages of the file, or random ones."""
    if given.passages is not None:
        return Passages.read(given.passages, view.tokenizer, prefix=given.prefix, suffix=given.suffix)[: given.count]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(view.vocab, (given.count, given.prefix + given.suffix), generator=generator).tolist()
    return Passages(
        tuple(Passage(f"p{n}", tuple(row[: given.prefix]), tuple(row[given.prefix :])) for n, row in enumerate(ids))
    )


def together(view: ModelView, passages: Passages, method: Slimming) -> Tensor:
    """Masks by memloc, [l, n, f]."""
    return torch.stack([scores for _, scores in sorted(method(view, passages).scores.items())])


def plain(view: ModelView, passages: Passages, method: Slimming) -> Tensor:
    """Masks one after another, [l, n, f]."""
    found = []
    for item in passages:
        gates = torch.ones(view.layers, view.neurons, dtype=view.dtype, requires_grad=True)
        descent = torch.optim.Adam([gates], lr=method.learning_rate)
        ids, start = torch.tensor([item.ids]), len(item.prefix)
        for _ in range(method.steps):
            with gated(view, dict(zip(gate_sites(view, "neuron"), gates.unbind(0), strict=True))):
                spoken = view.model(ids, use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)
            loss = -spoken.gather(-1, ids[0, start:, None]).mean() + method.penalty * gates.mean()
            descent.zero_grad()
            loss.backward()
            descent.step()
            gates.data.clamp_(0, 1)
        found.append(gates.detach())
        view.model.zero_grad(set_to_none=True)
    return torch.stack(found, 1)


if __name__ == "__main__":
    main()
