"""Attribution patching: patching every place at once, to first order, by one backward pass; and how far to trust it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from memloc.batches import batches
from memloc.costs import Cost
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.patching.corruption import Corruption, How
from memloc.patching.first_order import FirstOrder
from memloc.patching.pairs import Direction
from memloc.patching.places import Node, PatchGrain, Places, Stream
from memloc.patching.question import Metric
from memloc.patching.spot_check import Checked, SpotCheck, notes_of
from memloc.patching.sweep import Sweep
from memloc.progress import steps
from memloc.provenance import Provenance, settings_of
from memloc.scores import Localization
from memloc.sites import Site
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class AttributionPatching:
    """Score of a place = first-order estimate of what another run's activation in it does to the suffix.

    With `a` the clean activation, `a'` the corrupted one and the gradient taken in the run that is patched,

        score = Σ_t (a'_t - a_t) · ∂loss/∂a_t

    in the loss's units. Sign: loss is larger where the suffix is said less well (its mean NLL, or minus its logit), so
    larger is more responsible, for direction noise (a' put into the clean run breaks it) and denoise (a put into the
    corrupted run restores it) alike; equal to `activation-patching` where the loss is linear in the place. Both runs
    have the same tokens' number, position by position. One axis of passages.

    Three remedies for what a line misses. `node` query or key: the softmax is recomputed with the other run's queries
    or keys, and only what follows is linear (AtP*). `graddrop`: mean of |score| over gradients that each skip one
    layer's contribution to the residual stream, divided by l - 1, so that two paths that cancel do not hide a place
    (AtP*; no sign then). `verify`, `audit`: below.

    Notes, with `verify`, one value a passage: correlation of the estimates with the exact effects of the verified
    places ("verified_correlation", None below two places), their sums ("verified_estimate", "verified_exact"), and the
    exact effect of patching together the verified places, all others, and all ("joint_verified", "joint_rest",
    "joint_all"). With `audit`, also the audited places' estimates and exact effects ("audit_estimate", "audit_exact"),
    of how many others they were drawn ("audit_others"), and the verified ones' least effect and sum of positive ones
    ("verified_least", "verified_found"): `spot_check.Audit.of(notes)` turns these into an interval for the share
    of places that should have been verified, and one for the effect that was missed.

    Attributes:
        grain: "neuron", "head", "component" (what `attn.out` or `mlp.out` puts out), "layer" (both), all at every
            position at once; "position": one token's vector of `stream`.
        stream: of positions: "block": the residual stream after a block (scored at `mlp.out`), "mlp" or "attn".
        node: of heads: what the other run gives them: "out", or "query", "key", "value".
        corrupt: the other run, see `patching.corruption`; "zero": score = -Σ a·∂loss/∂a, gradient times activation.
            "mean", "resample" and "rare" take their tokens from the contrast.
        direction: which run is patched; constants have no run to restore.
        metric: the loss: "nll", "logit", "logit-difference" (gold less the clean run's likeliest other token), or
            "probability"; mean over the suffix's tokens.
        graddrop: see above.
        verify: so many best places of each passage are patched exactly, and their scores replaced by exact effects.
        audit: so many others of each passage, drawn at random, are patched exactly; their scores are left as they are.
        noise: of "noise" and "rare": standard deviation, in those of the entries of the embedding matrix.
        draws: of "noise", "rare" and "resample": corrupted rows a passage, over which effects are averaged.
        alternatives: of "perturbed": tokens tried at every prefix position.
        seed: of all that is drawn; every passage draws by itself.
        batch_size: passages per forward, rows of exact patching run together; no effect on scores.

    Cost: one forward and one backward of each passage, and one forward of each corrupted row (denoising: the other way
    round); graddrop: a backward a layer; query, key and value: one forward more of each corrupted row; verify and
    audit: one row a place from the changed layer up.

    Source: Nanda 2023; Kramár et al. 2024, arXiv:2403.00745 (AtP*, and subsets as a diagnostic). Verification in place
    and the bounds are ours.
    """

    grain: PatchGrain = "neuron"
    stream: Stream = "block"
    node: Node = "out"
    corrupt: How = "zero"
    direction: Direction = "noise"
    metric: Metric = "nll"
    graddrop: bool = False
    verify: int = 0
    audit: int = 0
    noise: float = 3.0
    draws: int = 1
    alternatives: int = 2
    seed: int = 0
    batch_size: int = 16

    in_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.node != "out" and self.grain != "head":
            raise InputError(f"node={self.node!r}: only heads have queries, keys and values; take grain=head")
        if self.verify < 0 or self.audit < 0 or (self.audit and not self.verify):
            raise InputError(f"verify {self.verify}, audit {self.audit}: expected at least 0, and an audit verify too")
        _ = self._sweep

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score places, passage by passage; `contrast` gives means, other prefixes or token counts, by `corrupt`.

        Raises:
            InputError: no passages, one the model cannot take (named), or no contrast where one is needed.
        """
        if not passages:
            raise InputError("attribution-patching: no passages given")
        places = self._places(view)
        scores = self._estimates(view, places, passages, contrast)
        notes: dict[str, Any] = {}
        if self.verify:
            check = SpotCheck(self._sweep, self.verify, self.audit, self.seed)
            found: list[Checked] = []
            for row, checked in enumerate(check.passages(view, places, passages, contrast, scores)):
                checked.put_into(scores, row)
                found.append(checked)
            notes = notes_of(found)
        inputs = {"model": view.digest, "passages": passages.digest}
        if contrast is not None:
            inputs["contrast"] = contrast.digest
        provenance = Provenance("attribution-patching", settings_of(self), self.seed, inputs)
        lengths = tuple(len(item.ids) for item in passages) if self.grain == "position" else None
        return Localization(places.grain_of_scores(), scores, provenance, passages.ids, notes, lengths)

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """Told without running it; with `verify` at most, for the places decide at which layers their runs start."""
        places, sweep = self._places(view), self._sweep
        total = sweep.prepared(view, passages, contrast)
        for batch in batches(passages, size=self.batch_size, cloze=view.mask_token):
            total = total + FirstOrder(sweep, self.graddrop).cost(view, places, batch)
        results = sweep.bytes(view, places, passages)
        total = Cost(total.forward, total.backward, total.bytes + results, total.bound)
        if not self.verify:
            return total
        check = SpotCheck(sweep, self.verify, self.audit, self.seed).cost(view, places, passages)
        found = total + sweep.corruption.cost(view, passages) + check
        return Cost(found.forward, found.backward, found.bytes, "at most")

    def _estimates(
        self, view: ModelView, places: Places, passages: Passages, contrast: Passages | None
    ) -> dict[Site, Tensor]:
        """Scored site to [n, units], float64."""
        passages.check(view.vocab, view.context)
        longest = max(len(item.ids) for item in passages)
        shape = (len(passages), *places.shape(longest))
        scores = {site: torch.zeros(shape, dtype=torch.float64) for site in places.scored}
        with view.frozen():
            given = self._sweep.corruption.of(view, passages, contrast)
            constants = self._sweep.constants(view, places, contrast) if self._sweep.corruption.constant else {}
            first_order = FirstOrder(self._sweep, self.graddrop)
            for batch in steps(list(view.batches(passages, size=self.batch_size)), "attribution patching"):
                rows = list(batch.rows)
                for site, found in first_order(view, places, batch, given or constants).items():
                    found = found.double().cpu()
                    if self.grain == "position":
                        scores[site][rows, : found.shape[1]] = found
                    else:
                        scores[site][rows] = found
        return scores

    @property
    def _sweep(self) -> Sweep:
        corruption = Corruption(self.corrupt, self.noise, self.draws, self.alternatives, self.seed)
        return Sweep(corruption, self.direction, self.metric, self.batch_size)

    def _places(self, view: ModelView) -> Places:
        return Places(view, self.grain, self.stream, node=self.node)
