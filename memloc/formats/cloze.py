"""ParaRel and LAMA: relations as cloze sentences.

A model that reads from left to right can be asked what ends one; a masked language model, which is told by its
tokenizer's mask token, what stands anywhere in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memloc.errors import InputError
from memloc.formats.content import Content, Row
from memloc.formats.format import (
    FACT_KEYS,
    PASSAGE_KEYS,
    Format,
    Settings,
    carried,
    object_at,
    shown,
    text_at,
    texts_at,
)
from memloc.formats.opening import open_content
from memloc.formats.rewrites import ONE_ANSWER, own
from memloc.passages import SLOT

AT_END = "no sentence ends in its slot, so a left-to-right model cannot be asked (a masked one can: give its tokenizer)"


def both_ways(settings: Settings) -> bool:
    """Whether what is read is for a model that reads both ways."""
    return getattr(settings.tokenizer, "mask_token_id", None) is not None


def bag(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A ParaRel bag, [[sentence with [MASK], answer, relation], …]: a passage for each that can be asked."""
    if not isinstance(record, list) or not record:
        raise InputError(f"expected a list of [sentence, answer, relation], found {shown(record)}")
    found = []
    for index, entry in enumerate(record):
        if not isinstance(entry, list) or len(entry) != 3 or not all(isinstance(part, str) for part in entry):
            raise InputError(f"entry {index}: expected [sentence, answer, relation], found {shown(entry)}")
        sentence, answer, relation = entry
        found += _asked(sentence, answer, {"relation": relation, "format": "pararel", "cloze": sentence}, settings)
    return found


def lama(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A LAMA record with masked sentences: a passage for each that can be asked."""
    entry = object_at(record)
    answer = text_at(entry, "obj_label")
    sentences = texts_at(entry, "masked_sentences")
    evidences = entry.get("evidences")
    for part in evidences if isinstance(evidences, list) else ():
        sentences.append(text_at(part, "masked_sentence"))
    rest = carried(entry, ("masked_sentences", "evidences", "uuid"), PASSAGE_KEYS)
    found = []
    for sentence in dict.fromkeys(sentences):
        found += _asked(sentence, answer, {"format": "lama", "cloze": sentence, **rest}, settings)
    return found


def _asked(sentence: str, answer: str, tags: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    if sentence.count(SLOT) != 1:
        raise InputError(f"expected one {SLOT} in the sentence, found {shown(sentence)}")
    head, tail = sentence.split(SLOT)
    if both_ways(settings):
        suffix = (" " if head.strip() else "") + answer.strip()
        return [{"prefix": head.rstrip(), "suffix": suffix, **({"after": tail} if tail.strip() else {}), **tags}]
    if tail.strip(" .") or not head.strip():
        return []
    return [{"prefix": head.rstrip(), "suffix": " " + answer.strip(), **tags}]


def with_patterns(content: Content, settings: Settings) -> Iterable[Row]:
    """Each pair with the relation's templates.

    Raises:
        InputError: no file of patterns is named, or none in it can be used.
    """
    if settings.patterns is None:
        raise InputError(f"{content.path}: sub_label and obj_label without a sentence; give the relation's patterns: "
                         "`memloc convert --patterns FILE`")  # fmt: skip
    templates = patterns(settings.patterns, inside=both_ways(settings))
    for where, record in content.rows:
        yield where, (record, templates)


def pairs(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A pair (sub_label, obj_label), asked with the patterns that can be: the first is its prompt."""
    entry, templates = object_at(record[0]), record[1]
    subject, answer = text_at(entry, "sub_label"), text_at(entry, "obj_label")
    found = {
        "id": str(entry.get("uuid", "")),
        "prompt": templates[0],
        "subject": subject,
        "target": answer,
        "target_true": answer,
        "paraphrases": templates[1:],
        "format": "pararel",
        "answers": "one",
        **carried(entry, ("uuid", "sub_label", "obj_label"), FACT_KEYS),
    }
    return own(found, settings)


def patterns(path: str | Path, *, inside: bool = False) -> list[str]:
    """Templates with {} for [X] from a file of patterns ("pattern" or "template"), those that end in [Y].

    Args:
        path: the file.
        inside: also those that go on behind [Y], which becomes [MASK] there.

    Raises:
        InputError: no pattern there, or none that ends in [Y].
    """
    found, seen = [], 0
    for where, record in open_content(path).rows:
        text = record.get("pattern", record.get("template")) if isinstance(record, dict) else None
        if not isinstance(text, str) or text.count("[X]") != 1 or text.count("[Y]") != 1:
            raise InputError(f"{path}, {where}: expected a pattern with one [X] and one [Y], found {shown(text)}")
        seen += 1
        head, tail = text.split("[Y]")
        asked = "[X]" in head and "{}" not in head
        if asked and inside and tail.strip():
            found.append(re.sub(r"\[X\]", "{}", head).rstrip() + f" {SLOT}{tail}")
        elif asked and not tail.strip(" ."):
            found.append(re.sub(r"\[X\]", "{}", head).rstrip())
    if not found:
        raise InputError(f"{path}: none of {seen} patterns ends in [Y] after [X]; {AT_END}")
    return list(dict.fromkeys(found))


def _bags(content: Content) -> bool:
    first = content.first
    return isinstance(first, list) and bool(first) and isinstance(first[0], list)


FORMATS = (
    Format(
        name="pararel",
        makes="passages",
        about="ParaRel as bags of [sentence with [MASK], answer, relation]; for models that read from left to right "
        "those that end in their slot",
        matches=_bags,
        convert=bag,
        left_out=AT_END,
    ),
    Format(
        name="lama",
        makes="passages",
        about="LAMA: obj_label with masked sentences; for models that read from left to right those that end in their "
        "slot",
        matches=lambda content: (
            content.has("obj_label") and bool(content.keys.intersection({"masked_sentences", "evidences"}))
        ),
        convert=lama,
        left_out=AT_END,
    ),
    Format(
        name="pararel-pairs",
        makes="facts",
        about="ParaRel and LAMA pairs: sub_label, obj_label; needs --patterns FILE of the relation",
        matches=lambda content: (
            content.has("sub_label", "obj_label") and not content.keys.intersection({"masked_sentences", "evidences"})
        ),
        convert=pairs,
        rows=with_patterns,
        noted=ONE_ANSWER,
    ),
)
