"""What wakes a neuron: its strongest contexts over a corpus of any length, in a table of fixed size.

One number holds a score and a place: the upper 32 bits are the float32 score (positive floats order as their bits do),
the lower 32 count down with the place in the corpus. The largest k of such numbers are the strongest k contexts, the
earliest first among equals, in whichever order they were met; so a table of a corpus read in parts is the table of the
corpus.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memloc import store
from memloc.errors import InputError, MismatchError
from memloc.passages import Passages
from memloc.progress import steps
from memloc.sites import Kind, Site
from memloc.view import ModelView

LAST = (1 << 32) - 1
"""The lower half of the first place; the places a table can tell apart."""

CHUNK = 1 << 22
"""Scores packed at once."""


@dataclass(frozen=True)
class Triggers:
    """The k strongest contexts of every neuron, over the texts read so far.

    A context is a text up to a token that another follows; its score is the neuron there (what enters `mlp.out`),
    where that is above 0. Made by `read_triggers`.

    Attributes:
        packed: [l, f, k] long, strongest first: score and place; 0 where a neuron woke fewer times.
        tokens: [total] int, ids of all texts, one after another.
        starts: [n + 1] long, where each text starts, and the end of the last.
        names: ids of the texts.
        model: digest of the model that read them.
    """

    packed: Tensor
    tokens: Tensor
    starts: Tensor
    names: tuple[str, ...]
    model: str

    @classmethod
    def none(cls, view: ModelView, count: int) -> Triggers:
        """Of no text yet."""
        packed = torch.zeros(view.layers, view.neurons, count, dtype=torch.long)
        none = torch.zeros(0, dtype=torch.int32)
        return cls(packed, none, torch.zeros(1, dtype=torch.long), (), view.digest)

    @property
    def scores(self) -> Tensor:
        """[l, f, k] float32; 0 where there is none."""
        return (self.packed >> 32).to(torch.int32).view(torch.float32)

    @property
    def places(self) -> Tensor:
        """[l, f, k] long, index of the context's last token among all; -1 where there is none."""
        return torch.where(self.packed > 0, LAST - (self.packed & LAST), -1)

    def tokens_at(self, shift: int = 0) -> Tensor:
        """Ids of the tokens at (0), or after (1), the contexts' ends: [l, f, k] long; -1 where there is none."""
        places = self.places
        if not len(self.tokens):
            return places
        return torch.where(places >= 0, self.tokens[(places + shift).clamp_min(0)].long(), -1)

    def where(self, layer: int, neuron: int) -> list[tuple[float, int, int]]:
        """A neuron's contexts, strongest first: score, index of the text, position of the context's last token."""
        found = []
        for score, place in zip(self.scores[layer, neuron].tolist(), self.places[layer, neuron].tolist(), strict=True):
            if place >= 0:
                text = int(torch.searchsorted(self.starts, place, right=True)) - 1
                found.append((score, text, place - int(self.starts[text])))
        return found

    def context(self, text: int, position: int, width: int) -> tuple[list[int], int]:
        """At most `width` tokens up to `position` of a text, and the token that follows."""
        end = int(self.starts[text]) + position + 1
        start = max(int(self.starts[text]), end - width)
        return self.tokens[start:end].tolist(), int(self.tokens[end])

    def merged(self, other: Triggers) -> Triggers:
        """Of these texts and `other`'s after them.

        Raises:
            MismatchError: another model's, or another size.
            InputError: more tokens in all than a table can tell apart.
        """
        if self.model != other.model or self.packed.shape != other.packed.shape:
            raise MismatchError(
                f"triggers [l, f, k] of {list(self.packed.shape)} and {list(other.packed.shape)}: of another model, or "
                "another number of contexts; nothing was merged"
            )
        total = len(self.tokens)
        _check_size(total + len(other.tokens))
        moved = torch.where(other.packed > 0, other.packed - total, 0)
        packed = torch.cat([self.packed, moved], -1).topk(self.packed.shape[-1]).values
        starts = torch.cat([self.starts, other.starts[1:] + total])
        return Triggers(packed, torch.cat([self.tokens, other.tokens]), starts, self.names + other.names, self.model)

    def save(self, path: str | Path) -> None:
        """Write it, atomically."""
        tensors = {"packed": self.packed, "tokens": self.tokens, "starts": self.starts}
        store.save(path, "triggers", tensors, {"names": list(self.names), "model": self.model})

    @classmethod
    def load(cls, path: str | Path) -> Triggers:
        """Read what `save` wrote.

        Raises:
            ArtifactError: missing, cut, or of another kind.
        """
        tensors, header = store.load(path, "triggers")
        return cls(tensors["packed"], tensors["tokens"], tensors["starts"], tuple(header["names"]), header["model"])


def read_triggers(
    view: ModelView,
    corpus: Passages,
    *,
    count: int = 25,
    batch_size: int = 16,
    path: str | Path | None = None,
    part: int = 512,
) -> Triggers:
    """The strongest contexts of all neurons over `corpus`.

    Args:
        view: the model.
        corpus: texts; prefix and suffix alike.
        count: contexts kept a neuron.
        batch_size: texts per forward.
        path: a file to keep the table in after every part; where there is one already, reading goes on behind it.
        part: texts read between two savings.

    Cost: one forward; memory one layer's activations of a batch, and the table.

    Raises:
        MismatchError: the file is of another model, of other texts, or of another count.
    """
    found = Triggers.none(view, count)
    if path is not None and Path(path).exists():
        found = _continued(Path(path), Triggers.load(path), found, corpus)
    for start in range(len(found.names), len(corpus), part):
        found = found.merged(_read(view, corpus[start : start + part], count, batch_size))
        if path is not None:
            found.save(path)
    return found


def purity(tokens: Tensor) -> float:
    """How much of one kind contexts are: mean over neurons of the commonest token's share among theirs.

    Args:
        tokens: [f, k] ids, -1 where there is none; neurons with fewer than two are left out. 0.0 with none left.
    """
    real = tokens >= 0
    rows, kept = tokens[real.sum(1) > 1], real[real.sum(1) > 1]
    if not len(rows):
        return 0.0
    same = torch.zeros(rows.shape, dtype=torch.long)
    for column in range(rows.shape[1]):
        same += (rows == rows[:, column : column + 1]) & kept & kept[:, column : column + 1]
    return float((same.amax(1) / kept.sum(1)).double().mean())


def shuffled(tokens: Tensor, seed: int) -> Tensor:
    """The ids of a layer dealt to its neurons at random: [f, k]; those that are not there (-1) stay where they are."""
    generator = torch.Generator().manual_seed(seed)
    real = tokens >= 0
    own = tokens[real]
    dealt = tokens.clone()
    dealt[real] = own[torch.randperm(len(own), generator=generator)]
    return dealt


def _read(view: ModelView, corpus: Passages, count: int, batch_size: int) -> Triggers:
    """One part, read at once."""
    packed = torch.zeros(view.layers, view.neurons, count, dtype=torch.long, device=view.device)
    starts = torch.tensor([0, *(len(item.ids) for item in corpus)]).cumsum(0)
    _check_size(int(starts[-1]))
    for batch in steps(list(view.batches(corpus, size=batch_size)), "contexts of neurons"):
        real = batch.mask & batch.mask.roll(-1, 1)
        real[:, -1] = False
        place = starts[list(batch.rows)][:, None].to(view.device) + torch.arange(batch.ids.shape[1], device=view.device)

        # Heard as the model runs: one layer's activations are alive at a time.
        def hear(site: Site, entering: Tensor, real: Tensor = real, place: Tensor = place) -> Tensor:
            _keep_largest(packed[site.layer], entering[real], place[real])
            return entering

        with torch.no_grad(), view.replace(view.sites(Kind.MLP_OUT), hear):
            view.hidden(batch)
    tokens = torch.tensor([token for item in corpus for token in item.ids], dtype=torch.int32)
    return Triggers(packed.cpu(), tokens, starts, corpus.ids, view.digest)


def _keep_largest(table: Tensor, scores: Tensor, places: Tensor) -> None:
    """Put into `table` [f, k] what of `scores` [m, f], at `places` [m], is larger than what it holds."""
    step = max(1, CHUNK // max(1, len(places)))
    for start in range(0, len(table), step):
        mine = scores[:, start : start + step].T.float().contiguous()
        keys = (mine.view(torch.int32).long() << 32) | (LAST - places)
        keys = torch.where(mine > 0, keys, 0)
        best = keys.topk(min(table.shape[1], keys.shape[1]), dim=1).values
        joint = torch.cat([table[start : start + step], best], 1)
        table[start : start + step] = joint.topk(table.shape[1], dim=1).values


def _continued(path: Path, done: Triggers, fresh: Triggers, corpus: Passages) -> Triggers:
    """The table of a file, if it is the beginning of what is wanted."""
    ahead = corpus[: len(done.names)]
    tokens = [token for item in ahead for token in item.ids]
    same = done.model == fresh.model and done.packed.shape == fresh.packed.shape
    if not same or done.names != ahead.ids or done.tokens.tolist() != tokens:
        raise MismatchError(
            f"{path} holds contexts of another model, of other texts, or another number a neuron; name another file"
        )
    return done


def _check_size(total: int) -> None:
    if total > LAST:
        raise InputError(f"{total} tokens; a table of contexts tells {LAST} apart")
