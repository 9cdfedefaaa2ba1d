"""Known answers: models of which we know where something is kept, and how a localizer is judged on them.

A world is a family of known answers, made one by one from a ground (a trained model and texts it knows and does not
know). A localizer is run on each and judged: by recall where the answer is a set of places, with the ceiling it can
reach and what chance gives; otherwise by what the world asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from memloc.errors import InputError, MismatchError
from memloc.passages import Passages
from memloc.provenance import Provenance
from memloc.registry import Registry
from memloc.scores import Localization, Selection
from memloc.sites import Grain, Site
from memloc.view import ModelView

TIMES = (1, 2, 5)
"""Recall is asked at so many times the share that is gold."""

Judge = Callable[["Known", Localization], Mapping[str, float]]
"""What a localization is worth on a known answer: figures by name."""

WORLDS = Registry(
    "world",
    {
        "planted": "memloc.truth.planting:PLANTED",
        "inj": "memloc.truth.injected:INJ",
        "inj-free": "memloc.truth.injected:FREE",
        "inj-in": "memloc.truth.injected:KEYS",
        "inj-heads": "memloc.truth.injected:HEADS",
        "inj-field": "memloc.truth.injected:FIELD",
        "del": "memloc.truth.deletion:DEL",
        "del-mean": "memloc.truth.deletion:MEAN",
        "del-resample": "memloc.truth.deletion:RESAMPLE",
        "sinks": "memloc.truth.sinks:SINKS",
        "wrong-sums": "memloc.truth.wrong_sums:WRONG_SUMS",
    },
)
"""Name to "module:instance" of a `World`: one line each."""


@dataclass(frozen=True)
class Ground:
    """What known answers are made from.

    Attributes:
        name: of the model, such as the name of its folder; unique in a table.
        view: a trained model; a world copies it and never writes into it. None for worlds that train their own.
        memorized: passages it recites.
        unknown: passages of the same kind it was never trained on.
        text: ordinary text it was not trained on.
        seed: of every draw a world makes.
        keep: folder where a world may keep what is dear to make, or None.
    """

    name: str
    view: ModelView | None = None
    memorized: Passages | None = None
    unknown: Passages | None = None
    text: Passages | None = None
    seed: int = 0
    keep: Path | None = None

    def need(self, name: str) -> Any:
        """What is called `name`.

        Raises:
            InputError: it is not there.
        """
        words = {"view": "a trained model", "memorized": "passages it recites", "unknown": "passages new to it",
                 "text": "ordinary text"}  # fmt: skip
        found = getattr(self, name)
        if not found:
            raise InputError(f"{self.name}: this world needs {words[name]}, and none is given")
        return found


@dataclass(frozen=True)
class Known:
    """One known answer.

    Attributes:
        name: unique among the known answers of its world and ground.
        view: the model; a copy of its own.
        passages: what localizers are asked about.
        controls: passages of the same kind the model does not know.
        text: ordinary text.
        gold: the places that carry `passages`, on all sites a localizer of that grain scores; None where places are
            not known and `judge` asks something else.
        judge: figures of a localization; by default recall, see `recalls`.
        notes: what is known beside it, JSON values (losses, a causal check).
    """

    name: str
    view: ModelView
    passages: Passages
    controls: Passages | None = None
    text: Passages | None = None
    gold: Selection | None = None
    judge: Judge = field(default=lambda known, found: recalls(known, found))
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the places that are gold."""
        return self.answer.fraction

    @property
    def grain(self) -> Grain:
        """What a localizer should score here."""
        return Grain.NEURON if self.gold is None else self.gold.grain

    @property
    def answer(self) -> Selection:
        """The gold.

        Raises:
            InputError: no places are known here.
        """
        if self.gold is None or not self.gold.count:
            raise InputError(f"{self.name}: no place is known to be the answer here")
        return self.gold

    def ceiling(self, times: float = 1, *, per: str = "site") -> float:
        """The recall of a perfect localizer; see `ceiling`."""
        return ceiling(self.answer, times, per=per)

    def chance(self, times: float = 1, *, per: str = "site") -> float:
        """The recall of random scores, expected; see `chance`."""
        return chance(self.answer, times, per=per)


class World(Protocol):
    """A family of known answers: a frozen dataclass whose fields are its settings."""

    @property
    def headline(self) -> str:
        """The figure that stands for this world in the table."""
        ...

    def names(self, ground: Ground) -> tuple[str, ...]:
        """Names of the known answers it can make on `ground`; cheap, so that a finished table is resumed at once."""
        ...

    def make(self, ground: Ground, name: str) -> Known:
        """The known answer of that name; equal ground, settings and name give equal bits."""
        ...


def recall(found: Localization, gold: Selection, times: float = 1, *, per: str = "site") -> float:
    """Share of the gold among the best-scored places.

    Args:
        found: scores of the gold's grain; an axis of passages is averaged; other sites than the gold's do not count.
        gold: the known places.
        times: how many places are named, in multiples of the share that is gold.
        per: "site" names that share at every site (the published convention: most methods compare badly across
            layers), "model" the best anywhere.

    Raises:
        MismatchError: scores of another grain, or none at one of the gold's sites.

    Source: Chang et al. 2024, arXiv:2311.09060, section 3.1; "model" is ours.
    """
    mean = found.mean()
    if mean.grain != gold.grain:
        raise MismatchError(f"{found.provenance.method} scores {mean.grain}s, and no {gold.grain}s")
    for site, mask in gold.masks.items():
        if site not in mean.scores or mean.scores[site].shape != mask.shape:
            raise MismatchError(f"{found.provenance.method} gave no scores for the {mask.numel()} places at {site}")
    hits = 0
    if per == "site":
        for site, count in _named(gold, times).items():
            alone = Localization(mean.grain, {site: mean.scores[site]}, mean.provenance)
            hits += int((alone.top(count).masks[site] & gold.masks[site]).sum())
    else:
        here = Localization(mean.grain, {site: mean.scores[site] for site in gold.masks}, mean.provenance)
        best = here.top(_named_anywhere(gold, times, per)).masks
        hits = sum(int((best[site] & mask).sum()) for site, mask in gold.masks.items())
    return hits / gold.count


def ceiling(gold: Selection, times: float = 1, *, per: str = "site") -> float:
    """Recall of a perfect localizer: below 1 where a layer holds more gold than may be named there. Exact."""
    if per != "site":
        return min(1.0, _named_anywhere(gold, times, per) / gold.count)
    named = _named(gold, times)
    return sum(min(named[site], int(mask.sum())) for site, mask in gold.masks.items()) / gold.count


def chance(gold: Selection, times: float = 1, *, per: str = "site") -> float:
    """Expected recall of random scores. Exact."""
    if per != "site":
        return _named_anywhere(gold, times, per) / sum(mask.numel() for mask in gold.masks.values())
    named = _named(gold, times)
    return sum(int(mask.sum()) * named[site] / mask.numel() for site, mask in gold.masks.items()) / gold.count


def expected_ceiling(layers: int, neurons: int, share: float, times: float = 1) -> float:
    """Mean of `ceiling` over draws of ⌊share·layers·neurons⌋ gold places from all layers, per site. Exact.

    A layer's number of gold places is hypergeometric.
    """
    places, gold = layers * neurons, math.floor(share * layers * neurons)
    named = _rounded(neurons, times * share)
    rest = math.lgamma(places + 1) - math.lgamma(gold + 1) - math.lgamma(places - gold + 1)
    held = 0.0
    for here in range(min(neurons, gold) + 1):
        if gold - here <= places - neurons:
            log = _log_choose(neurons, here) + _log_choose(places - neurons, gold - here) - rest
            held += min(named, here) * math.exp(log)
    return layers * held / gold


def recalls(known: Known, found: Localization) -> dict[str, float]:
    """Recall at 1, 2 and 5 times the gold's share, per layer and over the model, each with ceiling and chance.

    "recall@1" is per layer, "recall@1/ceiling" that over what can be reached, "recall@1 model" over the model.
    """
    gold = known.answer
    figures: dict[str, float] = {}
    for times in TIMES:
        reached, most = recall(found, gold, times), ceiling(gold, times)
        figures |= {
            f"recall@{times}": reached,
            f"recall@{times}/ceiling": reached / most,
            f"recall@{times} ceiling": most,
            f"recall@{times} chance": chance(gold, times),
            f"recall@{times} model": recall(found, gold, times, per="model"),
        }
    return figures


def oracle(gold: Selection) -> Localization:
    """The perfect localizer's scores: 1 at gold places, 0 elsewhere."""
    scores = {site: mask.to(torch.float32) for site, mask in gold.masks.items()}
    return Localization(gold.grain, scores, Provenance("oracle"))


def _named(gold: Selection, times: float) -> dict[Site, int]:
    """How many places are named at every site: the same share everywhere, at least one."""
    return {site: _rounded(mask.numel(), times * gold.fraction) for site, mask in gold.masks.items()}


def _named_anywhere(gold: Selection, times: float, per: str) -> int:
    if per != "model":
        raise InputError(f"per={per!r}: expected 'model' or 'site'")
    places = sum(mask.numel() for mask in gold.masks.values())
    return min(places, max(1, math.floor(times * gold.count + 0.5)))


def _rounded(places: int, share: float) -> int:
    return min(places, max(1, math.floor(share * places + 0.5)))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
