"""Patterns, bypassed heads and triggers beside plain ways to the same figures, in one process, in CPU time.

Patterns: read off an sdpa model's own arithmetic, beside a second, eager copy of the model that returns them. Bypassed
heads: from the changed layer on, beside a whole forward a head. Triggers: a table of fixed size, beside all activations
kept and sorted at the end; memory is that of the tensors made, at its highest.

    python scripts/benchmark/reading.py [--rounds 3] [--texts 64]

Prints the largest difference and the ratio of CPU times (float32, alternating, the least of the rounds).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import torch
from alternating import alternately
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from memloc.costs import counted
from memloc.localizers.attention_bypass import AttentionBypass
from memloc.objectives import suffix_nll
from memloc.passages import Passage, Passages
from memloc.reading.triggers import read_triggers
from memloc.running.patterns import Attention, short_circuit
from memloc.sites import Kind
from memloc.view import ModelView

TRIGGERS = 25


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    view, eager = open_view("sdpa"), open_view("eager")
    texts = some_texts(view, given.texts)
    few = texts[:8]
    ways: Mapping[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "patterns": (lambda: patterns(view, few), lambda: returned(eager, few)),
        "bypassed heads": (lambda: bypassed(view, few), lambda: bypassed_plainly(view, few)),
        "triggers": (lambda: table(view, texts), lambda: kept(view, texts)),
    }
    for name, (mine, plain) in ways.items():
        timed = alternately({"memloc": mine, "plainly": plain}, given.rounds)
        gap = float((timed.results["memloc"] - timed.results["plainly"]).abs().max())
        print(f"{name}: largest difference {gap:.2g}")
        timed.show("memloc")
    for many in (given.texts // 2, given.texts):
        sizes = [highest(view, lambda way=way, many=many: way(view, texts[:many])) for way in (table, kept)]
        print(f"triggers of {many} texts: {sizes[0] / 2**20:.0f} MB, all kept {sizes[1] / 2**20:.0f} MB")


def open_view(kernel: str) -> ModelView:
    """A random model with room for opinions; the same for every kernel."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=1000, n_positions=128, n_embd=256, n_layer=6, n_head=8, bos_token_id=0, eos_token_id=0,
        attn_implementation=kernel,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.dim() == 1 else 6.0)
    return ModelView.open(model)


def some_texts(view: ModelView, count: int) -> Passages:
    """Random texts of 64 and 32 tokens."""
    ids = torch.randint(view.vocab, (count, 96), generator=torch.Generator().manual_seed(1)).tolist()
    return Passages(tuple(Passage(f"p{n}", tuple(row[:64]), tuple(row[64:])) for n, row in enumerate(ids)))


def patterns(view: ModelView, texts: Passages) -> Tensor:
    """[l, n, h, t, t] by memloc."""
    found = Attention.of(view, next(view.batches(texts)))
    return torch.stack([found.pattern(layer) for layer in range(view.layers)])


@torch.no_grad()
def returned(view: ModelView, texts: Passages) -> Tensor:
    """The same, returned by an eager model."""
    batch = next(view.batches(texts))
    return torch.stack(view.model(batch.ids, output_attentions=True, use_cache=False).attentions)


def bypassed(view: ModelView, texts: Passages) -> Tensor:
    """Rise of the NLL, [l, n, h], by memloc."""
    scores = AttentionBypass(grain="head")(view, texts).scores
    return torch.stack([scores[site] for site in sorted(scores)])


@torch.no_grad()
def bypassed_plainly(view: ModelView, texts: Passages) -> Tensor:
    """The same by whole forwards."""
    batch = next(view.batches(texts))
    clean, found = suffix_nll(view, batch), torch.zeros(view.layers, len(texts), view.heads)
    for layer in range(view.layers):
        for head in range(view.heads):
            with short_circuit(view, [layer], [head]):
                found[layer, :, head] = suffix_nll(view, batch) - clean
    return found


def table(view: ModelView, texts: Passages) -> Tensor:
    """Scores of the strongest contexts, [l, f, k], by memloc."""
    return read_triggers(view, texts, count=TRIGGERS).scores


@torch.no_grad()
def kept(view: ModelView, texts: Passages) -> Tensor:
    """The same from all activations, sorted at the end."""
    sites, parts = view.sites(Kind.MLP_OUT), []
    for batch in view.batches(texts, size=16):
        with view.record(sites) as seen:
            view.hidden(batch)
        parts.append(torch.stack([seen[site][:, :-1].flatten(0, 1) for site in sites]))
    best = torch.cat(parts, 1).clamp_min(0).sort(1, descending=True).values[:, :TRIGGERS]
    return best.transpose(1, 2)


def highest(view: ModelView, work: Callable[[], object]) -> int:
    """Bytes of tensors alive at once, at their highest."""
    with counted(view) as spent:
        work()
    return spent.bytes


if __name__ == "__main__":
    main()
