"""The curvature of a loss by the weights of maps, as Kronecker factors: what ordinary text leans on, and what not.

A map reads a_t and is pulled on by g_t, the gradient, by what it puts out, of the sum of negative log-likelihoods of a
passage's tokens. K-FAC takes G ⊗ A for the second moment of g aᵀ per token, with A = E[a aᵀ] and G = E[g gᵀ]. In the
eigenbases of both, a weight is C = U_Gᵀ W U_A and its entry (i, j) has curvature λ_i μ_j. With labels drawn from the
model this is its Fisher information; with the true next tokens, the empirical one. EK-FAC keeps the bases and estimates
the curvatures again, as mean squares of the gradient's own coordinates.

Source: Martens & Grosse 2015, arXiv:1503.05671; George et al. 2018, arXiv:1806.03884; Grosse et al. 2023,
arXiv:2308.03296; bands and memorization: Merullo et al. 2025, arXiv:2510.24256.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from memloc import progress, store
from memloc.batches import Batch
from memloc.errors import InputError, MismatchError
from memloc.gradients.flows import Loss
from memloc.gradients.map_gradients import CHUNK, pulls
from memloc.moments import Moments
from memloc.passages import Passages
from memloc.provenance import Provenance, digest_json
from memloc.sites import Site
from memloc.view import ModelView

Labels = Literal["sampled", "true"]


@dataclass(frozen=True, eq=False)
class Factors:
    """Second moments of what maps read and of what pulls on them, per token; sums, so that parts of a text merge.

    Attributes:
        read: of a, every site [in, in].
        pull: of g, every site [out, out].
        provenance: labels, seed, digests of the model and the text.
    """

    read: Moments
    pull: Moments
    provenance: Provenance

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where factors were collected."""
        return tuple(self.read.sums)

    @property
    def count(self) -> int:
        """Tokens they are sums over."""
        return self.read.count

    def basis(self, site: Site) -> Basis:
        """The eigenbases at `site`, steepest first.

        Raises:
            InputError: no factors were collected there.
        """
        (energy, read), (pulling, write) = (_eigen(moments.mean(site)) for moments in (self.read, self.pull))
        return Basis(read, write, energy, pulling)

    def merge(self, other: Factors) -> Factors:
        """Factors over both texts.

        Raises:
            MismatchError: another model, other sites, the same text, or labels of another kind.
        """
        if self.provenance.settings != other.provenance.settings:
            raise MismatchError("curvature factors with other labels or another seed cannot be merged")
        read = self.read.merge(other.read)
        settings, seed = dict(self.provenance.settings), self.provenance.seed
        provenance = Provenance("curvature", settings, seed, read.provenance.inputs)
        return Factors(read, self.pull.merge(other.pull), provenance)

    def save(self, path: str | Path) -> None:
        """Write `curvature.safetensors`, atomically; 8 bytes an entry.

        Raises:
            TargetError: it cannot be written.
        """
        tensors = {f"{site}|read": entry for site, entry in self.read.sums.items()}
        tensors |= {f"{site}|pull": entry for site, entry in self.pull.sums.items()}
        store.save(path, "curvature", tensors, {"count": self.count, "provenance": self.provenance.to_json()})

    @classmethod
    def load(cls, path: str | Path) -> Factors:
        """Read what `save` wrote.

        Raises:
            ArtifactError: missing, cut, or of another kind.
        """
        tensors, header = store.load(path, "curvature")
        provenance, sides = Provenance.from_json(header["provenance"]), {}
        for side in ("read", "pull"):
            found = {name.partition("|")[0]: entry for name, entry in tensors.items() if name.endswith(f"|{side}")}
            sums = {Site.parse(name): entry for name, entry in found.items()}
            sides[side] = Moments(sums, int(header["count"]), Provenance("moments", {}, None, provenance.inputs))
        return cls(sides["read"], sides["pull"], provenance)


@dataclass(frozen=True, eq=False)
class Basis:
    """Directions of one map by the curvature of the loss along them, steepest first; float64 on the CPU.

    Attributes:
        read: [in, in], columns are directions of what the map reads: eigenvectors of A.
        write: [out, out], columns are directions of what it puts out: eigenvectors of G.
        read_energy: [in], eigenvalues of A, falling.
        write_energy: [out], eigenvalues of G, falling.
        corrected: [out, in] curvatures estimated again in these bases (EK-FAC), or None.
    """

    read: Tensor
    write: Tensor
    read_energy: Tensor
    write_energy: Tensor
    corrected: Tensor | None = None

    def curvature(self) -> Tensor:
        """[out, in], of every pair of a direction written and one read."""
        return torch.outer(self.write_energy, self.read_energy) if self.corrected is None else self.corrected

    def coordinates(self, weight: Tensor) -> Tensor:
        """A weight [out, in] in these bases: U_Gᵀ W U_A, float64."""
        return self.write.T @ weight.to(self.write) @ self.read

    def weight(self, coordinates: Tensor) -> Tensor:
        """Back from `coordinates`."""
        return self.write @ coordinates @ self.read.T

    def steep(self, mass: float) -> Tensor:
        """[out, in] mask: the fewest pairs, steepest first, that hold `mass` of all curvature.

        Raises:
            InputError: mass is not in [0, 1].
        """
        if not 0 <= mass <= 1:
            raise InputError(f"mass {mass}: expected between 0 and 1, a share of the curvature")
        found = self.curvature()
        falling, order = found.flatten().sort(descending=True, stable=True)
        before = falling.cumsum(0) - falling
        mask = torch.zeros(found.numel(), dtype=torch.bool)
        mask[order] = before < mass * falling.sum()
        return mask.view(found.shape)

    def flat_part(self, weight: Tensor, mass: float) -> Tensor:
        """The part of `weight` [out, in] outside the pairs that hold `mass` of the curvature, in float64."""
        return self.weight(self.coordinates(weight).masked_fill(self.steep(mass), 0))


def curvature_factors(
    view: ModelView,
    text: Passages,
    sites: Sequence[Site],
    *,
    labels: Labels = "sampled",
    seed: int = 0,
    size: int = 8,
) -> Factors:
    """Kronecker factors of `sites` over every token of `text` but each passage's last, which predicts nothing.

    Cost: one forward and one backward; memory of one batch, all its logits, and of the factors in float64.

    Args:
        view: the model.
        text: ordinary text; prefix and suffix count alike.
        sites: any maps of the blocks.
        labels: "sampled" from the model at every token (the Fisher information), or the "true" next tokens.
        seed: of the labels; each passage has a generator of its own.
        size: passages a batch; the result depends on it by rounding only.

    Raises:
        InputError: no text, no sites, or passages of one token only.
    """
    if not sites or not text:
        raise InputError(f"curvature of {len(sites)} sites over {len(text)} passages; each needs at least one")
    read: dict[Site, Tensor] = {}
    pulling: dict[Site, Tensor] = {}
    count = 0
    for batch in _batches(view, text, size, "curvature"):
        _, found = pulls(view, batch, sites, loss=token_loss(labels, seed))
        inner = all_predicting(batch)
        count += int(inner.sum())
        for site, pull in found.items():
            for sums, rows in ((read, pull.read[inner]), (pulling, pull.pull[inner])):
                product = rows.double().T @ rows.double()
                sums[site] = sums[site] + product if site in sums else product
    inputs = {"model": view.digest, "text": text.digest}
    plain = Provenance("moments", {}, None, inputs)
    settings = {"labels": labels, "seed": seed}
    return Factors(
        Moments(read, count, plain), Moments(pulling, count, plain), Provenance("curvature", settings, seed, inputs)
    )


def corrected(
    view: ModelView,
    text: Passages,
    bases: Mapping[Site, Basis],
    *,
    per: Literal["passage", "token"] = "passage",
    labels: Labels = "sampled",
    seed: int = 0,
    size: int = 8,
) -> dict[Site, Basis]:
    """The same bases with every pair's curvature estimated in them: the EK-FAC correction.

    Per passage, the curvature of a pair is the sum over passages of (U_Gᵀ g U_A)² with g = Σ_t g_t a_tᵀ the whole
    passage's gradient: the exact diagonal of the Fisher information in these bases (George et al.; for sequences as
    Grosse et al.). Per token, of (g̃_t ã_t)² for every token by itself, which takes tokens for independent, as K-FAC
    does. Both are divided by the number of tokens, so that they compare with λ_i μ_j.

    Cost: one forward and one backward; [out, in] in float64 a site.
    """
    sums = {site: torch.zeros(len(basis.write), len(basis.read), dtype=torch.float64) for site, basis in bases.items()}
    count = 0
    for batch in _batches(view, text, size, "curvature, corrected"):
        _, found = pulls(view, batch, list(bases), loss=token_loss(labels, seed))
        count += int(all_predicting(batch).sum())
        for site, pull in found.items():
            read, written = pull.read.cpu().double() @ bases[site].read, pull.pull.cpu().double() @ bases[site].write
            if per == "token":
                sums[site] += written.square().flatten(0, 1).T @ read.square().flatten(0, 1)
                continue
            step = max(1, CHUNK // sums[site].numel())
            for own, pulled in zip(torch.split(read, step), torch.split(written, step), strict=True):
                sums[site] += (pulled.mT @ own).square().sum(0)
    return {
        site: Basis(basis.read, basis.write, basis.read_energy, basis.write_energy, sums[site] / count)
        for site, basis in bases.items()
    }


def token_loss(labels: Labels, seed: int) -> Loss:
    """A loss for `pulls`: the sum over a row's tokens of the negative log-likelihood of labels, [n], nats."""
    return partial(_token_loss, labels=labels, seed=seed)


def all_predicting(batch: Batch) -> Tensor:
    """[n, t], positions that predict a token of the row: all real ones but the last."""
    at = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    return at < batch.length[:, None] - 1


def _token_loss(view: ModelView, batch: Batch, *, labels: Labels, seed: int) -> Tensor:
    row, column = all_predicting(batch).nonzero(as_tuple=True)
    spoken = view.logits_at(batch, row, column).log_softmax(-1)
    if labels == "true":
        chosen = batch.ids[row, column + 1]
    else:
        chosen = torch.cat([
            _draw(spoken.detach()[row == index].exp(), [seed, batch.ids[index, : batch.length[index]].tolist()])
            for index in range(len(batch))
        ])  # fmt: skip
    losses = -spoken.gather(1, chosen[:, None])[:, 0]
    return losses.new_zeros(len(batch)).index_add(0, row, losses)


def _draw(probabilities: Tensor, seed: list[object]) -> Tensor:
    """One label a token [t], of a passage's own generator: where the running sum passes a uniform number."""
    generator = torch.Generator().manual_seed(int(digest_json(seed)[:15], 16))
    drawn = torch.rand(len(probabilities), 1, generator=generator, dtype=torch.float64).to(probabilities)
    running = probabilities.cumsum(1)
    below: Tensor = (running < drawn * running[:, -1:]).sum(1)
    return below.clamp_max(probabilities.shape[1] - 1)


def _eigen(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling, and eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(moment)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _batches(view: ModelView, text: Passages, size: int, label: str) -> Iterator[Batch]:
    return progress.steps(view.batches(text, size=size), label, math.ceil(len(text) / size))
