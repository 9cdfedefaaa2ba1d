"""Curvature, SVD, rewinding, norms and other checkpoints as edits of trained labs: what goes, and who goes with it.

    python scripts/claims/spectral_pruning_on_lab.py LAB [LAB ...] --rows FILE [--arms PATTERN] [--work FOLDER]

Every lab folder is one that `memloc lab` wrote, 50 passages planted at the full dose. Ten are the targets; of the other
40 half are called named and half unnamed (most of these editors are told of none of them, so the difference between
targets, named and unnamed says whether an edit tells memories apart). Judged on: greedy recitation of each set (strict:
all tokens; tokens: mean share of the suffix's tokens that are greedy), perplexity of held-out windows, and all facts
the model knows. Beside every edit stands a random one of the same maps, forms and norms. Statistics are of training
text, never of held-out text.

A row is one edit of one lab; those already in FILE are not made again. Without labs, prints the table of FILE.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from editors.base import Request
from editors.control import random_like
from editors.demo.material import Material, material
from editors.edit import Edit
from editors.methods import EDITORS
from memloc.measures.extraction import Extraction
from memloc.measures.facts import FactRecall
from memloc.measures.perplexity import Perplexity
from memloc.objectives import suffix_nll
from memloc.passages import Passages, read_jsonl
from memloc.view import ModelView

MLP = "mlp.gate,mlp.in,mlp.out"
ATTENTION = "attn.q,attn.k,attn.v,attn.out"
ALL = f"{ATTENTION},{MLP}"
KEEPS = (0.6, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995)
COLUMNS = ("targets", "named", "unnamed", "tokens", "perplexity", "facts", "targets, random", "perplexity, random")


@dataclass(frozen=True)
class Lab:
    """One lab, cut, with text for statistics.

    Attributes:
        folder: the lab's.
        view: the model.
        data: as the demo cuts it, ten targets.
        text: windows of training text.
        work: a folder for factors and checkpoints made on the way.
        seed: of everything random.
    """

    folder: Path
    view: ModelView
    data: Material
    text: Passages
    work: Path
    seed: int

    @classmethod
    def open(cls, folder: Path, work: Path, seed: int) -> Lab:
        """Read a lab's folder."""
        view = ModelView.open(folder)
        data = material(folder, view, targets=10, facts=10**6, seed=seed)
        rows = [row["text"] for _, row in read_jsonl(folder / "corpus.jsonl") if row["split"] == "train"]
        text = Passages.from_texts(rows, view.tokenizer, window=view.context or 64, origin="train")
        step = max(1, len(text) // 1500)
        return cls(folder, view, data, text[::step][:1500], work / folder.name, seed)

    def judge(self) -> dict[str, float]:
        """All figures of the model as it stands."""
        found = {}
        for name in ("targets", "named", "unnamed"):
            figures = Extraction()(self.view, getattr(self.data, name)).figures
            found[name] = figures["strict rate"].value
            if name == "targets":
                found["tokens"] = figures["exact memorization"].value
        found["perplexity"] = Perplexity()(self.view, self.data.held_out).figures["perplexity"].value
        facts = FactRecall()(self.view, self.data.facts).figures
        return {**found, "facts": facts["true accuracy"].value}

    def glance(self) -> dict[str, float]:
        """What the random control is asked."""
        strict = Extraction()(self.view, self.data.targets).figures["strict rate"].value
        spread = Perplexity()(self.view, self.data.held_out).figures["perplexity"].value
        return {"targets, random": strict, "perplexity, random": spread}

    @property
    def sets(self) -> dict[str, Passages]:
        """Passages never trained on, for copies to learn: ten that both learn, ten for each."""
        return {name: self.data.controls[10 * n : 10 * n + 10] for n, name in enumerate(("shared", "first", "second"))}

    def request(self) -> Request:
        """What every editor is told: targets, named passages, training text."""
        return Request(forget=self.data.targets, retain=self.data.named, text=self.text, seed=self.seed)


Arm = Callable[[Lab], Edit]


def editor(name: str, **settings: Any) -> Arm:
    """An arm that is one editor with these settings; factors are kept in the lab's work folder."""

    def made(lab: Lab) -> Edit:
        more = {"cache": str(lab.work / "factors")} if name == "curvature" else {}
        found: Edit = EDITORS[name](**settings, **more)(lab.view, lab.request())
        return found

    return made


def arms() -> dict[str, Arm]:
    """Every arm, by name."""
    found: dict[str, Arm] = {}
    for kinds, where in ((None, "mlp.in"), (MLP, "mlp"), (ATTENTION, "attn"), (ALL, "all")):
        for keep in KEEPS:
            found[f"curvature {where} {keep}"] = editor("curvature", keep=keep, kinds=kinds)
    for keep in KEEPS:
        found[f"curvature EK-FAC mlp {keep}"] = editor("curvature", keep=keep, kinds=MLP, correction=True)
        found[f"curvature loss mlp {keep}"] = editor("curvature", keep=keep, kinds=MLP, price="loss")
        found[f"curvature forget mlp {keep}"] = editor("curvature", keep=keep, kinds=MLP, aim="forget")
        found[f"curvature forget loss mlp {keep}"] = editor(
            "curvature", keep=keep, kinds=MLP, aim="forget", price="loss"
        )
        found[f"curvature forget loss EK-FAC mlp {keep}"] = editor(
            "curvature", keep=keep, kinds=MLP, aim="forget", price="loss", correction=True
        )
        found[f"curvature forget loss attn {keep}"] = editor(
            "curvature", keep=keep, kinds=ATTENTION, aim="forget", price="loss"
        )
    for layer in range(4):
        found[f"curvature mlp layer {layer} 0.6"] = editor("curvature", keep=0.6, kinds=MLP, layers=(layer,))
        found[f"curvature forget loss mlp layer {layer} 0.75"] = editor(
            "curvature", keep=0.75, kinds=MLP, layers=(layer,), aim="forget", price="loss"
        )
    for energy in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99):
        found[f"svd mlp {energy}"] = editor("svd", energy=energy, kinds=MLP)
        found[f"svd all {energy}"] = editor("svd", energy=energy, kinds=ALL)
    for step in ("00000", "00040", "00100", "00200", "00300"):
        for layer in range(4):
            found[f"rewind layer {layer} to {step}"] = rewind(step, layers=(layer,))
        found[f"rewind attention to {step}"] = rewind(step, kinds=ATTENTION)
        found[f"rewind mlp to {step}"] = rewind(step, kinds=MLP)
    for layer in range(4):
        found[f"norms of layer {layer}"] = editor("layernorm-removal", layers=(layer,))
    found["norms of all layers"] = editor("layernorm-removal")
    found["norms before attention"] = editor("layernorm-removal", kinds="attn.norm")
    found["norms before the mlp"] = editor("layernorm-removal", kinds="mlp.norm")
    found["norm, final"] = editor("layernorm-removal", kinds="norm")
    for scale in (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0):
        found[f"task vector of targets -{scale:g}"] = negation(scale)
    for scale in (0.25, 0.5, 0.75):
        found[f"task vector from step-00300 -{scale:g}"] = lambda lab, scale=scale: EDITORS["task-vector"](
            base=str(lab.folder / "snapshots" / "step-00300"), scale=-scale
        )(lab.view, lab.request())
    for mean in ("arithmetic", "geometric"):
        found[f"fuse of two, {mean}"] = fusion(mean)
    return found


def rewind(step: str, **settings: Any) -> Arm:
    """An arm that puts something back to one of the lab's snapshots."""

    def made(lab: Lab) -> Edit:
        earlier = str(lab.folder / "snapshots" / f"step-{step}")
        found: Edit = EDITORS["layer-rewind"](earlier=earlier, **settings)(lab.view, lab.request())
        return found

    return made


def negation(scale: float) -> Arm:
    """An arm that fine-tunes a copy on the targets and takes that step back, `scale` times."""

    def made(lab: Lab) -> Edit:
        folder = tuned(lab, lab.data.targets, "on-targets", steps=30)
        found: Edit = EDITORS["task-vector"](finetuned=folder, scale=-scale)(lab.view, lab.request())
        return found

    return made


def fusion(mean: str) -> Arm:
    """An arm that fuses two copies that learned ten new passages together and ten more each (`sets`)."""

    def made(lab: Lab) -> Edit:
        first = tuned(lab, lab.sets["shared"] + lab.sets["first"], "first", steps=150)
        second = tuned(lab, lab.sets["shared"] + lab.sets["second"], "second", steps=150)
        edit: Edit = EDITORS["fuse"](others=(first, second), weights=(0, 0.5, 0.5), mean=mean)(lab.view, Request())
        return edit

    return made


def tuned(lab: Lab, passages: Passages, name: str, *, steps: int, lr: float = 3e-4) -> str:
    """A folder with the lab's model trained on passages alone, all of them at every step."""
    folder = lab.work / name
    if not folder.is_dir():
        view = lab.view.copy()
        batch = next(iter(view.batches(passages, size=len(passages))))
        optimiser = torch.optim.AdamW(view.model.parameters(), lr=lr, weight_decay=0.0)
        for _ in range(steps):
            optimiser.zero_grad()
            suffix_nll(view, batch).mean().backward()
            optimiser.step()
        view.model.save_pretrained(folder)
    return str(folder)


def run(lab: Lab, name: str, arm: Arm) -> dict[str, Any]:
    """One row: the edit made, judged, taken out again, and its random control."""
    start = time.process_time()
    edit = arm(lab)
    row: dict[str, Any] = {"lab": lab.folder.name, "arm": name, "seed": lab.seed, "cpu s": time.process_time() - start}
    sizes = [float(lab.view.weight(site).detach().norm()) for site in edit.deltas]
    row["moved"] = (sum(norm**2 for norm in edit.norms.values()) / sum(size**2 for size in sizes)) ** 0.5
    row["forms"] = sorted({type(delta).__name__ for delta in edit.deltas.values()})
    with edit.apply(lab.view):
        row |= lab.judge()
        if name.startswith("fuse"):
            row["fused"] = learned(lab, lab.view)
            for one in ("first", "second"):
                row[one] = learned(lab, ModelView.open(lab.work / one))
    with random_like(edit, lab.view, lab.seed).apply(lab.view):
        row |= lab.glance()
    return row


def learned(lab: Lab, view: ModelView) -> dict[str, float]:
    """What a copy recites of the passages that copies learn."""
    return {name: Extraction()(view, part).figures["strict rate"].value for name, part in lab.sets.items()}


def table(rows: list[Mapping[str, Any]]) -> None:
    """Rows as a table, by lab."""
    print(f"| lab | arm | moved | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 3)}")
    for row in rows:
        cells = [f"{row[key]:.2f}" if key in row and row[key] is not None else "" for key in ("moved", *COLUMNS)]
        print(f"| {row['lab']} | {row['arm']} | {' | '.join(cells)} |")


def main() -> int:
    """Make the rows that are missing, then print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="*", type=Path)
    parser.add_argument("--rows", type=Path, required=True, help="JSONL of finished rows")
    parser.add_argument("--arms", default="*", help="patterns of names, with commas between")
    parser.add_argument("--work", type=Path, default=Path("spectral-work"), help="for factors and checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.rows.touch()
    done = [json.loads(line) for line in given.rows.read_text(encoding="utf8").splitlines()]
    for folder in given.labs:
        lab = Lab.open(folder, given.work, given.seed)
        wanted: dict[str, Arm | None] = {"none": None, **arms()}
        for name, arm in wanted.items():
            known = any((row["lab"], row["arm"], row["seed"]) == (folder.name, name, given.seed) for row in done)
            if known or not any(fnmatch.fnmatch(name, pattern.strip()) for pattern in given.arms.split(",")):
                continue
            if arm is None:
                row = {"lab": folder.name, "arm": name, "seed": given.seed, "moved": 0.0, **lab.judge()}
            else:
                row = run(lab, name, arm)
            done.append(row)
            with given.rows.open("a", encoding="utf8") as file:
                file.write(json.dumps(row) + "\n")
            told = " ".join(f"{key} {row[key]:.2f}" for key in COLUMNS if key in row)
            print(f"{name}: {told} cpu {row.get('cpu s', 0):.1f}", file=sys.stderr, flush=True)
    table(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
