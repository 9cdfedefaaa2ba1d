"""Second moments in minutes: one pass for all layers over a draw of any text, picked up again where it was interrupted.

The draw is as many tokens as neurons, some times over, spread over the whole text; the sums of its two halves are kept
apart, so that the result can be judged (`memloc.moment_judgement`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memloc import processes, progress, store
from memloc.batches import Batch
from memloc.errors import ArtifactError, InputError, MismatchError
from memloc.moments import Moments, Split, add_keys, empty, mirrored
from memloc.passages import Passages
from memloc.provenance import Provenance, digest_json
from memloc.sites import Site
from memloc.view import ModelView

FORMAT = 1
"""Counted up when the same inputs would give other sums because this code changed."""

RUNS = 16
"""Runs of neighbouring passages that go to one half and the other in turn: neighbours are alike, so few should part."""

PROBES = 32
"""Passages all over the draw whose last key is kept."""


@dataclass(frozen=True)
class Draw:
    """Passages to sum over.

    Attributes:
        text: the passages.
        first: of each, whether it is in the first half.
        probed: of each, whether its last key is kept.
        settings: how they were drawn, JSON values.
    """

    text: Passages
    first: tuple[bool, ...]
    probed: tuple[bool, ...]
    settings: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Tokens of all passages."""
        return sum(len(item.ids) for item in self.text)

    def share(self, number: int, of: int) -> Draw:
        """Run `number`, from 0, of `of` runs of neighbours; it may be empty."""
        start, end = (len(self.text) * step // of for step in (number, number + 1))
        return Draw(self.text[start:end], self.first[start:end], self.probed[start:end], self.settings)


def draw(text: Passages, tokens: int, *, seed: int = 0) -> Draw:
    """Passages of `tokens` tokens or hardly more, anywhere in `text`, in its order; all of it where it has no more.

    Raises:
        InputError: no text, or no tokens are asked for.
    """
    if not text or tokens < 1:
        raise InputError(f"second moments of {tokens} tokens from {len(text)} passages; each needs at least one")
    chosen, count = [], 0
    for row in torch.randperm(len(text), generator=torch.Generator().manual_seed(seed)).tolist():
        if count >= tokens:
            break
        chosen.append(row)
        count += len(text[row].ids)
    chosen.sort()
    total, runs = len(chosen), min(RUNS, len(chosen))
    probes = {round(index * (total - 1) / (PROBES - 1)) for index in range(PROBES)}
    return Draw(
        Passages(tuple(text[row] for row in chosen), text.origin),
        tuple(index * runs // total % 2 == 0 for index in range(total)),
        tuple(index in probes for index in range(total)),
        {"drawn_from": text.digest, "tokens": tokens, "seed": seed},
    )


@dataclass(frozen=True, kw_only=True)
class MomentPass:
    """Second moments of all sites in one pass over a draw of a text.

    Attributes:
        multiplier: tokens drawn, in widths of the widest site: the f of an MLP's output map.
        tokens: tokens drawn, instead.
        seed: of the draw.
        halves: keep the sums of two halves apart, to judge them and choose a shrinkage; twice the memory.
        batch_tokens: tokens of a forward pass at most (one passage at least); results depend on it by rounding only.
        every: seconds between two writings of what is summed so far, which take a twentieth of the time at most; 0
            writes after each batch.

    Cost: a forward over the draw, left after the highest site, and f² / 2 multiplications a token and site.
    Memory: two [f, f] float64 a site where the model is, and the keys of one batch.

    Source: as many tokens as 10 f: Gupta et al. 2025, arXiv:2506.04226. Halves, and resuming, are ours.
    """

    multiplier: float = 10.0
    tokens: int | None = None
    seed: int = 0
    halves: bool = True
    batch_tokens: int = 4096
    every: float = 30.0

    def __post_init__(self) -> None:
        for name in ("multiplier", "batch_tokens") if self.tokens is None else ("tokens", "batch_tokens"):
            if not getattr(self, name) > 0:
                raise InputError(f"second moments: {name} is {getattr(self, name)}, expected above 0")

    def draw(self, view: ModelView, text: Passages, sites: Sequence[Site]) -> Draw:
        """The passages that a call would sum over.

        Raises:
            InputError: no text or no sites.
        """
        if not sites:
            raise InputError("second moments of no sites; at least one is needed")
        widest = max(view.weight(site).shape[1] for site in sites)
        return draw(text, self.tokens or max(1, round(self.multiplier * widest)), seed=self.seed)

    @torch.no_grad()
    def __call__(
        self,
        view: ModelView,
        text: Passages,
        sites: Sequence[Site],
        *,
        folder: str | Path | None = None,
        shard: tuple[int, int] | None = None,
    ) -> Moments:
        """Sum, or read what was summed before. Several processes sum a share each; the whole is returned in all.

        Args:
            view: the model, the same in all processes.
            text: ordinary text.
            sites: any maps of the blocks.
            folder: where finished sums are kept and read again, and unfinished ones are picked up, to the bit, under a
                name made of the digests of model, dtype, sites, passages and settings; None keeps nothing.
            shard: sum over this share of the draw only, (number from 1, count), for `Moments.merge`.

        Raises:
            InputError: no text, no sites, a passage that does not fit the model, keys that are not finite, a shard
                that is empty.
            MismatchError: the processes hold different models.
            TargetError: the folder cannot be written.
        """
        whole = self.draw(view, text, sites)
        sites = tuple(sorted(set(sites)))
        if shard is not None:
            whole = _sharded(whole, shard)
        model = view.digest
        if len(set(processes.exchange(model))) > 1:
            raise MismatchError("the processes hold different models; second moments of them cannot be added up")
        path = None if folder is None else Path(folder) / f"{self.key(view, model, whole, sites)}.safetensors"
        ready = None if path is None else _read(path, {"model": model, "text": whole.text.digest})
        everywhere = all(processes.exchange(ready is not None))
        if ready is not None and everywhere:
            return ready
        mine = whole.share(processes.rank(), processes.count())
        part = None if folder is None else Path(folder) / f"{self.key(view, model, mine, sites)}.part.safetensors"
        sums = self._summed(view, mine, sites, part)
        made = sums.moments(whole, model)
        if path is not None and part is not None:
            if not processes.rank():
                made.save(path)
            processes.exchange(None)  # what is unfinished may go once the whole is safe
            part.unlink(missing_ok=True)
        return made

    def key(self, view: ModelView, model: str, drawn: Draw, sites: Sequence[Site]) -> str:
        """What sums are known by: everything that decides their bits, beside the machine's arithmetic."""
        return digest_json({
            "format": FORMAT, "model": model, "dtype": str(view.dtype), "sites": [str(site) for site in sites],
            "text": drawn.text.digest, "tokens": drawn.tokens, "first": drawn.first if self.halves else None,
            "probed": drawn.probed, "batch_tokens": self.batch_tokens, "drawn": drawn.settings,
        })  # fmt: skip

    def _summed(self, view: ModelView, drawn: Draw, sites: Sequence[Site], part: Path | None) -> _Sums:
        sums = _Sums.start(view, sites, self.halves)
        if part is not None:
            sums.go_on(part)
        if not drawn.text:
            return sums
        size = max(1, self.batch_tokens // max(len(item.ids) for item in drawn.text))
        total = -(-len(drawn.text) // size)
        written, took = time.monotonic(), 0.0
        progress.tell("second moments", sums.done, total)
        for index, batch in enumerate(view.batches(drawn.text, size=size)):
            if index < sums.done:
                continue
            with view.record(sites, stop=True) as seen:
                view.hidden(batch)
            sums.add(drawn, batch, seen)
            progress.tell("second moments", sums.done, total, f"{sums.tokens:,} tokens")
            now = time.monotonic()
            pause = self.every and max(self.every, 20 * took)
            if part is not None and sums.done < total and now - written >= pause:
                sums.save(part)
                written = time.monotonic()
                took = written - now
        return sums


@dataclass
class _Sums:
    """What is summed so far: by half, upper triangles only.

    Attributes:
        halves: for each half, site to [in, in]; the second is left out where halves are not kept apart.
        probes: site to (row of the draw, key).
        counts: tokens of each half.
        done: batches.
    """

    halves: list[dict[Site, Tensor]]
    probes: dict[Site, list[tuple[int, Tensor]]]
    counts: list[int]
    done: int = 0

    @classmethod
    def start(cls, view: ModelView, sites: Sequence[Site], apart: bool) -> _Sums:
        widths = {site: view.weight(site) for site in sites}
        halves = [
            {site: empty(entry.shape[1], entry.device) for site, entry in widths.items()} for _ in range(1 + apart)
        ]
        return cls(halves, {site: [] for site in sites}, [0] * (1 + apart))

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    def add(self, drawn: Draw, batch: Batch, seen: dict[Site, Tensor]) -> None:
        """One batch, as its rows' halves say."""
        apart = len(self.halves) > 1
        half = torch.tensor([int(apart and not drawn.first[row]) for row in batch.rows], device=batch.ids.device)
        for site, found in seen.items():
            for index, sums in enumerate(self.halves):
                keys = _keys(found, batch, half == index)
                if not len(keys):
                    continue
                add_keys(sums[site], keys)
                if not bool(torch.isfinite(sums[site].diagonal()).all()):
                    said = f"{site}: keys that are not finite in {found.dtype}"
                    raise InputError(f"{said}; open the model in another dtype")
            for place, row in enumerate(batch.rows):
                if drawn.probed[row]:
                    self.probes[site].append((row, found[place, int(batch.length[place]) - 1].float().cpu()))
        for index in range(len(self.halves)):
            self.counts[index] += int(batch.length[half == index].sum())
        self.done += 1

    def moments(self, drawn: Draw, model: str) -> Moments:
        """The whole, of all processes."""
        halves = [{site: mirrored(_added(entry)).cpu() for site, entry in sums.items()} for sums in self.halves]
        counts = [sum(entries) for entries in zip(*processes.exchange(self.counts), strict=True)]
        inputs = {"model": model, "text": drawn.text.digest}
        provenance = Provenance("moments", drawn.settings, drawn.settings["seed"], inputs)
        shared = processes.exchange({site: self._probes(site) for site in self.probes})
        if len(halves) == 1:
            return Moments(halves[0], counts[0], provenance)
        probes = {site: torch.cat([part[site] for part in shared]) for site in self.probes}
        whole = {site: entry + halves[1][site] for site, entry in halves[0].items()}
        return Moments(whole, sum(counts), provenance, Split(halves[0], counts[0], probes))

    def _probes(self, site: Site) -> Tensor:
        """[p, in], in the order of their passages."""
        keys = [key for _, key in sorted(self.probes[site], key=lambda entry: entry[0])]
        return torch.stack(keys) if keys else torch.zeros(0, self.halves[0][site].shape[0])

    def save(self, path: Path) -> None:
        """Write what is summed so far, atomically."""
        tensors = {f"half{index} {site}": entry for index, sums in enumerate(self.halves)
                   for site, entry in sums.items()}  # fmt: skip
        for site, entries in self.probes.items():
            if entries:
                tensors[f"probes {site}"] = torch.stack([key for _, key in entries])
        rows = {str(site): [row for row, _ in entries] for site, entries in self.probes.items()}
        store.save(path, "moments-part", tensors, {"done": self.done, "counts": self.counts, "rows": rows})

    def go_on(self, path: Path) -> None:
        """Take up what `save` wrote; where nothing can be read, all is summed again."""
        try:
            tensors, header = store.load(path, "moments-part")
        except ArtifactError:
            return
        for index, sums in enumerate(self.halves):
            for site, entry in sums.items():
                entry.copy_(tensors[f"half{index} {site}"])
        for site, entries in self.probes.items():
            rows = header["rows"][str(site)]
            entries += zip(rows, tensors[f"probes {site}"] if rows else (), strict=True)
        self.counts, self.done = header["counts"], header["done"]


def _keys(found: Tensor, batch: Batch, chosen: Tensor) -> Tensor:
    """What flows into a site at the real tokens of the chosen rows, [k, f]; not copied where that is all of it."""
    mask = batch.mask
    if not bool(mask.all()):
        return found[(mask & chosen[:, None]).to(found.device)]
    rows = found if bool(chosen.all()) else found[chosen.to(found.device)]
    return rows.reshape(-1, found.shape[-1])


def _sharded(drawn: Draw, shard: tuple[int, int]) -> Draw:
    number, of = shard
    mine = drawn.share(number - 1, of)
    if not mine.text:
        raise InputError(f"shard {number}/{of} of {len(drawn.text)} passages is empty; make at most {len(drawn.text)}")
    return Draw(mine.text, mine.first, mine.probed, {**drawn.settings, "shard": f"{number}/{of}"})


def _added(own: Tensor) -> Tensor:
    """The sum over all processes."""
    if processes.count() > 1:
        torch.distributed.all_reduce(own)
    return own


def _read(path: Path, inputs: dict[str, str]) -> Moments | None:
    """What was summed before, or None where there is nothing, or another file under its name."""
    try:
        found = Moments.load(path)
    except ArtifactError:
        return None
    return found if found.provenance.inputs == inputs else None
