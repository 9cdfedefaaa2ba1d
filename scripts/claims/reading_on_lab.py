"""What heads look at and what neurons hold, on trained labs: rarity heads, bypassed attention, keys and values.

    python scripts/claims/reading_on_lab.py LAB [LAB ...] [--texts 1500] [--json FILE]

Of each lab: every head's rank correlation with rarity, on what it recites and on text it never saw, beside what becomes
of recital and of held-out text when the head is silenced; what attention bypassed layer by layer does to both; and, by
layer, whether neurons' values promote what follows their strongest contexts, how pure these are, and how a layer's
output is made of them. Each figure stands beside its control. Ordinary text is the lab's training text (the first
`--texts` of it) for triggers and all of it for rarity; held-out text is the lab's own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from memloc.localizers.attention_bypass import AttentionBypass
from memloc.localizers.ffn_memory import FfnMemory
from memloc.localizers.rare_token_heads import RareTokenHeads
from memloc.passages import Passages, read_jsonl
from memloc.reading.rarity import spearman
from memloc.running.outcomes import Outcome
from memloc.sites import Site
from memloc.view import ModelView

LAYER_FIGURES = (
    "agreement", "agreement_dealt", "target_rank", "target_rank_dealt", "last_purity", "last_purity_dealt",
    "next_purity", "next_purity_dealt", "composition", "composition_dealt", "composition_of_ten", "active", "kept",
    "taken_over", "compromise", "agrees_with_final",
)  # fmt: skip


class Lab:
    """A lab's model and texts."""

    def __init__(self, folder: Path, texts: int) -> None:
        self.view = ModelView.open(folder)
        tokenizer, window = self.view.tokenizer, self.view.context or 64
        planted = Passages.read(folder / "passages.jsonl", tokenizer)
        most = max(item.tags["dose"] for item in planted)
        self.recited = planted.where(lambda item: item.tags["dose"] == most)
        self.unseen = Passages.read(folder / "controls.jsonl", tokenizer)
        rows = [row for _, row in read_jsonl(folder / "corpus.jsonl")]
        train = [row["text"] for row in rows if row["split"] == "train"]
        held_out = [row["text"] for row in rows if row["split"] != "train"]
        self.train = Passages.from_texts(train, tokenizer, window=window)
        self.ordinary = Passages.from_texts(train[:texts], tokenizer, window=window)
        self.held_out = Passages.from_texts(held_out, tokenizer, window=window)


def heads(lab: Lab) -> dict[str, Any]:
    """Every head: rarity on recited and unseen text, and what silencing it does; query: the whole suffix."""
    count = lab.view.layers * lab.view.heads
    rarity = RareTokenHeads(query="suffix")
    seen, unseen = rarity(lab.view, lab.recited, contrast=lab.train), rarity(lab.view, lab.unseen, contrast=lab.train)
    silenced = RareTokenHeads(query="suffix", ablate="zero", silenced=count, permutations=0)
    told = silenced(lab.view, lab.recited, contrast=lab.held_out).notes["ablation"]
    rows = []
    for entry in told["heads"]:
        layer, head = entry["site"].split(".")[0], entry["head"]
        rows.append({
            "head": f"{layer}.{head}", "r": seen.notes["r"][layer][head], "r unseen": unseen.notes["r"][layer][head],
            "z": seen.notes["z"][layer][head], "published": seen.notes["published"][layer][head],
            "exact": entry["passages"]["exact"],
            "nll rise": entry["passages"]["nll"] - told["clean"]["passages"]["nll"],
            "held-out rise": entry["contrast"]["nll"] - told["clean"]["contrast"]["nll"],
        })  # fmt: skip
    rows.sort(key=lambda row: str(row["head"]))
    upper = [row for row in rows if not str(row["head"]).startswith("L0")]
    return {
        "rows": rows,
        "best": seen.notes["best"],
        "best unseen": unseen.notes["best"],
        "even head, published statistic": seen.notes["published_even"],
        "baselines": seen.notes["baselines"],
        "median exact": median(float(row["exact"]) for row in rows),
        "held-out nll": told["clean"]["contrast"]["nll"],
        "rho(r, nll rise), all heads": _rho(rows),
        "rho(r, nll rise), above layer 0": _rho(upper),
    }


def bypassed(lab: Lab) -> list[dict[str, Any]]:
    """Every layer: what recital and held-out text lose without attention there."""
    notes = AttentionBypass()(lab.view, lab.recited, contrast=lab.held_out).notes
    seen, other = notes["passages"], notes["contrast"]
    return [
        {
            "layer": layer,
            "exact": figures["exact"],
            "accuracy": figures["accuracy"],
            "nll rise": figures["nll"] - seen["clean"]["nll"],
            "held-out rise": other["changed"][layer]["nll"] - other["clean"]["nll"],
        }
        for layer, figures in seen["changed"].items()
    ]


def neurons(lab: Lab) -> dict[str, list[dict[str, Any]]]:
    """Every layer: keys and values, triggers looked for in what is recited, never seen, and ordinary."""
    found = {}
    method = FfnMemory(positions=10_000, readings=0)
    corpora = {"recited": None, "unseen": lab.unseen, "ordinary": lab.ordinary, "held-out": lab.held_out}
    for name, corpus in corpora.items():
        layers = method(lab.view, lab.recited, contrast=corpus).notes["layers"]
        found[name] = [{"layer": layer, **{key: told[key] for key in LAYER_FIGURES}} for layer, told in layers.items()]
    return found


def silenced(lab: Lab, *, passages: int = 8, count: int = 20) -> list[dict[str, Any]]:
    """The best `count` neurons of each of some passages silenced: what it loses, and what the other recited ones do."""
    found = []
    ways = {counts: FfnMemory(counts=counts, readings=0, positions=0) for counts in ("agreeing", "all")}
    chosen = {name: method(lab.view, lab.recited, contrast=lab.held_out) for name, method in ways.items()}
    clean = {name: _nll(lab.view, lab.recited.named([name])) for name in lab.recited.ids}
    for way in (*ways, "random"):
        own, other = [], []
        for index, name in enumerate(lab.recited.ids[:passages]):
            best = chosen["all" if way == "random" else way].of(name).top(count)
            best = best.random_like(index, per="model") if way == "random" else best
            with lab.view.replace(list(best.indices()), partial(_zero, best.indices())):
                own.append(_nll(lab.view, lab.recited.named([name])) - clean[name])
                rest = lab.recited.where(lambda item, name=name: item.id != name)
                other.append(_nll(lab.view, rest) - sum(clean[item] for item in rest.ids) / len(rest))
        means = sum(own) / len(own), sum(other) / len(other)
        found.append({"neurons": way, "own rise": means[0], "others' rise": means[1], "ratio": means[0] / means[1]})
    return found


def _zero(places: Mapping[Site, list[int]], site: Site, neurons: torch.Tensor) -> torch.Tensor:
    return neurons.index_fill(-1, torch.tensor(places[site]), 0)


def _nll(view: ModelView, passages: Passages) -> float:
    parts = ((batch, Outcome.of(view, batch)) for batch in view.batches(passages))
    return Outcome.gathered(parts, len(passages)).means()["nll"]


def _rho(rows: list[dict[str, Any]]) -> float:
    pair = (torch.tensor([float(row[key]) for row in rows]) for key in ("r", "nll rise"))
    return float(spearman(*pair))


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    head = "| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0])
    body = ("| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in rows)
    return "\n".join([head, *body])


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="+", type=Path)
    parser.add_argument("--texts", type=int, default=1500)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    everything = {}
    for folder in arguments.labs:
        lab = Lab(folder, arguments.texts)
        found = {"heads": heads(lab), "bypassed": bypassed(lab), "neurons": neurons(lab), "silenced": silenced(lab)}
        everything[folder.name] = found
        print(f"\n## {folder.name}: {len(lab.recited)} recited, {len(lab.unseen)} never seen\n\n### Heads\n")
        print(table(found["heads"]["rows"]) + "\n")
        for name, value in found["heads"].items():
            if name != "rows":
                print(f"- {name}: {value}")
        print(f"\n### Attention bypassed\n\n{table(found['bypassed'])}")
        print(f"\n### The 20 best neurons of 8 passages silenced\n\n{table(found['silenced'])}")
        for name, rows in found["neurons"].items():
            print(f"\n### Neurons, contexts in {name} text\n\n{table(rows)}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
