"""What to teach in the place of a memorized suffix: what the model itself says after a disturbed prefix."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from memloc import progress
from memloc.errors import InputError
from memloc.passages import Passage, Passages
from memloc.running.decoding import continuation
from memloc.view import ModelView


def own_alternative(view: ModelView, passages: Passages, *, tries: int = 32, seed: int = 0) -> Passages:
    """Each passage with another suffix: of what follows disturbed prefixes, what agrees least with the true one.

    The prefix stays as it was; continuations are greedy. Half of the tries substitute one token of the prefix (never
    the first), a quarter two, the rest four.

    Args:
        view: the model.
        passages: what it recites.
        tries: disturbed prefixes of each passage.
        seed: of positions and tokens.

    Raises:
        InputError: a passage is recited for more than half of its suffix whatever was tried.

    Cost: `tries` greedy continuations of each passage, in one batch.

    Source: Stoehr et al. 2024, arXiv:2403.19851 (one substituted token at every position; the search is ours).
    """
    generator = torch.Generator().manual_seed(seed)
    found = [_one(view, item, tries, generator) for item in progress.steps(passages, "alternatives")]
    return Passages(tuple(found), f"alternatives to {passages.origin}" if passages.origin else "alternatives")


def _one(view: ModelView, item: Passage, tries: int, generator: torch.Generator) -> Passage:
    disturbed = _disturbed(item.prefix, view.vocab, tries, generator).to(view.device)
    said = continuation(view, disturbed, len(item.suffix)).ids[:, len(item.prefix) :].cpu()
    agreement = (said == torch.tensor(item.suffix)).sum(1)
    best = int(agreement.argmin())
    if 2 * int(agreement[best]) > len(item.suffix):
        least = f"{int(agreement[best])} of {len(item.suffix)} tokens"
        raise InputError(f"passage {item.id!r} is recited ({least}) whatever prefix of {tries} was tried; raise tries")
    return replace(item, suffix=tuple(said[best].tolist()))


def _disturbed(prefix: tuple[int, ...], vocab: int, tries: int, generator: torch.Generator) -> Tensor:
    """`[tries, s]`: copies of the prefix with one, two or four tokens substituted by others."""
    rows = torch.tensor(prefix).repeat(tries, 1)
    first = 1 if len(prefix) > 1 else 0
    for row in range(tries):
        many = 1 if row < tries / 2 else 2 if row < 3 * tries / 4 else 4
        places = first + torch.randperm(len(prefix) - first, generator=generator)[:many]
        # A step of 1 to v - 1, modulo v, never gives the same token back.
        step = torch.randint(1, vocab, (len(places),), generator=generator)
        rows[row, places] = (rows[row, places] + step) % vocab
    return rows
