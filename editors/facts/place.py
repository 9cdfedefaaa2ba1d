"""One fact at one token of its prompts, and a change of one map that was made for it there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from editors.deltas import LowRank
from editors.facts.contexts import Demand, Row, Token
from editors.facts.protected import Protected
from memloc.sites import Site

Variant = Literal["consistent", "2022", "prompt-only"]


class Keys(NamedTuple):
    """Which keys the closed form uses.

    Attributes:
        variant: the mean key in all places ("consistent"), its direction and the bare prompt's length ("2022"), or the
            bare prompt's in all places.
        bare: weight of the bare prompt's key in the mean key; None weighs all alike.
    """

    variant: Variant
    bare: float | None

    def mean(self, keys: Tensor) -> Tensor:
        """Of `keys` `[n, f]`, the bare prompt's first."""
        if self.bare is None or len(keys) == 1:
            return keys.mean(0)
        return self.bare * keys[0] + (1 - self.bare) * keys[1:].mean(0)


@dataclass(frozen=True)
class Place:
    """One fact at one token of its prompts, as rows.

    Attributes:
        token: where the model is edited.
        asked: the fact: its prompt, bare and behind prefixes, and the model's own ways to it.
        own: these ways.
        kept: what should stay.
        judges: those of it by which sites are judged; no change that is tried protects them.
    """

    token: Token
    asked: Demand
    own: tuple[Row, ...]
    kept: Protected
    judges: Protected


@dataclass(frozen=True)
class Found:
    """A change that makes a fact so.

    Attributes:
        site: of the map.
        delta: of rank one.
        wanted: [d] what the map should put out at the bare prompt's token.
        place: the fact at that token.
        note: what is worth knowing of it.
        merit: what it did when it was tried, to be compared.
    """

    site: Site
    delta: LowRank
    wanted: Tensor
    place: Place
    note: Mapping[str, Any]
    merit: tuple[float, float] = (0.0, 0.0)

    @property
    def row(self) -> Row:
        """The prompt, at the token it was edited at."""
        return self.place.asked.prompts[0]
