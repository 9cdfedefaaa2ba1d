"""zsRE's figures: token by token, teacher-forced, against the answers of the record's convention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memloc.errors import InputError
from memloc.measurement import Figure, Measurement
from memloc.measures.asking import at_least_one, mean_share, need_some, predicted, token_share
from memloc.measures.figures import figure
from memloc.passages import Fact, Facts
from memloc.provenance import Provenance, settings_of
from memloc.view import ModelView

PARTS = ("efficacy", "paraphrase", "specificity")
OWN = "not said by the record"


@dataclass(frozen=True, kw_only=True)
class Zsre:
    """Share of answer tokens that are the arg-max, with the true tokens before them.

    Of the new answer after the prompt ("efficacy") and after its paraphrases, and of a neighbour's own answer after it
    ("specificity").

    "score" is the harmonic mean of the three. "… exact": whole answers instead of tokens. Every token counts, where
    published code compares first sub-tokens only, and where a start token would be compared with itself.

    Two conventions are in use, and their numbers do not compare: the wanted answer is `alt` (a counterfactual), or
    `answers[0]` (a correction). The readers tag records with theirs ("zsre-convention"); it goes into the rows and
    the provenance, and sets that mix both are refused.

    Rows: id, one share a figure, "convention".

    Attributes:
        batch_size: rows of a forward pass.

    Cost: one forward over every distinct pair of prompt and answer.

    Source: Meng et al. 2022, arXiv:2202.05262, after Mitchell et al. 2022, arXiv:2110.11309.
    """

    batch_size: int = 32

    def __post_init__(self) -> None:
        at_least_one("zsre", batch_size=self.batch_size)

    def __call__(self, view: ModelView, facts: Facts) -> Measurement:
        """Measure `facts` on the model.

        Raises:
            InputError: no facts, facts of both conventions, or one that does not fit the model.
            ModelError: logits that are not finite.
        """
        need_some(facts)
        conventions = sorted({str(fact.tags.get("zsre-convention", OWN)) for fact in facts})
        if len(conventions) > 1:
            raise InputError(f"zsre: facts of two conventions ({'; '.join(conventions)}); measure them one by one")
        asked = {fact.id: _asked(fact) for fact in facts}
        pairs = [pair for groups in asked.values() for group in groups.values() for pair in group]
        best = dict(zip(pairs, predicted(view, pairs, batch_size=self.batch_size), strict=True))
        rows = tuple(
            {"id": name, **_judged(groups, best), "convention": conventions[0]} for name, groups in asked.items()
        )
        settings = {**settings_of(self), "convention": conventions[0]}
        inputs = {"model": view.digest, "facts": facts.digest}
        return Measurement("zsre", _figures(rows), rows, Provenance("zsre", settings, None, inputs))


Pairs = list[tuple[tuple[int, ...], tuple[int, ...]]]


def _asked(fact: Fact) -> dict[str, Pairs]:
    return {
        "efficacy": [(fact.prompt.ids, fact.target)],
        "paraphrase": [(prompt.ids, fact.target) for prompt in fact.paraphrases],
        "specificity": [(neighbor.prompt.ids, neighbor.target) for neighbor in fact.neighbors],
    }


def _judged(groups: Mapping[str, Pairs], best: Mapping[Any, tuple[int, ...]]) -> dict[str, float]:
    found = {}
    for name, pairs in groups.items():
        if pairs:
            shares = [token_share(best[pair], pair[1]) for pair in pairs]
            found[name] = _mean(shares)
            found[f"{name} exact"] = _mean(share == 1 for share in shares)
    return found


def _mean(values: Iterable[float]) -> float:
    found = [float(value) for value in values]
    return sum(found) / len(found)


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    for name in (*PARTS, *(f"{part} exact" for part in PARTS)):
        found |= mean_share(name, rows)
    parts = [found[name] for name in PARTS if name in found]
    if len(parts) == len(PARTS):
        values = [part.value for part in parts]
        harmonic = len(values) / sum(1 / value for value in values) if all(values) else 0.0
        found["score"] = figure("score", harmonic, min(part.n for part in parts), None, "share", "higher")
    return found
