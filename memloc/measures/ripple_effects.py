"""RippleEdits' figures: does what follows from an edit change, and does what does not follow stay?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from memloc.errors import InputError
from memloc.measurement import Figure, Measurement
from memloc.measures.asking import at_least_one, earlier, mean_share, need_some, predicted, written
from memloc.measures.prose import names
from memloc.passages import Fact, Facts
from memloc.provenance import Provenance, digest_json, settings_of
from memloc.view import ModelView

CRITERIA = (
    "Logical_Generalization", "Compositionality_I", "Compositionality_II", "Subject_Aliasing", "Forgetfulness",
    "Relation_Specificity",
)  # fmt: skip


class Query(NamedTuple):
    """A prompt, and the names of every answer that is right."""

    prompt: str
    answers: tuple[str, ...]


class Test(NamedTuple):
    """One test of a criterion.

    Attributes:
        criterion: one of six.
        queries: what is asked of the edited model.
        all_of: every query must be answered, not any.
        conditions: what the unedited model must answer for the test to be run.
    """

    criterion: str
    queries: tuple[Query, ...]
    all_of: bool
    conditions: tuple[Query, ...]


@dataclass(frozen=True, kw_only=True)
class RippleEffects:
    """Share of an example's tests that the model passes, by criterion.

    A query is answered where the model's own text names one of its answers or aliases.

    A test is run only where the model before the edit answered all of its condition queries, which needs `before`: the
    same measurement of that model. Without it every test is run, and "conditions" says how many could have been.
    "edit": the new answer is the arg-max after the fact's prompt; with `before`, the tests of a fact whose edit did
    not take are not run, as in the paper.

    The benchmark edits one example at a time: measure each on its own edited model, and pool the rows.

    Rows: id, one share a criterion (of the tests that were run), "tests run", "conditions", and "met": which tests'
    conditions held.

    Attributes:
        before: the same measurement, saved, of the model before its edit.
        tokens: written by the model after a prompt.
        batch_size: rows of a forward pass.

    Cost: a forward over each distinct prompt and a step a token written.

    Source: Cohen et al. 2023, arXiv:2307.12976.
    """

    before: str | None = None
    tokens: int = 20
    batch_size: int = 32

    def __post_init__(self) -> None:
        at_least_one("ripple-effects", tokens=self.tokens, batch_size=self.batch_size)

    def __call__(self, view: ModelView, facts: Facts) -> Measurement:
        """Measure the tests of `facts` on the model.

        Raises:
            InputError: facts without tests, no tokenizer, a prompt that does not fit the context.
            MismatchError: `before` is another measure's, or of other facts.
        """
        need_some(facts)
        old = earlier(self.before, "ripple-effects", facts.ids)
        tests = {fact.id: tuple(tests_of(fact)) for fact in facts}
        asked = list(dict.fromkeys(query.prompt for group in tests.values() for query in _queries(group)))
        texts = dict(zip(asked, written(view, asked, self.tokens, batch_size=self.batch_size), strict=True))
        best = predicted(view, [(fact.prompt.ids, fact.target) for fact in facts], batch_size=self.batch_size)
        rows = []
        for fact, said in zip(facts, best, strict=True):
            took = said == fact.target
            rows.append({"id": fact.id, "edit": took, **_judged(tests[fact.id], texts, old.get(fact.id), took)})
        figures: dict[str, Figure] = {}
        for name in ("edit", *map(_name, CRITERIA)):
            figures |= mean_share(name, rows)
        figures |= mean_share("conditions", rows, better="")
        inputs = {
            "model": view.digest, "facts": facts.digest,
            "prompts": digest_json([list(map(list, group)) for group in tests.values()]),
        }  # fmt: skip
        settings = {**settings_of(self), "before": None if self.before is None else "given"}
        return Measurement("ripple-effects", figures, tuple(rows), Provenance("ripple-effects", settings, None, inputs))


def tests_of(fact: Fact) -> Iterator[Test]:
    """The tests a record carries, in order.

    Raises:
        InputError: none, or one that cannot be read.
    """
    groups = fact.tags.get("tests")
    if not isinstance(groups, Mapping):
        raise InputError(f"fact {fact.id!r} carries no 'tests'; ripple-effects needs the records of its benchmark")
    for criterion in CRITERIA:
        for index, test in enumerate(groups.get(criterion) or ()):
            try:
                asked = tuple(map(_query, test["test_queries"]))
                conditions = tuple(map(_query, test.get("condition_queries") or ()))
                all_of = str(test.get("test_condition", "OR")).upper() == "AND"
            except (KeyError, TypeError, AttributeError) as error:
                raise InputError(f"fact {fact.id!r}: test {index} of {criterion} cannot be read ({error})") from error
            if asked:
                yield Test(criterion, asked, all_of, conditions)


def _query(record: Mapping[str, Any]) -> Query:
    found = [name for answer in record["answers"] for name in (answer["value"], *(answer.get("aliases") or ()))]
    return Query(str(record["prompt"]), tuple(str(name) for name in found))


def _queries(tests: Sequence[Test]) -> Iterator[Query]:
    for test in tests:
        yield from test.queries
        yield from test.conditions


def _judged(
    tests: Sequence[Test], texts: Mapping[str, str], old: Mapping[str, Any] | None, took: bool
) -> dict[str, Any]:
    met = [all(names(texts[query.prompt], query.answers) for query in test.conditions) for test in tests]
    # With the unedited model's answers at hand, its conditions decide, and an edit that did not take tests nothing.
    runs = [took and bool(held) for held in old["met"]] if old is not None else [True] * len(tests)
    groups: dict[str, list[bool]] = {}
    for test, run in zip(tests, runs, strict=True):
        if run:
            answered = [names(texts[query.prompt], query.answers) for query in test.queries]
            groups.setdefault(_name(test.criterion), []).append(all(answered) if test.all_of else any(answered))
    shares = {name: sum(passed) / len(passed) for name, passed in groups.items()}
    held = {"conditions": sum(met) / len(met)} if met else {}
    return {**shares, **held, "tests run": sum(runs), "met": met}


def _name(criterion: str) -> str:
    return criterion.replace("_", " ").lower()
