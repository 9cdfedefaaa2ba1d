"""What a model writes by itself, whole sequences: how far an edit changed it, which token accuracy hides."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memloc.measurement import Figure, Measurement
from memloc.measures.continuation import continue_greedy
from memloc.measures.figures import figure
from memloc.passages import Passages
from memloc.provenance import Provenance
from memloc.statistics import bootstrap_interval, rate_interval
from memloc.view import ModelView

GRAM = 4


@dataclass(frozen=True)
class Writing:
    """Greedy continuations of prefixes, beside those of the model before the edit.

    Rows: id, same (the whole continuation is the original's), agreement (share of it before the first difference),
    distance (Levenshtein, in tokens, as a share of its length), repeated (share of 4-grams that stood there before),
    entropy (of its tokens, nats).

    Figures: "written alike" (rows the same to the end), "agreement", "edit distance", "repeated 4-grams",
    "token entropy"; means over the rows.

    Attributes:
        reference: token ids the original writes after each prefix.
        digest: of the prefixes.
    """

    reference: tuple[tuple[int, ...], ...]
    digest: str

    @classmethod
    def of(cls, view: ModelView, prompts: Passages) -> Writing:
        """With the original's continuations, as long as each suffix."""
        return cls(continue_greedy(view, prompts), prompts.digest)

    def __call__(self, view: ModelView, prompts: Passages) -> Measurement:
        """Measure what `view` writes.

        Raises:
            ValueError: other prompts than the reference was made with.
        """
        if prompts.digest != self.digest:
            raise ValueError("other prompts than the reference was written for")
        said = continue_greedy(view, prompts)
        rows: list[dict[str, Any]] = []
        for item, old, new in zip(prompts, self.reference, said, strict=True):
            alike = next((at for at, (a, b) in enumerate(zip(old, new, strict=True)) if a != b), len(old))
            rows.append({"id": item.id, "same": old == new, "agreement": alike / len(old),
                         "distance": levenshtein(old, new) / len(old), "repeated": repeated(new),
                         "entropy": entropy(new)})  # fmt: skip
        provenance = Provenance("writing", {"gram": GRAM}, None, {"model": view.digest, "passages": prompts.digest})
        return Measurement("writing", {item.name: item for item in _figures(rows)}, tuple(rows), provenance)


def prompts_of(text: Passages, *, count: int = 32, prefix: int = 16, suffix: int = 24) -> Passages:
    """Windows of ordinary text cut anew: `prefix` tokens to continue, `suffix` to write."""
    items = [type(item)(item.id, item.ids[:prefix], item.ids[prefix : prefix + suffix])
             for item in text if len(item.ids) >= prefix + suffix]  # fmt: skip
    step = max(1, len(items) // count)
    return Passages(tuple(items[::step][:count]), text.origin)


def levenshtein(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens to insert, delete or exchange to turn one row into the other."""
    before = list(range(len(other) + 1))
    for row, mine in enumerate(one, 1):
        now = [row]
        for column, theirs in enumerate(other, 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (mine != theirs)))
        before = now
    return before[-1]


def repeated(said: Sequence[int]) -> float:
    """Share of 4-grams that occurred earlier in the row; 0 for rows shorter than one."""
    grams = [tuple(said[at : at + GRAM]) for at in range(len(said) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def entropy(said: Sequence[int]) -> float:
    """Of the row's tokens, nats."""
    counts = Counter(said).values()
    return -sum(count / len(said) * math.log(count / len(said)) for count in counts) + 0.0


def _figures(rows: Sequence[dict[str, Any]]) -> list[Figure]:
    same = sum(row["same"] for row in rows)
    found = [figure("written alike", same / len(rows), len(rows), rate_interval(same, len(rows)), "share")]
    columns = (("agreement", "agreement", "share"), ("edit distance", "distance", "share"),
               ("repeated 4-grams", "repeated", "share"), ("token entropy", "entropy", "nats"))  # fmt: skip
    for name, key, unit in columns:
        values = [row[key] for row in rows]
        found.append(figure(name, sum(values) / len(values), len(values), bootstrap_interval(values), unit))
    return found
