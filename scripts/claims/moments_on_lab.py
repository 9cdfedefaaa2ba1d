"""How much text second moments need on a lab, what shrinking buys, and whether the diagnostic tells.

    python scripts/claims/moments_on_lab.py LAB [LAB ...] [--multipliers 1 2.5 5 10 20] [--json FILE]

For each number of tokens (in widths of the MLP) the moment is collected in one pass over one part of the lab's training
text; the gentlest direction for the key of each fact's subject (120 or 420 facts) is computed with it, plain (damped by
1e-4, as rome does) and shrunk; and the disturbance of tokens of the other part is compared with the least possible
there. "half" is that excess with one half of the text, and "said" what the diagnostic made of it from the two halves
and the facts' keys alone, never seeing the other part; "said of text" is what it says of keys of ordinary text.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from torch import Tensor

from editors.facts.contexts import row_of
from editors.facts.keys_values import read_at
from memloc.moment_judgement import judge
from memloc.moment_pass import MomentPass
from memloc.moments import second_moments, towards_identity
from memloc.passages import Facts, Passages, read_jsonl
from memloc.sites import Kind
from memloc.view import ModelView


def excess(used: Tensor, truth: Tensor, keys: Tensor) -> float:
    """Median over keys: disturbance under `truth` of the direction from `used`, over the least, minus one."""
    solved = []
    for moment in (used, truth):
        factor, failed = torch.linalg.cholesky_ex(moment)
        if int(failed):
            return float("nan")
        solved.append(torch.cholesky_solve(keys.T, factor).T)
    mine, best = solved
    disturbed = ((mine @ truth) * mine).sum(1) / (mine * keys).sum(1).square()
    return float((disturbed * (best * keys).sum(1)).median()) - 1


def one_lab(folder: Path, multipliers: list[float]) -> list[dict[str, object]]:
    """A row for every multiplier and layer."""
    view = ModelView.open(folder)
    texts = [row["text"] for _, row in read_jsonl(folder / "corpus.jsonl") if row["split"] == "train"]
    random.Random(0).shuffle(texts)
    window = view.context or 64
    half = len(texts) // 2
    given, fresh = (Passages.from_texts(part, view.tokenizer, window=window) for part in (texts[:half], texts[half:]))
    sites = view.sites(Kind.MLP_OUT)
    facts = Facts.read(folder / "facts.jsonl", view.tokenizer)
    keys = read_at(view, sites, [row_of(fact.prompt, "subject-last") for fact in facts])
    truth = second_moments(view, fresh, sites)
    print(f"{folder}: {truth.count} fresh tokens, {len(facts)} facts, f = {len(truth.mean(sites[0]))}")
    rows: list[dict[str, object]] = []
    for multiplier in multipliers:
        moments = MomentPass(multiplier=multiplier)(view, given, sites)
        for site in sites:
            said, plain = judge(moments, site, keys[site]), moments.mean(site)
            first = moments.split.first[site] / moments.split.count
            rows.append({
                "lab": folder.name, "site": str(site), "multiplier": multiplier, "tokens": moments.count,
                "damped": excess(plain + 1e-4 * plain.diagonal().mean() * torch.eye(len(plain)), truth.mean(site),
                                 keys[site]),
                "shrunk": excess(towards_identity(plain, said.shrinkage), truth.mean(site), keys[site]),
                "half": excess(towards_identity(first, min(1.0, 2 * said.shrinkage)), truth.mean(site), keys[site]),
                "said": said.excess, "said of text": judge(moments, site).excess,
                "shrinkage": said.shrinkage, "agreement": said.agreement,
            })  # fmt: skip
            row = rows[-1]
            print("  ".join(f"{name} {value:.3g}" if isinstance(value, float) else str(value)
                            for name, value in row.items()), flush=True)  # fmt: skip
    return rows


def main() -> None:
    """Run, print a row each, and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="+", type=Path)
    parser.add_argument("--multipliers", nargs="+", type=float, default=[1.0, 2.5, 5.0, 10.0, 20.0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [row for folder in args.labs for row in one_lab(folder, args.multipliers)]
    for multiplier in args.multipliers:
        mine = [row for row in rows if row["multiplier"] == multiplier]
        means = {
            name: sum(float(str(row[name])) for row in mine) / len(mine)
            for name in ("damped", "shrunk", "half", "said")
        }
        print(f"{multiplier:g} f tokens: excess of fact keys, mean of {len(mine)} sites: "
              + ", ".join(f"{name} {value:.2f}" for name, value in means.items()))  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
