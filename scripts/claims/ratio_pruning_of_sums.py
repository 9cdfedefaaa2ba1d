"""Neurons of low participation ratio silenced by an edit: do wrong sums go and does the rule stay (claim K33)?

    python scripts/claims/ratio_pruning_of_sums.py [--seeds 0,1,2] [--json FILE]

The claim is of a two-layer quadratic network (Doshi et al. 2023, arXiv:2310.13061), which
scripts/claims/corrupted_arithmetic.py re-creates. Here the same is asked of small transformers that were trained on
sums mod 31 with a tenth of the labels wrong: neurons ordered by participation-ratio, the best-scored share silenced by
neuron-dropout, as an edit of weights.
Beside it the reverse order and, as mean of five, random order. Printed for every share and order: wrong sums recited
(of the wrong labels), wrong sums answered with the truth, right sums answered, sums never trained on answered.

It holds where, at some share, lowest-ratio-first takes at least .15 of the wrong sums and at most .05 of the right
ones, and the wrong sums fall further below the right ones than under the reverse and the random order.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from editors.base import Request
from editors.pruners.neuron_dropout import NeuronDropout
from memloc.localizers.participation_ratio import ParticipationRatio
from memloc.passages import Passage, Passages
from memloc.scores import Localization, Selection
from memloc.truth.worlds import Ground
from memloc.truth.wrong_sums import WrongSums, answered
from memloc.view import ModelView

SHARES = (0.05, 0.1, 0.2, 0.4, 0.6)
RANDOM = 5
WORLDS = {
    "one layer": WrongSums(),
    "one layer, strong decay": WrongSums(decay=4.0),
    "two layers": WrongSums(layers=2),
}


def main() -> None:
    """Train, silence, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for world, recipe in WORLDS.items():
        for seed in map(int, given.seeds.split(",")):
            curves = of_model(recipe, seed)
            found[f"{world}, seed {seed}"] = curves
            print(f"\n{world}, seed {seed}: whole {shown(curves['whole']['0'])}")
            for order in ("lowest", "highest", "random"):
                for share, row in curves[order].items():
                    print(f"  {order:>7} {float(share):4.0%}: {shown(row)}", flush=True)
            print(f"  {'holds' if holds(curves) else 'does NOT hold'}")
    print(f"\nholds in {sum(map(holds, found.values()))} of {len(found)}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")


def of_model(recipe: WrongSums, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Order to share to figures, of one trained model."""
    known = recipe.make(Ground("sums", seed=seed), "sums-0")
    truth = Passages(tuple(corrected(item, recipe.modulus) for item in known.passages), "truth")
    rest = {"right": known.controls or Passages(()), "unseen": known.text or Passages(())}
    sets = {"wrong": known.passages, "truth": truth, **rest}
    scores = ParticipationRatio(tokens=f"0-{recipe.modulus - 1}")(known.view, known.passages)
    flipped = Localization(scores.grain, {site: -s for site, s in scores.scores.items()}, scores.provenance)
    curves: dict[str, dict[str, dict[str, float]]] = {"whole": {"0": under(known.view, sets, [])}}
    for order, ranked in (("lowest", scores), ("highest", flipped)):
        curves[order] = {str(share): under(known.view, sets, [ranked.top(fraction=share)]) for share in SHARES}
    curves["random"] = {
        str(share): under(known.view, sets, [scores.top(fraction=share).random_like(draw) for draw in range(RANDOM)])
        for share in SHARES
    }
    return curves


def corrected(item: Passage, modulus: int) -> Passage:
    """The same sum with its true answer."""
    return Passage(f"{item.id} true", item.prefix, ((item.prefix[0] + item.prefix[1]) % modulus,))


def under(view: ModelView, sets: dict[str, Passages], selections: Sequence[Selection]) -> dict[str, float]:
    """Shares answered as the sets say, mean over the edits; of the model as it is where there are none."""
    if not selections:
        return {name: answered(view, rows) for name, rows in sets.items()}
    total = dict.fromkeys(sets, 0.0)
    for selection in selections:
        with NeuronDropout()(view, Request(selection=selection)).apply(view):
            for name, rows in sets.items():
                total[name] += answered(view, rows) / len(selections)
    return total


def holds(curves: dict[str, dict[str, dict[str, float]]]) -> bool:
    """Whether the claim does, at some share."""
    whole = curves["whole"]["0"]

    def gap(order: str, share: str) -> float:
        row = curves[order][share]
        return (whole["wrong"] - row["wrong"]) - (whole["right"] - row["right"])

    return any(
        whole["wrong"] - row["wrong"] >= 0.15
        and whole["right"] - row["right"] <= 0.05
        and gap("lowest", share) > max(gap("highest", share), gap("random", share))
        for share, row in curves["lowest"].items()
    )


def shown(row: dict[str, float]) -> str:
    """One row as text."""
    return (
        f"wrong recited {row['wrong']:.3f}, corrected {row['truth']:.3f}, right {row['right']:.3f}, "
        f"unseen {row['unseen']:.3f}"
    )


if __name__ == "__main__":
    main()
