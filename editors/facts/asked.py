"""Many facts as rows of tokens: the prompts of all, the model's own ways to them, and which rows make up a key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.facts.batch_settings import BatchEditor
from editors.facts.contexts import Demand, Row, demand, row_of
from editors.facts.own_words import recalls, shared_ways
from memloc.passages import Facts
from memloc.view import ModelView


@dataclass(frozen=True)
class Asked:
    """The rows at which keys are read, and how they are averaged.

    Attributes:
        rows: of all facts.
        mean: [n, rows] float64, each line one key's weights.
        first: [n] the row at which what is missing is measured.
        fact: [n] whose key it is.
    """

    rows: tuple[Row, ...]
    mean: Tensor
    first: Tensor
    fact: Tensor

    @classmethod
    def of(cls, demands: Sequence[Demand], own: Sequence[int], ways: str) -> Asked:
        """Half of a key is the bare prompt's and half that of the others, as MEMIT does.

        Args:
            demands: the facts.
            own: how many of each one's last prompts are the model's own ways to it.
            ways: "each" gives those a key of their own.
        """
        rows: list[Row] = []
        lines: list[list[tuple[int, float]]] = []
        fact = []
        for index, (entry, count) in enumerate(zip(demands, own, strict=True)):
            start, alone = len(rows), count if ways == "each" else 0
            rows += entry.prompts
            rest = range(start + 1, len(rows) - alone)
            half = 0.5 if len(rest) else 1.0
            lines.append([(start, half), *((row, (1 - half) / len(rest)) for row in rest)])
            lines += [[(row, 1.0)] for row in range(len(rows) - alone, len(rows))]
            fact += [index] * (1 + alone)
        mean = torch.zeros(len(lines), len(rows), dtype=torch.float64)
        for line, parts in enumerate(lines):
            for row, weight in parts:
                mean[line, row] = weight
        return cls(tuple(rows), mean, torch.tensor([parts[0][0] for parts in lines]), torch.tensor(fact))

    def keys(self, demands: Sequence[Demand]) -> list[list[int]]:
        """For every fact the key of each of its prompts, and of its essence that of the bare prompt."""
        weight = (self.mean > 0).double()
        of_row = weight.argmax(0).tolist()
        found, start = [], 0
        for entry in demands:
            mine = of_row[start : start + len(entry.prompts)]
            start += len(entry.prompts)
            found.append(mine + mine[:1] * (entry.essence is not None))
        return found


def demands_of(
    editor: BatchEditor, view: ModelView, facts: Facts, prefixes: Sequence[str], draw: torch.Generator
) -> tuple[tuple[Demand, ...], list[int]]:
    """The facts as rows, and how many of each one's rows are the model's own ways to it."""
    found, own = [], []
    essence = editor.place == "subject-last" and editor.kl_weight > 0
    ways = recalls(view, tuple(facts), editor.recalls, draw, top_k=2 * editor.top_k)
    for fact, mine in zip(facts, shared_ways(view, facts, ways, editor.recalls), strict=True):
        asked = demand(fact, view.tokenizer, prefixes, editor.place, essence=essence)
        rows = tuple(dict.fromkeys(row_of(prompt, editor.place) for prompt in mine))
        found.append(Demand(asked.id, asked.prompts + rows, asked.target, asked.essence))
        own.append(len(rows))
    return tuple(found), own
