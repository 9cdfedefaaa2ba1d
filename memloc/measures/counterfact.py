"""CounterFact's figures as its papers define them: success, magnitude, accuracy, and what free text is like."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memloc.errors import InputError
from memloc.measurement import Figure, Measurement
from memloc.measures.asking import at_least_one
from memloc.measures.figures import figure
from memloc.measures.prose import inverse_frequencies, ngram_entropy, similarity
from memloc.measures.recall import recall_figures, recalled
from memloc.passages import Fact, Facts, decode, encode
from memloc.progress import steps
from memloc.provenance import Provenance, digest_bytes, settings_of
from memloc.running.decoding import continuation
from memloc.statistics import bootstrap_interval
from memloc.view import ModelView

MAGNITUDES = ("efficacy magnitude", "paraphrase magnitude", "neighbour magnitude")


@dataclass(frozen=True, kw_only=True)
class CounterFact:
    """`facts` and what the papers print beside it: magnitudes, and what free text about the subject is like.

    magnitude: mean P(new) - P(true), for neighbours P(own) - P(new), P being exp(-mean nats per answer token).
    fluency: weighted entropy of word n-grams (bits; papers print it times 100) of texts sampled after each of a fact's
    generation prompts (its own prompt, where the record brings none). consistency: cosine of the TF-IDF vectors of all
    these texts together and of the reference texts about the new answer, where `snippets` names them.

    Rows: those of `facts`, with the magnitudes, "fluency" and "consistency".

    Attributes:
        generate: sample texts; without, fluency and consistency are left out.
        tokens: of a text, its prompt included, within the context.
        top_k: each token is drawn from the k likeliest.
        seed: of the texts; each prompt has a generator of its own.
        snippets: attribute_snippets.json: a list of {relation_id, target_id, samples: [{text}]}.
        batch_size: rows of a forward pass.

    Cost: that of `facts`, and one step a token of generated text.

    Source: Meng et al. 2022, arXiv:2202.05262. Words are split by a regular expression, and word frequencies come from
    the snippets, so both figures are near to the papers' and not equal.
    """

    generate: bool = True
    tokens: int = 100
    top_k: int = 5
    seed: int = 0
    snippets: str | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        at_least_one("counterfact", tokens=self.tokens, top_k=self.top_k, batch_size=self.batch_size)

    def __call__(self, view: ModelView, facts: Facts) -> Measurement:
        """Measure `facts` on the model.

        Raises:
            InputError: no facts, one that does not fit, text asked of a model without a tokenizer, no such snippets.
            ModelError: logits that are not finite.
        """
        base = recalled(view, facts, batch_size=self.batch_size)
        references = _references(self.snippets)
        weights = inverse_frequencies([" ".join(texts) for texts in references.values()])
        rows = []
        for fact, row in zip(steps(facts, "texts") if self.generate else facts, base, strict=True):
            more: dict[str, Any] = {}
            if self.generate:
                texts = [self._text(view, prompt) for prompt in _prompts(fact)]
                more["fluency"] = sum(map(ngram_entropy, texts)) / len(texts)
                known = references.get((str(fact.tags.get("relation")), str(fact.tags.get("target_new_id"))))
                if known:
                    more["consistency"] = similarity(" ".join(texts), " ".join(known), weights)
            rows.append({**row, **more})
        figures = {**recall_figures(rows), **_figures(rows)}
        inputs = {"model": view.digest, "facts": facts.digest, "prompts": _digest(facts, self.snippets)}
        return Measurement(
            "counterfact", figures, tuple(rows), Provenance("counterfact", settings_of(self), self.seed, inputs)
        )

    def _text(self, view: ModelView, prompt: str) -> str:
        ids = encode(view.tokenizer, prompt).ids
        length = min(self.tokens, view.context or self.tokens) - len(ids)
        if length < 1:
            raise InputError(f"the generation prompt {prompt!r} has {len(ids)} tokens, which leaves none to write")
        seed = int(digest_bytes(str(self.seed).encode(), prompt.encode())[:15], 16)
        generator = torch.Generator(view.device).manual_seed(seed)
        start = torch.tensor([ids], device=view.device)
        made = continuation(view, start, length, temperature=1.0, top_k=self.top_k, generator=generator)
        return decode(view.tokenizer, made.ids[0].tolist())


def _prompts(fact: Fact) -> list[str]:
    given = fact.tags.get("generation_prompts")
    found = [text for text in given if isinstance(text, str) and text] if isinstance(given, list) else []
    return found or [fact.prompt.text]


def _references(path: str | None) -> dict[tuple[str, str], list[str]]:
    if path is None:
        return {}
    try:
        entries = json.loads(Path(path).read_text(encoding="utf8"))
        return {
            (str(entry["relation_id"]), str(entry["target_id"])): [str(sample["text"]) for sample in entry["samples"]]
            for entry in entries
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a list of {{relation_id, target_id, samples: [{{text}}]}} ({error})") from error


def _digest(facts: Facts, snippets: str | None) -> str:
    asked = [_prompts(fact) for fact in facts]
    held = b"" if snippets is None else Path(snippets).read_bytes()
    return digest_bytes(json.dumps(asked, ensure_ascii=False).encode(), held)


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    found = {}
    units = {**dict.fromkeys(MAGNITUDES, "probability"), "fluency": "bits", "consistency": "cosine"}
    for name, unit in units.items():
        values = [float(row[name]) for row in rows if name in row]
        if values:
            found[name] = figure(
                name, math.fsum(values) / len(values), len(values), bootstrap_interval(values), unit, "higher"
            )
    return found
