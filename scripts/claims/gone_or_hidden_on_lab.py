"""Is what an edit took out of a lab gone, or hidden? Edits of ten passages, verified; and false alarms.

    python scripts/claims/gone_or_hidden_on_lab.py LAB OUT [--only NAME ...] [--effort quick|full] [--false-alarms N]

Edits: the demo's unlearning (sparse fine-tuning of a fifth of the weights); the 3 % of neurons that integrated
gradients blame, silenced; every map in the blocks put back to a snapshot; or, by its name, any editor that forgets
passages as it comes (those that tune weights on the demo's fifth of them; forget-passage chooses for itself). Each
beside a random edit of equal size and one in the largest weights. With --false-alarms, N times ten texts the lab never
saw are taught to it and then really removed, by putting back the weights: a battery that calls one of those hidden
cries wolf.

Writes OUT/EDIT/report.html and prints Markdown tables. About a minute of one core an edit with the lab of size "demo".
"""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path

import torch

from editors.base import Request
from editors.deltas import Delta, Dense
from editors.demo.material import material
from editors.demo.stages import localize
from editors.edit import Edit
from editors.methods import EDITORS
from editors.pruners.neuron_dropout import NeuronDropout
from editors.rewriters.sparse_fine_tune import SparseFineTune
from editors.tuning.descent import working_copy
from editors.verification import Effort, Material, Verification, verify
from memloc.objectives import suffix_nll
from memloc.passages import Passage, Passages, encode, read_jsonl
from memloc.provenance import Provenance
from memloc.sites import Site
from memloc.terminal import Terminal, progress_shown
from memloc.view import ModelView

ALONE = ("forget-passage", "rmu")
"""Editors that choose their places themselves."""


def main() -> None:
    """Make the edits, verify them, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lab", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--effort", choices=["quick", "full"], default="quick")
    parser.add_argument("--snapshot", default="step-00100")
    parser.add_argument("--only", nargs="*", default=["unlearned", "silenced", "rewound"], help="or editors' names")
    parser.add_argument("--false-alarms", type=int, default=0)
    given = parser.parse_args()
    say, view = Terminal().note, ModelView.open(given.lab)
    cut = material(given.lab, view, targets=10)
    data = Material(targets=cut.targets, controls=cut.controls, retain=cut.named, memorized=cut.unnamed,
                    facts=cut.facts, text=cut.held_out)  # fmt: skip
    effort = Effort.named(given.effort)
    with progress_shown():
        for name in given.only:
            folder = given.out / name
            edit = made(name, view, given.lab, cut, folder, given.snapshot)
            found = verify(view, edit, data, effort=effort, folder=folder / "checks")
            found.save(folder)
            say(f"\n### {name}\n\n{found.sentence}\n\n{table(found)}")
        if given.false_alarms:
            say(alarms(given.lab, given.false_alarms, effort))


def made(name: str, view: ModelView, lab: Path, cut: object, folder: Path, snapshot: str) -> Edit:
    """One of the edits; kept in `folder`."""
    path = folder / "edit.safetensors"
    if path.is_file():
        return Edit.load(path)
    if name == "rewound":
        edit = difference(view, ModelView.open(lab / "snapshots" / snapshot))
    else:
        maps = localize(view, cut)  # type: ignore[arg-type]
        request = Request(forget=cut.targets, retain=cut.named, text=cut.kept_text)  # type: ignore[attr-defined]
        if name in EDITORS:
            chosen = None if name in ALONE else maps.weights.top(fraction=0.2)
            edit = EDITORS[name]()(view, replace(request, selection=chosen))
        elif name == "unlearned":
            chosen = Request(**{**vars(request), "selection": maps.weights.top(fraction=0.2)})
            edit = SparseFineTune()(view, chosen)
        else:
            edit = NeuronDropout()(view, Request(**{**vars(request), "selection": maps.neurons.top(fraction=0.03)}))
    path.parent.mkdir(parents=True, exist_ok=True)
    edit.save(path)
    return edit


def difference(before: ModelView, after: ModelView) -> Edit:
    """The dense edit of every map that turns one model's blocks into the other's."""
    found: dict[Site, Delta] = {}
    for site in before.sites(*before.kinds):
        found[site] = Dense((after.weight(site) - before.weight(site)).detach().clone())
    return Edit.of(before, found, Provenance("rewound", {}, None, {"model": before.digest}))


def alarms(lab: Path, count: int, effort: Effort) -> str:
    """Texts taught and really removed, `count` times: how often each check cries wolf."""
    innocent = ModelView.open(lab)
    unseen = _windows(innocent, lab, "held-out")
    ordinary, words = _windows(innocent, lab, "train")[:400], []
    for seed in range(count):
        order = list(range(len(unseen)))
        random.Random(seed).shuffle(order)
        drawn = Passages(tuple(unseen[at] for at in order))
        data = Material(targets=drawn[:10], controls=drawn[10:40])
        taught = working_copy(innocent)
        _teach(taught, data.targets, ordinary)
        found = verify(taught, difference(taught, innocent), data, effort=effort, seed=seed)
        words.append({finding.check: (finding.verdict, finding.left.value) for finding in found.findings})
        recited = found["as-given"].recited
        words[-1]["recited before"] = ("", float(recited[2] if recited else 0))
    lines = ["| check | gone | cannot tell | hidden | memory left, mean |", "|---|---:|---:|---:|---:|"]
    for check in words[0]:
        rows = [row[check] for row in words if check in row]
        counts = [sum(word == want for word, _ in rows) for want in ("gone", "cannot tell", "hidden")]
        mean = sum(left for _, left in rows) / len(rows)
        lines.append(f"| {check} | {' | '.join(map(str, counts))} | {mean:.3f} |")
    return f"\n### taught and really removed, {count} draws of 10 targets and 30 texts never seen\n\n" + "\n".join(
        lines
    )


def table(found: Verification) -> str:
    """Checks and damages as Markdown."""
    lines = ["| check | verdict | memory left (95 %) | p | written whole: targets, never seen, before |",
             "|---|---|---:|---:|---:|"]  # fmt: skip
    for entry in found.findings:
        left = f"{entry.left.value:.2f} ({entry.left.low:.2f} to {entry.left.high:.2f})"
        said = "—" if entry.recited is None else ", ".join(map(str, entry.recited))
        lines.append(f"| {entry.check} ({entry.way}) | {entry.verdict} | {left} | {entry.p:.2g} | {said} |")
    lines += [
        "",
        "| what should stay | verdict | lost | random | largest weights | n |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for damage in found.damages:
        losses = " | ".join("—" if x is None else f"{x:.3f}" for x in (damage.loss, damage.random, damage.magnitude))
        lines.append(f"| {damage.group} | {damage.verdict} | {losses} | {damage.n} |")
    moved = ", ".join(f"{bits} bits: {share:.3f}" for bits, share in found.moved.items())
    return "\n".join(lines) + f"\n\nShare of edited weights in another bucket: {moved}."


def _windows(view: ModelView, lab: Path, split: str) -> Passages:
    items = []
    for at, record in read_jsonl(lab / "corpus.jsonl"):
        row = encode(view.tokenizer, record["text"]).ids if record["split"] == split else ()
        if len(row) >= 64 and len(items) < 400:
            items.append(Passage(f"{split}-{at}", row[:32], row[32:64]))
    return Passages(tuple(items))


def _teach(view: ModelView, targets: Passages, ordinary: Passages, *, steps: int = 80, lr: float = 3e-3) -> None:
    """Adam on the blocks' maps, ordinary text beside, so that the rest of the model stays about what it was."""
    weights = list({id(view.parameter(site)): view.parameter(site) for site in view.sites(*view.kinds)}.values())
    optimiser = torch.optim.Adam(weights, lr=lr)
    every = list(view.batches(ordinary, size=10))
    for step in range(steps):
        with view.trainable(weights):
            kept = suffix_nll(view, every[step % len(every)]).mean()
            (6 * suffix_nll(view, next(view.batches(targets))).mean() + kept).backward()  # type: ignore[no-untyped-call]
            optimiser.step()


if __name__ == "__main__":
    main()
