"""Logit lens and direct logit attribution: what each layer, component, head or neuron says of the suffix by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from memloc.costs import Cost, block_tokens, pass_bytes, widest
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.progress import steps
from memloc.provenance import Provenance, settings_of
from memloc.reading.attribution import Attribution, Norm, attribute
from memloc.reading.readout import Of, Position, lens, lens_bytes, row_means
from memloc.scores import Localization
from memloc.sites import Grain, Kind, Site
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class LogitLens:
    """Score of a layer = nats its block adds to the suffix's log-probability, the stream read as if it were the last.

    mode "lens": with x^l the residual stream after block l and p^l the probabilities softmax(W_U·LN_f(x^l)),

        score_l = log p^l(y) - log p^(l-1)(y)    (l = 0: minus that of what enters the first block)

    in nats per suffix token, so that the scores sum to the model's log-probability minus the embedding's. The notes
    say layer by layer (first the embedding) the mean rank, log-probability and share of tokens on top; and of every
    passage the mean layer after which a token first is on top, and after which it stays there (counted from 1; layers
    + 1 where it never is): candidates are promoted early, confidence grows late.

    mode "attribution": a part c of the stream where token y is predicted scores (w_y - w̄)·γ⊙(c - c̄)/σ, with γ and σ
    of the whole stream's final norm held, in logits above the vocabulary's mean logit. Components' scores (`attn.out`
    and `mlp.out` with their biases), the embedding's share and a constant, both in the notes, sum to the model's logit
    exactly; heads' and neurons' lack the biases. The sum is checked in every run.

    Scores are means over suffix tokens, signed. One axis of passages.

    Attributes:
        mode: "lens" (layers) or "attribution".
        grain: of attribution: "component", "head" or "neuron".
        position: which suffix tokens count: "all" (mean), "first" or "last".
        of: follow the suffix's own tokens, or those the model itself predicts in their place ("prediction").
        centre: attribution: take the vocabulary's mean logit away; what raises all logits alike says nothing.
        batch_size: passages per forward; no effect on scores.
        memory_mb: what logits and neurons may take at once, roughly; no effect on scores.

    Cost: one forward a passage; the lens unembeds each suffix position once a layer.

    Source: nostalgebraist 2020 (logit lens); Haviv et al. 2023, arXiv:2210.03588 (two phases); Elhage et al. 2021, "A
    Mathematical Framework for Transformer Circuits" (direct attribution); Geva et al. 2022, arXiv:2203.14680 (neurons).
    """

    in_parts = True

    mode: Literal["lens", "attribution"] = "lens"
    grain: Literal["component", "head", "neuron"] = "component"
    position: Position = "all"
    of: Of = "suffix"
    centre: bool = True
    batch_size: int = 16
    memory_mb: int = 512

    def __post_init__(self) -> None:
        if min(self.batch_size, self.memory_mb) < 1:
            raise InputError("batch_size and memory_mb: expected at least 1 each")

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score places, passage by passage; `contrast` is not used.

        Raises:
            InputError: no passages, or one the model cannot take (named).
            ModelError: the stream is not the sum of what the sublayers write, or the norm is of another kind.
        """
        if not passages:
            raise InputError("logit-lens: no passages given")
        read = self._lens if self.mode == "lens" else self._attribution
        scores, notes = read(view, passages)
        inputs = {"model": view.digest, "passages": passages.digest}
        made = Provenance("logit-lens", settings_of(self), inputs=inputs)
        grain = Grain.LAYER if self.mode == "lens" else Grain(self.grain)
        return Localization(grain, scores, made, passages.ids, notes)

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """One forward over the passages, told without running it."""
        rows, length = widest(passages, size=self.batch_size)
        tokens, bytes_ = rows * length, 8 if view.dtype == torch.float64 else 4
        kept = view.layers * 8 * view.width
        if self.mode == "attribution":
            kept += view.layers * 3 * (view.neurons if self.grain == "neuron" else view.heads * view.head_width)
            kept += 5 * view.vocab
        memory = tokens * (kept + 12 * view.width) * bytes_ + pass_bytes(view, tokens, context=length)
        memory += min(tokens * lens_bytes(view), self.memory_mb * 2**20 + lens_bytes(view))
        memory += 2 * (view.width * max(view.neurons, view.vocab) + view.vocab) * bytes_
        results = 8 * len(passages) * view.layers * max(view.neurons, 8)
        return Cost(block_tokens(view, passages, size=self.batch_size), bytes=memory + results)

    def _lens(self, view: ModelView, passages: Passages) -> tuple[dict[Site, Tensor], dict[str, Any]]:
        sites = view.sites(Kind.MLP_OUT)
        layers = torch.zeros(3, len(sites) + 1, len(passages))
        first, steady = torch.zeros(len(passages)), torch.zeros(len(passages))
        for batch in steps(list(view.batches(passages, size=self.batch_size)), "logit lens"):
            seen = lens(view, batch, position=self.position, of=self.of, memory_mb=self.memory_mb)
            rows = list(batch.rows)
            whole = torch.stack([seen.logprob, seen.rank.to(seen.logprob), (seen.rank == 0).to(seen.logprob)])
            layers[..., rows] = row_means(whole.movedim(-1, 0), seen.row, len(rows)).movedim(0, -1).cpu().float()
            for table, found in ((first, seen.first), (steady, seen.steady)):
                table[rows] = row_means(found.to(seen.logprob), seen.row, len(rows)).cpu().float()
        notes = {
            "layers": {
                name: dict(zip(("logprob", "rank", "on_top"), layers[:, index].mean(1).tolist(), strict=True))
                for index, name in enumerate(["embedding", *(f"L{layer}" for layer in range(view.layers))])
            },
            "first_on_top": first.tolist(),
            "on_top_from": steady.tolist(),
        }
        added = layers[0].diff(dim=0)
        return {site: added[site.layer] for site in sites}, notes

    def _attribution(self, view: ModelView, passages: Passages) -> tuple[dict[Site, Tensor], dict[str, Any]]:
        kinds = {"component": (Kind.ATTN_OUT, Kind.MLP_OUT), "head": (Kind.ATTN_OUT,), "neuron": (Kind.MLP_OUT,)}
        sites = view.sites(*kinds[self.grain])
        sizes = {"component": (), "head": (view.heads,), "neuron": (view.neurons,)}
        scores = {site: torch.zeros(len(passages), *sizes[self.grain]) for site in sites}
        rest = {name: torch.zeros(len(passages)) for name in ("logit", "embedding", "constant")}
        norm, entering = Norm.of(view), None if self.grain == "component" else kinds[self.grain][0]
        for batch in steps(list(view.batches(passages, size=self.batch_size)), "logit attribution"):
            found = attribute(
                view, norm, batch, position=self.position, of=self.of, centre=self.centre, entering=entering
            )
            rows = list(batch.rows)
            for name, table in rest.items():
                table[rows] = row_means(getattr(found, name), found.row, len(rows)).cpu().float()
            for site in sites:
                scores[site][rows] = row_means(self._shares(view, found, site), found.row, len(rows)).cpu().float()
        return scores, {name: table.tolist() for name, table in rest.items()}

    def _shares(self, view: ModelView, found: Attribution, site: Site) -> Tensor:
        if self.grain == "component":
            return found.components[site]
        return found.heads(view, site) if self.grain == "head" else found.neurons(view, site)
