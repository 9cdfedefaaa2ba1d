"""Prefix perturbation: which tokens of the prefix hold the suffix together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from memloc.costs import Cost
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.patching.perturbation import Exchanges, PrefixMap
from memloc.provenance import Provenance, settings_of
from memloc.scores import Localization
from memloc.sites import OUTSIDE, Grain, Kind, Site
from memloc.view import ModelView, left_to_right


@dataclass(frozen=True, kw_only=True)
class PrefixPerturbation:
    """Score of a prefix token = what goes wrong with the suffix when another token stands in its place.

    Mean over random alternatives, each other than the token itself. By `score`:

        nll      rise of the suffix's mean NLL, nats per token
        exact    fall of the number of suffix tokens that greedy decoding gets right before its first mistake
        changed  share of the greedily decoded tokens that are other than the suffix's

    One score a token of prefix and suffix, at the embedding; 0 in the suffix. One axis of passages. Position 0 counts
    as any other. Read the scores beside those of a control: what is not memorized is disrupted more easily.

    Notes, one value a passage: the most disruptive exchange by this score ("position", "token", "effect"), the first
    suffix token whose likeliest candidate changes under it ("first_impacted", or None), suffix tokens decoded right
    without it and under it ("exact_before", "exact_after").

    Attributes:
        score: as above. "exact" needs no decoding: until its first mistake the decoded text is the suffix itself, so
            the teacher-forced pass knows; "changed" decodes.
        target: "suffix": the passage's; "own": as many tokens of the model's own greedy continuation in its place, so
            that what was never memorized can be asked how easily it is changed.
        alternatives: random tokens tried at every position.
        seed: theirs.
        batch_size: passages whose prefixes are cached together; no effect on scores.
        stride: neighbouring positions that start from one cached prefix; no effect on scores.
        memory_mb: working memory of the rows run together, roughly; no effect on scores.

    Cost: one forward a passage; then, for every prefix token and alternative, the tokens from there on, which is
    about three quarters of a forward where prefix and suffix are of one length.

    Source: Stoehr et al. 2024, arXiv:2403.19851 (one alternative, position 0 left out, the random token may be the
    original; these defects are not copied). The cached prefix, and counting without decoding, are ours.
    """

    score: Literal["nll", "exact", "changed"] = "nll"
    target: Literal["suffix", "own"] = "suffix"
    alternatives: int = 4
    seed: int = 0
    batch_size: int = 16
    stride: int = 8
    memory_mb: int = 512

    in_parts: ClassVar[bool] = True
    refuses = staticmethod(left_to_right)

    def __post_init__(self) -> None:
        if min(self.alternatives, self.batch_size, self.stride, self.memory_mb) < 1:
            raise InputError("alternatives, batch_size, stride and memory_mb: expected at least 1 each")

    def __call__(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Localization:
        """Score tokens, passage by passage; `contrast` is not used.

        Raises:
            InputError: no passages, or one the model cannot take (named).
        """
        view.need_causal("the method lives on what a token cannot hear")
        if not passages:
            raise InputError("prefix-perturbation: no passages given")
        lengths = tuple(len(item.ids) for item in passages)
        scores = torch.zeros(len(passages), max(lengths), dtype=torch.float64)
        told: list[dict[str, Any]] = []
        for row, found in enumerate(self._exchanges.maps(view, passages)):
            by = {"nll": "rise", "exact": "drop", "changed": "changed"}[self.score]
            effect = getattr(found, by).double()
            scores[row, : len(effect)] = effect.mean(1)
            told.append(_told(found, effect))
        notes = {key: [entry[key] for entry in told] for key in told[0]}
        inputs = {"model": view.digest, "passages": passages.digest}
        provenance = Provenance("prefix-perturbation", settings_of(self), self.seed, inputs)
        return Localization(Grain.POSITION, {EMBED: scores}, provenance, passages.ids, notes, lengths)

    def cost(self, view: ModelView, passages: Passages, *, contrast: Passages | None = None) -> Cost:
        """The map's cost; with decoding an upper bound."""
        rows = 8 * len(passages) * max(len(item.ids) for item in passages)
        found = self._exchanges.cost(view, passages)
        return Cost(found.forward, 0, found.bytes + 2 * rows, found.bound)

    @property
    def _exchanges(self) -> Exchanges:
        return Exchanges(
            self.alternatives,
            self.seed,
            self.target,
            self.score == "changed",
            self.batch_size,
            self.stride,
            self.memory_mb,
        )


EMBED = Site(OUTSIDE, Kind.EMBED)


def _told(found: PrefixMap, by: torch.Tensor) -> dict[str, Any]:
    at, which = found.worst(by)
    wrong = (found.greedy[at, which] != found.clean).nonzero()
    return {
        "position": at,
        "token": int(found.tokens[at, which]),
        "effect": float(by[at, which]),
        "first_impacted": int(wrong[0]) if len(wrong) else None,
        "exact_before": found.clean_exact,
        "exact_after": int(found.exact[at, which]),
    }
