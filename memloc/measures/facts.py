"""Fact recall: is the answer given after the prompt, after other phrasings of it, and kept about others?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from memloc.errors import InputError, MismatchError
from memloc.measurement import Figure, Measurement
from memloc.measures.figures import figure
from memloc.measures.record import token_record
from memloc.passages import Fact, Facts, Passage, Passages
from memloc.provenance import Provenance, settings_of
from memloc.statistics import share_interval
from memloc.view import ModelView

Tokens = tuple[int, ...]


class Answer(NamedTuple):
    """How the model takes one answer to one prompt: mean nats per token, and whether every token is the arg-max."""

    nll: float
    exact: bool


@dataclass(frozen=True, kw_only=True)
class FactRecall:
    """CounterFact's figures, all prompts of all facts in one pass.

    success: the new answer is likelier than the true one, per token (for neighbours: their own answer is likelier than
    the new one). accuracy: every token of the new answer is the arg-max, teacher-forced (for neighbours: of their
    own). "true accuracy" and "paraphrase true accuracy" ask the same of the true answer: whether the model knows the
    fact, before an edit, or still gives it, after. "score" is the harmonic mean of the three successes; its interval is
    that of their ends, so rather too wide than too narrow.

    Each fact counts once: its share of paraphrases or neighbours is averaged first. A figure that no fact has prompts
    for is left out. Answers are the tokens that follow the fact's own prompt, a space before them included.

    Rows: id, one value a figure (bool, or a share of the fact's prompts), nll_new, nll_true.

    Attributes:
        batch_size: rows of a forward pass.

    Cost: one forward over every distinct pair of prompt and answer.

    Source: Meng et al. 2022, arXiv:2202.05262 (success, score); Meng et al. 2023, arXiv:2210.07229 (accuracy).
    """

    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size {self.batch_size}: expected at least 1")

    def __call__(self, view: ModelView, facts: Facts) -> Measurement:
        """Measure `facts` on the model.

        Raises:
            InputError: no facts, a token outside the vocabulary, a prompt longer than the context.
            ModelError: logits that are not finite.
        """
        asked = self._ask(view, facts)
        rows = tuple({"id": fact.id, **_judge(fact, asked), **_tags(fact)} for fact in facts)
        provenance = Provenance("facts", settings_of(self), None, {"model": view.digest, "facts": facts.digest})
        return Measurement("facts", _figures(rows), rows, provenance)

    def _ask(self, view: ModelView, facts: Facts) -> dict[tuple[Tokens, Tokens], Answer]:
        """Every distinct (prompt, answer) of `facts`, asked once."""
        names: dict[tuple[Tokens, Tokens], str] = {}
        for fact in facts:
            for index, pair in enumerate(_pairs(fact)):
                names.setdefault(pair, f"{fact.id}, prompt and answer {index}")
        items = tuple(Passage(name, *pair) for pair, name in names.items())
        record = token_record(view, Passages(items, facts.origin), batch_size=self.batch_size, label="facts")
        answers = zip(record.nll().tolist(), record.strict.tolist(), strict=True)
        return {pair: Answer(*answer) for pair, answer in zip(names, answers, strict=True)}


def pooled(parts: Sequence[Measurement], facts: Facts) -> Measurement:
    """One measurement of `facts` from one for each of them, where each fact was measured on a model of its own.

    Args:
        parts: `FactRecall` of one fact each, in the order of `facts`.
        facts: all of them.

    Raises:
        MismatchError: the rows are not those of `facts`, or the parts were measured with different settings.
    """
    rows = tuple(row for part in parts for row in part.rows)
    if tuple(row["id"] for row in rows) != facts.ids or len({str(part.provenance.settings) for part in parts}) > 1:
        raise MismatchError(f"{len(rows)} rows of facts measured one by one do not pool into the {len(facts)} given")
    first = parts[0].provenance
    return Measurement("facts", _figures(rows), rows, replace(first, inputs={"facts": facts.digest}))


def _pairs(fact: Fact) -> Iterator[tuple[Tokens, Tokens]]:
    for prompt in (fact.prompt, *fact.paraphrases):
        yield prompt.ids, fact.target
        yield prompt.ids, fact.target_true
    for neighbor in fact.neighbors:
        yield neighbor.prompt.ids, neighbor.target
        yield neighbor.prompt.ids, fact.target


def _judge(fact: Fact, asked: Mapping[tuple[Tokens, Tokens], Answer]) -> dict[str, Any]:
    new, true = asked[fact.prompt.ids, fact.target], asked[fact.prompt.ids, fact.target_true]
    found: dict[str, Any] = {
        "efficacy success": new.nll < true.nll,
        "efficacy accuracy": new.exact,
        "true accuracy": true.exact,
    }
    if fact.paraphrases:
        pairs = [(asked[p.ids, fact.target], asked[p.ids, fact.target_true]) for p in fact.paraphrases]
        found["paraphrase success"] = _share(new.nll < true.nll for new, true in pairs)
        found["paraphrase accuracy"] = _share(new.exact for new, _ in pairs)
        found["paraphrase true accuracy"] = _share(true.exact for _, true in pairs)
    if fact.neighbors:
        pairs = [(asked[n.prompt.ids, n.target], asked[n.prompt.ids, fact.target]) for n in fact.neighbors]
        found["neighbour success"] = _share(own.nll < new.nll for own, new in pairs)
        found["neighbour accuracy"] = _share(own.exact for own, _ in pairs)
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


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
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


def _share(verdicts: Iterable[bool]) -> float:
    found = list(verdicts)
    return sum(found) / len(found)


def _tags(fact: Fact) -> dict[str, Any]:
    return {key: fact.tags[key] for key in ("relation", "dose") if key in fact.tags}
