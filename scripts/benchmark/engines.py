"""The same localization by plain hooks, nnsight's traces and TransformerLens's hook points: seconds, and how far apart.

Run: python scripts/benchmark/engines.py MODEL PASSAGES
"""

from __future__ import annotations

import sys

from alternating import cpu_seconds

from memloc.engines.engine import ENGINES
from memloc.localizers.activation import Activation
from memloc.localizers.grad_activation import GradActivation
from memloc.passages import Passages
from memloc.scores import Localization
from memloc.view import ModelView


def main(model: str, data: str) -> None:
    """Print a line for each engine and method."""
    passages = Passages.read(data, ModelView.open(model).tokenizer)
    first: dict[str, Localization] = {}
    for engine in ENGINES:
        view = ModelView.open(model, engine=engine)
        Activation()(view, passages)
        for method in (Activation(), GradActivation()):
            spent, found = cpu_seconds(lambda method=method, view=view: method(view, passages).mean())
            name = type(method).__name__
            mine = first.setdefault(name, found)
            away = max(float((found.scores[site] - mine.scores[site]).abs().max()) for site in mine.scores)
            largest = max(float(scores.abs().max()) for scores in mine.scores.values())
            print(f"{name} by {engine}: {spent:.2f} CPU-s, {away / largest:.1e} of the largest score from hooks")


if __name__ == "__main__":
    main(*sys.argv[1:])
