"""Localization and Selection: what a localizer says, and what is chosen from it.

Larger means more responsible, in every method. Scores are float32 on the CPU, one tensor a site; their shape follows
from the grain: layer, component and position-free sums are `[]`, head `[h]`, neuron `[f]`, weight `[out, in]`, position
`[t]` (a token's index in its passage, prefix and suffix), direction `[r]`. Neurons live at `mlp.out` (its input), heads
at `attn.out` (its input).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memloc import store
from memloc.errors import InputError, MismatchError
from memloc.lazy import method
from memloc.provenance import Provenance
from memloc.sites import Grain, Site


@dataclass(frozen=True)
class Localization:
    """Scores of places, from one method on one set of passages.

    Attributes:
        grain: what one score speaks of.
        scores: site to float32 scores on the CPU; with `passages` set, a leading axis of that length.
        provenance: method, settings, seed, digests of model and data.
        passages: ids of the leading axis, or None where scores are already one for all passages.
        notes: numbers the method reports beside its scores (a completeness gap, an objective), JSON values.
        lengths: tokens of each passage, where scores are of positions: beyond them scores are 0 and mean nothing.

    Raises:
        InputError: a score is not finite (the site is named), or the leading axis or `lengths` has another length.
    """

    grain: Grain
    scores: Mapping[Site, Tensor]
    provenance: Provenance
    passages: tuple[str, ...] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] | None = None

    __repr__ = method("memloc.notebook:plain")
    _repr_html_ = method("memloc.notebook:html")

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", {s: t.detach().to("cpu", torch.float32) for s, t in self.scores.items()})
        for site, scores in self.scores.items():
            if not bool(torch.isfinite(scores).all()):
                raise InputError(f"{self.provenance.method}: {site} has scores that are not finite")
            if self.passages is not None and scores.shape[:1] != (len(self.passages),):
                raise InputError(f"{site}: scores {list(scores.shape)}, expected {len(self.passages)} passages first")
        if self.lengths is not None and len(self.lengths) != len(self.passages or ()):
            raise InputError(f"{len(self.lengths)} lengths for {len(self.passages or ())} passages")

    @property
    def count(self) -> int:
        """How many places are scored (the axis of passages not counted)."""
        return sum(scores.numel() for scores in self.mean().scores.values())

    def mean(self) -> Localization:
        """One score a place: the mean over passages where there is an axis of them."""
        if self.passages is None:
            return self
        scores = {site: scores.mean(0) for site, scores in self.scores.items()}
        return replace(self, scores=scores, passages=None, lengths=None)

    def of(self, passage: str) -> Localization:
        """The scores of one passage.

        Raises:
            InputError: no such passage, or scores are not kept per passage.
        """
        if self.passages is None or passage not in self.passages:
            raise InputError(f"no scores of passage {passage!r}; this localization holds {self.passages or 'one mean'}")
        row = self.passages.index(passage)
        end = None if self.lengths is None else self.lengths[row]
        scores = {site: scores[row] if end is None else scores[row, :end] for site, scores in self.scores.items()}
        return replace(self, scores=scores, passages=None, lengths=None)

    def minus(self, other: Localization) -> Localization:
        """Difference of two localizations of the same grain and sites (memorized minus control, say).

        Raises:
            MismatchError: grains or sites differ.
        """
        mine, theirs = self.mean(), other.mean()
        if mine.grain != theirs.grain or set(mine.scores) != set(theirs.scores):
            raise MismatchError(f"cannot compare {mine.grain} with {theirs.grain} scores, or of different sites")
        return replace(mine, scores={site: mine.scores[site] - theirs.scores[site] for site in mine.scores})

    def top(self, count: int | None = None, *, fraction: float | None = None, per: str = "model") -> Selection:
        """The best-scored places.

        Ties are broken by order of site, then of index, so the same scores give the same selection everywhere.

        Args:
            count: how many; or
            fraction: which share of the places scored, in (0, 1]; at least one is taken.
            per: "model" (the best anywhere) or "site" (that many, or that share, at every site).

        Raises:
            InputError: neither or both of count and fraction, out of range, or another `per`.
        """
        if per not in ("model", "site"):
            raise InputError(f"per={per!r}: expected 'model' or 'site'")
        scores = dict(sorted(self.mean().scores.items()))
        groups = [scores] if per == "model" else [{site: entry} for site, entry in scores.items()]
        masks: dict[Site, Tensor] = {}
        for group in groups:
            flat = torch.cat([entry.reshape(-1) for entry in group.values()])
            chosen = torch.zeros(len(flat), dtype=torch.bool)
            chosen[_largest(flat, _how_many(len(flat), count, fraction))] = True
            parts = torch.split(chosen, [entry.numel() for entry in group.values()])
            masks |= {site: part.view(entry.shape) for (site, entry), part in zip(group.items(), parts, strict=True)}
        settings = {"count": count, "fraction": fraction, "per": per}
        return Selection(self.grain, masks, replace(self.provenance, settings={**self.provenance.settings, **settings}))

    def save(self, path: str | Path) -> None:
        """Write `localization.safetensors`, atomically."""
        header = {
            "grain": str(self.grain),
            "passages": None if self.passages is None else list(self.passages),
            "notes": dict(self.notes),
            "lengths": None if self.lengths is None else list(self.lengths),
            "provenance": self.provenance.to_json(),
        }
        store.save(path, "localization", {str(site): entry for site, entry in self.scores.items()}, header)

    @classmethod
    def load(cls, path: str | Path) -> Localization:
        """Read what `save` wrote.

        Raises:
            ArtifactError: missing, cut, or of another kind.
        """
        tensors, header = store.load(path, "localization")
        scores = {Site.parse(name): entry for name, entry in tensors.items()}
        passages = None if header["passages"] is None else tuple(header["passages"])
        provenance = Provenance.from_json(header["provenance"])
        lengths = None if header.get("lengths") is None else tuple(header["lengths"])
        return cls(Grain(header["grain"]), dict(sorted(scores.items())), provenance, passages, header["notes"], lengths)


@dataclass(frozen=True)
class Selection:
    """Places chosen: one boolean mask a site, shaped like the scores they came from.

    Attributes:
        grain: what one entry speaks of.
        masks: site to bool, on the CPU.
        provenance: of the localization and the choice.
    """

    grain: Grain
    masks: Mapping[Site, Tensor]
    provenance: Provenance

    __repr__ = method("memloc.notebook:plain")
    _repr_html_ = method("memloc.notebook:html")

    @property
    def count(self) -> int:
        """How many places are chosen."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def fraction(self) -> float:
        """Share of the places scored that are chosen."""
        return self.count / max(1, sum(mask.numel() for mask in self.masks.values()))

    def indices(self) -> dict[Site, list[int]]:
        """Chosen flat indices of every site that has any."""
        found = {site: mask.reshape(-1).nonzero().reshape(-1).tolist() for site, mask in sorted(self.masks.items())}
        return {site: entries for site, entries in found.items() if entries}

    def random_like(self, seed: int, *, per: str = "site") -> Selection:
        """The matched control: as many places, chosen at random.

        Args:
            seed: of a generator of its own; the global one is not touched.
            per: "site" keeps the number at every site (so only *which* differs), "model" only the total.
        """
        if per not in ("model", "site"):
            raise InputError(f"per={per!r}: expected 'model' or 'site'")
        generator = torch.Generator().manual_seed(seed)
        sites = sorted(self.masks)
        if per == "site":
            masks = {site: _random_mask(self.masks[site], int(self.masks[site].sum()), generator) for site in sites}
        else:
            whole = torch.cat([self.masks[site].reshape(-1) for site in sites])
            parts = torch.split(
                _random_mask(whole, self.count, generator), [self.masks[site].numel() for site in sites]
            )
            masks = {site: part.view(self.masks[site].shape) for site, part in zip(sites, parts, strict=True)}
        settings = {**self.provenance.settings, "control_of": self.provenance.method, "matched": per}
        return Selection(self.grain, masks, replace(self.provenance, method="random", settings=settings, seed=seed))

    def save(self, path: str | Path) -> None:
        """Write `selection.safetensors`, atomically."""
        header = {"grain": str(self.grain), "provenance": self.provenance.to_json()}
        store.save(path, "selection", {str(site): mask for site, mask in self.masks.items()}, header)

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read what `save` wrote.

        Raises:
            ArtifactError: missing, cut, or of another kind.
        """
        tensors, header = store.load(path, "selection")
        masks = {Site.parse(name): mask for name, mask in tensors.items()}
        return cls(Grain(header["grain"]), dict(sorted(masks.items())), Provenance.from_json(header["provenance"]))

    def overlap(self, other: Selection) -> float:
        """Jaccard index of two selections of the same grain: shared over either; 1.0 when both are empty.

        Raises:
            MismatchError: grains differ.
        """
        if self.grain != other.grain:
            raise MismatchError(f"cannot compare a selection of {self.grain}s with one of {other.grain}s")
        both = {site: self.masks[site] & other.masks[site] for site in self.masks.keys() & other.masks.keys()}
        shared = sum(int(mask.sum()) for mask in both.values())
        either = self.count + other.count - shared
        return shared / either if either else 1.0


def selected(sites: Mapping[Site, Sequence[int]], sizes: Mapping[Site, int], grain: Grain) -> Selection:
    """A selection written by hand: indices at sites, such as `{Site(1, Kind.MLP_OUT): [7]}` with sizes `{...: 512}`."""
    masks = {site: torch.zeros(size, dtype=torch.bool) for site, size in sizes.items()}
    for site, entries in sites.items():
        if site not in sizes or any(not 0 <= entry < sizes[site] for entry in entries):
            raise InputError(f"{site}: indices {list(entries)} outside the {sizes.get(site, 0)} that are there")
        masks[site][list(entries)] = True
    return Selection(grain, masks, Provenance("by hand"))


def _how_many(total: int, count: int | None, fraction: float | None) -> int:
    if (count is None) == (fraction is None):
        raise InputError("give either a count or a fraction of places to select")
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise InputError(f"fraction {fraction}: expected above 0 and at most 1")
        return max(1, math.floor(fraction * total + 0.5))
    if count is None or not 0 < count <= total:
        raise InputError(f"count {count}: expected 1 to {total}, the places scored")
    return count


def _largest(flat: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, lower index first among equals, in O(n)."""
    least = flat.kthvalue(len(flat) - count + 1).values
    above = (flat > least).nonzero().reshape(-1)
    ties = (flat == least).nonzero().reshape(-1)
    return torch.cat([above, ties[: count - len(above)]])


def _random_mask(like: Tensor, count: int, generator: torch.Generator) -> Tensor:
    flat = torch.zeros(like.numel(), dtype=torch.bool)
    flat[torch.randperm(like.numel(), generator=generator)[:count]] = True
    return flat.view(like.shape)
