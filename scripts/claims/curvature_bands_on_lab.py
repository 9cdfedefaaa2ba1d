"""Does memorized text use directions of low curvature more than other text? By band, map and layer, on trained labs.

    python scripts/claims/curvature_bands_on_lab.py LAB [LAB ...] [--windows 1500] [--seed 0]

Every lab folder is one that `memloc lab` wrote. K-FAC factors are taken over windows of the training text, labels drawn
from the model. Compared: passages planted at the full dose (and the lower doses), controls never trained on, other
windows of the training text and windows of held-out text, all cut to the planted passages' prefix and suffix, so that
every token stands at the same position. A figure is the root mean square of what a map reads (input), or of what its
weight writes by the pairs of that band (output), where the suffix is predicted: memorized over controls, with a
95 % bootstrap interval of the ratio of means, both sides resampled. The published figures are of input or output norms
of OLMo-2 7B's layer 22, against clean text: +23 % in the bottom half, and the top tenth 26 % higher on clean text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from memloc.gradients.curvature import Basis, corrected, curvature_factors
from memloc.gradients.curvature_bands import BANDS, band_energies
from memloc.passages import Passage, Passages, read_jsonl
from memloc.sites import Kind, Site
from memloc.view import ModelView

Norms = np.ndarray
"""[n, bands] of a set of passages at one map."""


def main() -> int:
    """Print tables of every lab."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="+", type=Path)
    parser.add_argument("--windows", type=int, default=1500, help="of text for the factors")
    parser.add_argument("--compared", type=int, default=300, help="windows of text compared")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for folder in given.labs:
        view = ModelView.open(folder)
        text, sets = cut(view, folder, given)
        sites = view.sites(Kind.MLP_GATE, Kind.MLP_IN, Kind.MLP_OUT)
        factors = curvature_factors(view, text, sites, seed=given.seed, size=32)
        bases = {site: factors.basis(site) for site in sites}
        sizes = ", ".join(f"{len(part)} {name}" for name, part in sets.items())
        print(f"\n{folder.name}: factors of {factors.count} tokens; {sizes}")
        report("input, bands of A's eigenvectors", measure(view, sets, bases, "input"))
        report("output, bands of K-FAC's pairs", measure(view, sets, bases, "output"))
        better = corrected(view, text, bases, seed=given.seed, size=32)
        report("output, bands of EK-FAC's pairs", measure(view, sets, better, "output"))
    return 0


def cut(view: ModelView, folder: Path, given: argparse.Namespace) -> tuple[Passages, Mapping[str, Passages]]:
    """Text for the factors, and the sets compared, all of the planted passages' shape."""
    planted, controls = Passages.read(folder / "passages.jsonl"), Passages.read(folder / "controls.jsonl")
    prefix, suffix = len(planted[0].prefix), len(planted[0].suffix)
    window = prefix + suffix
    windows = {}
    for split in ("train", "held-out"):
        rows = [row["text"] for _, row in read_jsonl(folder / "corpus.jsonl") if row["split"] == split]
        whole = Passages.from_texts(rows, view.tokenizer, window=window, origin=split)
        fits = [item for item in whole if len(item.ids) == window]
        order = np.random.default_rng(given.seed).permutation(len(fits))
        shaped = [Passage(fits[n].id, fits[n].ids[:prefix], fits[n].ids[prefix:]) for n in order]
        windows[split] = Passages(tuple(shaped), split)
    doses = sorted({item.tags["dose"] for item in planted}, reverse=True)
    sets = {"memorized": planted.where(lambda item: item.tags["dose"] == doses[0])}
    sets |= {"lower doses": planted.where(lambda item: item.tags["dose"] < doses[0]), "controls": controls}
    text, rest = windows["train"][: given.windows], windows["train"][given.windows :]
    return text, {**sets, "train text": rest[: given.compared], "held-out text": windows["held-out"][: given.compared]}


def measure(
    view: ModelView, sets: Mapping[str, Passages], bases: Mapping[Site, Basis], energy: str
) -> Mapping[str, Mapping[Site, Norms]]:
    """Norms by band of every set at every map."""
    return {
        name: {
            site: found.sqrt().numpy()
            for site, found in band_energies(view, part, bases, energy=energy, size=32).items()  # type: ignore[arg-type]
        }
        for name, part in sets.items()
    }


def report(title: str, found: Mapping[str, Mapping[Site, Norms]]) -> None:
    """A table of memorized over controls, and the means over maps of every set over controls."""
    print(f"\n{title}: memorized over controls\n| map | {' | '.join(BANDS)} |\n|{'---|' * (len(BANDS) + 1)}")
    for site, controls in found["controls"].items():
        print(f"| {site} | {' | '.join(cells(found['memorized'][site], controls))} |")
    print("over controls, mean of maps:")
    for name, sites in found.items():
        ratios = [part.mean(0) / found["controls"][site].mean(0) for site, part in sites.items()]
        print(f"  {name}: {' / '.join(f'{entry:.3f}' for entry in np.mean(ratios, 0))}", flush=True)


def cells(mine: Norms, theirs: Norms, *, draws: int = 2000, seed: int = 0) -> list[str]:
    """Ratio of means of every band with its interval."""
    generator = np.random.default_rng(seed)
    picks = [generator.integers(0, len(part), (draws, len(part))) for part in (mine, theirs)]
    drawn = mine[picks[0]].mean(1) / theirs[picks[1]].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    ratio = mine.mean(0) / theirs.mean(0)
    rows = zip(*(100 * (entry - 1) for entry in (ratio, low, high)), strict=True)
    return [f"{mean:+.1f} % ({least:+.1f} to {most:+.1f})" for mean, least, most in rows]


if __name__ == "__main__":
    sys.exit(main())
