"""Which layers of a trained lab, put back to an earlier checkpoint, stop it reciting, and what ordinary text says.

    python scripts/claims/rewinding_on_lab.py LAB [LAB ...] [--dose 64] [--count 50] [--json FILE]

Every lab folder is one that `memloc lab` wrote, with its snapshots. Passages are those planted at the full dose, beside
them windows of held-out text.

K07  memorization is spread over layers and components: at least two layers, and both kinds of sublayer (attention and
     feed-forward maps), cost more than 5 % of exact recitation when they are put back to the last snapshot that does
     not recite (with all layers put back to it at least 95 % of recitation is lost); and putting back no single layer
     of the upper half removes all of it.
Beside it: windows of layers, criticality, and retraining on ordinary text from that snapshot.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from memloc.localizers.layer_retrain import LayerRetrain
from memloc.localizers.layer_rewind import LayerRewind
from memloc.passages import Passages, read_jsonl
from memloc.view import ModelView

ATTENTION, FEED_FORWARD = "attn.q,attn.k,attn.v,attn.out", "mlp.gate,mlp.in,mlp.out"


def main() -> None:
    """Rewind, retrain, print a verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="+", type=Path)
    parser.add_argument("--dose", type=int, default=64)
    parser.add_argument("--count", type=int, default=50, help="passages")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {str(lab): of_lab(lab, given.dose, given.count) for lab in given.labs}
    held = [name for name, entry in found.items() if entry["K07"]]
    print(f"K07 spread over layers and components: {'holds' if len(held) == len(found) else 'does NOT hold'} "
          f"({len(held)} of {len(found)} labs)")  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")


def of_lab(lab: Path, dose: int, count: int) -> dict[str, Any]:
    """Everything of one lab, printed."""
    view, start = ModelView.open(lab), time.process_time()
    passages = Passages.read(lab / "passages.jsonl", view.tokenizer, prefix=32, suffix=32)
    passages = passages.where(lambda item: item.tags["dose"] == dose)[:count]
    text, train = (windows(lab, view, part, most) for part, most in (("held-out", 60), ("train", 400)))
    print(f"{lab}: {len(passages)} passages of dose {dose}, {len(text)} windows of held-out text")
    snapshots = str(lab / "snapshots")
    whole = LayerRewind(earlier=snapshots, window=0)(view, passages, contrast=text).notes
    print(f"  as trained: {whole['nll']:.3f} nats, {whole['exact_match']:.0%} recited; "
          f"text {whole['contrast_nll']:.3f} nats")  # fmt: skip
    table(whole)
    everything = whole["exact_match_drop"][f"L0-L{view.layers - 1}"]
    last = [lab / "snapshots" / name for name, lost in everything.items() if lost >= 0.95 * whole["exact_match"]][-1]
    print(f"  the last snapshot that does not recite: {last.name}")
    sublayers = {
        name: LayerRewind(earlier=str(last), kinds=kinds)(view, passages, contrast=text).notes
        for name, kinds in (("attention", ATTENTION), ("feed-forward", FEED_FORWARD))
    }
    for name, notes in sublayers.items():
        print(f"  {name} maps alone put back:")
        table(notes)
    retrained = LayerRetrain(earlier=str(last), steps=60, lr=3e-4)(view, passages, contrast=train)
    for window in retrained.notes["reset"]:
        cells = {name: next(iter(retrained.notes[name][window].values())) for name in retrained.notes
                 if isinstance(retrained.notes[name], Mapping)}  # fmt: skip
        print(f"  retrained {window} from there: " + ", ".join(f"{name} {cells[name]:.3f}" for name in cells))
    print(f"  {time.process_time() - start:.0f} CPU-s")
    drops = {f"L{layer}": whole["exact_match_drop"][f"L{layer}"][last.name] for layer in range(view.layers)}
    each = [max(row[last.name] for row in notes["exact_match_drop"].values()) for notes in sublayers.values()]
    upper = [drops[f"L{layer}"] for layer in range(view.layers // 2, view.layers)]
    verdict = sum(value > 0.05 for value in drops.values()) >= 2 and min(each) > 0.05
    return {"K07": verdict and max(upper) < whole["exact_match"], "rewound": dict(whole),
            "sublayers": sublayers, "retrained": dict(retrained.notes)}  # fmt: skip


def table(notes: Mapping[str, Any]) -> None:
    """A line a window: at each checkpoint the rise, the share no longer recited, the text's rise, the distance."""
    for window, row in notes["rise"].items():
        cells = [
            f"{name} {value:+.2f} ({notes['exact_match_drop'][window][name]:.0%} lost, text "
            f"{notes['contrast_rise'][window][name]:+.2f}, moved {notes['moved'][window][name]:.2f})"
            for name, value in row.items()
        ]
        print(f"    {window:>6}: " + "; ".join(cells))


def windows(lab: Path, view: ModelView, part: str, most: int) -> Passages:
    """Windows of 64 tokens of the lab's text, held out or trained on."""
    texts = [record["text"] for _, record in read_jsonl(lab / "corpus.jsonl") if record["split"] == part]
    found = Passages.from_texts(texts[: 8 * most], view.tokenizer, window=64, origin=part)
    return found.where(lambda item: len(item.ids) == 64)[:most]


if __name__ == "__main__":
    main()
