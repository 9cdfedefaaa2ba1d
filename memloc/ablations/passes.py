"""What passes through a model, seen from inside: which position each token has in its row, and which text it ends.

A forward pass may hold whole padded rows, or one new token a row on cached keys and values. Both are followed, so that
whoever changes activations by position, or draws for a text, does the same in both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache

from memloc import hooks
from memloc.ablations.draws import addresses
from memloc.errors import InputError, ModelError
from memloc.sites import OUTSIDE, Kind, Site
from memloc.view import ModelView

EMBED = Site(OUTSIDE, Kind.EMBED)


@dataclass(frozen=True)
class Pass:
    """The tokens of the forward pass that is under way.

    Attributes:
        at: [t] long, absolute positions, counted from 0 at the row's first token.
        address: [n, t] long, see `memloc.ablations.draws.addresses`.
        suffix: [n, t] bool, tokens behind one of the prefixes given; None where none were.
    """

    at: Tensor
    address: Tensor
    suffix: Tensor | None


@dataclass
class Passes:
    """Follows the passes of one view inside `follow`.

    Attributes:
        prefixes: how rows may begin, where "behind the prefix" is asked; none begins another.
        now: the pass under way, from the first block on.
    """

    prefixes: Sequence[Sequence[int]] = ()
    now: Pass | None = None
    _past: WeakKeyDictionary[Any, tuple[Tensor, Tensor]] = field(default_factory=WeakKeyDictionary)

    def of(self, tensor: Tensor) -> Pass:
        """The pass that `tensor` [n, t, ...] is part of.

        Raises:
            ModelError: blocks were run by themselves, on rows that no forward pass brought.
        """
        if self.now is None or self.now.address.shape != tensor.shape[:2]:
            found = None if self.now is None else list(self.now.address.shape)
            raise ModelError(f"a block was given {list(tensor.shape[:2])} tokens, the forward pass {found}: positions "
                             "and random draws are known in whole forward passes only")  # fmt: skip
        return self.now

    @contextlib.contextmanager
    def follow(self, view: ModelView) -> Iterator[None]:
        """Look on, inside the block; enter it before any hook that asks `of`.

        Raises:
            InputError: one of `prefixes` begins another.
        """
        ends = _ends(self.prefixes, view.device)
        with (
            view.record([EMBED]) as ids,
            hooks.record_calls({0: view.block(0)}) as calls,
            view.replace_blocks([0], lambda _, tensor: self._begin(tensor, ids[EMBED], calls[0], ends), side="input"),
        ):
            yield
        self.now = None

    def _begin(self, residual: Tensor, ids: Tensor, call: hooks.Call, ends: Tensor | None) -> Tensor:
        if ids.shape != residual.shape[:2]:
            raise ModelError(f"{list(ids.shape)} token ids for {list(residual.shape[:2])} tokens; give input_ids")
        cache = next((part for part in (*call.args, *call.kwargs.values()) if isinstance(part, Cache)), None)
        start = 0 if cache is None else int(cache.get_seq_length())
        before = None if start == 0 else self._past.get(cache)
        if start and (before is None or len(before[0]) != len(ids)):
            raise ModelError(f"{start} cached tokens a row that were not seen here; start the text inside the ablation")
        address = addresses(ids, start, None if before is None else before[0])
        suffix, passed = None, torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        if ends is not None:
            ended = torch.isin(address, ends)
            passed = ended.any(1) if before is None else before[1] | ended.any(1)
            if not bool(passed.all()):
                raise InputError(f"row {int((~passed).nonzero()[0])} of a batch begins with none of the prefixes given")
            suffix = ended.roll(1, 1)
            suffix[:, 0] = False if before is None else before[1]
            suffix = suffix.long().cumsum(1) > 0
        if cache is not None:
            self._past[cache] = (address[:, -1], passed)
        self.now = Pass(torch.arange(start, start + ids.shape[1], device=ids.device), address, suffix)
        return residual


def _ends(prefixes: Sequence[Sequence[int]], device: torch.device) -> Tensor | None:
    """Addresses of the prefixes' last tokens."""
    known = {tuple(row) for row in prefixes}
    for row in known:
        if any(row[:length] in known for length in range(1, len(row))):
            raise InputError(f"the prefix {list(row)} begins with another of the prefixes given; where one ends is "
                             "then not known; ablate them apart")  # fmt: skip
    rows = [addresses(torch.tensor([row], device=device), 0)[0, -1] for row in sorted(known)]
    return torch.stack(rows) if rows else None
