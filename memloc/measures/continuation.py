"""What the model says next: greedy continuations, token by token. For people to read; verdicts need none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from memloc.errors import InputError
from memloc.passages import Passages
from memloc.progress import steps
from memloc.running.decoding import continuation
from memloc.view import ModelView


def continue_greedy(
    view: ModelView, passages: Passages, tokens: int | None = None, *, batch_size: int = 32
) -> tuple[tuple[int, ...], ...]:
    """Greedy continuation of every prefix, in the order of `passages`.

    Prefixes of one length run together, so nothing is padded and no row can see another's length. No end token stops
    a row and no setting of the checkpoint's generation_config (penalties, bans) bends it: plain arg-max.

    Args:
        view: the model.
        passages: their prefixes are continued.
        tokens: how many tokens; by default as many as each suffix has.
        batch_size: rows that run together.

    Raises:
        InputError: a token outside the vocabulary, or prefix and continuation longer than the context.

    Cost: one forward over the prefix and one step a token, with a key-value cache.
    """
    if (tokens is not None and tokens < 1) or batch_size < 1:
        raise InputError(f"tokens {tokens}, batch_size {batch_size}: expected at least 1 of each")
    passages.check(view.vocab, view.context)
    wanted = [len(item.suffix) if tokens is None else tokens for item in passages]
    for item, count in zip(passages, wanted, strict=True):
        if view.context is not None and len(item.prefix) + count > view.context:
            raise InputError(f"passage {item.id!r}: {len(item.prefix)} tokens and {count} more, the model's context "
                             f"holds {view.context}; ask for fewer tokens")  # fmt: skip
    found: dict[int, tuple[int, ...]] = {}
    for rows in steps(list(_groups(passages, wanted, batch_size)), "continuations"):
        ids = [passages[row].prefix for row in rows]
        start = torch.tensor(ids, device=view.device)
        said = continuation(view, start, max(wanted[row] for row in rows)).ids[:, start.shape[1] :].tolist()
        found.update({row: tuple(line[: wanted[row]]) for row, line in zip(rows, said, strict=True)})
    return tuple(found[row] for row in range(len(passages)))


def _groups(passages: Passages, wanted: Sequence[int], size: int) -> Iterator[list[int]]:
    by_length: dict[int, list[int]] = {}
    for row, item in enumerate(passages):
        by_length.setdefault(len(item.prefix), []).append(row)
    for rows in by_length.values():
        rows.sort(key=lambda row: -wanted[row])
        yield from (rows[start : start + size] for start in range(0, len(rows), size))
