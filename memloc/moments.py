"""Second moments: what ordinary text sends into a matrix, as the mean of k kᵀ. One pass over the text for all sites.

Not centred: an update is judged by what it adds to every output, and that depends on the keys themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memloc import progress, store
from memloc.errors import InputError, MismatchError
from memloc.passages import Passages
from memloc.provenance import Provenance, digest_json, digest_tensor
from memloc.sites import Site
from memloc.view import ModelView

BLOCK = 64
"""Columns that a product of keys is computed in at least; smaller blocks cost more in calls than they save."""
ROWS = 1024
"""Keys whose products are added up in float32 before they go into a sum in float64."""


@dataclass(frozen=True, eq=False)
class Split:
    """What second moments are judged by: the sums over one half of the passages, and some of the keys.

    Attributes:
        first: site to `[in, in]` float64, the sum over the first half.
        count: tokens of the first half.
        probes: site to `[p, in]` float32, keys at the last token of passages all over the text.
    """

    first: Mapping[Site, Tensor]
    count: int
    probes: Mapping[Site, Tensor]

    def joined(self, other: Split) -> Split:
        """Halves and probes of both."""
        first = {site: entry + other.first[site] for site, entry in self.first.items()}
        probes = {site: torch.cat([entry, other.probes[site]]) for site, entry in self.probes.items()}
        return Split(first, self.count + other.count, probes)


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums of k kᵀ over tokens, by site.

    Attributes:
        sums: site to `[in, in]` float64 on the CPU, symmetric.
        count: tokens summed over, the same for every site.
        provenance: digests of the model and the text.
        split: what they are judged by (`memloc.moment_judgement`), where it was collected.
        shrinkage: site to the share τ that `mean` moves towards τ tr(C)/f I; the sums stay as they are.

    Raises:
        InputError: no token, a share outside [0, 1], a sum that is not square or not finite (the site is named).
    """

    sums: Mapping[Site, Tensor]
    count: int
    provenance: Provenance
    split: Split | None = None
    shrinkage: Mapping[Site, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plain = {site: entry.detach().to("cpu", torch.float64) for site, entry in sorted(self.sums.items())}
        object.__setattr__(self, "sums", plain)
        if self.count < 1:
            raise InputError(f"second moments of {self.count} tokens; at least one is needed")
        for site, entry in plain.items():
            if entry.ndim != 2 or entry.shape[0] != entry.shape[1]:
                raise InputError(f"{site}: second moment {list(entry.shape)}, expected a square matrix")
            if not bool(torch.isfinite(entry).all()):
                raise InputError(f"{site}: the second moment holds values that are not finite")
        for site, share in self.shrinkage.items():
            if site not in plain or not 0 <= share <= 1:
                raise InputError(f"shrinkage {share} of {site}; expected a site that was collected and 0 to 1")

    @property
    def digest(self) -> str:
        """Digest of sums, count and shrinkage: of all that `mean` depends on."""
        sums = {str(site): digest_tensor(entry) for site, entry in self.sums.items()}
        found: dict[str, Any] = {"sums": sums, "count": self.count}
        if self.shrinkage:
            found["shrinkage"] = {str(site): share for site, share in self.shrinkage.items()}
        return digest_json(found)

    def mean(self, site: Site) -> Tensor:
        """C, the mean of k kᵀ per token at `site`, or (1-τ) C + τ tr(C)/f I where it is shrunk: `[in, in]` float64.

        Raises:
            InputError: it was not collected there.
        """
        if site not in self.sums:
            raise InputError(f"no second moment of {site}; there are those of {', '.join(map(str, self.sums))}")
        return towards_identity(self.sums[site] / self.count, self.shrinkage.get(site, 0.0))

    def shrunk(self, shares: Mapping[Site, float]) -> Moments:
        """The same sums, whose `mean` is shrunk by these shares."""
        return replace(self, shrinkage=dict(sorted(shares.items())))

    def merge(self, other: Moments) -> Moments:
        """Moments over both texts, of the same model and sites; not shrunk, for the share depends on the count.

        Raises:
            MismatchError: another model, other sites, or texts that are or may be the same (tokens would count twice).
        """
        mine, theirs = self.provenance.inputs, other.provenance.inputs
        if mine.get("model") != theirs.get("model") or set(self.sums) != set(other.sums):
            raise MismatchError("second moments of another model or of other sites cannot be merged")
        shared = set(_texts(mine)) & set(_texts(theirs))
        if shared:
            raise MismatchError(f"both second moments hold the text {min(shared)[:12]}; its tokens would count twice")
        drawn = _drawn_alike(self.provenance, other.provenance)
        sums = {site: self.sums[site] + other.sums[site] for site in self.sums}
        texts = sorted([*_texts(mine), *_texts(theirs)])
        inputs = {"model": mine.get("model", ""), "text": "+".join(texts)}
        split = None if self.split is None or other.split is None else self.split.joined(other.split)
        return Moments(sums, self.count + other.count, Provenance("moments", drawn, None, inputs), split)

    def save(self, path: str | Path) -> None:
        """Write `moments.safetensors`, atomically; 8 bytes an entry, twice that with halves.

        Raises:
            TargetError: it cannot be written.
        """
        header: dict[str, Any] = {"count": self.count, "provenance": self.provenance.to_json()}
        tensors = {str(site): entry for site, entry in self.sums.items()}
        if self.shrinkage:
            header["shrinkage"] = {str(site): share for site, share in self.shrinkage.items()}
        if self.split is not None:
            header["first"] = self.split.count
            tensors |= {f"first {site}": entry for site, entry in self.split.first.items()}
            tensors |= {f"probes {site}": entry for site, entry in self.split.probes.items()}
        store.save(path, "moments", tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Read what `save` wrote.

        Raises:
            ArtifactError: missing, cut, or of another kind.
        """
        tensors, header = store.load(path, "moments")
        found: dict[str, dict[Site, Tensor]] = {"": {}, "first": {}, "probes": {}}
        for name, entry in tensors.items():
            part, _, site = name.rpartition(" ")
            found[part][Site.parse(site)] = entry
        split = Split(found["first"], int(header["first"]), found["probes"]) if "first" in header else None
        shrinkage = {Site.parse(name): float(share) for name, share in header.get("shrinkage", {}).items()}
        provenance = Provenance.from_json(header["provenance"])
        return cls(found[""], int(header["count"]), provenance, split, shrinkage)


@torch.no_grad()
def second_moments(view: ModelView, text: Passages, sites: Sequence[Site], *, size: int = 32) -> Moments:
    """Second moments of what flows into `sites` over every token of `text`.

    Sums run in float64 whatever the model's dtype; padding does not count.

    Cost: one forward a batch, left after the highest site; memory of one batch's inputs and two `[in, in]` a site.

    Args:
        view: the model.
        text: ordinary text; prefix and suffix tokens count alike.
        sites: any maps of the blocks.
        size: rows a batch; the result depends on it by rounding only.

    Raises:
        InputError: no text, no sites, or a passage that does not fit the model.
    """
    if not sites or not text:
        raise InputError(f"second moments of {len(sites)} sites over {len(text)} passages; each needs at least one")
    sums: dict[Site, Tensor] = {}
    count = 0
    total = math.ceil(len(text) / size)
    for batch in progress.steps(view.batches(text, size=size), "second moments", total):
        with view.record(sites, stop=True) as inputs:
            view.hidden(batch)
        for site, found in inputs.items():
            if site not in sums:
                sums[site] = empty(found.shape[-1], found.device)
            add_keys(sums[site], found[batch.mask])
        count += int(batch.length.sum())
    inputs_of = {"model": view.digest, "text": text.digest}
    whole = {site: mirrored(entry) for site, entry in sums.items()}
    return Moments(whole, count, Provenance("moments", {}, None, inputs_of))


def towards_identity(moment: Tensor, share: float) -> Tensor:
    """(1-τ) C + τ tr(C)/f I: the same trace, closer to a multiple of the identity; τ = 0 gives C itself."""
    if not share:
        return moment
    shrunk = (1 - share) * moment
    shrunk.diagonal().add_(share * moment.diagonal().mean())
    return shrunk


def empty(width: int, device: torch.device) -> Tensor:
    """A sum to begin with, where float64 exists: `[width, width]`."""
    return torch.zeros(width, width, dtype=torch.float64, device="cpu" if device.type == "mps" else device)


def add_keys(total: Tensor, keys: Tensor) -> None:
    """Add Σ k kᵀ over the rows of `keys` [t, f] to `total`, in place and in float64; see `mirrored`.

    Only blocks on and above the diagonal are computed: the product is symmetric, so half the work is enough. Products
    of a thousand rows are taken in float32 (which keys of half precision lose nothing in, and float32 ones no more
    than their own rounding) and added up in float64; all in float64 where the keys are, or where torch was told to
    multiply float32 coarsely.
    """
    wide = keys.dtype == torch.float64 or torch.get_float32_matmul_precision() != "highest"
    plain = keys.to(total.device, torch.float64 if wide else torch.float32)
    width = total.shape[0]
    step = max(BLOCK, -(-width // 8))
    for first in range(0, len(plain), ROWS):
        rows = plain[first : first + ROWS]
        for start in range(0, width, step):
            end = min(start + step, width)
            total[:end, start:end] += rows[:, :end].T @ rows[:, start:end]


def mirrored(total: Tensor) -> Tensor:
    """What `add_keys` summed, with its lower triangle."""
    return total.triu() + total.triu(1).T


def _drawn_alike(mine: Provenance, theirs: Provenance) -> dict[str, Any]:
    """Settings to keep; passages drawn from one text may be the same ones, unless they are shards of one draw."""
    one, other = dict(mine.settings), dict(theirs.settings)
    first, second = one.pop("shard", ""), other.pop("shard", "")
    if "drawn_from" not in one or one["drawn_from"] != other.get("drawn_from"):
        return {}
    if one != other or not first or not second:
        said = "both second moments were drawn from one text, not as shards of one draw"
        raise MismatchError(f"{said}; tokens could count twice")
    return {**one, "shard": "+".join(sorted([*first.split("+"), *second.split("+")]))}


def _texts(inputs: Mapping[str, str]) -> list[str]:
    return [part for part in inputs.get("text", "").split("+") if part]
