"""Injected memory as worlds (INJ): sequences new to a trained model, learned by places drawn at random.

Localizers are asked about the whole sequence, its first token given, as it was trained: rows that serve its first half
cannot be found by who looks at the second only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memloc.errors import ArtifactError, InputError
from memloc.passages import Passage, Passages
from memloc.provenance import digest_json, settings_of
from memloc.truth.injection import Injection, Training, Where, causal_check, draw, inject, seed_of
from memloc.truth.worlds import Ground, Known
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Injected:
    """Places drawn from all layers were trained on new sequences, and nothing else was.

    The default share suits small models: at a tenth of the neurons of a four-layer lab a sequence of 32 tokens is
    learned with norms kept. Large models take .01 or .001, as published.

    Attributes:
        where: "ffn-out" (value vectors), "ffn-in" (key rows, and the gate's), "attention" (heads' slices of the output
            projection; the answer is heads then).
        share: of all places that is trained.
        norm_preserving: rows keep their norm; otherwise their size alone gives them away.
        sequences: known answers a ground.
        together: sequences injected at once into the same places.
        tokens: of every sequence, from its start; None takes all.
        source: "unknown" (passages never trained on) or "random" (random tokens).
        learning_rate: of Adam.
        steps: at most so many.
        target: nats per token at which training stops.

    Source: Chang et al. 2024, arXiv:2311.09060, section 3.1 (free rows of "ffn-out"). Kept norms, the other places,
    several sequences at once and the causal check are ours.
    """

    where: Where = "ffn-out"
    share: float = 0.1
    norm_preserving: bool = True
    sequences: int = 5
    together: int = 1
    tokens: int | None = 32
    source: str = "unknown"
    learning_rate: float = 1e-2
    steps: int = 200
    target: float = 0.05
    headline: str = "recall@1/ceiling"

    def __post_init__(self) -> None:
        """Raises InputError: settings that give no known answer."""
        if self.sequences < 1 or self.together < 1 or (self.tokens is not None and self.tokens < 2):
            raise InputError(
                f"sequences {self.sequences}, together {self.together}, tokens {self.tokens}: expected at least 1, 1, 2"
            )
        if self.source not in ("unknown", "random"):
            raise InputError(f"source={self.source!r}: expected 'unknown' or 'random'")

    def names(self, ground: Ground) -> tuple[str, ...]:
        """One name for each draw; fewer than wanted where the ground knows too few sequences."""
        most = self.sequences
        ground.need("view")
        if self.source == "unknown":
            most = min(most, len(ground.need("unknown")) // self.together)
        return tuple(f"sequence-{index}" for index in range(most))

    def make(self, ground: Ground, name: str) -> Known:
        """Inject one draw of sequences, or read it where the ground keeps it; check that the gold carries them."""
        base: ModelView = ground.need("view")
        passages, controls = self._sequences(ground, int(name.rpartition("-")[2]))
        injection = self._injection(ground, base, passages, name)
        view = injection.into(base)
        check = causal_check(base, view, passages, injection.gold, self.where, seed=ground.seed)
        notes = {"loss before": injection.loss[0], "loss": injection.loss[1], "steps": injection.steps,
                 "causal check": check.to_json()}  # fmt: skip
        return Known(name, view, passages, controls, ground.text, injection.gold, notes=notes)

    def _injection(self, ground: Ground, view: ModelView, passages: Passages, name: str) -> Injection:
        training = Training(norm_preserving=self.norm_preserving, learning_rate=self.learning_rate, steps=self.steps,
                            target=self.target)  # fmt: skip
        file = None
        if ground.keep is not None:
            key = digest_json([settings_of(self), view.digest, passages.digest, ground.seed, name])
            file = ground.keep / f"{key[:24]}.safetensors"
            try:
                return Injection.load(file)
            except ArtifactError:
                pass
        generator = torch.Generator().manual_seed(seed_of(ground.seed, passages, name))
        found = inject(view, passages, draw(view, self.where, self.share, generator), self.where, training)
        if file is not None:
            found.save(file)
        return found

    def _sequences(self, ground: Ground, index: int) -> tuple[Passages, Passages | None]:
        """The sequences of a draw, and as many controls as there are left, at most eight."""
        generator = torch.Generator().manual_seed(ground.seed)
        count = self.sequences * self.together
        if self.source == "random":
            width = self.tokens or 32
            drawn = torch.randint(ground.need("view").vocab, (count + 8, width), generator=generator).tolist()
            items = [Passage(f"random-{row}", tuple(ids[:1]), tuple(ids[1:])) for row, ids in enumerate(drawn)]
        else:
            unknown: Passages = ground.need("unknown")
            order = torch.randperm(len(unknown), generator=generator).tolist()
            items = [self._whole(unknown[row]) for row in order]
        chosen = items[index * self.together : (index + 1) * self.together]
        rest = items[count : count + 8]
        return Passages(tuple(chosen), "injected"), Passages(tuple(rest), "never injected") if rest else None

    def _whole(self, item: Passage) -> Passage:
        """The passage with its first token as prefix."""
        ids = item.ids[: self.tokens]
        return Passage(item.id, ids[:1], ids[1:], item.tags)


INJ = Injected()
FREE = Injected(norm_preserving=False)
KEYS = Injected(where="ffn-in")
HEADS = Injected(where="attention", share=0.25)
FIELD = Injected(share=0.2, together=3, sequences=3)
