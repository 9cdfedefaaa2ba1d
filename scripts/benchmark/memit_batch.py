"""MEMIT on many facts: values of all in one batch from the edited layer up, against one by one with whole forwards.

    python scripts/benchmark/memit_batch.py [LAB] [--facts 100] [--steps 20] [--width 512 --depth 12 --vocab 8000]

Without a LAB a random GPT-2 of that size is taken. The naive way is that of the published code: for each fact Adam on
one value, a forward and a backward through the whole model for all of its prompts at each step, every position
unembedded; then for each layer an f-sized dense solve. Both make as many steps (nothing stops early), from the same
prompts, moments and settings; both are timed in CPU time of this process, in turn, and the largest difference between
their changes is told.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from alternating import alternately, keep

from editors.base import Request
from editors.deltas import LowRank
from editors.facts.batch_edit import Work
from editors.facts.keys_values import read_at, read_blocks_at
from editors.hook_form import as_if
from editors.rewriters.memit import Memit
from memloc.batches import pad
from memloc.moments import second_moments
from memloc.passages import Fact, Facts, Passage, Passages, Prompt, read_jsonl
from memloc.sites import Kind, Site
from memloc.view import ModelView


def from_lab(folder: Path, count: int) -> tuple[ModelView, Facts, Passages]:
    """A lab's model, some of its facts and of its training text."""
    view = ModelView.open(folder)
    facts = Facts.read(folder / "facts.jsonl", view.tokenizer)
    chosen = sorted(random.Random(0).sample(range(len(facts)), min(count, len(facts))))
    train = [row["text"] for _, row in read_jsonl(folder / "corpus.jsonl") if row.get("split") == "train"]
    text = Passages.from_texts(train[:200], view.tokenizer, window=view.context or 64)
    return view, Facts(tuple(facts[index] for index in chosen)), text


def at_random(width: int, depth: int, vocab: int, count: int) -> tuple[ModelView, Facts, Passages]:
    """A model nobody trained, and as many facts of random tokens: the time is the same."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocab, n_positions=64, n_embd=width, n_layer=depth, n_head=8)
    view = ModelView.open(GPT2LMHeadModel(config).eval())
    draw = random.Random(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab) for _ in range(length))

    facts = []
    for index in range(count):
        prompt = Prompt(ids(12), (0, 4), "")
        facts.append(Fact(str(index), "{}", str(index), prompt, ids(2), ids(2), "new", "old"))
    windows = Passages(tuple(Passage(str(index), ids(1), ids(63)) for index in range(width // 4)))
    return view, Facts(tuple(facts)), windows


def naive(view: ModelView, work: Work, moments: dict[Site, torch.Tensor]) -> dict[Site, LowRank]:
    """One fact after the other, whole forwards, dense solves."""
    editor, top = work.editor, work.layers[-1]
    changes = []
    for demand in work.demands:
        rows = [row.ids + demand.target[:-1] for row in demand.prompts]
        at = torch.tensor([row.at for row in demand.prompts])
        batch, line = pad(rows, device=view.device), torch.arange(len(rows))
        ends = [len(row.ids) - 1 for row in demand.prompts]
        norm = read_blocks_at(view, top, demand.prompts[:1]).norm().float()
        change = torch.zeros(view.width, requires_grad=True)
        adam = torch.optim.Adam([change], lr=editor.lr)

        def moved(_: Site, output: torch.Tensor, change=change, line=line, at=at) -> torch.Tensor:
            return output.index_put((line, at), output[line, at] + change)

        for step in range(editor.steps):
            with view.replace([Site(top, Kind.MLP_OUT)], moved, side="output"):
                logs = view.logits(batch).float().log_softmax(-1)
            said = [logs[row, end + place, token] for row, end in enumerate(ends)
                    for place, token in enumerate(demand.target)]  # fmt: skip
            loss = -torch.stack(said).mean() + editor.weight_decay * change.norm() / norm**2
            if step == editor.steps - 1:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                change *= (editor.clamp * norm / change.norm().clamp_min(1e-30)).clamp_max(1)
        changes.append(change.detach().double())
    rows = [row for demand in work.demands for row in demand.prompts[:1]]
    goal = read_blocks_at(view, top, rows) + torch.stack(changes)
    deltas: dict[Site, LowRank] = {}
    for order, layer in enumerate(work.layers):
        site = Site(layer, Kind.MLP_OUT)
        with as_if(view, deltas):
            keys = work.asked.mean @ read_at(view, [site], work.asked.rows)[site]
            missing = (goal - read_blocks_at(view, top, rows)) / (len(work.layers) - order)
        ridge = editor.damping * moments[site].diagonal().mean() * torch.eye(keys.shape[1], dtype=torch.float64)
        system = editor.slack_of(keys) * (moments[site] + ridge) + keys.T @ keys
        deltas[site] = LowRank(missing.T.float(), torch.linalg.solve(system, keys.T).T.float())
    return deltas


def main() -> None:
    """Time both, print the ratio and how far they agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=8.0, help="the least ratio that passes")
    for name, default in (("facts", 100), ("steps", 20), ("width", 512), ("depth", 12), ("vocab", 8000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.lab:
        view, facts, text = from_lab(args.lab, args.facts)
    else:
        view, facts, text = at_random(args.width, args.depth, args.vocab, args.facts)
    sites = view.sites(Kind.MLP_OUT)
    collected = second_moments(view, text, sites)
    editor = Memit(
        moment=collected, prefixes=("Then", "In the end", "They said") if view.tokenizer else (), steps=args.steps,
        kl_weight=0.0, recalls=0, protect=0.0, namesakes=0, replay=0.0, sentences=0, price=0.0, stop_below=0.0, lr=0.05,
        passes=1,
    )  # fmt: skip
    asked = Request(facts=facts)
    work, means = Work.of(editor, view, asked, facts), {site: collected.mean(site) for site in sites}

    def one_by_one() -> dict[Site, torch.Tensor]:
        with view.frozen(), torch.enable_grad():
            return {site: delta.dense() for site, delta in naive(view, work, means).items()}

    def together() -> dict[Site, torch.Tensor]:
        return {site: delta.dense() for site, delta in editor(view, asked).deltas.items()}

    timed = alternately({"together": together, "one by one": one_by_one}, args.rounds)
    edit, slow = timed.results["together"], timed.results["one by one"]
    apart = max(float((edit[site] - slow[site]).norm() / slow[site].norm()) for site in slow)
    print(
        f"{view.layers} layers, d {view.width}, f {view.neurons}, vocabulary {view.vocab}; {len(facts)} facts, "
        f"{len(work.asked.rows)} prompts, {args.steps} steps, layers {work.layers}, {torch.get_num_threads()} threads; "
        f"changes differ by {apart:.1e}"
    )
    timed.show("together")
    cheap = timed.ratio("one by one", "together") >= args.ratio
    keep(f"equal to 1e-4, at least {args.ratio:g} times less CPU time", apart < 1e-4, cheap)


if __name__ == "__main__":
    main()
