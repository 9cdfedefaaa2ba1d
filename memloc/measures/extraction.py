"""Extraction: is the suffix recited after its prefix, and how many samples would it take?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memloc.errors import InputError
from memloc.measurement import Figure, Measurement
from memloc.measures.figures import figure
from memloc.measures.queries import leak_probability, log_queries, queries, queries_to_leak_any
from memloc.measures.record import Scheme, TokenRecord, token_record
from memloc.passages import Passages
from memloc.provenance import Provenance, settings_of
from memloc.statistics import bootstrap_interval, median_interval, rate_interval, ratio_interval
from memloc.view import ModelView


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Strict greedy recall, log p_z and what follows from them, from one teacher-forced pass and no generation.

    A run has one sampling scheme, so that a figure's name has one meaning; `token_record` takes several at once. The
    default is plain sampling, where log p_z is finite and comparable to that of controls. `top_k=40` is Hayes et
    al.'s scheme: there a row with one token outside the 40 likeliest has log p_z = -inf. "mean nll" is always plain.

    log p_z covers the stored tokenisation of the suffix only, so it bounds the text's probability from below.

    Rows: id, tokens, strict, first_miss (tokens recited before it), log_pz (nats), nll (plain, nats per token),
    exact_memorization, extraction_strength, queries (samples to see the suffix with probability `p`; inf where p_z is
    0 or the number leaves float64), log10_queries, fragile, worst_rank (largest rank of a suffix token, 0 the
    arg-max), and `dose` where the passage has it.

    Figures: "strict rate", "first miss", "median log p_z", "log10 p_z" (median), "queries to leak any" (of this very
    set, each row asked that often), "expected leaks" (rows leaked by `n` samples of each), "exact memorization",
    "extraction strength", "mean nll" (token-weighted), "fragile rows".

    Attributes:
        temperature: of the sampling scheme.
        top_k: keep that many likeliest tokens, or all.
        top_p: keep the likeliest tokens that hold this mass, or all.
        p: probability asked for in "queries".
        n: samples in "expected leaks".
        batch_size: rows of a forward pass.

    Cost: one forward over every prefix and suffix.

    Source: Carlini et al. 2022, arXiv:2202.07646 (strict); Hayes et al. 2024, arXiv:2410.19482 (p_z, n, p).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    p: float = 0.9
    n: int = 1000
    batch_size: int = 32

    def __post_init__(self) -> None:
        Scheme(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        if not 0 < self.p < 1:
            raise InputError(f"p {self.p}: expected a probability between 0 and 1, both excluded")
        if self.n < 1 or self.batch_size < 1:
            raise InputError(f"n {self.n}, batch_size {self.batch_size}: expected at least 1 of each")

    @property
    def scheme(self) -> Scheme:
        """The sampling scheme."""
        return Scheme(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def __call__(self, view: ModelView, passages: Passages) -> Measurement:
        """Measure `passages` on the model.

        Raises:
            InputError: no passages, a token outside the vocabulary, a row longer than the context.
            ModelError: logits that are not finite.
        """
        schemes = (Scheme(), self.scheme)
        record = token_record(view, passages, schemes=schemes, batch_size=self.batch_size, label="extraction")
        rows = self._rows(passages, record)
        provenance = Provenance(
            "extraction", settings_of(self), None, {"model": view.digest, "passages": passages.digest}
        )
        return Measurement("extraction", {item.name: item for item in self._figures(rows)}, rows, provenance)

    def _rows(self, passages: Passages, record: TokenRecord) -> tuple[dict[str, Any], ...]:
        log_pz = record.log_pz(self.scheme).numpy()
        columns: dict[str, Any] = {
            "tokens": record.length,
            "strict": record.strict,
            "first_miss": record.first_miss,
            "log_pz": log_pz,
            "nll": record.nll(),
            "exact_memorization": record.exact_memorization,
            "extraction_strength": record.extraction_strength,
            "queries": queries(log_pz, self.p),
            "log10_queries": log_queries(log_pz, self.p) / math.log(10),
            "fragile": record.fragile,
            "worst_rank": record.rank.amax(1),
        }
        values = [column.tolist() for column in columns.values()]
        return tuple(
            {"id": item.id, **dict(zip(columns, row, strict=True)), **_dose(item.tags)}
            for item, *row in zip(passages, *values, strict=True)
        )

    def _figures(self, rows: Sequence[dict[str, Any]]) -> list[Figure]:
        count = len(rows)
        column = {key: [row[key] for row in rows] for key in rows[0] if key != "dose"}
        hits, fragile = sum(column["strict"]), sum(column["fragile"])
        log_pz, leaks = column["log_pz"], leak_probability(column["log_pz"], self.n).tolist()
        middle, (low, high) = float(np.median(log_pz)), median_interval(log_pz)
        total = [nll * tokens for nll, tokens in zip(column["nll"], column["tokens"], strict=True)]
        fewest, most = bootstrap_interval(leaks)
        ln10 = math.log(10)
        return [
            figure("strict rate", hits / count, count, rate_interval(hits, count), "share", "lower"),
            _mean("first miss", column["first_miss"], "tokens"),
            figure("median log p_z", middle, count, (low, high), "nats", "lower"),
            figure("log10 p_z", middle / ln10, count, (low / ln10, high / ln10), "log10", "lower"),
            figure("queries to leak any", queries_to_leak_any(log_pz, self.p), count, None, "queries", "higher"),
            figure("expected leaks", sum(leaks), count, (fewest * count, most * count), "passages", "lower"),
            _mean("exact memorization", column["exact_memorization"], "share"),
            _mean("extraction strength", column["extraction_strength"], "share"),
            figure(
                "mean nll",
                sum(total) / sum(column["tokens"]),
                count,
                ratio_interval(total, column["tokens"]),
                "nats/token",
                "higher",
            ),
            figure("fragile rows", fragile, count, None, "passages"),
        ]


def _mean(name: str, values: Sequence[float], unit: str) -> Figure:
    return figure(name, sum(values) / len(values), len(values), bootstrap_interval(values), unit, "lower")


def _dose(tags: Any) -> dict[str, Any]:
    return {"dose": tags["dose"]} if "dose" in tags else {}
