"""How memloc's types look: a card of HTML for notebooks, the same card's first line for a terminal.

A card is small and stands alone: no script, no outside reference, colours that read on a light and on a dark page. It
never holds the text of a passage or of a fact, nor their tokens: ids, lengths and digests only, as in a report.
"""

from __future__ import annotations

from typing import Any

from memloc.notebook.cards import card_of
from memloc.notebook.markup import Drawing, framed

__all__ = ["Drawing", "html", "plain"]


def html(thing: Any) -> str:
    """The card of one of memloc's types, as HTML. Cost: milliseconds, and about 0.1 s where there is a picture."""
    card = card_of(thing)
    return framed(card.title, card.line, card.body())


def plain(thing: Any) -> str:
    """One line, for terminals and tracebacks."""
    card = card_of(thing)
    return f"<{card.title}: {card.line}>"
