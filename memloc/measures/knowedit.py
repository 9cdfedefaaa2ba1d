"""KnowEdit's figures: success, locality against the model before its edit, portability, fluency; protocol tagged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from memloc.measurement import Figure, Measurement
from memloc.measures.asking import (
    at_least_one,
    earlier,
    mean_share,
    need_some,
    pair,
    predicted,
    token_share,
    written,
)
from memloc.measures.figures import figure
from memloc.measures.prose import names, ngram_entropy
from memloc.passages import Fact, Facts
from memloc.provenance import Provenance, digest_json, settings_of
from memloc.statistics import bootstrap_interval
from memloc.view import ModelView


class Ask(NamedTuple):
    """One prompt of a record: which figure it counts for, and the answers that are right (the first is forced)."""

    part: str
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class KnowEdit:
    """Success of the edit, of its rephrasing and of what follows from it, and what stayed as it was elsewhere.

    "rewrite" and "rephrase": the new answer to the prompt and to its rephrasings. "portability …": the answers of the
    record's portability prompts, a figure a kind and their mean. "locality …": on the record's locality prompts, how
    far the model says what it said before the edit (not what is true), which needs `before`.

    protocol "teacher-forced": the share of answer tokens that are the arg-max with the true tokens before them; for
    locality, the share that is the same as before. "generated": whether the model's own greedy text of `tokens`
    tokens names one of the answers; for locality, whether it is the same text. The two do not compare, and the first
    flatters: the protocol is part of the settings a comparison checks.

    Rows: id, one share a figure, and "said": what is compared with after an edit.

    Attributes:
        protocol: "teacher-forced" or "generated".
        before: the same measurement, saved, of the model before its edit.
        tokens: written by the model after a prompt, for "generated" and for fluency.
        fluency: whether the entropy of n-grams (bits) of text after the fact's prompt is measured.
        batch_size: rows of a forward pass.

    Cost: one forward over every distinct prompt and answer; "generated", or fluency: a step a token written.

    Source: Zhang et al. 2024, arXiv:2401.01286, as its code counts.
    """

    protocol: Literal["teacher-forced", "generated"] = "teacher-forced"
    before: str | None = None
    tokens: int = 30
    fluency: bool = True
    batch_size: int = 32

    def __post_init__(self) -> None:
        at_least_one("knowedit", tokens=self.tokens, batch_size=self.batch_size)

    def __call__(self, view: ModelView, facts: Facts) -> Measurement:
        """Measure `facts` on the model.

        Raises:
            InputError: a model without a tokenizer, a fact that does not fit.
            MismatchError: `before` is another measure's, or of other facts.
            ModelError: logits that are not finite.
        """
        need_some(facts)
        old = earlier(self.before, "knowedit", facts.ids)
        asked = {fact.id: asks(fact) for fact in facts}
        said = self._said(view, [ask for asks_ in asked.values() for ask in asks_])
        prompts = [fact.prompt.text for fact in facts] if self.fluency else []
        texts = written(view, prompts, self.tokens, batch_size=self.batch_size)
        rows = []
        for index, (name, parts) in enumerate(asked.items()):
            shares = self._shares(parts, said, old.get(name))
            free = {"fluency": ngram_entropy(texts[index])} if self.fluency else {}
            rows.append({"id": name, **shares, **free, "said": [list(said[ask][0]) for ask in parts]})
        inputs = {
            "model": view.digest, "facts": facts.digest,
            "prompts": digest_json([list(map(list, part)) for part in asked.values()]),
        }  # fmt: skip
        settings = {**settings_of(self), "before": None if self.before is None else "given"}
        return Measurement("knowedit", _figures(rows), tuple(rows), Provenance("knowedit", settings, None, inputs))

    def _said(self, view: ModelView, asked: Sequence[Ask]) -> dict[Ask, tuple[Sequence[Any], float]]:
        """What the model says to each, and how right that is."""
        if self.protocol == "generated":
            texts = written(view, [ask.prompt for ask in asked], self.tokens, batch_size=self.batch_size)
            return {ask: ([text], float(names(text, ask.answers))) for ask, text in zip(asked, texts, strict=True)}
        pairs = [pair(view.tokenizer, ask.prompt, ask.answers[0]) for ask in asked]
        best = predicted(view, pairs, batch_size=self.batch_size)
        return {
            ask: (tokens, token_share(tokens, wanted))
            for ask, tokens, (_, wanted) in zip(asked, best, pairs, strict=True)
        }

    def _shares(
        self, parts: Sequence[Ask], said: Mapping[Ask, tuple[Sequence[Any], float]], old: Mapping[str, Any] | None
    ) -> dict[str, float]:
        groups: dict[str, list[float]] = {}
        for index, ask in enumerate(parts):
            tokens, right = said[ask]
            if not ask.part.startswith("locality"):
                groups.setdefault(ask.part, []).append(right)
            elif old is not None:
                groups.setdefault(ask.part, []).append(token_share(tuple(tokens), tuple(old["said"][index])))
        found = {name: sum(values) / len(values) for name, values in groups.items()}
        for whole in ("locality", "portability"):
            kinds = [value for name, value in found.items() if name.startswith(f"{whole} ")]
            if kinds:
                found[whole] = sum(kinds) / len(kinds)
        return found


def asks(fact: Fact) -> tuple[Ask, ...]:
    """Every prompt of a record: of the fact itself, and of its tags "portability" and "locality"."""
    found = [Ask("rewrite", fact.prompt.text, (fact.target_text,))]
    found += [Ask("rephrase", prompt.text, (fact.target_text,)) for prompt in fact.paraphrases]
    for whole in ("portability", "locality"):
        groups = fact.tags.get(whole)
        for kind, entries in groups.items() if isinstance(groups, Mapping) else ():
            found += [
                Ask(f"{whole} {kind.replace('_', ' ').lower()}", str(entry["prompt"]), answers)
                for entry in (entries if isinstance(entries, list) else [entries])
                if isinstance(entry, Mapping) and entry.get("prompt")
                if (answers := tuple(_texts(entry.get("ground_truth"))))
            ]
    return tuple(found)


def _texts(value: Any) -> list[str]:
    if isinstance(value, list):
        return [text for part in value for text in _texts(part)]
    return [value] if isinstance(value, str) and value.strip() else []


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    parts = list(dict.fromkeys(name for row in rows for name in row if name not in ("id", "said", "fluency")))
    order = ("rewrite", "rephrase", "portability", "locality")
    found: dict[str, Figure] = {}
    for name in sorted(parts, key=lambda name: (order.index(name.split()[0]), name)):
        found |= mean_share(name, rows)
    bits = [float(row["fluency"]) for row in rows if "fluency" in row]
    if bits:
        found["fluency"] = figure(
            "fluency", sum(bits) / len(bits), len(bits), bootstrap_interval(bits), "bits", "higher"
        )
    return found
