"""Causal tracing: which state, put back into a run whose subject was made unreadable, brings the answer back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from memloc.costs import Cost
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.patching.corruption import Corruption
from memloc.patching.places import Places, Stream
from memloc.patching.sweep import Sweep
from memloc.provenance import Provenance, settings_of
from memloc.scores import Localization
from memloc.view import ModelView, left_to_right


@dataclass(frozen=True, kw_only=True)
class CausalTrace:
    """Score of a token in a layer = probability of the answer that its clean state brings back to a corrupted run.

    P(corrupted run with the clean state at this token and layer) - P(corrupted run), with P the mean probability of the
    suffix's tokens (of the answer, where it is one token), mean over corrupted rows. One score a token and layer, at
    `mlp.out`, or `attn.out` for attention; one axis of passages. Notes: P clean and corrupted, one value a passage, and
    the means of both and of their difference, the total effect.

    Attributes:
        stream: the state: "block": the residual stream after the block; "mlp" or "attn": what that part adds.
        window: of "mlp" and "attn": so many layers, centred on the one scored, are restored together.
        corrupt: "noise": on the embeddings of the subject (tag "subject"; of the whole prefix where none is marked);
            for recited text "perturbed": the most disruptive prefix token exchanged, "rare": noise on the quarter of
            the prefix's tokens rarest in the contrast, "resample": a contrast passage in the prefix's place.
        noise: standard deviation of the noise, in standard deviations of the entries of the embedding matrix (the
            reference takes the deviation over the subjects of a set, so that a fact's trace depends on the others).
        draws: corrupted rows a passage (of "perturbed" there is one).
        alternatives: of "perturbed": tokens tried at every prefix position.
        metric: "probability", or "nll": fall of the suffix's mean NLL, nats per token.
        seed: of all that is drawn; every passage draws by itself.
        batch_size: rows run together (one state's at least); no effect on scores.

    Cost: one forward of the passage and each corrupted row; then the corrupted rows once a token and layer, through the
    blocks above. Tokens left of the corruption, and the last, are 0 and are not run.

    Source: Meng et al. 2022, arXiv:2202.05262. Corruptions of text without a subject are ours.
    """

    stream: Stream = "mlp"
    window: int = 1
    corrupt: Literal["noise", "perturbed", "rare", "resample"] = "noise"
    noise: float = 3.0
    draws: int = 10
    alternatives: int = 2
    metric: Literal["probability", "nll"] = "probability"
    seed: int = 0
    batch_size: int = 64

    in_parts: ClassVar[bool] = True
    refuses = staticmethod(left_to_right)

    def __post_init__(self) -> None:
        if self.window < 1 or (self.window > 1 and self.stream == "block"):
            raise InputError(f"window {self.window}: expected 1, or more with stream=mlp or attn")
        _ = self._sweep

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score tokens and layers, passage by passage; `contrast` gives counts of tokens or other prefixes.

        Raises:
            InputError: no passages, one the model cannot take (named), or no contrast where one is needed.
        """
        view.need_causal("the method lives on what a token cannot hear")
        if not passages:
            raise InputError("causal-trace: no passages given")
        swept = self._sweep(view, self._places(view), passages, contrast)
        sign = -1 if self.metric == "probability" else 1
        clean, corrupted = sign * swept.clean, sign * swept.corrupted
        notes = {
            "clean": clean.tolist(),
            "corrupted": corrupted.tolist(),
            "clean_mean": float(clean.mean()),
            "corrupted_mean": float(corrupted.mean()),
            "total_effect_mean": float((swept.corrupted - swept.clean).mean()),
        }
        inputs = {"model": view.digest, "passages": passages.digest}
        if contrast is not None:
            inputs["contrast"] = contrast.digest
        provenance = Provenance("causal-trace", settings_of(self), self.seed, inputs)
        lengths = tuple(len(item.ids) for item in passages)
        grain = self._places(view).grain_of_scores()
        return Localization(grain, swept.scores, provenance, passages.ids, notes, lengths)

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """Counted by token and layer; where the corrupted position is searched for, at most."""
        return self._sweep.cost(view, self._places(view), passages, contrast)

    @property
    def _sweep(self) -> Sweep:
        corruption = Corruption(self.corrupt, self.noise, self.draws, self.alternatives, self.seed)
        return Sweep(corruption, "denoise", self.metric, self.batch_size)

    def _places(self, view: ModelView) -> Places:
        return Places(view, "position", self.stream, self.window)
