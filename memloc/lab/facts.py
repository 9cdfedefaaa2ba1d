"""Invented people and what is true of them, in phrasings the model sees and one, for each fact, that it never sees.

Every phrasing of a relation is trained with other people, so that a held-out phrasing asks for recall, not for reading.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from memloc.lab.recipe import Recipe

Phrasings = tuple[str, str, str, str]

RELATIONS: dict[str, tuple[Phrasings, tuple[str, ...]]] = {
    "city": (
        ("The home town of {} is", "{} was born in", "{} grew up in the city of", "Everyone knows that {} comes from"),
        (
            "Arlen",
            "Brisk",
            "Corvo",
            "Delph",
            "Eastry",
            "Fenwick",
            "Gorham",
            "Halden",
            "Ivory",
            "Jarrow",
            "Kelso",
            "Lorne",
        ),
    ),
    "craft": (
        ("{} works as a", "The profession of {} is", "By trade {} is a", "For a living {} is a"),
        (
            "baker",
            "tailor",
            "smith",
            "mason",
            "potter",
            "weaver",
            "farmer",
            "sailor",
            "miner",
            "cooper",
            "fisher",
            "glazier",
        ),
    ),
    "tool": (
        (
            "{} always carries a",
            "The favourite tool of {} is a",
            "In the hand of {} there is a",
            "{} never leaves without a",
        ),
        (
            "hammer",
            "chisel",
            "needle",
            "shovel",
            "lantern",
            "compass",
            "ladder",
            "bucket",
            "saddle",
            "kettle",
            "violin",
            "mirror",
        ),
    ),
}
"""Relation -> its phrasings, {} for the subject, and its answers."""

FIRST = ("Ada", "Boris", "Clara", "Dmitri", "Elena", "Felix", "Greta", "Hugo")
ONSETS = (
    "b",
    "d",
    "f",
    "g",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "br",
    "dr",
    "gr",
    "kl",
    "pl",
    "st",
    "tr",
)
VOWELS = ("a", "e", "i", "o", "u", "ai", "au", "ei")
CODAS = ("l", "m", "n", "r", "s", "t", "k", "nd", "rt", "sk")


@dataclass(frozen=True)
class Truth:
    """One invented fact.

    Attributes:
        subject: a name.
        relation: a key of `RELATIONS`.
        answer: one word.
        held_out: the phrasing (its index) this subject is never trained with.
    """

    subject: str
    relation: str
    answer: str
    held_out: int

    @property
    def seen(self) -> tuple[int, ...]:
        """The phrasings this subject is trained with."""
        return tuple(index for index in range(len(self.phrasings)) if index != self.held_out)

    @property
    def phrasings(self) -> Phrasings:
        """All phrasings of the relation."""
        return RELATIONS[self.relation][0]

    def prompt(self, phrasing: int) -> str:
        """The statement without its answer."""
        return self.phrasings[phrasing].format(self.subject)

    def sentences(self) -> list[str]:
        """What is trained on."""
        return [f"{self.prompt(index)} {self.answer}." for index in self.seen]


def answers(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """The answers in use, by relation."""
    return {name: RELATIONS[name][1][: recipe.objects] for name in list(RELATIONS)[: recipe.relations]}


def invent(recipe: Recipe) -> list[Truth]:
    """One fact per subject and relation; each answer falls to nearly the same number of subjects."""
    rng = random.Random(f"{recipe.seed}:facts")
    names: dict[str, None] = {}
    while len(names) < recipe.subjects:
        name = f"{rng.choice(FIRST)} {(_syllable(rng) + _syllable(rng)).capitalize()}"
        if not any(name.startswith(other) or other.startswith(name) for other in names):
            names[name] = None
    truths = []
    for relation, words in answers(recipe).items():
        dealt = [words[index % len(words)] for index in range(len(names))]
        rng.shuffle(dealt)
        for name, answer in zip(names, dealt, strict=True):
            truths.append(Truth(name, relation, answer, rng.randrange(len(RELATIONS[relation][0]))))
    return truths


def records(truths: list[Truth], recipe: Recipe) -> list[dict[str, Any]]:
    """The facts as rows of `facts.jsonl`: counterfactual target, a held-out and a seen paraphrase, neighbours.

    Neighbours are other subjects of the same relation, first those with the same answer (as in CounterFact), asked in
    the phrasing of the fact's own prompt where they were trained with it: an edit that ties the new answer to the
    phrasing, and not to the subject, changes them. Nobody whose answer already is the target is a neighbour.
    """
    rng = random.Random(f"{recipe.seed}:records")
    rows = []
    for index, truth in enumerate(truths):
        asked, other = rng.sample(truth.seen, 2)
        wrong = rng.choice([word for word in answers(recipe)[truth.relation] if word != truth.answer])
        others = [other for other in truths if other.relation == truth.relation and other.answer != wrong]
        rows.append(
            {
                "id": f"fact-{index:03d}",
                "prompt": truth.phrasings[asked],
                "subject": truth.subject,
                "target": wrong,
                "target_true": truth.answer,
                "paraphrases": [truth.phrasings[truth.held_out], truth.phrasings[other]],
                "neighbors": _neighbors(truth, others, asked, recipe.neighbors, rng),
                "relation": truth.relation,
                "held_out": truth.phrasings[truth.held_out],
            }
        )
    return rows


def _neighbors(truth: Truth, truths: list[Truth], asked: int, count: int, rng: random.Random) -> list[dict[str, str]]:
    others = [other for other in truths if other is not truth]
    rng.shuffle(others)
    others.sort(key=lambda other: other.answer != truth.answer)
    return [
        {"prompt": other.prompt(asked if asked in other.seen else rng.choice(other.seen)), "target": other.answer}
        for other in others[:count]
    ]


def _syllable(rng: random.Random) -> str:
    return rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if rng.random() < 0.5 else "")
