"""A passage and what the models make of it: marked token by token where it may be shown, counted where it may not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memloc.provenance import digest_json

Text = str | Sequence[str]

_PIECE = re.compile(r"\s*\w+|\s*[^\w\s]|\s+")


@dataclass(frozen=True)
class TextRow:
    """One passage: what the model was given, what is true, and how each model went on.

    Attributes:
        id: of the passage; shown even when its text is not.
        prefix: what the model was given.
        truth: the true suffix.
        before: continuation by the model as it came.
        after: continuation by the edited model; None where there is none.
        control: continuation under the random control of equal size, or None.

    Each text is a sequence of token strings (then counts are of tokens) or one string (then it is cut into words and
    marks, and counts are of those).
    """

    id: str
    prefix: Text
    truth: Text
    before: Text | None = None
    after: Text | None = None
    control: Text | None = None

    def to_json(self, *, show_text: bool) -> dict[str, Any]:
        """Counts, digest, and the pieces themselves only if `show_text`; nothing else depends on it."""
        truth = pieces(self.truth)
        arms = {"before": self.before, "after": self.after, "random": self.control}
        found: dict[str, Any] = {
            "id": self.id,
            "unit": "words" if isinstance(self.truth, str) else "tokens",
            "prefix_length": len(pieces(self.prefix)),
            "truth_length": len(truth),
            "digest": digest_json([list(pieces(self.prefix)), list(truth)]),
            "arms": {name: agreement(truth, pieces(text)) for name, text in arms.items() if text is not None},
        }
        if show_text:
            found["prefix"], found["truth"] = "".join(pieces(self.prefix)), list(truth)
            for name, text in arms.items():
                if text is not None:
                    found["arms"][name]["text"] = list(pieces(text))
        return found


def pieces(text: Text) -> tuple[str, ...]:
    """Token strings as given, or a string cut into words (each with the space before it) and marks."""
    return tuple(_PIECE.findall(text)) if isinstance(text, str) else tuple(text)


def agreement(truth: Sequence[str], said: Sequence[str]) -> dict[str, Any]:
    """How much of the truth a continuation holds.

    Returns:
        `length`; `matching`: pieces equal at the same place; `first_miss`: pieces before the first difference;
        `longest_run`: longest stretch of the truth found anywhere in it, so that a shifted recital is not missed.
    """
    same = matches(truth, said)
    run = difflib.SequenceMatcher(None, truth, said, autojunk=False).find_longest_match()
    first = next((place for place, equal in enumerate(same) if not equal), len(same))
    return {"length": len(said), "matching": sum(same), "first_miss": first, "longest_run": run.size}


def matches(truth: Sequence[str], said: Sequence[str]) -> list[bool]:
    """Whether each piece said is the true one at its place."""
    return [place < len(truth) and truth[place] == piece for place, piece in enumerate(said)]


def runs(truth: Sequence[str], said: Sequence[str]) -> list[tuple[bool, str]]:
    """Neighbouring pieces joined while they agree, or while they differ: (agrees, text)."""
    joined: list[tuple[bool, str]] = []
    for same, piece in zip(matches(truth, said), said, strict=True):
        if joined and joined[-1][0] == same:
            joined[-1] = (same, joined[-1][1] + piece)
        else:
            joined.append((same, piece))
    return joined


def guarded(value: Any, *, show_text: bool) -> Any:
    """A JSON value without free text: a string with a space in it becomes its length and digest.

    Settings and notes of methods may quote a passage or a fact; names, modes and digests have no space in them.
    """
    if show_text:
        return value
    if isinstance(value, Mapping):
        return {key: guarded(entry, show_text=False) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [guarded(entry, show_text=False) for entry in value]
    if isinstance(value, str) and any(character.isspace() for character in value.strip()):
        return f"[text of {len(value)} characters, {digest_json(value)[:12]}]"
    return value
