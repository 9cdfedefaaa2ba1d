"""From scores of single prompts to the neurons of a fact: thresholds, what paraphrases share, what a relation shares.

Numbers in, numbers out: places are flat indices (layer by layer), no model is needed.

Source: Dai et al. 2022, arXiv:2104.08696, sections 3.3 and 4.1; its public code names the constants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from memloc.errors import InputError

Unit = Literal["share", "absolute", "quantile"]
Places = tuple[int, ...]


@dataclass(frozen=True)
class Refinement:
    """What of a relation's facts is kept, and how it came to that.

    Attributes:
        kept: of every fact, the places kept, ascending.
        share: the share of a fact's prompts a place had to pass in, as it ended.
        rounds: how often the share was moved.
        mean: places a fact, on average.
    """

    kept: Mapping[str, Places]
    share: float
    rounds: int
    mean: float


def coarse(scores: Tensor, threshold: float, unit: Unit) -> tuple[float, Places]:
    """The bar of one prompt, and the places that pass, ascending: those with a score above 0 and at least the bar.

    Args:
        scores: [places].
        threshold: the bar as a share of the prompt's largest score; in the scores' own unit; or the share of places
            that lie below it.
        unit: which of the three.
    """
    bar = {
        "share": lambda: threshold * float(scores.max()),
        "absolute": lambda: threshold,
        "quantile": lambda: _quantile(scores, threshold),
    }[unit]()
    return bar, tuple(((scores >= bar) & (scores > 0)).nonzero()[:, 0].tolist())


def agreed(prompts: Sequence[Sequence[int]], share: float, *, least: int = 1, strict: bool = False) -> Places:
    """The places that pass in at least `share` of a fact's prompts, and in at least `least` of them.

    Args:
        prompts: the places of each prompt.
        share: of the prompts.
        least: prompts; where there are fewer, all of them.
        strict: in more than `share` of them, not in just so many.
    """
    counts = Counter(place for prompt in prompts for place in prompt)
    wanted = share * len(prompts)
    # 0.55 of 20 prompts are 11, whatever the last bit of the product says.
    bar = wanted + 1e-9 if strict else wanted - 1e-9
    enough = min(least, len(prompts))
    return tuple(sorted(place for place, count in counts.items() if count >= bar and count >= enough))


def refine(
    facts: Mapping[str, Sequence[Sequence[int]]],
    *,
    share: float = 0.7,
    step: float = 0.05,
    rounds: int = 6,
    aim: tuple[float, float] = (2.0, 5.0),
    least: int = 3,
    strict: bool = False,
) -> Refinement:
    """The places of every fact of one relation; the share they must agree in is moved until there are so many.

    Args:
        facts: of every fact, the places of each prompt.
        share: where the share starts.
        step: by how much it moves, up where a fact has too many places on average, down where too few.
        rounds: how often at most.
        aim: the mean count is to end in this range.
        least: see `agreed`.
        strict: see `agreed`.
    """

    def kept(at: float) -> dict[str, Places]:
        return {name: agreed(prompts, at, least=least, strict=strict) for name, prompts in facts.items()}

    found, moved = kept(share), 0
    while moved < rounds:
        mean = mean_count(found)
        way = (mean > aim[1]) - (mean < aim[0])
        after = round(share + way * step, 10)
        if not way or not 0 < after <= 1 or (strict and after == 1):
            break
        share, found, moved = after, kept(after), moved + 1
    return Refinement(found, share, moved, mean_count(found))


def shared(kept: Mapping[str, Sequence[int]], part: float) -> dict[int, int]:
    """Places that at least `part` of the facts kept, and two of them at least, with how many; most shared first."""
    counts = Counter(place for places in kept.values() for place in places)
    bar = max(2.0, part * len(kept) - 1e-9)
    common = [(place, count) for place, count in counts.items() if count >= bar]
    return dict(sorted(common, key=lambda entry: (-entry[1], entry[0])))


def mean_count(kept: Mapping[str, Sequence[int]]) -> float:
    """Places a fact, on average."""
    return sum(len(places) for places in kept.values()) / max(1, len(kept))


def _quantile(scores: Tensor, part: float) -> float:
    if not 0 <= part < 1:
        raise InputError(f"threshold {part} as a quantile: expected at least 0 and below 1")
    return float(scores.sort().values[int(part * len(scores))])
