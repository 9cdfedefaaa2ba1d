"""Settings that all editors of many facts share, and the few things in which they differ, as methods to override."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from editors.facts.closed_forms import Factor, Metric
from editors.facts.contexts import Demand, Token
from editors.facts.fact_settings import FactEditor
from editors.facts.keys_values import Values, optimise_values
from memloc.errors import InputError
from memloc.moments import Moments
from memloc.sites import Site
from memloc.view import ModelView

Spread = Literal["even", "sqrt", "first-last", "last"]


@dataclass(frozen=True, kw_only=True)
class BatchEditor(FactEditor):
    """Settings that all editors of many facts share, beside those of all editors of facts.

    Attributes:
        layers: blocks whose MLPs are changed, upwards; () for those between `depths`.
        depths: relative depths (0 the first block, 1 the last) between which blocks are changed.
        measured: try other ranges of blocks on some of the facts first, and take the best of those that are surely
            ahead (`editors.facts.layer_trial`).
        trials: on how many facts blocks and token are tried, drawn by the seed.
        token: where to edit: the subject's last token, the prompt's, or whichever measures best on these facts.
        spread: what share of what is missing each layer brings: 1/(layers left) ("even", MEMIT), 1/√ of that ("sqrt",
            PMET), half at the first and the rest at the last and nothing between ("first-last", BLUE), all at the last.
        rounds: how often the layers are gone through; what a round left missing is asked for in the next. The rank
            grows with it.
        ways: the model's own ways to a fact (`recalls`) get a key each ("each"), or are averaged into one ("mean").
        growth: an edit that would make a map's change (edits already made included) larger than this share of its
            norm is scaled down to it, and says so; None for no limit.
    """

    layers: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.3, 1.0)
    measured: bool = False
    trials: int = 6
    token: Literal["subject-last", "prompt-last", "measured"] = "prompt-last"
    spread: Spread = "even"
    rounds: int = 1
    ways: Literal["each", "mean"] = "each"
    growth: float | None = None
    moment: Moments | Path | str | None = None

    least: ClassVar[Mapping[str, float]] = {**FactEditor.least, "rounds": 1, "trials": 1}

    def metric(self, moment: Tensor) -> Metric:
        """Which directions of a map's input are cheap, from what should stay."""
        raise NotImplementedError

    def slack_of(self, keys: Tensor) -> float:
        """What a miss of these keys `[n, f]` may cost."""
        raise NotImplementedError

    def holding(
        self, metrics: Mapping[Site, Metric], keys: Mapping[Site, Tensor], weight: float
    ) -> tuple[dict[Site, Metric], dict[Site, Tensor]]:
        """The metrics with `weight` on each of `keys` `[m, f]`, and the keys that stand beside those asked for instead.

        Weights are in shares of an average token of text; beside the keys asked for, in shares of one of these.
        """
        found, beside = dict(metrics), {}
        for site, rows in keys.items():
            metric = found[site]
            if isinstance(metric, Factor):
                # An average token of text weighs k C⁻¹ k = f in all, one of m keys as much as its share of a mean.
                found[site] = metric.holding(rows.T, weight / rows.shape[1])
            else:
                beside[site] = rows.T * weight**0.5
        return found, beside

    @property
    def place(self) -> Token:
        """Where to edit, once that is known."""
        if self.token == "measured":
            raise InputError(f"{self.name}: the token is to be measured, and was not yet; name it")
        return self.token

    def search(self, view: ModelView, layer: int, demands: Sequence[Demand], scale: Tensor) -> Values:
        """The values of `demands` at `layer`, each fact's by itself; `scale` is as in `optimise_values`."""
        return optimise_values(view, layer, demands, scale, self.descent)

    def check(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            InputError: names the setting, what it is and what is expected.
        """
        super().check()
        if self.growth is not None and self.growth <= 0:
            raise InputError(f"{self.name}: growth is {self.growth}, expected above 0, or none")
        if self.measured and self.layers:
            raise InputError(f"{self.name}: layers are {self.layers} and are to be measured; leave out one of the two")
        if len(self.depths) != 2 or not 0 <= self.depths[0] <= self.depths[1] <= 1:
            raise InputError(f"{self.name}: depths are {self.depths}, expected two between 0 and 1, the lower first")

    def layers_of(self, view: ModelView) -> tuple[int, ...]:
        """The blocks that are changed, upwards."""
        found = tuple(sorted(set(self.layers)))
        if not found:
            low, high = (round(depth * (view.layers - 1)) for depth in self.depths)
            found = tuple(range(low, high + 1))
        for layer in found:
            view.block(layer)
        if self.spread == "last":
            return found[-1:]
        return (found[0], found[-1]) if self.spread == "first-last" and len(found) > 2 else found
