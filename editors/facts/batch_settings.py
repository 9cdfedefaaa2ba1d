"""Settings that all editors of many facts share, and the few things in which they differ, as methods to override."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from editors.facts.closed_forms import Factor, Metric
from editors.facts.contexts import Demand, Token
from editors.facts.keys_values import Descent, Values, optimise_values
from editors.facts.protected import Amounts
from memloc.errors import InputError
from memloc.sites import Site
from memloc.view import ModelView

Spread = Literal["even", "sqrt", "first-last", "last"]


@dataclass(frozen=True, kw_only=True)
class BatchEditor:
    """Settings that all editors of many facts share.

    Attributes:
        layers: blocks whose MLPs are changed, upwards; () for those between `depths`.
        depths: relative depths (0 the first block, 1 the last) between which blocks are changed.
        measured: choose the blocks instead by trying ranges of them on some of the facts (`editors.facts.layer_trial`).
        trials: on how many facts, drawn by the seed.
        token: where to edit: the subject's last token, the prompt's, or whichever measures best on these facts.
        spread: what share of what is missing each layer brings: 1/(layers left) ("even", MEMIT), 1/√ of that ("sqrt",
            PMET), half at the first and the rest at the last and nothing between ("first-last", BLUE), all at the last.
        rounds: how often the layers are gone through; what a round left missing is asked for in the next. The rank
            grows with it.
        ways: the model's own ways to a fact (`recalls`) get a key each ("each"), or are averaged into one ("mean").
        steps: passes of the search for values, the last of which only evaluates.
        pace: Adam's step size in shares of the clean output's root mean square: streams differ in scale.
        lr: as published instead, in the stream's units; only where each fact's value is searched for by itself.
        clamp: a value's change is kept below this many times the norm of the clean output.
        weight_decay: weight of its norm / ‖clean output‖² in the loss.
        kl_weight: weight of the change of the answer to "{subject} is a", in nats; at subject-last only.
        stop_below: a fact's search ends when its loss is below.
        price: weight of the drift that the closed form will charge for the values (of what should stay, in shares of
            the maps' outputs) in the search for them, all facts together; 0 searches for each by itself, as published.
        damping: share of the moment's mean diagonal added to its diagonal.
        samples: how many prefixes of each length the model writes.
        lengths: of these prefixes in tokens, the start token included.
        top_k: each sampled token is one of the k likeliest.
        recalls: at most how many of the model's own ways to each fact are used.
        protect: weight of the mean k kᵀ over named facts and passages, and over namesakes, against that of text.
        namesakes: for each fact so many prompts about other subjects are made up and protected.
        replay: weight of the mean k kᵀ over the model's own sentences against that of text.
        sentences: how many sentences the model writes.
        sentence_length: of them, in tokens.
        past_weight: weight of each key of edits already made, in shares of an average token of text.
        passes: how often the edit is made: each time it is tried first, what it would change against its will is held,
            and facts that it misses are demanded more strictly; 1 takes the first as it is.
        hold: weight of each named key, or namesake's, whose answer would change, in shares of an average token of text.
        hold_own: and of each such token of the model's own sentences.
        growth: an edit that would make a map's change (edits already made included) larger than this share of its
            norm is scaled down to it, and says so; None for no limit.
        prefixes: texts instead of the model's own; () for none.
        moment: second moments instead of those of the request's text: a `Moments`, or the path of a saved one.
    """

    layers: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.3, 1.0)
    measured: bool = False
    trials: int = 6
    token: Literal["subject-last", "prompt-last", "measured"] = "prompt-last"
    spread: Spread = "even"
    rounds: int = 1
    ways: Literal["each", "mean"] = "each"
    steps: int = 60
    pace: float = 0.05
    lr: float | None = None
    clamp: float = 4.0
    weight_decay: float = 1e-3
    kl_weight: float = 0.0625
    stop_below: float = 0.1
    price: float = 10.0
    damping: float = 1e-2
    samples: int = 2
    lengths: tuple[int, ...] = (5, 10)
    top_k: int = 5
    recalls: int = 8
    protect: float = 1.0
    namesakes: int = 24
    replay: float = 1.0
    sentences: int = 1200
    sentence_length: int = 16
    past_weight: float = 1.0
    passes: int = 3
    hold: float = 1.0
    hold_own: float = 0.3
    growth: float | None = None
    prefixes: tuple[str, ...] | None = None
    moment: Any = None

    name: ClassVar[str] = ""

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

    @property
    def descent(self) -> Descent:
        """The settings of the search for values."""
        return Descent.of(self)

    @property
    def amounts(self) -> Amounts:
        """How much of what nobody named is protected."""
        return Amounts(
            self.namesakes if self.protect else 0, self.sentences if self.replay else 0, self.sentence_length
        )

    def search(self, view: ModelView, layer: int, demands: Sequence[Demand], scale: Tensor) -> Values:
        """The values of `demands` at `layer`, each fact's by itself; `scale` is as in `optimise_values`."""
        return optimise_values(view, layer, demands, scale, self.descent)

    def check(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            InputError: names the setting, what it is and what is expected.
        """
        least = {"damping": 0, "trials": 1, "rounds": 1, "steps": 1, "pace": 0, "clamp": 0, "weight_decay": 0,
                 "kl_weight": 0, "samples": 0, "namesakes": 0, "protect": 0, "replay": 0, "sentences": 0,
                 "sentence_length": 2, "recalls": 0, "past_weight": 0, "passes": 1, "hold": 0,
                 "hold_own": 0, "top_k": 1}  # fmt: skip
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(f"{self.name}: {name} is {getattr(self, name)}, expected {value} or more")
        if self.lr is not None and self.lr < 0:
            raise InputError(f"{self.name}: lr is {self.lr}, expected 0 or more, or none for steps of pace")
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
