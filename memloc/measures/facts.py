"""Fact recall: is the answer given after the prompt, after other phrasings of it, and kept about others?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from memloc.errors import InputError, MismatchError
from memloc.measurement import Measurement
from memloc.measures.recall import recall_figures, recalled
from memloc.passages import Facts
from memloc.provenance import Provenance, settings_of
from memloc.view import ModelView


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

    Rows: id, one value a figure (bool, or a share of the fact's prompts), nll_new, nll_true, and the magnitudes: mean
    P(new) - P(true), for neighbours P(own) - P(new), P being exp(-nll).

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
        rows = recalled(view, facts, batch_size=self.batch_size)
        provenance = Provenance("facts", settings_of(self), None, {"model": view.digest, "facts": facts.digest})
        return Measurement("facts", recall_figures(rows), rows, provenance)


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
    return Measurement("facts", recall_figures(rows), rows, replace(first, inputs={"facts": facts.digest}))
