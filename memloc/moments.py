"""Second moments: what ordinary text sends into a matrix, as the mean of k kᵀ. One pass over the text for all sites.

Not centred: an update is judged by what it adds to every output, and that depends on the keys themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memloc import progress, store
from memloc.errors import InputError, MismatchError
from memloc.passages import Passages
from memloc.provenance import Provenance, digest_json, digest_tensor
from memloc.sites import Site
from memloc.view import ModelView


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums of k kᵀ over tokens, by site.

    Attributes:
        sums: site to `[in, in]` float64 on the CPU, symmetric.
        count: tokens summed over, the same for every site.
        provenance: digests of the model and the text.

    Raises:
        InputError: no token, or a sum that is not square or not finite (the site is named).
    """

    sums: Mapping[Site, Tensor]
    count: int
    provenance: Provenance

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

    @property
    def digest(self) -> str:
        """Digest of sums and count."""
        sums = {str(site): digest_tensor(entry) for site, entry in self.sums.items()}
        return digest_json({"sums": sums, "count": self.count})

    def mean(self, site: Site) -> Tensor:
        """Mean of k kᵀ per token at `site`: `[in, in]` float64.

        Raises:
            InputError: it was not collected there.
        """
        if site not in self.sums:
            raise InputError(f"no second moment of {site}; there are those of {', '.join(map(str, self.sums))}")
        return self.sums[site] / self.count

    def merge(self, other: Moments) -> Moments:
        """Moments over both texts, of the same model and sites.

        Raises:
            MismatchError: another model, other sites, or texts that are the same (tokens would count twice).
        """
        mine, theirs = self.provenance.inputs, other.provenance.inputs
        if mine.get("model") != theirs.get("model") or set(self.sums) != set(other.sums):
            raise MismatchError("second moments of another model or of other sites cannot be merged")
        shared = set(_texts(mine)) & set(_texts(theirs))
        if shared:
            raise MismatchError(f"both second moments hold the text {min(shared)[:12]}; its tokens would count twice")
        sums = {site: self.sums[site] + other.sums[site] for site in self.sums}
        texts = sorted([*_texts(mine), *_texts(theirs)])
        inputs = {"model": mine.get("model", ""), "text": "+".join(texts)}
        return Moments(sums, self.count + other.count, Provenance("moments", {}, None, inputs))

    def save(self, path: str | Path) -> None:
        """Write `moments.safetensors`, atomically; 8 bytes an entry.

        Raises:
            TargetError: it cannot be written.
        """
        header = {"count": self.count, "provenance": self.provenance.to_json()}
        store.save(path, "moments", {str(site): entry for site, entry in self.sums.items()}, header)

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Read what `save` wrote.

        Raises:
            ArtifactError: missing, cut, or of another kind.
        """
        tensors, header = store.load(path, "moments")
        sums = {Site.parse(name): entry for name, entry in tensors.items()}
        return cls(sums, int(header["count"]), Provenance.from_json(header["provenance"]))


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
            keys = found[batch.mask].to(torch.float64)
            product = keys.T @ keys
            sums[site] = sums[site] + product if site in sums else product
        count += int(batch.length.sum())
    inputs_of = {"model": view.digest, "text": text.digest}
    return Moments(sums, count, Provenance("moments", {}, None, inputs_of))


def _texts(inputs: Mapping[str, str]) -> list[str]:
    return [part for part in inputs.get("text", "").split("+") if part]
