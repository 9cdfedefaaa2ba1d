"""The prefix, one token exchanged at a time: what each exchange does to the suffix.

Every row starts at its changed token, on the cached tokens left of it; neighbouring positions start together. How many
suffix tokens would be decoded before the first wrong one needs no decoding: until then the decoded text is the suffix
itself, so one teacher-forced pass knows.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from memloc.batches import Batch, batches
from memloc.costs import Cost, pass_bytes
from memloc.passages import Passage, Passages
from memloc.progress import steps
from memloc.running.decoding import continuation
from memloc.running.resumed import LeftCache, Resumed
from memloc.view import ModelView

Target = Literal["suffix", "own"]


@dataclass(frozen=True)
class PrefixMap:
    """Every exchange of one prefix token of one passage: p positions by a alternatives, on a suffix of s tokens.

    Attributes:
        tokens: [p, a] the token put in.
        rise: [p, a] how much the suffix's mean NLL rises, nats per token.
        greedy: [p, a, s] the likeliest token at every suffix position, the true tokens before it given.
        clean: [s] the same with the prefix as it is.
        nll: the suffix's mean NLL with the prefix as it is.
        suffix: [s] the suffix.
        written: [p, a, s] what is decoded greedily; None where it was not asked for.
    """

    tokens: Tensor
    rise: Tensor
    greedy: Tensor
    clean: Tensor
    nll: float
    suffix: Tensor
    written: Tensor | None = None

    @property
    def exact(self) -> Tensor:
        """[p, a] suffix tokens that greedy decoding gets right before its first mistake."""
        return _leading(self.greedy == self.suffix)

    @property
    def clean_exact(self) -> int:
        """The same with the prefix as it is."""
        return int(_leading(self.clean == self.suffix))

    @property
    def drop(self) -> Tensor:
        """[p, a] tokens fewer than with the prefix as it is."""
        return self.clean_exact - self.exact

    @property
    def changed(self) -> Tensor:
        """[p, a] share of the decoded tokens that are not the suffix's."""
        if self.written is None:
            raise ValueError("this map was made without decoding")
        return (self.written != self.suffix).double().mean(-1)

    def worst(self, by: Tensor) -> tuple[int, int]:
        """Position and alternative with the largest entry of `by` [p, a]; the first among equals."""
        index = int(by.reshape(-1).argmax())
        return index // by.shape[1], index % by.shape[1]


@dataclass(frozen=True)
class Exchanges:
    """How prefixes are perturbed.

    Attributes:
        alternatives: random tokens tried at every position, each other than the one that stands there.
        seed: theirs; every passage draws by itself, from the seed and its own tokens.
        target: what is watched: "suffix", or "own", as many tokens of the model's own greedy continuation.
        decode: write every perturbed continuation out.
        batch_size: passages whose prefixes are cached together.
        stride: neighbouring positions that start together, at the first of them.
        memory_mb: working memory of the rows run together, roughly.
    """

    alternatives: int = 1
    seed: int = 0
    target: Target = "suffix"
    decode: bool = False
    batch_size: int = 16
    stride: int = 8
    memory_mb: int = 512

    @torch.no_grad()
    def maps(self, view: ModelView, passages: Passages) -> list[PrefixMap]:
        """One map a passage, in order.

        Cost: the passages once; then each exchange from its position on (a little more than half a forward).

        Raises:
            InputError: a passage the model cannot take (named).
        """
        passages.check(view.vocab, view.context)
        drawn = [self.draw(view.vocab, item) for item in passages]
        if self.target == "own":
            passages = recited(view, passages, batch_size=self.batch_size)
        found: dict[int, PrefixMap] = {}
        for batch in steps(list(batches(passages, size=self.batch_size, device=view.device)), "prefix map"):
            found |= dict(zip(batch.rows, self._maps(view, batch, drawn), strict=True))
        return [found[row] for row in range(len(passages))]

    def draw(self, vocab: int, passage: Passage) -> Tensor:
        """[p, a] tokens to put in, none of them the one that stands there."""
        generator = own_generator(self.seed, passage)
        shift = torch.randint(1, vocab, (len(passage.prefix), self.alternatives), generator=generator)
        return (torch.tensor(passage.prefix)[:, None] + shift) % vocab

    def cost(self, view: ModelView, passages: Passages) -> Cost:
        """What `maps` takes; decoding starts at a row's first mistake, so with it the figure is an upper bound."""
        forward = highest = kept = 0
        for batch in batches(passages, size=self.batch_size):
            rows, width = len(batch), batch.ids.shape[1]
            forward += rows * (width - 1)
            heads = 4 * view.layers * rows * width * view.kv_heads * view.head_width
            left = pass_bytes(view, rows * width, context=width, unembedded=int(batch.suffix_mask.sum()))
            highest = max(highest, left + 8 * heads)
            for chunk in self._chunks(view, batch):
                forward += chunk.row.numel() * chunk.width
                if self.decode:
                    forward += int((batch.length - batch.prefix)[chunk.row].sum()) - chunk.row.numel()
                copies = 12 if self.decode else 3
                share = chunk.row.numel() * self._row_bytes(view, batch, copies=copies)
                highest = max(highest, 8 * heads + left + share)
        for item in passages:
            kept += 8 * (3 + 2 * len(item.suffix)) * len(item.prefix) * self.alternatives
        if self.target == "own":
            forward += sum(len(item.prefix) + len(item.suffix) - 1 for item in passages)
        bytes_ = highest + 2 * kept + 2**16
        return Cost(view.layers * forward, bytes=bytes_, bound="at most" if self.decode else "exact")

    def _maps(self, view: ModelView, batch: Batch, drawn: Sequence[Tensor]) -> list[PrefixMap]:
        left = LeftCache.of(view, batch.ids[:, :-1])
        clean = _heard(view, left.hidden, batch, torch.arange(len(batch), device=batch.ids.device), 0)
        tokens = [drawn[row].to(batch.ids.device) for row in batch.rows]
        nll = [torch.zeros_like(entry, dtype=clean[0].dtype) for entry in tokens]
        size = (batch.length - batch.prefix).tolist()
        greedy = [entry.new_zeros(*entry.shape, size[row]) for row, entry in enumerate(tokens)]
        written = [entry.clone() for entry in greedy]
        for chunk in self._chunks(view, batch):
            ids = batch.ids[chunk.row, chunk.column : chunk.column + chunk.width]
            new = [tokens[row][at, which] for row, at, which in chunk.items]
            ids[torch.arange(len(ids)), chunk.at - chunk.column] = torch.stack(new)
            resumed = left.resume(chunk.row, chunk.column, ids)
            same = chunk.at > chunk.column
            left.proves(chunk.row[same], chunk.column, resumed.hidden[same, 0])
            each, best = _heard(view, resumed.hidden, batch, chunk.row, chunk.column)
            for (row, at, which), value, spoken in zip(chunk.items, each, best, strict=True):
                nll[row][at, which] = value
                greedy[row][at, which] = spoken[: size[row]]
            if self.decode:
                for (row, at, which), text in zip(chunk.items, _decoded(resumed, batch, chunk, best), strict=True):
                    written[row][at, which] = text
        return [
            PrefixMap(
                tokens[row].cpu(),
                (nll[row] - clean[0][row]).cpu(),
                greedy[row].cpu(),
                clean[1][row, : size[row]].cpu(),
                float(clean[0][row]),
                batch.ids[row, int(batch.prefix[row]) : int(batch.length[row])].cpu(),
                written[row].cpu() if self.decode else None,
            )
            for row in range(len(batch))
        ]

    def _row_bytes(self, view: ModelView, batch: Batch, *, copies: int = 3) -> int:
        """About what one row of a chunk takes: its pass, its share of the cache, its logits."""
        context = batch.ids.shape[1]
        longest = int((batch.length - batch.prefix).max())
        cache = copies * 2 * view.layers * context * view.kv_heads * view.head_width * 8
        return pass_bytes(view, context, context=context, unembedded=longest) + cache

    def _chunks(self, view: ModelView, batch: Batch) -> Iterator[_Chunk]:
        size = max(1, self.memory_mb * 2**20 // self._row_bytes(view, batch))
        for column in range(0, int(batch.prefix.max()), self.stride):
            items = [
                (row, at, which)
                for row in range(len(batch))
                for at in range(column, min(column + self.stride, int(batch.prefix[row])))
                for which in range(self.alternatives)
            ]
            for start in range(0, len(items), size):
                part = items[start : start + size]
                row, at, _ = torch.tensor(part, device=batch.ids.device).unbind(1)
                yield _Chunk(column, int(batch.length[row].max()) - 1 - column, row, at, part)


@dataclass(frozen=True)
class _Chunk:
    """Exchanges run together: [m] rows of the batch and positions, from `column` on over `width` tokens."""

    column: int
    width: int
    row: Tensor
    at: Tensor
    items: list[tuple[int, int, int]]


def recited(view: ModelView, passages: Passages, *, batch_size: int = 16) -> Passages:
    """The passages with as many tokens of the model's own greedy continuation in the suffix's place.

    Cost: one forward over the prefixes, then one a token; passages of equal lengths go together.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, item in enumerate(passages):
        groups[len(item.prefix), len(item.suffix)].append(row)
    found: dict[int, Passage] = {}
    for (prefix, length), rows in groups.items():
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            ids = torch.tensor([passages[row].prefix for row in part], device=view.device)
            text = continuation(view, ids, length).ids[:, prefix:].tolist()
            found |= {row: replace(passages[row], suffix=tuple(own)) for row, own in zip(part, text, strict=True)}
    return Passages(tuple(found[row] for row in range(len(passages))), passages.origin)


def own_generator(seed: int, passage: Passage) -> torch.Generator:
    """A passage's own randomness: the same in any company and any order."""
    text = f"{seed}:{passage.prefix}:{passage.suffix}"
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little"))


def _heard(view: ModelView, hidden: Tensor, batch: Batch, rows: Tensor, column: int) -> tuple[Tensor, Tensor]:
    """Of rows run from `column` on: mean NLL of the suffix [m], likeliest token at its positions [m, s]."""
    size = (batch.length - batch.prefix)[rows]
    at = torch.arange(int(size.max()), device=rows.device)
    real = at < size[:, None]
    item, step = real.nonzero(as_tuple=True)
    place = batch.prefix[rows][item] + step
    logits = view.unembed(hidden[item, place - 1 - column])
    gold = logits.log_softmax(-1).gather(1, batch.ids[rows[item], place, None])[:, 0]
    nll = -gold.new_zeros(real.shape).index_put((item, step), gold).sum(1) / size
    best = torch.zeros_like(real, dtype=torch.long).index_put((item, step), logits.argmax(-1))
    return nll, best


def _decoded(resumed: Resumed, batch: Batch, chunk: _Chunk, best: Tensor) -> list[Tensor]:
    """What each row of a chunk writes greedily: the suffix up to the first mistake, decoded from there on."""
    found = [batch.ids[0, :0]] * len(best)
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, at in enumerate(chunk.row.tolist()):
        groups[int(batch.prefix[at]), int(batch.length[at])].append(place)
    for (prefix, length), members in groups.items():
        index = torch.tensor(members, device=best.device)
        suffix = batch.ids[chunk.row[index], prefix:length]
        right = int(_leading(best[index, : length - prefix] == suffix).min())
        text = suffix.clone()
        if right < length - prefix:
            text[:, right:] = resumed.decode(index, prefix + right, best[index, right], length - prefix - right)
        for place, row in zip(members, text, strict=True):
            found[place] = row
    return found


def _leading(right: Tensor) -> Tensor:
    """How many are True before the first False, along the last axis."""
    return right.long().cumprod(-1).sum(-1)
