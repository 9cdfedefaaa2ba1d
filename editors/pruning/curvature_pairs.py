"""What a curvature edit knows of every pair of a direction written and one read: from ordinary text and passages.

Factors can be kept in a folder, in files named by what they depend on, because they take nearly all of the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from memloc import progress
from memloc.errors import ArtifactError, InputError
from memloc.gradients.curvature import Basis, Factors, Labels, curvature_factors
from memloc.gradients.flows import wide
from memloc.gradients.map_gradients import CHUNK, pulls
from memloc.passages import Passages
from memloc.provenance import digest_json
from memloc.sites import Site
from memloc.view import ModelView


def kept_factors(
    view: ModelView,
    text: Passages,
    sites: Sequence[Site],
    *,
    folder: str | Path | None = None,
    labels: Labels = "sampled",
    seed: int = 0,
    size: int = 8,
) -> Factors:
    """`curvature_factors`, read from `folder` where they lie there, and kept there where they do not.

    A file's name is a digest of model, text, maps, labels, seed and batch size, so that a stale one is never read; one
    that is damaged is made again.

    Args:
        view: the model.
        text: ordinary text.
        sites: maps of the blocks.
        folder: made if absent; None keeps nothing.
        labels: see `curvature_factors`.
        seed: of the labels.
        size: passages a batch.

    Raises:
        InputError: no text, or `folder` is a file.
        TargetError: it cannot be written.
    """
    how = {"labels": labels, "seed": seed, "size": size}
    if folder is None:
        return curvature_factors(view, text, sites, **how)  # type: ignore[arg-type]
    if Path(folder).is_file():
        raise InputError(f"{folder} is a file; curvature factors are kept in a folder")
    name = digest_json([view.digest, text.digest, [str(site) for site in sites], how])
    path = Path(folder) / f"curvature-{name[:24]}.safetensors"
    if path.is_file():
        try:
            return Factors.load(path)
        except ArtifactError:
            progress.tell("curvature", 0, 1, f"{path.name} is damaged; made again")
    found = curvature_factors(view, text, sites, **how)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save(path)
    return found


def passage_energies(
    view: ModelView, passages: Passages, bases: Mapping[Site, Basis], *, size: int = 8
) -> dict[Site, Tensor]:
    """Share of the passages' gradient along every pair: site to [out, in], float64; all sites sum to 1.

    With g the gradient of a passage's suffix NLL by a map, its share along pair (i, j) is (U_Gᵀ g U_A)²_ij over the sum
    of all maps' squared gradients: every passage counts alike, however small its loss has become. The mean over
    passages is given.

    Args:
        view: the model.
        passages: whose suffixes.
        bases: of the maps.
        size: passages a batch; no effect beyond rounding.

    Cost: one forward and one backward; some [out, in] in float64.
    """
    sums = {site: torch.zeros(len(basis.write), len(basis.read), dtype=torch.float64) for site, basis in bases.items()}
    for batch in progress.steps(list(view.batches(passages, size=size)), "curvature, passages"):
        _, found = pulls(view, batch, list(bases))
        parts = {site: (wide(pull.read).cpu().double(), wide(pull.pull).cpu().double()) for site, pull in found.items()}
        whole = torch.zeros(len(batch), dtype=torch.float64)
        for site, (read, pull) in parts.items():
            whole += torch.cat([part.square().sum((1, 2)) for part in _gradients(read, pull, sums[site].numel())])
        scale = whole.clamp_min(torch.finfo(torch.float64).tiny).rsqrt()[:, None, None]
        for site, (read, pull) in parts.items():
            turned = read @ bases[site].read, scale * (pull @ bases[site].write)
            for part in _gradients(*turned, sums[site].numel()):
                sums[site] += part.square().sum(0)
    return {site: entry / len(passages) for site, entry in sums.items()}


def _gradients(read: Tensor, pull: Tensor, entries: int) -> Iterator[Tensor]:
    """Σ_t pull_t read_tᵀ of every passage, [n, out, in], some passages at a time."""
    step = max(1, CHUNK // entries)
    for own, pulled in zip(torch.split(read, step), torch.split(pull, step), strict=True):
        yield pulled.mT @ own
