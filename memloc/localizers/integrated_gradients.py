"""Integrated gradients of neurons: what each adds to the probability of the suffix."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch

from memloc.costs import Cost
from memloc.errors import InputError
from memloc.gradients.paths import Integral
from memloc.passages import Passages
from memloc.progress import steps
from memloc.provenance import Provenance, settings_of
from memloc.reading.readout import wide
from memloc.scores import Localization
from memloc.sites import Grain, Kind
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class IntegratedGradients(Integral):
    """Score of a neuron = its share in the probability of the suffix's tokens, by integrated gradients.

    At a position c that predicts suffix token y, with w̄ [f] what enters `mlp.out` there and P(α) the probability of y
    were it α·w̄ instead (at c only, in one layer at a time, other layers free to follow):

        score_i = w̄_i ∫₀¹ ∂P/∂w_i (α w̄) dα

    so a layer's scores sum to P(1) - P(0), what silencing it at c would take away; the remaining difference is the
    completeness gap, reported in the notes as a share of the passage's largest such effect. Scores are means over
    positions, probability per neuron, signed: positive neurons speed the suffix. One axis of passages.

    Exact and fast: the prefix is cached once, the integral runs on rows of one token that start at the changed layer.

    Attributes:
        position: which suffix tokens count: "all" (mean), "first" or "last".
        site: what is scaled: "activation", what enters `mlp.out`; or "pre-activation", what leaves `mlp.in`, as a
            public reference does on GPT models. A gated neuron has none, and is refused.
        nodes: quadrature points of a path, and of each half where one is halved.
        quadrature: "gauss-legendre"; "riemann-right" (the paper's, α = k/m, k from 1); "riemann-left" (its authors'
            code, k from 0); "inclusive" (m equal steps with both ends, each weighing 1/m: the rule of a later public
            reference, which counts the ends twice).
        tolerance: Gauss-Legendre only: halve a stretch of a path where its own gap is too large for this share in all.
        halvings: and so many times at most, nor below the rounding of a model in half precision. A model that has
            learned a text turns sharply near α = 0, where more nodes on the whole path would be spent in vain.
        batch_size: passages prefilled together; no effect on scores.
        memory_mb: working memory the one-token rows may take, roughly; no effect on scores.

    Cost: one forward a passage; then, for each layer and suffix token, nodes + 2 single tokens forward and backward
    through half the blocks on average, and twice that for each halving.

    Source: Dai et al. 2022, arXiv:2104.08696. Gauss-Legendre with halving, the one-token form and the sum over
    all suffix tokens without decoding are ours.
    """

    in_parts = True

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score all neurons, passage by passage; `contrast` is not used.

        Raises:
            InputError: no passages, one the model cannot take (named), or a site the family has not.
        """
        if not passages:
            raise InputError("integrated-gradients: no passages given")
        sites = view.sites(Kind.MLP_OUT)
        scores = torch.zeros(len(sites), len(passages), view.neurons, dtype=wide(view.dtype), device=view.device)
        gaps = torch.zeros(len(passages))
        points: Counter[int] = Counter()
        with view.frozen():
            for batch in steps(list(view.batches(passages, size=self.batch_size)), "integrated gradients"):
                path = self.integrate(view, batch)
                rows = list(batch.rows)
                scores[:, rows], gaps[rows] = path.scores(), path.gaps().cpu().float()
                points.update((self.nodes * path.points).flatten().tolist())
        notes = {
            "completeness_gap": float(gaps.max()),
            "completeness_gap_mean": float(gaps.mean()),
            "points_mean": sum(count * paths for count, paths in points.items()) / points.total(),
            "points_most": max(points),
        }
        provenance = Provenance(
            "integrated-gradients",
            settings_of(self),
            inputs={"model": view.digest, "passages": passages.digest},
        )
        return Localization(Grain.NEURON, {site: scores[site.layer] for site in sites}, provenance, passages.ids, notes)

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """Exact where no path can be halved; otherwise what the unhalved paths take, "at least"."""
        results = 16 * view.layers * len(passages) * view.neurons
        spent = self.taken(view, passages)
        return replace(spent, bytes=spent.bytes + results)
