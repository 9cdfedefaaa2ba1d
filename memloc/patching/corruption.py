"""Corrupted runs of a passage: the same length, token for token, with what it hangs on taken away.

Two of them are no runs at all but constants put in a place (0, or its mean over ordinary text).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memloc.costs import Cost
from memloc.errors import InputError
from memloc.passages import Passage, Passages
from memloc.patching.perturbation import Exchanges, own_generator
from memloc.sites import OUTSIDE, Kind, Site
from memloc.view import ModelView

How = Literal["zero", "mean", "resample", "perturbed", "noise", "rare"]
EMBED = Site(OUTSIDE, Kind.EMBED)


@dataclass(frozen=True)
class Corrupted:
    """Corrupted rows of one passage, r of them, t tokens each as the passage has.

    Attributes:
        ids: [r, t].
        noise: [r, t, d] added to the token embeddings, or None.
        first: the first position that differs from the passage in any row.
    """

    ids: Tensor
    noise: Tensor | None
    first: int


@dataclass(frozen=True)
class Corruption:
    """How passages are corrupted; the suffix stays as it is.

    Attributes:
        how: "zero" and "mean" (over the contrast's tokens): constants in a place, no corrupted run. "resample": the
            first tokens of a contrast passage at least as long in the prefix's place. "perturbed": the most disruptive
            of some random exchanges of one prefix token (`patching.perturbation`). "noise": Gaussian noise on the
            embeddings of the subject (tag "subject"), or of the whole prefix where no subject is marked. "rare": the
            same on the quarter of the prefix's tokens that are rarest in the contrast.
        noise: its standard deviation, in standard deviations of the entries of the token embeddings, scaled where the
            model scales them.
        draws: rows of noise, or contrast passages, each passage is corrupted with.
        alternatives: of "perturbed": tokens tried at every position.
        seed: every passage draws by itself, from the seed and its own tokens.
    """

    how: How
    noise: float = 3.0
    draws: int = 1
    alternatives: int = 2
    seed: int = 0

    @property
    def constant(self) -> bool:
        """Whether a constant is put in the place, so that there is no corrupted run."""
        return self.how in ("zero", "mean")

    @property
    def rows(self) -> int:
        """Corrupted rows a passage."""
        return 0 if self.constant else 1 if self.how == "perturbed" else self.draws

    def of(self, view: ModelView, passages: Passages, contrast: Passages | None) -> list[Corrupted]:
        """The corrupted rows of every passage, in order; none for constants.

        Raises:
            InputError: a contrast is needed and missing, or none of its passages is as long as a prefix; a subject that
                is not inside its prefix.
        """
        self.check(contrast)
        if self.constant:
            return []
        if self.how == "perturbed":
            return self._perturbed(view, passages)
        if self.how == "resample":
            return [self._resampled(item, contrast or passages) for item in passages]
        counts = None if contrast is None or self.how != "rare" else _counts(view, contrast)
        sigma = embedding_spread(view)
        return [self._noisy(view, item, _noised(item, counts), sigma) for item in passages]

    def check(self, contrast: Passages | None) -> None:
        """Refuse a corruption that lacks its contrast."""
        if self.how in ("mean", "resample", "rare") and not contrast:
            raise InputError(f"corrupt={self.how!r} needs a contrast set (ordinary text, or other passages)")

    def cost(self, view: ModelView, passages: Passages) -> Cost:
        """Of finding the corrupted rows, not of running them: only the search for a disruptive token runs the model."""
        return self._exchanges.cost(view, passages) if self.how == "perturbed" else Cost(0)

    @property
    def _exchanges(self) -> Exchanges:
        return Exchanges(self.alternatives, self.seed)

    def _perturbed(self, view: ModelView, passages: Passages) -> list[Corrupted]:
        found = []
        for item, seen in zip(passages, self._exchanges.maps(view, passages), strict=True):
            at, which = seen.worst(seen.rise)
            ids = torch.tensor([item.ids])
            ids[0, at] = seen.tokens[at, which]
            found.append(Corrupted(ids, None, at))
        return found

    def _resampled(self, item: Passage, contrast: Passages) -> Corrupted:
        size = len(item.prefix)
        others = [other.ids[:size] for other in contrast if len(other.ids) >= size and other.ids[:size] != item.prefix]
        if not others:
            raise InputError(
                f"passage {item.id!r}: a prefix of {size} tokens, and no contrast passage is another of that length; "
                "give longer ones"
            )
        picks = torch.randint(len(others), (self.draws,), generator=own_generator(self.seed, item))
        ids = torch.tensor([[*others[pick], *item.suffix] for pick in picks.tolist()])
        return Corrupted(ids, None, int((ids != torch.tensor(item.ids)).any(0).nonzero()[0]))

    def _noisy(self, view: ModelView, item: Passage, where: Sequence[int], sigma: float) -> Corrupted:
        drawn = torch.randn(
            self.draws, len(where), view.width, generator=own_generator(self.seed, item), dtype=torch.float64
        )
        noise = torch.zeros(self.draws, len(item.ids), view.width, dtype=torch.float64)
        noise[:, list(where)] = self.noise * sigma * drawn
        return Corrupted(torch.tensor([item.ids]).expand(self.draws, -1), noise, min(where))


@torch.no_grad()
def embedding_spread(view: ModelView) -> float:
    """Standard deviation of the entries of all token embeddings, as the embedding puts them out."""
    return float(view.module(EMBED)(torch.arange(view.vocab, device=view.device)).double().std())


def added(view: ModelView, noise: Tensor | None) -> AbstractContextManager[None]:
    """Inside, `noise` [n, t, d] is added to the token embeddings."""
    if noise is None:
        return contextlib.nullcontext()
    return view.replace([EMBED], lambda _, vectors: vectors + noise.to(vectors), side="output")


def _noised(item: Passage, counts: Tensor | None) -> list[int]:
    """Positions of the prefix that get noise."""
    if counts is not None:
        heard = counts[torch.tensor(item.prefix)]
        return sorted(torch.argsort(heard, stable=True)[: max(1, len(item.prefix) // 4)].tolist())
    subject = item.tags.get("subject")
    if subject is None:
        return list(range(len(item.prefix)))
    start, end = subject
    if not 0 <= start < end <= len(item.prefix):
        raise InputError(f"passage {item.id!r}: subject [{start}, {end}) outside its prefix of {len(item.prefix)}")
    return list(range(start, end))


def _counts(view: ModelView, contrast: Passages) -> Tensor:
    return torch.bincount(torch.tensor([token for item in contrast for token in item.ids]), minlength=view.vocab)
