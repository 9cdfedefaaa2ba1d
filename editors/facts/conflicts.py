"""Facts of one batch that cannot all be made so: one line that names both."""

from __future__ import annotations

from torch import Tensor

from memloc.errors import InputError
from memloc.passages import Facts
from memloc.sites import Site

ALIKE = 0.9999
"""Cosine of two keys from which one map cannot answer them differently without a change far larger than either's."""


def refuse_same(facts: Facts) -> None:
    """Refuse two facts that ask the same.

    Raises:
        InputError: names both, and whether their answers agree.
    """
    seen: dict[tuple[int, ...], int] = {}
    for index, fact in enumerate(facts):
        other = seen.setdefault(fact.prompt.ids, index)
        if other != index:
            first = facts[other]
            how = "the same answer" if first.target == fact.target else "different answers"
            asks = f"facts {first.id!r} and {fact.id!r} give {fact.prompt.text!r} {how}"
            raise InputError(f"{asks}; leave one of them out")


def refuse_alike(facts: Facts, owner: Tensor, keys: Tensor, site: Site) -> None:
    """Refuse two facts whose keys are all but parallel and whose answers differ.

    Args:
        facts: the batch.
        owner: [n] which fact each key is of.
        keys: [n, f].
        site: where the keys were read.

    Raises:
        InputError: names both, and where.
    """
    plain = keys / keys.norm(dim=1, keepdim=True).clamp_min(1e-300)
    cosine = (plain @ plain.T).triu(1)
    for mine, other in (cosine > ALIKE).nonzero().tolist():
        one, two = facts[int(owner[mine])], facts[int(owner[other])]
        if one.target != two.target:
            near = f"{site} reads nearly the same key for facts {one.id!r} and {two.id!r} (cosine "
            near += f"{float(cosine[mine, other]):.5f}) and their answers differ"
            raise InputError(f"{near}; edit at another layer or token, or leave one out")
