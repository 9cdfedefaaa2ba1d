"""The demo from beginning to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from editors.demo.material import FEW, HASTY, MASKS, SHARE, few_groups, groups_of, material
from editors.demo.page import page
from editors.demo.stages import Found, by_chance, check, fewest_steps, localize, rewrite, ship, unlearn
from editors.rewriters.rome import Rome
from editors.rewriters.sparse_fine_tune import SparseFineTune
from memloc.lab.build import build
from memloc.lab.recipe import preset
from memloc.measures.extraction import Extraction
from memloc.terminal import Terminal
from memloc.view import ModelView


def demo(out: Path, *, size: str, seed: int, terminal: Terminal) -> dict[str, Any]:
    """Run the loop and write `out`: lab/, localization.safetensors, two edits, two checkpoints, two reports.

    The lab is kept from an earlier run with the same recipe; checkpoints of an earlier run are replaced.

    Returns:
        The verdicts and the paths, JSON values.

    Cost: about five minutes on two cores for the size "demo", a minute for "tiny".
    """
    lab = build(preset(size, seed=seed), out / "lab", log=terminal.note)
    view = ModelView.open(lab)
    data = material(lab, view, facts=20 if size == "demo" else 6, seed=seed)
    say = terminal.note
    say(f"localizing {len(data.targets)} targets, beside {len(data.controls)} controls")
    maps = localize(view, data)
    maps.weights.save(out / "localization.safetensors")
    say(f"unlearning in {SHARE:.0%} of the weights, then in as many at random")
    gone = unlearn(view, data, groups_of(data), maps.weights.top(fraction=SHARE), SparseFineTune(), seed)
    gone.edit.save(out / "unlearn.edit.safetensors")
    say(f"unlearning in {FEW:.1%} of the weights, then in as many at random")
    chosen, groups = maps.weights.top(fraction=FEW), few_groups(data)
    hasty = fewest_steps(view, data, groups[0], chosen, SparseFineTune(**HASTY), seed)
    few = unlearn(view, data, groups, chosen, hasty, seed)
    seeds = range(seed + 1, seed + MASKS)
    more = by_chance(view, data, few.groups[0], few.selection, hasty, seeds)
    chance = (few.random[few.groups[0].name], *more)
    say(f"editing {len(data.facts)} facts one by one")
    changed = rewrite(view, data, Rome(), seed)
    changed.edit.save(out / "fact.edit.safetensors")
    say("writing, reloading and undoing checkpoints")
    shipped = (
        *ship(gone.edit, lab, out / "unlearned", gone.groups[0], gone.after),
        *ship(changed.edit, lab, out / "edited"),
    )
    say("asking whether the targets are gone, or only hidden")
    checked = check(view, data, gone.edit, out / "verified", seed)
    found = Found(data, Extraction()(view, data.planted), maps, gone, few, chance, changed, shipped, checked)
    report = page(view, found, out, f"memloc demo --out {out.name} --size {size} --seed {seed}")
    written = report.save(out)
    for path in written:
        say(f"written: {path}")
    verdicts = report.to_json()["verdicts"]
    terminal.table("what was found", ["", "", ""],
                   [[_mark(entry["holds"]), entry["text"], entry["measured"]] for entry in verdicts])  # fmt: skip
    return {"out": str(out), "verdicts": verdicts, "report": [str(path) for path in written]}


def _mark(holds: bool | None) -> str:
    return {True: "yes", False: "NO", None: "·"}[holds]
