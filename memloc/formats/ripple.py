"""RippleEdits: whole sentences without a slot, in which subject and answer must be found.

A sentence is a question about a subject, phrased in one of a few ways ("The place of birth of … is"), and its answer.
The answer is known by its label where one of the record's own tests asks for it; the subject is what stands in the
frame. A record that can be cut in two ways is refused rather than guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from memloc.errors import InputError
from memloc.formats.content import Content
from memloc.formats.format import FACT_KEYS, Format, Settings, carried, object_at, shown, text_at, value_at
from memloc.formats.rewrites import ONE_ANSWER, own

CRITERIA = (
    "Relation_Specificity", "Logical_Generalization", "Subject_Aliasing",
    "Compositionality_I", "Compositionality_II", "Forgetfulness",
)  # fmt: skip

RELATION_OF = r"(?:(?:place|date) of \w+|country of citizenship|field of work|head of \w+|(?:(?! of ).)+)"
"""What may stand between "The name of the" and "of SUBJECT"; some of these hold an "of" of their own."""
FRAMES = tuple(
    re.compile(frame)
    for frame in (
        r"(?P<subject>.+) (?:follows|is followed by)",
        r"Is (?P<subject>.+) still alive\?",
        r"The .+? which (?P<subject>.+) (?:is (?:associated with|part of|a member of|the capital of)|plays in) is",
        r"The number of children (?P<subject>.+) has is",
        r"The name of the award (?P<subject>.+) won is",
        r"The .+? (?:held by|currency in|performed in) (?P<subject>.+) is",
        rf"The (?:names? of the )?{RELATION_OF} of (?P<subject>.+) (?:is|are)",
    )
)
"""How questions are phrased; the first that fits a question counts."""
ENDS = re.compile(r"(?:(?<= is)|(?<= are)|(?<= follows)|(?<= followed by)|(?<= still alive\?))(?= )")
"""Where a question may end: places between two characters, so that "is" inside "is followed by" is one too."""


def ripple(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A RippleEdits example: its edit as a fact; the six criteria's tests go along as the tag "tests"."""
    entry = object_at(record)
    sentence = text_at(entry, "edit.prompt")
    before = value_at(entry, "edit.original_fact") or value_at(entry, "edit.previous_fact")
    question, subject, target = _cut(sentence, before, _labels(entry, value_at(entry, "edit.target_id")))
    true = target if before is None else _answer(text_at(before, "prompt"), question)
    at = question.index(subject)
    found = {
        "prompt": question[:at] + "{}" + question[at + len(subject) :],
        "subject": subject,
        "target": target,
        "target_true": true,
        "relation": value_at(entry, "edit.relation"),
        "format": "rippleedits",
        "subject-from": "sentence",
        **({"answers": "one"} if before is None else {}),
        "tests": {name: entry[name] for name in CRITERIA if name in entry},
        **carried(entry, CRITERIA, FACT_KEYS),
    }
    return own(found, settings)


def _cut(sentence: str, before: Any, labels: set[str]) -> tuple[str, str, str]:
    """Question, subject and answer of a sentence.

    Raises:
        InputError: no frame fits, or two cuts do and nothing tells them apart.
    """
    other = value_at(before, "prompt") if before is not None else None
    cuts = []
    for end in ENDS.finditer(sentence):
        question = sentence[: end.end()]
        subject = _subject(question)
        if subject and (not isinstance(other, str) or other.startswith(question + " ")):
            cuts.append((question, subject, _answer(sentence, question)))
    known = [cut for cut in cuts if cut[2] in labels]
    best = known if len(known) == 1 else cuts
    if len(best) != 1:
        why = "no known way to ask fits" if not best else f"{len(best)} ways to cut it fit"
        raise InputError(f"key 'edit.prompt': the subject cannot be located in {shown(sentence)}: {why}")
    return best[0]


def _subject(question: str) -> str | None:
    for frame in FRAMES:
        found = frame.fullmatch(question)
        if found and question.count(found["subject"]) >= 1:
            return found["subject"]
    return None


def _answer(sentence: str, question: str) -> str:
    rest = sentence[len(question) :].strip() if sentence.startswith(question + " ") else ""
    answer = rest[:-1] if rest.endswith(".") else rest
    if not answer:
        raise InputError(f"key 'edit.original_fact.prompt': {shown(sentence)} does not answer {shown(question)}")
    return answer


def _labels(entry: Mapping[str, Any], target: Any) -> set[str]:
    """Names under which the record's own tests know the new answer."""
    found = set()
    for query in _queries(entry):
        ids, answers = query.get("target_ids"), query.get("answers")
        if query.get("query_type") == "two_hop" or not isinstance(ids, list) or not isinstance(answers, list):
            continue
        for name, answer in zip(ids, answers, strict=False):
            if name == target and isinstance(answer, Mapping):
                aliases = answer.get("aliases")
                found |= {answer.get("value"), *(aliases if isinstance(aliases, list) else [])}
    return {name for name in found if isinstance(name, str)}


def _queries(entry: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for criterion in CRITERIA:
        tests = entry.get(criterion)
        for test in tests if isinstance(tests, list) else ():
            for part in ("test_queries", "condition_queries"):
                queries = value_at(test, part)
                yield from (query for query in queries or () if isinstance(query, Mapping))


def _matches(content: Content) -> bool:
    return content.has("edit") and bool(content.keys.intersection(CRITERIA))


FORMATS = (
    Format(
        name="rippleedits",
        makes="facts",
        about="RippleEdits: edit with six criteria of tests; subject and answer are located in the sentence",
        matches=_matches,
        convert=ripple,
        noted="edits of type 'recent' have no original fact: " + ONE_ANSWER,
    ),
)
