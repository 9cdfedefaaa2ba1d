"""Localization over many passages, and moments over a corpus, by several processes or by runs that know of no other.

Each takes a run of neighbouring passages, so that results follow one another as the passages do. Exact for methods
that score every passage by itself (`in_parts`), and for moments, which are sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from memloc import processes
from memloc.errors import InputError, MismatchError
from memloc.moments import Moments, second_moments
from memloc.parts import in_parts, joined
from memloc.passages import Passages
from memloc.provenance import Provenance
from memloc.scores import Localization
from memloc.sites import Site
from memloc.view import ModelView

MARK = "shard"
"""The note of a localization of one shard: its number, of how many, and the digest of all passages."""


def share(passages: Passages, number: int, of: int) -> Passages:
    """Run `number`, from 0, of `of` runs of neighbours; their lengths differ by one at most, and may be 0."""
    return passages[len(passages) * number // of : len(passages) * (number + 1) // of]


def localize(
    localizer: Any,
    view: ModelView,
    passages: Passages,
    *,
    contrast: Passages | None = None,
    folder: str | Path | None = None,
) -> Localization:
    """What `localizer(view, passages)` says, each process scoring its share; the whole is returned in all of them.

    Args:
        localizer: one that scores every passage by itself, where there are several processes.
        view: the model, the same in all.
        passages: all passages, the same in all.
        contrast: as the localizer takes it; every process uses all of it.
        folder: where finished parts are kept, as by `memloc.parts.in_parts`; None keeps none.

    Raises:
        InputError: several processes, and a localizer that scores passages together.
        MismatchError: the processes hold different models or versions.
    """
    if not getattr(localizer, "in_parts", False):
        if processes.count() > 1:
            check_divisible(localizer)
        alone: Localization = localizer(view, passages, contrast=contrast)
        return alone
    mine = share(passages, processes.rank(), processes.count())
    part = None
    if mine or not passages:
        part = (
            localizer(view, mine, contrast=contrast)
            if folder is None
            else in_parts(localizer, view, mine, folder, contrast=contrast)
        )
    found = [entry for entry in processes.exchange(part) if entry is not None]
    return found[0] if len(found) == 1 else merged(found, passages.digest)


def moments(view: ModelView, text: Passages, sites: Sequence[Site], *, size: int = 32) -> Moments:
    """`memloc.moments.second_moments`, each process summing over its share; the sums of all in all of them.

    Raises:
        InputError: no text or no sites.
        MismatchError: the processes hold different models.
    """
    mine = share(text, processes.rank(), processes.count())
    if not sites or not text or processes.count() == 1:
        return second_moments(view, text, sites, size=size)
    own = second_moments(view, mine, sites, size=size) if mine else None
    facts = processes.exchange((view.digest, 0 if own is None else own.count))
    if len({digest for digest, _ in facts}) > 1:
        raise MismatchError("the processes hold different models; second moments of them cannot be added up")
    sums = {}
    for site in sorted(sites):
        width = view.weight(site).shape[1]
        sums[site] = torch.zeros(width, width, dtype=torch.float64) if own is None else own.sums[site]
        torch.distributed.all_reduce(sums[site])
    inputs = {"model": facts[0][0], "text": text.digest}
    return Moments(sums, sum(tokens for _, tokens in facts), Provenance("moments", {}, None, inputs))


# -- runs that know of no other ---------------------------------------------------------------------------------------


def sharded(passages: Passages, shard: tuple[int, int]) -> Passages:
    """The passages of a shard.

    Raises:
        InputError: it has none.
    """
    number, of = shard
    mine = share(passages, number - 1, of)
    if not mine:
        raise InputError(f"shard {number}/{of} of {len(passages)} passages is empty; make at most {len(passages)}")
    return mine


def check_divisible(localizer: Any) -> None:
    """See that a localizer's passages may be scored apart.

    Raises:
        InputError: it scores them together.
    """
    if not getattr(localizer, "in_parts", False):
        raise InputError(f"{type(localizer).__name__} scores all passages together; run it whole and in one process")


def marked(part: Localization, shard: tuple[int, int], whole: Passages) -> Localization:
    """A localization of a shard that says which it is."""
    number, of = shard
    note = {"number": number, "of": of, "passages": whole.digest}
    return replace(part, notes={**part.notes, MARK: note})


def merged(parts: Sequence[Localization], whole: str | None = None) -> Localization:
    """Localizations of disjoint passages as one, in the order of their shards, or as given where they are none.

    Args:
        parts: of one model, by one method with the same settings and versions.
        whole: digest of all passages; by default what the shards say, or the parts' own digests, joined.

    Raises:
        InputError: nothing to merge, or scores that are not kept per passage.
        MismatchError: they differ in more than their passages, share one, or a shard is missing.
    """
    if not parts:
        raise InputError("nothing to merge")
    parts, said = _in_order(parts)
    _check_alike(parts)
    _check_disjoint(parts)
    digests = [part.provenance.inputs.get("passages", "") for part in parts]
    inputs = {**parts[0].provenance.inputs, "passages": whole or said or "+".join(digests)}
    return joined(parts, replace(parts[0].provenance, inputs=inputs))


def _in_order(parts: Sequence[Localization]) -> tuple[list[Localization], str | None]:
    """Parts by the number of their shard, their marks taken off, and the digest of all passages."""
    marks = [part.notes.get(MARK) for part in parts]
    if all(mark is None for mark in marks):
        return list(parts), None
    if any(mark is None for mark in marks):
        raise MismatchError("some of these are shards and some are not; merge the shards of one run")
    wholes = {(mark["of"], mark["passages"]) for mark in marks if mark is not None}
    if len(wholes) > 1:
        raise MismatchError("these are shards of different passages, or of different counts; merge those of one run")
    of, digest = wholes.pop()
    numbered = sorted(zip([mark["number"] for mark in marks if mark is not None], parts, strict=True), key=_number)
    numbers = [number for number, _ in numbered]
    for number in range(1, of + 1):
        if numbers.count(number) != 1:
            found = "is missing" if number not in numbers else f"is given {numbers.count(number)} times"
            raise MismatchError(f"shard {number}/{of} {found}; nothing was merged")
    plain = [replace(part, notes={k: v for k, v in part.notes.items() if k != MARK}) for _, part in numbered]
    return plain, digest


def _number(entry: tuple[int, Localization]) -> int:
    return entry[0]


def _check_alike(parts: Sequence[Localization]) -> None:
    first = _identity(parts[0])
    for index, part in enumerate(parts[1:], 2):
        for what, value in _identity(part).items():
            if value != first[what]:
                raise MismatchError(f"part {index} has another {what} than part 1; nothing was merged")


def _identity(part: Localization) -> dict[str, Any]:
    made = part.provenance
    names = ("method", "settings", "seed", "versions")
    inputs = {name: digest for name, digest in made.inputs.items() if name not in ("model", "passages")}
    rest = {"model": made.inputs.get("model"), "second data set": inputs, "set of sites": set(part.scores)}
    return {"grain": part.grain, **{name: getattr(made, name) for name in names}, **rest}


def _check_disjoint(parts: Sequence[Localization]) -> None:
    seen: set[str] = set()
    for index, part in enumerate(parts, 1):
        if part.passages is None:
            raise InputError(f"part {index} holds one score for all its passages; such scores cannot be merged")
        shared = seen & set(part.passages)
        if shared:
            raise MismatchError(f"part {index} holds passage {min(shared)!r} once more; nothing was merged")
        seen |= set(part.passages)
