"""Perplexity on ordinary text: what an edit costs everywhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from memloc.errors import InputError
from memloc.measurement import Measurement
from memloc.measures.figures import figure
from memloc.measures.record import Scheme, suffix_logits
from memloc.passages import Passage, Passages
from memloc.provenance import Provenance, settings_of
from memloc.statistics import ratio_interval
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp of the mean NLL over all suffix tokens of all passages: every token counts once, whatever its window.

    Windows of ordinary text (`Passages.from_texts`) have a prefix of one token, so all but the first are scored.

    Of a masked language model it is the pseudo-perplexity: each token alone is hidden, and all others are seen. Its
    figure is called so, for it is no perplexity and not to be compared with one.

    Rows: id, nll (nats per token), tokens. Figures: "perplexity", and "nll" in nats per token.

    Attributes:
        batch_size: rows of a forward pass.

    Cost: one forward over every passage; of a masked language model, one for every token that is scored.

    Source: pseudo-perplexity, Salazar et al. 2020, arXiv:1910.14659.
    """

    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size {self.batch_size}: expected at least 1")

    def __call__(self, view: ModelView, passages: Passages) -> Measurement:
        """Measure `passages` on the model.

        Raises:
            InputError: no passages, a token outside the vocabulary, a row longer than the context.
            ModelError: logits that are not finite.
        """
        asked, source = (passages, None) if view.row.causal else one_by_one(passages)
        total = torch.zeros(len(passages), dtype=torch.float64)
        for chunk in suffix_logits(view, asked, size=self.batch_size, label="perplexity"):
            spoken = Scheme().logprobs(chunk.logits, chunk.token)
            row = chunk.row.cpu()
            total.index_add_(0, row if source is None else source[row], -spoken.cpu().double())
        sums, tokens = total.tolist(), [len(item.suffix) for item in passages]
        mean = math.fsum(sums) / sum(tokens)
        ends = ratio_interval(sums, tokens) if len(sums) > 1 else None
        raised = None if ends is None else (_exp(ends[0]), _exp(ends[1]))
        name = "perplexity" if view.row.causal else "pseudo-perplexity"
        figures = (
            figure(name, _exp(mean), len(sums), raised, "perplexity", "lower"),
            figure("nll", mean, len(sums), ends, "nats/token", "lower"),
        )
        rows = tuple(
            {"id": item.id, "nll": value / size, "tokens": size}
            for item, value, size in zip(passages, sums, tokens, strict=True)
        )
        provenance = Provenance(
            "perplexity", settings_of(self), None, {"model": view.digest, "passages": passages.digest}
        )
        return Measurement("perplexity", {item.name: item for item in figures}, rows, provenance)


def one_by_one(passages: Passages) -> tuple[Passages, Tensor]:
    """Every suffix token as a passage of its own, what stands around it seen; and which passage each is of."""
    items, source = [], []
    for index, item in enumerate(passages):
        for step, token in enumerate(item.suffix):
            seen, rest = item.prefix + item.suffix[:step], item.suffix[step + 1 :] + item.after
            items.append(Passage(f"{item.id}, token {step}", seen, (token,), after=rest))
            source.append(index)
    return Passages(tuple(items), passages.origin), torch.tensor(source, dtype=torch.long)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
