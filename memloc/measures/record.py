"""The token record: one teacher-forced pass, from which every figure about a fixed suffix follows.

Greedy decoding of a prefix gives the suffix exactly when every suffix token is the arg-max at its place with the
true tokens before it, so verdicts need no generation. The unembedding runs on positions that predict a suffix token,
a chunk at a time: logits of all positions `[n, t, v]` never exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memloc.errors import InputError, ModelError
from memloc.passages import Passages
from memloc.progress import steps
from memloc.view import ModelView

CHUNK = 2**23
"""Logits held at once (32 MiB in float32)."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a continuation is sampled: temperature, then top-k, then top-p, the order of transformers' `generate`.

    Attributes:
        temperature: logits are divided by it.
        top_k: keep the tokens that reach the k-th largest logit (all that tie with it), or None for all.
        top_p: keep the smallest set of likeliest tokens that holds this mass (and all that tie with its least), or
            None for all.

    Raises:
        InputError: a setting outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (0 < self.temperature < math.inf):
            raise InputError(f"temperature {self.temperature}: expected more than 0; greedy is the strict rate")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k {self.top_k}: expected at least 1, or none for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p}: expected a mass in (0, 1], or none for all tokens")

    def logprobs(self, logits: Tensor, token: Tensor) -> Tensor:
        """Log-probability of drawing `token` [c] from `logits` [c, v]: [c] nats, -inf where the scheme cuts it off."""
        scores = logits / self.temperature if self.temperature != 1 else logits
        if self.top_k is not None and self.top_k < scores.shape[1]:
            scores = _keep_from(scores, scores.topk(self.top_k).values[:, -1:])
        if self.top_p is not None and self.top_p < 1:
            scores = _keep_from(scores, _nucleus_edge(scores, self.top_p))
        return scores.log_softmax(1).gather(1, token[:, None])[:, 0]


def _keep_from(scores: Tensor, least: Tensor) -> Tensor:
    return scores.masked_fill(scores < least, -math.inf)


def _nucleus_edge(scores: Tensor, mass: float) -> Tensor:
    """The least score of the nucleus, [c, 1]: from the smallest upwards, drop while the dropped mass is ≤ 1 - mass."""
    rising = scores.sort(1).values
    dropped = (rising.softmax(1).cumsum(1) <= 1 - mass).sum(1, keepdim=True)
    return rising.gather(1, dropped.clamp(max=scores.shape[1] - 1))


@dataclass(frozen=True)
class Chunk:
    """Logits at some positions that predict a suffix token.

    Attributes:
        row: [c] which passage.
        step: [c] which token of its suffix, from 0.
        token: [c] that token.
        logits: [c, v] float32 (float64 where the model is), free to be overwritten.
    """

    row: Tensor
    step: Tensor
    token: Tensor
    logits: Tensor


@torch.no_grad()
def suffix_logits(view: ModelView, passages: Passages, *, size: int = 32, label: str = "suffixes") -> Iterator[Chunk]:
    """The logits that predict every suffix token, each exactly once, in chunks.

    Cost: one forward; at most `CHUNK` logits are held at once, whatever the batch.

    Args:
        view: the model.
        passages: what is asked.
        size: rows of a forward.
        label: what progress is called.

    Raises:
        InputError: no passages, a token outside the vocabulary, a row longer than the context.
        ModelError: logits that are not finite; the passage and its token are named.
    """
    if not len(passages):
        raise InputError(f"{passages.origin or 'passages'}: no passage to measure")
    if size < 1:
        raise InputError(f"batch_size {size}: expected at least 1")
    width = max(1, CHUNK // view.vocab)
    for batch in steps(view.batches(passages, size=size), label, -(-len(passages) // size)):
        row, column, token, step = batch.suffix_index()
        hidden = view.hidden(batch)[row, column]
        source = torch.tensor(batch.rows, device=row.device)[row]
        for start in range(0, len(row), width):
            part = slice(start, start + width)
            chunk = Chunk(source[part], step[part], token[part], view.unembed(hidden[part]))
            _check_finite(chunk, passages)
            yield chunk


def _check_finite(chunk: Chunk, passages: Passages) -> None:
    bad = ~torch.isfinite(chunk.logits.amax(1))
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        name, step = passages[int(chunk.row[first])].id, int(chunk.step[first])
        raise ModelError(f"passage {name!r}: the logits for suffix token {step} are not finite; "
                         "load the model in float32")  # fmt: skip


@dataclass(frozen=True)
class TokenRecord:
    """What one teacher-forced pass says about every suffix token; tables `[n, s]` on the CPU, s the longest suffix.

    Attributes:
        length: [n] long, tokens of each suffix.
        inside: [n, s] bool, False beyond a row's suffix; the other tables hold 0 (`match`: True) there.
        rank: [n, s] long, tokens with a larger logit.
        ties: [n, s] long, other tokens with the very same logit.
        match: [n, s] bool, the token is what arg-max returns (the lowest id among ties).
        close: [n, s] bool, best other logit within two roundings of the model's dtype (at the size of the logit).
        logprob: scheme to [n, s] float64 nats.
    """

    length: Tensor
    inside: Tensor
    rank: Tensor
    ties: Tensor
    match: Tensor
    close: Tensor
    logprob: dict[Scheme, Tensor]

    @property
    def strict(self) -> Tensor:
        """[n] bool: greedy decoding gives the suffix exactly."""
        return self.match.all(1)

    @property
    def first_miss(self) -> Tensor:
        """[n] long: tokens recited before the first miss; the suffix's length where there is none."""
        return (self.match & self.inside).long().cumprod(1).sum(1)

    @property
    def fragile(self) -> Tensor:
        """[n] bool: the strict verdict hangs on a tie, or on a margin as small as rounding.

        Such a row may be judged otherwise on another machine, at another batch size, or token by token.
        """
        return (self.match | self.close).all(1) & (self.close & self.inside).any(1)

    @property
    def exact_memorization(self) -> Tensor:
        """[n] float64: share of suffix tokens that are the arg-max, with the true tokens before them."""
        return (self.match & self.inside).sum(1).double() / self.length

    @property
    def extraction_strength(self) -> Tensor:
        """[n] float64: share of the suffix in the run of matches that ends it; 0 where the last token misses.

        Source: Carlini et al. 2021 by way of open-unlearning's definition, 1 - m/k with m the first token from which
        all match; a row whose last token misses has m = k.
        """
        run = self.match.flip(1).long().cumprod(1).sum(1) - (self.match.shape[1] - self.length)
        return run.double() / self.length

    def log_pz(self, scheme: Scheme) -> Tensor:
        """[n] float64: log-probability, in nats, that one continuation sampled by `scheme` is the suffix."""
        return self.logprob[scheme].sum(1)

    def nll(self) -> Tensor:
        """[n] float64: mean negative log-likelihood of the suffix, nats per token (needs the plain scheme)."""
        return -self.log_pz(Scheme()) / self.length


def token_record(
    view: ModelView,
    passages: Passages,
    *,
    schemes: Sequence[Scheme] = (Scheme(),),
    batch_size: int = 32,
    label: str = "suffixes",
) -> TokenRecord:
    """Teacher-force every suffix once and keep what all later figures need.

    Cost: one forward over prefix and suffix; memory for logits as in `suffix_logits`, for the record 19 bytes a
    token and 8 more a scheme.

    Raises:
        InputError, ModelError: as `suffix_logits`.
    """
    length = torch.tensor([len(item.suffix) for item in passages], dtype=torch.long)
    shape = (len(passages), int(length.max()) if len(passages) else 0)
    rank, ties = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    match, close = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    logprob = {scheme: torch.zeros(shape, dtype=torch.float64) for scheme in schemes}
    slack = 2 * torch.finfo(view.dtype).eps
    for chunk in suffix_logits(view, passages, size=batch_size, label=label):
        at = (chunk.row.cpu(), chunk.step.cpu())
        for scheme, table in logprob.items():
            table[at] = scheme.logprobs(chunk.logits, chunk.token).cpu().double()
        # From here on the token itself is out of the race: what is left are its rivals.
        column = chunk.token[:, None]
        mine = chunk.logits.gather(1, column)
        rivals = chunk.logits.scatter_(1, column, -math.inf)
        best, who = rivals.max(1, keepdim=True)
        # Counted in floats, exact up to 2**24 tokens: a sum over booleans takes ten times as long.
        counts = torch.empty_like(rivals)
        rank[at] = torch.gt(rivals, mine, out=counts).sum(1).long().cpu()
        ties[at] = torch.eq(rivals, mine, out=counts).sum(1).long().cpu()
        match[at] = ((mine > best) | ((mine == best) & (column < who)))[:, 0].cpu()
        close[at] = ((mine - best).abs() <= slack * mine.abs())[:, 0].cpu()
    inside = torch.arange(shape[1]) < length[:, None]
    return TokenRecord(length, inside, rank, ties, match, close, logprob)
