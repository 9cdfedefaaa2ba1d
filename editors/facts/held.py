"""What an edit would change against its will: found by trying it on what should stay, and held when it is made again.

A mean over everything that should stay spends its strength evenly, also on the many answers that the edit would not
have moved. Those that it does move are known once it was tried; their keys are held one by one. Ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from editors.deltas import Delta
from editors.facts.contexts import Demand, Row
from editors.facts.protected import Protected
from editors.facts.together import likeliest
from editors.hook_form import as_if
from memloc.sites import Site
from memloc.view import ModelView


class Lost(NamedTuple):
    """Rows at which an answer was lost, at the tokens whose outputs are to be held.

    Attributes:
        named: what was named, and namesakes.
        said: tokens of the model's own sentences.
    """

    named: tuple[Row, ...]
    said: tuple[Row, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many, to be noted."""
        return {"lost": len(self.named), "lost own": len(self.said)}

    def of(self, kept: Protected) -> float:
        """The share of what is named, and that of what the model says, summed."""
        return len(self.named) / max(1, len(kept.named)) + len(self.said) / max(1, len(kept.said))


@dataclass(frozen=True)
class Watch:
    """What is looked at when an edit is tried; no weight is touched.

    Attributes:
        view: the model.
        kept: what should stay.
        before: [n] the likeliest token behind each of these, clean.
        asked: each fact's bare prompt with its target, at the tokens behind which the target's stand.
        target: these tokens.
        fact: and whose they are.
    """

    view: ModelView
    kept: Protected
    before: Tensor
    asked: tuple[Row, ...]
    target: Tensor
    fact: Tensor

    @classmethod
    def of(cls, view: ModelView, kept: Protected, demands: Sequence[Demand]) -> Watch:
        """Cost: a forward of everything protected."""
        asked = tuple(
            Row(entry.prompts[0].ids + entry.target[:-1], len(entry.prompts[0].ids) - 1 + step)
            for entry in demands for step in range(len(entry.target))
        )  # fmt: skip
        target = torch.tensor([token for entry in demands for token in entry.target])
        fact = torch.tensor([index for index, entry in enumerate(demands) for _ in entry.target])
        return cls(view, kept, likeliest(view, _answered(kept)), asked, target, fact)

    def lost(self, deltas: Mapping[Site, Delta]) -> Lost:
        """Where another token is the likeliest with `deltas`. Cost: a forward of everything protected."""
        with as_if(self.view, deltas):
            changed = (likeliest(self.view, _answered(self.kept)) != self.before).tolist()
        rows = (*self.kept.named, *self.kept.said)
        first = len(self.kept.named)
        named = tuple(row for row, other in zip(rows[:first], changed[:first], strict=True) if other)
        said = tuple(row for row, other in zip(rows[first:], changed[first:], strict=True) if other)
        return Lost(named, said)

    def missed(self, deltas: Mapping[Site, Delta]) -> list[int]:
        """Facts whose target is not the likeliest answer to the bare prompt with `deltas`, token by token."""
        with as_if(self.view, deltas):
            wrong = likeliest(self.view, self.asked) != self.target
        return sorted(set(self.fact[wrong].tolist()))


def _answered(kept: Protected) -> tuple[Row, ...]:
    """The rows of what is kept, at the tokens behind which the answers stand."""
    return (*(Row(row.ids, at) for row, at in zip(kept.named, kept.asked, strict=True)), *kept.said)
