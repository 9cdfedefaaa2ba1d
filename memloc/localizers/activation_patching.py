"""Activation patching, exactly: every place holds another run's activation once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memloc.costs import Cost
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.patching.corruption import Corruption, How
from memloc.patching.pairs import Direction
from memloc.patching.places import Node, PatchGrain, Places, Stream
from memloc.patching.question import Metric
from memloc.patching.sweep import Sweep
from memloc.provenance import Provenance, settings_of
from memloc.scores import Localization
from memloc.view import ModelView, left_to_right


@dataclass(frozen=True, kw_only=True)
class ActivationPatching:
    """Score of a place = what another run's activation in it does to the suffix, measured by running it.

    With `a` the place's activation in the clean run and `a'` in a corrupted run of the same length:

        denoise  loss(corrupted run) - loss(corrupted run with a in the place)
        noise    loss(clean run with a' in the place) - loss(clean run)

    so that larger is more responsible either way. One axis of passages. Notes: each passage's loss in both runs.

    Attributes:
        grain: "component": what `attn.out` or `mlp.out` puts out, "layer": both of a block, "head" and "neuron": at
            every position at once; "position": one token's vector of `stream`, one score a token.
        stream: of positions: "block": the residual stream after a block (scored at `mlp.out`), "mlp" or "attn".
        node: of heads: what the other run gives them: "out", or "query", "key", "value", with the softmax recomputed.
        corrupt: the other run; see `memloc.patching.corruption`. "zero" and "mean" are ablations (noise only); "mean",
            "resample" and "rare" take their tokens from the contrast.
        direction: which run is patched.
        metric: the loss: "nll" (nats per token), "logit" or "logit-difference" (mean over suffix tokens, minus the
            gold logit, less that of the clean run's likeliest other token), "probability" (minus the mean).
        noise: of "noise" and "rare": standard deviation, in those of the entries of the embedding matrix.
        draws: of "noise", "rare" and "resample": corrupted rows a passage, over which effects are averaged.
        alternatives: of "perturbed": tokens tried at every prefix position.
        seed: of all that is drawn; every passage draws by itself.
        batch_size: rows run together; no effect on scores.

    Cost: one forward of each passage and each corrupted row; then one row a place and corrupted row, from the changed
    layer up. Positions that the corruption cannot reach are 0 and are not run.

    Source: Vig et al. 2020, arXiv:2004.12265; on recited paragraphs Stoehr et al. 2024, arXiv:2403.19851, appendix.
    """

    grain: PatchGrain = "component"
    stream: Stream = "block"
    node: Node = "out"
    corrupt: How = "perturbed"
    direction: Direction = "denoise"
    metric: Metric = "nll"
    noise: float = 3.0
    draws: int = 1
    alternatives: int = 2
    seed: int = 0
    batch_size: int = 32

    in_parts: ClassVar[bool] = True
    refuses = staticmethod(left_to_right)

    def __post_init__(self) -> None:
        if self.node != "out" and self.grain != "head":
            raise InputError(f"node={self.node!r}: only heads have queries, keys and values; take grain=head")
        _ = self._sweep

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score places, passage by passage; `contrast` gives means, other prefixes or token counts, by `corrupt`.

        Raises:
            InputError: no passages, one the model cannot take (named), or no contrast where one is needed.
        """
        view.need_causal("the method lives on what a token cannot hear")
        if not passages:
            raise InputError("activation-patching: no passages given")
        swept = self._sweep(view, self._places(view), passages, contrast)
        notes = {"clean": swept.clean.tolist(), "corrupted": swept.corrupted.tolist()}
        inputs = {"model": view.digest, "passages": passages.digest}
        if contrast is not None:
            inputs["contrast"] = contrast.digest
        provenance = Provenance("activation-patching", settings_of(self), self.seed, inputs)
        lengths = tuple(len(item.ids) for item in passages) if self.grain == "position" else None
        grain = self._places(view).grain_of_scores()
        return Localization(grain, swept.scores, provenance, passages.ids, notes, lengths)

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """Counted by the layer each place is patched at; positions of a searched corruption: at most."""
        return self._sweep.cost(view, self._places(view), passages, contrast)

    @property
    def _sweep(self) -> Sweep:
        corruption = Corruption(self.corrupt, self.noise, self.draws, self.alternatives, self.seed)
        return Sweep(corruption, self.direction, self.metric, self.batch_size)

    def _places(self, view: ModelView) -> Places:
        return Places(view, self.grain, self.stream, node=self.node)
