"""Pruners of the lab's memories at several budgets, each beside random and magnitude pruning of the very same budget.

    python scripts/claims/pruning_on_lab.py LAB [LAB ...] --rows FILE [--arms WORD,...] [--targets 10] [--table]

Every lab folder is one that `memloc lab` wrote, cut as the demo cuts it: of the passages at the full dose `--targets`
are to be forgotten, half of the others are named as retained, and the rest are named in no set. Every arm is an edit at
one budget. Beside it, once for every budget *by site* that occurs: weights drawn at random (three seeds) and the
smallest weights, as many at each site. Figures are kept in `--rows`, one JSON line each; what is there is not done
again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from editors.base import Request
from editors.deltas import LowRank
from editors.demo.material import Material, material
from editors.edit import Edit
from editors.pruners.balanced_subnet import BalancedSubnet
from editors.pruners.durable import Durable
from editors.pruners.greedy import Greedy
from editors.pruners.head_dropout import HeadDropout
from editors.pruners.magnitude import Magnitude
from editors.pruners.neuron_dropout import NeuronDropout
from editors.pruners.obs import Obs
from editors.pruners.random import Random
from editors.pruners.subnet import Subnet
from editors.pruners.subspace import Subspace
from memloc.localizers.activation_gradient import ActivationGradient
from memloc.localizers.weight_gradient import WeightGradient
from memloc.measures.extraction import Extraction
from memloc.measures.facts import FactRecall
from memloc.measures.perplexity import Perplexity
from memloc.provenance import Provenance, digest_json
from memloc.scores import Selection
from memloc.sites import Grain, Site
from memloc.view import ModelView

SHARES = (0.01, 0.05, 0.2)
RANKS = (1, 2, 4, 16)
HEADS = (1, 2, 4)
RANDOM_SEEDS = (0, 1, 2)


def arms() -> Iterator[tuple[str, Any, tuple[str, float] | None]]:
    """Name, editor, and the grain and budget of a selection where it takes one."""
    for share in SHARES:
        yield f"durable {share:g}", Durable(share=share), None
        yield f"durable-model {share:g}", Durable(share=share, among="model"), None
        yield f"subspace {share:g}", Subspace(share=share), None
        yield f"subspace-normalized {share:g}", Subspace(share=share, normalized=True), None
        yield f"obs {share:g}", Obs(share=share), None
        yield f"obs-absolute {share:g}", Obs(share=share, damping=1e-7, damping_unit="absolute"), None
        yield f"obs-keep {share:g}", Obs(share=share, compensate="keep"), None
        yield f"obs-forget {share:g}", Obs(share=share, compensate="forget"), None
        yield f"greedy {share:g}", Greedy(share=share), None
        yield f"subnet {share:g}", Subnet(share=share), None
        yield f"subnet-long {share:g}", Subnet(share=share, epochs=130), None
        yield f"subnet-untrained {share:g}", Subnet(share=share, epochs=0), None
        yield f"balanced-subnet {share:g}", BalancedSubnet(share=share), None
        yield f"balanced-subnet-both {share:g}", BalancedSubnet(share=share, epochs=130, mixing="both"), None
        yield f"magnitude-largest {share:g}", Magnitude(share=share, order="largest"), None
        yield f"neuron-zero {share:g}", NeuronDropout(), ("neuron", share)
        yield f"neuron-mean {share:g}", NeuronDropout(mode="mean"), ("neuron", share)
        yield f"neuron-resample {share:g}", NeuronDropout(mode="resample"), ("neuron", share)
    for enough in (0.3, 1.0, 3.0):
        yield f"greedy-enough {enough:g}", Greedy(share=0.01, backwards=500, enough=enough), None
    for rank in RANKS:
        yield f"directions {rank}", Subspace(mode="directions", rank=rank), None
    for count in HEADS:
        for mode in ("zero", "mean", "resample"):
            yield f"head-{mode} {count}", HeadDropout(mode=mode), ("head", float(count))


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="+", type=Path)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--arms", default="", help="only arms that start with one of these words")
    parser.add_argument("--targets", type=int, default=10)
    parser.add_argument("--table", action="store_true", help="print what is there, measure nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = read_rows(given.rows)
    for lab in given.labs:
        if not given.table:
            measure_lab(lab, given, known)
        show(lab.name, known)


def measure_lab(lab: Path, given: argparse.Namespace, known: dict[str, dict[str, Any]]) -> None:
    """Every arm that is not there yet, and its controls."""
    view = ModelView.open(lab)
    data = material(lab, view, targets=given.targets, facts=120)
    words = tuple(word for word in given.arms.split(",") if word)

    def keep(name: str, **row: Any) -> None:
        known[f"{lab.name} {name}"] = entry = {"lab": lab.name, "arm": name, **row}
        with given.rows.open("a", encoding="utf8") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"{lab.name} {name}: {line(entry)}", flush=True)

    if f"{lab.name} before" not in known:
        keep("before", **figures(view, data))
    for name, editor, chosen in arms():
        if f"{lab.name} {name}" in known or (words and not name.startswith(words)):
            continue
        start = time.process_time()
        request = asked(view, data, chosen)
        edit = editor(view, request)
        seconds = time.process_time() - start
        budget, counts = digest_json(counts_of(edit))[:8], counts_of(edit)
        with edit.apply(view):
            row = figures(view, data)
        keep(name, **row, seconds=round(seconds, 1), weights=sum(counts.values()), budget=budget, notes=told(edit))
        for control, other, controlled in controls(view, edit, request):
            if f"{lab.name} {control} {budget}" not in known:
                with other(view, controlled).apply(view):
                    keep(f"{control} {budget}", **figures(view, data))


def controls(view: ModelView, edit: Edit, request: Request) -> Iterator[tuple[str, Any, Request]]:
    """Pruners of as many weights at every site; for units also random units, silenced in the same way."""
    if any(isinstance(delta, LowRank) for delta in edit.deltas.values()):
        return
    masks = {}
    for name, count in counts_of(edit).items():
        site = Site.parse(name)
        masks[site] = torch.arange(view.weight(site).numel()).view(view.weight(site).shape) < count
    same = Selection(Grain.WEIGHT, masks, Provenance("as many as the edit prunes"))
    for seed in RANDOM_SEEDS:
        yield f"random-{seed}", Random(), Request(selection=same, seed=seed)
    yield "magnitude", Magnitude(), Request(selection=same)
    if request.selection is not None:
        silence = HeadDropout() if request.selection.grain is Grain.HEAD else NeuronDropout()
        for seed in RANDOM_SEEDS:
            yield f"random-units-{seed}", silence, Request(selection=request.selection.random_like(seed))


def asked(view: ModelView, data: Material, chosen: tuple[str, float] | None) -> Request:
    """The request, with the best neurons or heads where the arm takes a selection."""
    selection = None
    if chosen is not None and chosen[0] == "neuron":
        selection = ActivationGradient(grain="neuron")(view, data.targets).top(fraction=chosen[1])
    elif chosen is not None:
        selection = WeightGradient(grain="head")(view, data.targets).top(count=int(chosen[1]))
    return Request(forget=data.targets, retain=data.named, text=data.kept_text, selection=selection)


def counts_of(edit: Edit) -> dict[str, int]:
    """Pruned weights of every matrix; of what changes no single weights, all it changes."""
    told = edit.notes.get("by site")
    return told or {str(site): delta.touched for site, delta in edit.deltas.items() if not site.bias}


def told(edit: Edit) -> dict[str, Any]:
    """What of an edit's notes belongs in a table."""
    wanted = ("before", "after", "untrained mask", "trained mask", "chosen by training", "batches of one side", "steps",
              "top share", "damping over mean diagonal", "pruned", "backwards")  # fmt: skip
    return {name: edit.notes[name] for name in wanted if name in edit.notes}


def figures(view: ModelView, data: Material) -> dict[str, Any]:
    """Of the model as it is now."""
    recite = Extraction()
    groups = {"targets": data.targets, "named": data.named, "unnamed": data.unnamed}
    found = {name: recite(view, rows) for name, rows in groups.items()}
    strict = {name: [sum(row["strict"] for row in entry.rows), len(groups[name])] for name, entry in found.items()}
    return {
        **strict,
        "log p_z": found["targets"]["median log p_z"],
        "perplexity": Perplexity()(view, data.held_out)["perplexity"],
        "facts": FactRecall()(view, data.facts)["true accuracy"],
    }


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Rows that are there, by lab and arm."""
    if not path.exists():
        return {}
    rows = [json.loads(text) for text in path.read_text(encoding="utf8").splitlines()]
    return {f"{row['lab']} {row['arm']}": row for row in rows}


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    rates = "  ".join(f"{name} {row[name][0]:>2}/{row[name][1]}" for name in ("targets", "named", "unnamed"))
    return f"{rates}  log p_z {row['log p_z']:7.1f}  perplexity {row['perplexity']:7.3f}  facts {row['facts']:.2f}"


def show(lab: str, known: dict[str, dict[str, Any]]) -> None:
    """Every arm with its controls under it."""
    mine = {row["arm"]: row for row in known.values() if row["lab"] == lab}
    print(f"\n{lab}\n{'before':>28}  {line(mine['before'])}")
    for name, row in mine.items():
        if "weights" in row:
            print(f"{name:>28}  {line(row)}  {row['weights']} weights, {row['seconds']} s")
            for other, control in mine.items():
                if other.endswith(f" {row['budget']}") and other != name:
                    print(f"{other.split()[0]:>28}  {line(control)}")


if __name__ == "__main__":
    main()
