"""The planted memory as a world: one neuron alone carries a suffix, in a random model made for it. No training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memloc.errors import InputError
from memloc.scores import Localization, selected
from memloc.sites import Grain, Kind
from memloc.truth.planted import plant
from memloc.truth.worlds import Ground, Known, recall
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Planting:
    """One neuron, written by hand into a random small model, is the answer; drawn anew for every known answer.

    Attributes:
        count: known answers a ground.
        layers: of the random model.
        neurons: a layer.
    """

    count: int = 5
    layers: int = 3
    neurons: int = 96
    headline: str = "hit@1"

    def names(self, ground: Ground) -> tuple[str, ...]:
        """One name for each draw."""
        return tuple(f"planted-{index}" for index in range(self.count))

    def make(self, ground: Ground, name: str) -> Known:
        """A random model with a memory at a place drawn from the ground's seed."""
        index = int(name.rpartition("-")[2])
        generator = torch.Generator().manual_seed(1000 * ground.seed + index)
        layer, neuron = (int(torch.randint(most, (), generator=generator)) for most in (self.layers, self.neurons))
        view = ModelView.open(self._model(1000 * ground.seed + index))
        made = plant(view, layer=layer, neuron=neuron, seed=1000 * ground.seed + index)
        sites = made.view.sites(Kind.MLP_OUT)
        gold = selected({made.site: [made.neuron]}, {site: self.neurons for site in sites}, Grain.NEURON)
        return Known(name, made.view, made.passages, made.controls, made.controls, gold, judge=hit)

    def _model(self, seed: int) -> torch.nn.Module:
        import transformers

        if self.layers < 1 or self.neurons < 2:
            raise InputError(f"planted: {self.layers} layers of {self.neurons} neurons; expected at least 1 of 2")
        config = transformers.GPT2Config(
            vocab_size=101, n_positions=64, n_embd=48, n_inner=self.neurons, n_layer=self.layers, n_head=4,
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(config)
        return model


def hit(known: Known, found: Localization) -> dict[str, float]:
    """1 where the best-scored place of the model is the planted one; chance is one place in all."""
    return {"hit@1": recall(found, known.answer, 1, per="model"), "hit@1 chance": known.share}


PLANTED = Planting()
