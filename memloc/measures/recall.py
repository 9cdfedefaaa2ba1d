"""How the model answers facts' prompts: one pass over every distinct pair of prompt and answer, judged fact by fact."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from memloc.measurement import Figure
from memloc.measures.figures import figure
from memloc.measures.record import token_record
from memloc.passages import Fact, Facts, Passage, Passages, Prompt
from memloc.statistics import share_interval
from memloc.view import ModelView

Tokens = tuple[int, ...]
Asked = tuple[Tokens, Tokens, Tokens]
"""A prompt's tokens, those behind the answer, and the answer's."""


class Answer(NamedTuple):
    """How the model takes one answer to one prompt: mean nats per token, and whether every token is the arg-max."""

    nll: float
    exact: bool

    @property
    def chance(self) -> float:
        """exp(-nll): the geometric mean of its tokens' probabilities."""
        return math.exp(-self.nll)


def recalled(view: ModelView, facts: Facts, *, batch_size: int) -> tuple[dict[str, Any], ...]:
    """A row a fact: id, one value a figure (bool, or a share of its prompts), nll_new, nll_true, magnitudes, tags.

    Raises:
        InputError: no facts, a token outside the vocabulary, a prompt longer than the context.
        ModelError: logits that are not finite.
    """
    asked = _ask(view, facts, batch_size)
    return tuple({"id": fact.id, **_judge(fact, asked), **_tags(fact)} for fact in facts)


def _ask(view: ModelView, facts: Facts, batch_size: int) -> dict[Asked, Answer]:
    """Every distinct (prompt, answer) of `facts`, asked once."""
    names: dict[Asked, str] = {}
    for fact in facts:
        for index, pair in enumerate(_pairs(fact)):
            names.setdefault(pair, f"{fact.id}, prompt and answer {index}")
    items = tuple(Passage(name, ids, answer, after=after) for (ids, after, answer), name in names.items())
    record = token_record(view, Passages(items, facts.origin), batch_size=batch_size, label="facts")
    answers = zip(record.nll().tolist(), record.strict.tolist(), strict=True)
    return {pair: Answer(*answer) for pair, answer in zip(names, answers, strict=True)}


def _pair(prompt: Prompt, answer: Tokens) -> Asked:
    return prompt.ids, prompt.after, answer


def _pairs(fact: Fact) -> Iterator[Asked]:
    for prompt in (fact.prompt, *fact.paraphrases):
        yield _pair(prompt, fact.target)
        yield _pair(prompt, fact.target_true)
    for neighbor in fact.neighbors:
        yield _pair(neighbor.prompt, neighbor.target)
        yield _pair(neighbor.prompt, fact.target)


def _judge(fact: Fact, asked: Mapping[Asked, Answer]) -> dict[str, Any]:
    new, true = asked[_pair(fact.prompt, fact.target)], asked[_pair(fact.prompt, fact.target_true)]
    found: dict[str, Any] = {
        "efficacy success": new.nll < true.nll,
        "efficacy accuracy": new.exact,
        "true accuracy": true.exact,
        "efficacy magnitude": new.chance - true.chance,
    }
    if fact.paraphrases:
        pairs = [(asked[_pair(p, fact.target)], asked[_pair(p, fact.target_true)]) for p in fact.paraphrases]
        found["paraphrase success"] = _share(new.nll < true.nll for new, true in pairs)
        found["paraphrase accuracy"] = _share(new.exact for new, _ in pairs)
        found["paraphrase true accuracy"] = _share(true.exact for _, true in pairs)
        found["paraphrase magnitude"] = _share(new.chance - true.chance for new, true in pairs)
    if fact.neighbors:
        pairs = [(asked[_pair(n.prompt, n.target)], asked[_pair(n.prompt, fact.target)]) for n in fact.neighbors]
        found["neighbour success"] = _share(own.nll < new.nll for own, new in pairs)
        found["neighbour accuracy"] = _share(own.exact for own, _ in pairs)
        found["neighbour magnitude"] = _share(own.chance - new.chance for own, new in pairs)
    return {**found, "nll_new": new.nll, "nll_true": true.nll}


NAMES = (
    "efficacy success",
    "efficacy accuracy",
    "paraphrase success",
    "paraphrase accuracy",
    "neighbour success",
    "neighbour accuracy",
    "true accuracy",
    "paraphrase true accuracy",
)
SUCCESSES = ("efficacy success", "paraphrase success", "neighbour success")


def recall_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """The means of the rows' shares, and "score": the harmonic mean of the three successes."""
    found: dict[str, Figure] = {}
    for name in NAMES:
        shares = [float(row[name]) for row in rows if name in row]
        if shares:
            better = "" if "true" in name else "higher"
            mean = sum(shares) / len(shares)
            found[name] = figure(name, mean, len(shares), share_interval(shares), "share", better)
    parts = [found[name] for name in SUCCESSES if name in found]
    if len(parts) == len(SUCCESSES):
        ends = (_harmonic(part.low or 0.0 for part in parts), _harmonic(part.high or 0.0 for part in parts))
        n = min(part.n for part in parts)
        found["score"] = figure("score", _harmonic(part.value for part in parts), n, ends, "share", "higher")
    return found


def _harmonic(shares: Iterable[float]) -> float:
    found = list(shares)
    return len(found) / sum(1 / share for share in found) if all(found) else 0.0


def _share(verdicts: Iterable[float]) -> float:
    found = list(verdicts)
    return sum(found) / len(found)


def _tags(fact: Fact) -> dict[str, Any]:
    return {key: fact.tags[key] for key in ("relation", "dose") if key in fact.tags}
