"""Extraction by one teacher-forced pass against generate-and-compare: CPU time, and verdicts on every row.

The references are transformers' `generate` with its key-value cache, as many tokens as the suffix has, then a
comparison: row by row, the plain loop; and batched like our pass, rows of one prefix length together so that nothing
is padded. Half of the suffixes are what the model says, a quarter have one token changed, a quarter are random, so
verdicts are mixed. All run alternately in one process; a ratio is one of the least CPU times.

Both do the same arithmetic; what the pass saves is doing it a token at a time. Against the plain loop that is most
of the time; against large batches on one core, where a step is no longer bound by reading weights, about half.

    python scripts/benchmark/extraction.py                      # two random GPT-2 shapes
    python scripts/benchmark/extraction.py --model out/demo/lab --passages out/demo/lab/passages.jsonl
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from alternating import alternately
from transformers import AutoModelForCausalLM, GPT2Config

from memloc.measures.extraction import Extraction
from memloc.passages import Passage, Passages
from memloc.view import ModelView

SHAPES = {
    "lab-like": {"vocab_size": 4096, "n_embd": 128, "n_layer": 4, "n_head": 4},
    "GPT-2-small, 3 of 12 layers": {"vocab_size": 50257, "n_embd": 768, "n_layer": 3, "n_head": 12},
}
TARGET = 3.0


def main() -> int:
    """Run every case; exit 1 where a verdict differs or the ratio misses its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder, instead of the random shapes")
    parser.add_argument("--passages", type=Path, help="its passages, JSONL")
    parser.add_argument("--rows", type=int, default=16, help="rows of a random shape (default: 16)")
    parser.add_argument("--prefix", type=int, default=50)
    parser.add_argument("--suffix", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    good = True
    for name, view, passages in cases(options):
        good &= compare(name, view, passages, repeats=options.repeats, batch=options.batch)
    return 0 if good else 1


def cases(options: argparse.Namespace) -> Any:
    """Name, view and passages of every case, one after the other."""
    if options.model is not None:
        view = ModelView.open(options.model)
        passages = Passages.read(options.passages, view.tokenizer, prefix=options.prefix, suffix=options.suffix)
        yield options.model.name, view, passages
        return
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        config = GPT2Config(**shape, n_positions=128, bos_token_id=0, eos_token_id=0, pad_token_id=0)
        view = ModelView.open(AutoModelForCausalLM.from_config(config))
        yield name, view, mixed(view, options.rows, options.prefix, options.suffix)


def mixed(view: ModelView, rows: int, prefix: int, suffix: int) -> Passages:
    """Rows the model recites, rows it recites but for one token, and rows it does not."""
    generator = torch.Generator().manual_seed(1)
    heads = torch.randint(1, view.vocab, (rows, prefix), generator=generator)
    tails = generate(view, heads, suffix)
    for row in range(rows // 2, rows):
        if row % 2:
            tails[row, int(torch.randint(suffix, (), generator=generator))] += 1
        else:
            tails[row] = torch.randint(1, view.vocab, (suffix,), generator=generator)
    items = zip(heads.tolist(), (tails % view.vocab).tolist(), strict=True)
    return Passages(tuple(Passage(f"row-{i}", tuple(head), tuple(tail)) for i, (head, tail) in enumerate(items)))


def generate(view: ModelView, heads: torch.Tensor, tokens: int) -> torch.Tensor:
    """What transformers' greedy generation says, cache on and no end token: `[n, tokens]`."""
    view.model.generation_config.eos_token_id = None
    said: torch.Tensor = view.model.generate(
        heads, attention_mask=torch.ones_like(heads), max_new_tokens=tokens, do_sample=False, use_cache=True
    )
    return said[:, heads.shape[1] :].clone()


def by_generation(view: ModelView, passages: Passages, batch: int) -> list[bool]:
    """Strict verdicts, in order: decode, then compare."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, item in enumerate(passages):
        groups.setdefault((len(item.prefix), len(item.suffix)), []).append(row)
    verdicts = [False] * len(passages)
    for (_, tokens), members in groups.items():
        for start in range(0, len(members), batch):
            rows = members[start : start + batch]
            said = generate(view, torch.tensor([passages[row].prefix for row in rows]), tokens)
            for row, line in zip(rows, said.tolist(), strict=True):
                verdicts[row] = tuple(line) == passages[row].suffix
    return verdicts


def by_one_pass(view: ModelView, passages: Passages, batch: int) -> list[bool]:
    """Strict verdicts, in order, as the measure gives them (with everything else it gives)."""
    return [row["strict"] for row in Extraction(batch_size=batch)(view, passages).rows]


def compare(name: str, view: ModelView, passages: Passages, *, repeats: int, batch: int) -> bool:
    """Time all, alternately; print; say whether verdicts agree on every row and the plain loop is slow enough."""
    runs = {
        "one pass": lambda: by_one_pass(view, passages, batch),
        "generate, row by row": lambda: by_generation(view, passages, 1),
        f"generate, batches of {batch}": lambda: by_generation(view, passages, batch),
    }
    timed = alternately(runs, repeats)
    ours = timed.results["one pass"]
    differ = {
        item.id
        for verdicts in timed.results.values()
        for item, a, b in zip(passages, ours, verdicts, strict=True)
        if a != b
    }
    print(f"{name}: {len(passages)} rows, {sum(ours)} strict, verdicts differ on {len(differ)} {sorted(differ) or ''}")
    timed.show("one pass")
    print(f"target: row by row, at least {TARGET:g}")
    return not differ and timed.ratio("generate, row by row", "one pass") >= TARGET


if __name__ == "__main__":
    sys.exit(main())
