"""Settings that all editors of facts by subjects share: the search for values, prefixes, and what is protected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from editors.facts.keys_values import Descent
from editors.facts.protected import Amounts
from memloc.errors import InputError
from memloc.moments import Moments


@dataclass(frozen=True, kw_only=True)
class FactEditor:
    """Settings that all editors of facts share.

    Attributes:
        steps: passes of the search for values, the last of which only evaluates.
        pace: Adam's step size in shares of the clean stream's root mean square: streams differ in scale.
        lr: as published instead, in the stream's units; only at a `price` of 0.
        clamp: a value's change is kept below this many times the norm of the clean output.
        weight_decay: weight of its norm / ‖clean output‖² in the loss.
        kl_weight: weight of the change of the answer to "{subject} is a", in nats; used at subject-last only, for at
            prompt-last the value is the answer.
        stop_below: a fact's search ends when its loss is below.
        price: weight of the drift that the closed form will charge for the values (of what should stay, in shares of
            the maps' outputs) in the search for them, all facts of an edit together; 0 searches for each by itself and
            at no price, as published.
        damping: share of the moment's mean diagonal added to its diagonal.
        samples: how many prefixes of each length the model writes.
        lengths: of these prefixes in tokens, the start token included.
        top_k: each sampled token is one of the k likeliest.
        recalls: at most how many prompts of the model's own, in which it comes to the present answer from the subject
            alone (its own ways to the fact), are edited too.
        protect: weight of the mean k kᵀ over what is named (facts to keep; where `retain` predicts its suffixes) and
            over namesakes, against that of text.
        namesakes: for each fact so many prompts about other subjects are made up by the model, and protected.
        replay: weight of the mean k kᵀ over the model's own sentences against that of text.
        sentences: how many sentences the model writes; all their tokens are protected but those at which it is about to
            give the present answer of the subject.
        sentence_length: of them, in tokens.
        past_weight: weight of each key of edits already made, in shares of an average token of text.
        spared: at most so many prompts about others that earlier edits spared are protected again, drawn by the seed.
        passes: how often the edit is made: each time it is tried first, and what it would change against its will is
            held (and, where many facts are edited at once, those that it misses are demanded more strictly); 1 takes
            the first as it is.
        hold: weight of each named key, or namesake's, whose answer would change, in shares of an average token of text.
        hold_own: and of each such token of the model's own sentences.
        prefixes: texts instead of the model's own; () for none.
        moment: second moments instead of those of the request's text, as `memloc moments` saves them for this model.
    """

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
    spared: int = 5000
    passes: int = 3
    hold: float = 1.0
    hold_own: float = 0.3
    prefixes: tuple[str, ...] | None = None
    moment: Tensor | Moments | Path | str | None = None

    name: ClassVar[str] = ""
    least: ClassVar[Mapping[str, float]] = {
        "damping": 0, "steps": 1, "pace": 0, "clamp": 0, "weight_decay": 0, "kl_weight": 0, "samples": 0,
        "namesakes": 0, "protect": 0, "replay": 0, "sentences": 0, "sentence_length": 2, "recalls": 0,
        "past_weight": 0, "top_k": 1, "passes": 1, "hold": 0, "hold_own": 0,
        "spared": 0, "price": 0,
    }  # fmt: skip

    @property
    def descent(self) -> Descent:
        """The settings of the search for values."""
        return Descent.of(self)

    @property
    def amounts(self) -> Amounts:
        """How much of what nobody named is protected."""
        return Amounts(self.namesakes if self.protect else 0, self.sentences if self.replay else 0,
                       self.sentence_length, self.spared)  # fmt: skip

    def check(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            InputError: names the setting, what it is and what is expected.
        """
        for name, value in self.least.items():
            if getattr(self, name) < value:
                raise InputError(f"{self.name}: {name} is {getattr(self, name)}, expected {value} or more")
        if self.lr is not None and self.lr < 0:
            raise InputError(f"{self.name}: lr is {self.lr}, expected 0 or more, or none for steps of pace")
        if self.lr is not None and self.price:
            raise InputError(f"{self.name}: lr is {self.lr} and price {self.price}; lr is for a price of 0")
