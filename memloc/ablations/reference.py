"""What activations are on a reference text: mean and spread of every number, and a few whole tokens to draw from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memloc.ablations.components import Part
from memloc.ablations.draws import addresses
from memloc.ablations.ports import changing
from memloc.errors import InputError
from memloc.passages import Passages
from memloc.provenance import digest_json, digest_tensor
from memloc.view import ModelView


@dataclass(frozen=True)
class Usual:
    """What one port's numbers (or coefficients along directions) usually are; float32, float64 stays.

    Attributes:
        mean: [w].
        std: [w], of all tokens (not of a sample of them).
        tokens: [k, w], some tokens as they are, drawn evenly from the text.
        address: [k] long, which text each of them ends.
    """

    mean: Tensor
    std: Tensor
    tokens: Tensor
    address: Tensor


@dataclass(frozen=True, eq=False)
class Reference:
    """A text to take means, spreads and substitutes from; every port is read once a model, and kept in this object.

    Every token of prefix and suffix counts once, padding never, whatever the batch size.

    Attributes:
        passages: the text.
        tokens: how many whole tokens to keep for resampling; memory is that times the width of the ports.
        seed: of which tokens.
        batch_size: rows of a forward pass.

    Cost: one forward over the text for all ports that are asked for together.
    """

    passages: Passages
    tokens: int = 256
    seed: int = 0
    batch_size: int = 32
    _known: dict[tuple[str, str, str], Usual] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.passages:
            raise InputError("a reference needs at least one passage")
        if self.tokens < 1 or self.batch_size < 1:
            raise InputError(f"tokens {self.tokens}, batch_size {self.batch_size}: expected at least 1 of each")

    @property
    def digest(self) -> str:
        """Digest of the text and of which tokens are kept."""
        return digest_json([self.passages.digest, self.tokens, self.seed])

    def usual(self, view: ModelView, parts: Sequence[Part]) -> list[Usual]:
        """What the ports of `parts` usually carry (all their numbers, not the chosen ones only).

        Cost: one forward over the text, if a port is new; one pass over the weights, for their digest.
        """
        model = view.digest
        keys = [(model, str(part.port), "" if part.basis is None else digest_tensor(part.basis)) for part in parts]
        missing = {key: part for key, part in zip(keys, parts, strict=True) if key not in self._known}
        if missing:
            self._known.update(zip(missing, self._read(view, list(missing.values())), strict=True))
        return [self._known[key] for key in keys]

    @torch.no_grad()
    def _read(self, view: ModelView, parts: list[Part]) -> list[Usual]:
        sums = [_Sum(part.basis) for part in parts]
        wanted, total, seen = self._drawn().to(view.device), 0, []
        with ExitStack() as stack:
            for part, entry in zip(parts, sums, strict=True):
                stack.enter_context(changing(view, part.port, entry.add))
            for batch in view.batches(self.passages, size=self.batch_size):
                address = addresses(batch.ids, 0)[batch.mask]
                kept = torch.isin(torch.arange(total, total + len(address), device=address.device), wanted)
                for entry in sums:
                    entry.real, entry.kept = batch.mask, kept
                view.hidden(batch)
                total += len(address)
                seen.append(address[kept])
        return [entry.usual(total, torch.cat(seen)) for entry in sums]

    def _drawn(self) -> Tensor:
        """Which tokens are kept, counted in the order of the batches, which does not depend on their size."""
        total = sum(len(item.ids) for item in self.passages)
        return torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))[: self.tokens]


class _Sum:
    """Sums over the tokens that pass one port."""

    def __init__(self, basis: Tensor | None) -> None:
        self.basis = basis
        self.real, self.kept = torch.empty(0), torch.empty(0)
        self._first: Tensor | None = None
        self._total, self._centred, self._bank = torch.empty(0), torch.empty(0), list[Tensor]()

    def add(self, values: Tensor) -> None:
        """Look at what passes; changes nothing."""
        real = coefficients(values[self.real], self.basis)
        self._bank.append(real[self.kept])
        wide = real.double()
        if self._first is None:
            # Squares of distances from some token, not from zero: a mean far from zero costs no digits.
            self._first = wide[0]
            self._total, self._centred = torch.zeros_like(wide[0]), torch.zeros_like(wide[0])
        apart = wide - self._first
        self._total += apart.sum(0)
        self._centred += apart.square().sum(0)

    def usual(self, count: int, address: Tensor) -> Usual:
        """What was seen, over `count` tokens."""
        if self._first is None:
            raise InputError("the reference text reached no such place")
        shift = self._total / count
        std = (self._centred / count - shift.square()).clamp(min=0).sqrt()
        bank = torch.cat(self._bank)
        return Usual((self._first + shift).to(bank.dtype), std.to(bank.dtype), bank, address)


def coefficients(values: Tensor, basis: Tensor | None) -> Tensor:
    """Numbers [..., width], or their coefficients [..., r] along `basis`; float32, float64 stays."""
    wide = values if values.dtype == torch.float64 else values.float()
    return wide if basis is None else wide @ basis.to(wide.dtype).T
