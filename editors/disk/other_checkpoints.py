"""Weights of other checkpoint folders, by site: read parameter by parameter, checked to be of the same architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from editors.deltas import Delta, Dense, LowRank, Sparse
from memloc.errors import CheckpointError, InputError, MismatchError
from memloc.rewinding.snapshots import Snapshot
from memloc.rewinding.windows import check_same_kind
from memloc.sites import OUTSIDE, Kind, Site
from memloc.view import ModelView

PROBES = 72
"""Columns of the probe that finds the range of a difference; ranks up to eight fewer are found."""


def every_site(view: ModelView) -> tuple[Site, ...]:
    """All a model has: maps, norms, embeddings, positions, biases; a tied unembedding is the embedding."""
    layers = {True: range(view.layers), False: (OUTSIDE,)}
    sites = [Site(layer, kind, bias) for kind in Kind for layer in layers[kind.in_block] for bias in (False, True)]
    found = [site for site in sites if view.has(site)]
    tied = Site(OUTSIDE, Kind.UNEMBED)
    names = {view.place(site).parameter for site in found if site != tied}
    return tuple(sorted(site for site in found if site != tied or view.place(site).parameter not in names))


def need_reached(view: ModelView, sites: Sequence[Site], where: str = "") -> None:
    """Refuse a model with parameters that no site reaches, and that would be left behind unasked.

    Args:
        view: the model.
        sites: those that are taken.
        where: what a parameter's name starts with to count.

    Raises:
        InputError: names the first.
    """
    reached = {view.place(site).parameter for site in sites}
    rest = [name for name, _ in view.model.named_parameters() if name.startswith(where) and name not in reached]
    if rest:
        raise InputError(
            f"{rest[0]} (and {len(rest) - 1} more) is at no site of {view.row.family}'s row, so it would be left as it "
            "is; give a selection of components, or add it to its row in memloc/architectures.py"
        )


def open_other(view: ModelView, folder: str) -> Snapshot:
    """A checkpoint folder of the model's own architecture and vocabulary; no tensor is read but a second embedding.

    Raises:
        CheckpointError: it cannot be read.
        MismatchError: it is of another architecture, or unties what the model ties.
    """
    other = Snapshot.open(folder)
    check_same_kind(view, other)
    embedding = view.place(Site(OUTSIDE, Kind.EMBED)).parameter
    for name in view.tied(embedding):
        if name in other.files and not torch.equal(other.tensor(name), other.tensor(embedding)):
            raise MismatchError(f"{folder}: {name} is not {embedding}, and the model ties them; untie it first")
    return other


def read_weights(
    view: ModelView, others: Sequence[Snapshot], sites: Sequence[Site]
) -> Iterator[tuple[Site, tuple[Tensor, ...]]]:
    """Sites with their weights `[out, in]` in every other checkpoint, as stored there, on the CPU.

    Sites of one stored parameter come together, so that it is read once and dropped.

    Raises:
        CheckpointError: a tensor is missing, quantised or not finite.
        MismatchError: a shape differs.
    """
    homes: dict[str, list[Site]] = {}
    for site in sites:
        homes.setdefault(view.place(site).parameter, []).append(site)
    for parameter, here in homes.items():
        tensors = [_read(view, other, parameter) for other in others]
        for site in here:
            place = view.place(site)
            yield site, tuple(place.read(tensor).contiguous() for tensor in tensors)


def smallest(change: Tensor, weight: Tensor, mask: Tensor | None = None) -> Delta:
    """`change` in the smallest form that says the same: entries, factors, or all of it.

    Factors are taken where what they miss is less than the rounding of the stored dtype (an adapter that was merged
    into a checkpoint leaves a difference of low rank and rounding).

    Args:
        change: [out, in] or [out], float32 or float64.
        weight: what it is added to, in its stored dtype.
        mask: the only entries that count, or None.
    """
    change = change if mask is None else change * mask
    entries = int(change.count_nonzero())
    if change.ndim == 1 or entries * 3 < change.numel():
        return Dense(change) if change.ndim == 1 and mask is None else Sparse.of(change.float())
    found = None if mask is not None else _factors(change.double(), weight)
    return Dense(change.float()) if found is None else found


def _factors(change: Tensor, weight: Tensor) -> LowRank | None:
    """Factors of `change` [out, in], or None where they would be larger or miss more than rounding does."""
    out, into = change.shape
    most = min(PROBES, out, into)
    generator = torch.Generator().manual_seed(0)
    span, _ = torch.linalg.qr(change @ torch.randn(into, most, generator=generator, dtype=torch.float64))
    inner = span.T @ change
    left, sizes, right = torch.linalg.svd(inner, full_matrices=False)
    missed = float(change.square().sum() - inner.square().sum())
    allowed = (torch.finfo(weight.dtype).eps * float(weight.double().norm())) ** 2
    tail = sizes.square().flip(0).cumsum(0).flip(0) + max(missed, 0.0)
    rank = int((tail > allowed).sum())
    if missed > allowed or rank == 0 or rank * (out + into) >= out * into:
        return None
    return LowRank((span @ left[:, :rank] * sizes[:rank]).float(), right[:rank].float())


def _read(view: ModelView, other: Snapshot, parameter: str) -> Tensor:
    live, shape = view.model.get_parameter(parameter), other.shape(parameter)
    if shape != tuple(live.shape):
        raise MismatchError(
            f"{other.folder}: {parameter} is {list(shape)}, the model's is {list(live.shape)}; "
            "it is a checkpoint of another architecture"
        )
    found = other.tensor(parameter)
    if not found.is_floating_point() or not bool(torch.isfinite(found).all()):
        raise CheckpointError(f"{other.folder}: {parameter} is quantised or holds values that are not finite")
    return found
