"""Perturbed twins: each passage with its most disruptive prefix token exchanged, and what the model then writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from memloc.passages import Passages
from memloc.patching.perturbation import Exchanges, recited
from memloc.view import ModelView


@dataclass(frozen=True)
class Twins:
    """Each passage with its most disruptive token put in.

    Attributes:
        passages: prefix with one token exchanged, and what the model itself writes then; the passages' own ids, with
            the tags "perturbed" (position), "token" (put in) and "rise" (of the true suffix's NLL, nats per token).
        position: of each, the place of the exchanged token.
        token: of each, the token put in.
        rise: of each, the rise of the true suffix's mean NLL.
    """

    passages: Passages
    position: tuple[int, ...]
    token: tuple[int, ...]
    rise: tuple[float, ...]


def perturbed_twins(
    view: ModelView, passages: Passages, exchanges: Exchanges | None = None, *, by: Literal["nll", "exact"] = "nll"
) -> Twins:
    """The most disruptive prefix token of each passage, and the passage it leads to: for contrastive editing.

    Args:
        view: the model.
        passages: what it recites.
        exchanges: how prefixes are perturbed.
        by: disruption as the rise of the suffix's NLL, or as decoded tokens lost before the first mistake (the rise
            breaks ties, which are many).

    Source: Stoehr et al. 2024, arXiv:2403.19851 (there: by decoded tokens, one alternative, position 0 left out).
    """
    maps = (exchanges or Exchanges()).maps(view, passages)
    items, worst = [], []
    for item, found in zip(passages, maps, strict=True):
        # A rise is below 1e3 nats in any model: it decides among equal counts only.
        at, which = found.worst(found.rise if by == "nll" else found.drop + found.rise / 1e3)
        token, rise = int(found.tokens[at, which]), float(found.rise[at, which])
        tags = {**item.tags, "perturbed": at, "token": token, "rise": rise}
        items.append(replace(item, prefix=(*item.prefix[:at], token, *item.prefix[at + 1 :]), tags=tags))
        worst.append((at, token, rise))
    position, tokens, rises = zip(*worst, strict=True) if worst else ((), (), ())
    return Twins(recited(view, Passages(tuple(items), passages.origin)), position, tokens, rises)
