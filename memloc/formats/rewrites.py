"""Facts with an answer to replace: CounterFact, zsRE, KnowEdit, MQuAKE, and memloc's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memloc.errors import InputError
from memloc.formats.content import Content
from memloc.formats.format import FACT_KEYS, Format, Settings, carried, object_at, shown, text_at, texts_at, value_at

ONE_ANSWER = "only one answer is known, so target repeats target_true: for localizing and recall, not for editing"


def own(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A fact as memloc writes it."""
    entry = object_at(record)
    template, subject = text_at(entry, "prompt"), text_at(entry, "subject")
    if template.count("{}") != 1 and subject not in template:
        raise InputError(f"key 'subject': {shown(subject)} is not in the prompt {shown(template)}, nor one {{}} there")
    for key in ("target", "target_true"):
        text_at(entry, key)
    texts_at(entry, "paraphrases")
    neighbors = entry.get("neighbors", [])
    if not isinstance(neighbors, list):
        raise InputError(f"key 'neighbors': expected a list, found {shown(neighbors)}")
    for neighbor in neighbors:
        for text in [neighbor] if isinstance(neighbor, str) else [text_at(neighbor, "prompt")]:
            if "{}" in text:
                raise InputError(f"key 'neighbors': {shown(text)} holds {{}}; write its own subject out")
        if not isinstance(neighbor, str):
            text_at(neighbor, "target")
    return [dict(entry)]


def counterfact(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A CounterFact case: the requested rewrite, its paraphrases, its neighbourhood (whose answer is the true one)."""
    entry = object_at(record)
    rewrite = _rewrite(value_at(entry, "requested_rewrite"), "requested_rewrite")
    found = {
        "id": str(entry.get("case_id", "")),
        **rewrite,
        "paraphrases": texts_at(entry, "paraphrase_prompts"),
        "neighbors": texts_at(entry, "neighborhood_prompts"),
        "format": "counterfact",
        **carried(entry, ("case_id", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"), FACT_KEYS),
    }
    return own(found, settings)


def mquake(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A MQuAKE case: one fact a rewrite, called CASE-0, CASE-1, …; the multi-hop questions go along as tags."""
    entry = object_at(record)
    rewrites = value_at(entry, "requested_rewrite")
    if not isinstance(rewrites, list) or not rewrites:
        raise InputError(f"key 'requested_rewrite': expected a list of rewrites, found {shown(rewrites)}")
    case = str(entry.get("case_id", ""))
    rest = carried(entry, ("case_id", "requested_rewrite"), FACT_KEYS)
    found = []
    for index, rewrite in enumerate(rewrites):
        path = f"requested_rewrite[{index}]"
        fact = _rewrite(rewrite, path)
        question = rewrite.get("question")
        paraphrases = [question] if isinstance(question, str) and question else []
        named = {"id": f"{case}-{index}", "case": case} if case else {}
        whole = {**named, **fact, "paraphrases": paraphrases, "format": "mquake", **rest}
        found += own(whole, settings)
    return found


def _rewrite(rewrite: Any, path: str) -> dict[str, Any]:
    if not isinstance(rewrite, Mapping):
        raise InputError(f"key {path!r}: expected an object, found {shown(rewrite)}")
    template, subject = text_at(rewrite, "prompt"), text_at(rewrite, "subject")
    if template.count("{}") != 1:
        raise InputError(f"key '{path}.prompt': expected one {{}} for the subject, found {shown(template)}")
    ids = {f"{key}_id": value_at(rewrite, f"{key}.id") for key in ("target_new", "target_true")}
    return {
        "prompt": template,
        "subject": subject,
        "target": text_at(rewrite, "target_new.str"),
        "target_true": text_at(rewrite, "target_true.str"),
        "relation": rewrite.get("relation_id"),
        **ids,
    }


def zsre(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A zsRE row as a counterfactual: `alt` should replace `answers[0]` (the convention of EasyEdit and MEND)."""
    return _zsre(record, "alt", settings)


def zsre_answers(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A zsRE row as a correction: `answers[0]` is wanted (the convention of ROME and MEMIT), `alt` its foil."""
    return _zsre(record, "answers[0]", settings)


def _zsre(record: Any, convention: str, settings: Settings) -> list[dict[str, Any]]:
    entry = object_at(record)
    answers, alternative = texts_at(entry, "answers"), text_at(entry, "alt")
    if not answers:
        raise InputError("key 'answers': expected a list with the true answer first, found none")
    target, true = (alternative, answers[0]) if convention == "alt" else (answers[0], alternative)
    rephrase, asked = entry.get("rephrase"), entry.get("loc")
    neighbors = [{"prompt": asked, "target": text_at(entry, "loc_ans")}] if isinstance(asked, str) and asked else []
    subject, prompt = located(text_at(entry, "subject"), text_at(entry, "src"), "src")
    found = {
        **({"id": str(entry["case_id"])} if "case_id" in entry else {}),
        "prompt": prompt,
        "subject": subject,
        "target": target,
        "target_true": true,
        "paraphrases": [rephrase] if isinstance(rephrase, str) and rephrase else [],
        "neighbors": neighbors,
        "format": "zsre",
        "zsre-convention": f"target is {convention}",
        **carried(entry, ("case_id", "subject", "src", "alt", "rephrase", "loc", "loc_ans"), FACT_KEYS),
    }
    return own(found, settings)


def located(subject: str, prompt: str, key: str) -> tuple[str, str]:
    """The subject as the prompt spells it, and the prompt, with {} for it where it stands exactly once.

    Raises:
        InputError: it is not there, in capitals or not.
    """
    at = prompt.find(subject)
    if at < 0 and len(prompt.lower()) == len(prompt):
        at = prompt.lower().find(subject.lower())
    if at < 0:
        raise InputError(f"key {key!r}: the subject {shown(subject)} is not in {shown(prompt)}")
    spelled = prompt[at : at + len(subject)]
    if prompt.count(spelled) > 1 or "{}" in prompt:
        return spelled, prompt
    return spelled, prompt[:at] + "{}" + prompt[at + len(spelled) :]


def knowedit(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A KnowEdit (or flat EasyEdit) record; locality prompts with an answer become neighbours, portability a tag."""
    entry = object_at(record)
    true = first_text(value_at(entry, "ground_truth"))
    if true is None:
        raise InputError(f"key 'ground_truth': expected the present answer, found {shown(entry.get('ground_truth'))}")
    subject, prompt = located(text_at(entry, "subject"), text_at(entry, "prompt"), "prompt")
    asked = entry.get("rephrase_prompt") or entry.get("rephrase")
    found = {
        **({"id": str(entry["case_id"])} if "case_id" in entry else {}),
        "prompt": prompt,
        "subject": subject,
        "target": text_at(entry, "target_new"),
        "target_true": true,
        "paraphrases": [asked] if isinstance(asked, str) else [text for text in asked or [] if isinstance(text, str)],
        "neighbors": _locality(entry),
        "format": "knowedit",
        **carried(
            entry,
            ("case_id", "subject", "prompt", "target_new", "rephrase_prompt", "rephrase", "locality_prompt"),
            FACT_KEYS,
        ),
    }
    return own(found, settings)


def _locality(entry: Mapping[str, Any]) -> list[dict[str, str]]:
    asked = [(entry.get("locality_prompt"), entry.get("locality_ground_truth"))]
    groups = entry.get("locality")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        parts = group if isinstance(group, list) else [group]
        asked += [(part.get("prompt"), part.get("ground_truth")) for part in parts if isinstance(part, Mapping)]
    pairs = [(first_text(prompt), first_text(answer)) for prompt, answer in asked]
    return [
        {"prompt": prompt, "target": answer} for prompt, answer in pairs if prompt and answer and "{}" not in prompt
    ]


def first_text(value: Any) -> str | None:
    """The first text in lists of lists of texts, or None."""
    while isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) and value.strip() else None


def wikibio(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A KnowEdit WikiBio record: a long text to give after its opening, so a passage and no fact."""
    entry = object_at(record)
    labels = first_text(entry.get("labels"))
    if labels is None:
        raise InputError(f"key 'labels': expected the text to give, found {shown(entry.get('labels'))}")
    head = text_at(entry, "text")
    space = "" if head[-1:].isspace() or labels[:1].isspace() else " "
    rest = carried(entry, ("text", "labels"), frozenset({"id", "prefix", "suffix", "text"}))
    return [{"prefix": head, "suffix": space + labels, "format": "knowedit-wikibio", **rest}]


def known(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A fact for causal tracing (known_id, subject, attribute, template): one answer, nothing to replace it with."""
    entry = object_at(record)
    subject, template = text_at(entry, "subject"), text_at(entry, "template")
    answer = text_at(entry, "attribute")
    if template.count("{}") != 1:
        subject, template = located(subject, text_at(entry, "prompt"), "prompt")
    found = {
        "id": str(entry.get("known_id", "")),
        "prompt": template,
        "subject": subject,
        "target": answer,
        "target_true": answer,
        "format": "known",
        "answers": "one",
        **carried(entry, ("known_id", "subject", "template", "attribute", "prompt"), FACT_KEYS),
    }
    return own(found, settings)


def _rewrites_are(content: Content, kind: type) -> bool:
    return content.has("requested_rewrite") and isinstance(content.first["requested_rewrite"], kind)


FORMATS = (
    Format(
        name="facts",
        makes="facts",
        about="memloc's own facts: prompt, subject, target, target_true",
        matches=lambda content: content.has("prompt", "subject", "target", "target_true"),
        convert=own,
    ),
    Format(
        name="counterfact",
        makes="facts",
        about="CounterFact: requested_rewrite with paraphrase and neighbourhood prompts",
        matches=lambda content: _rewrites_are(content, Mapping),
        convert=counterfact,
    ),
    Format(
        name="mquake",
        makes="facts",
        about="MQuAKE: a list of rewrites with multi-hop questions; one fact a rewrite",
        matches=lambda content: _rewrites_are(content, list),
        convert=mquake,
    ),
    Format(
        name="zsre",
        makes="facts",
        about="zsRE, counterfactual: alt should replace answers[0] (--as zsre-answers for the other convention)",
        matches=lambda content: content.has("src", "alt", "answers", "subject"),
        convert=zsre,
    ),
    Format(
        name="zsre-answers",
        makes="facts",
        about="zsRE, correction: answers[0] should be given, alt is its foil; only with --as",
        matches=lambda content: False,
        convert=zsre_answers,
    ),
    Format(
        name="knowedit",
        makes="facts",
        about="KnowEdit and EasyEdit: subject, prompt, target_new, ground_truth, locality, portability",
        matches=lambda content: content.has("subject", "prompt", "target_new") and "target" not in content.keys,
        convert=knowedit,
    ),
    Format(
        name="knowedit-wikibio",
        makes="passages",
        about="KnowEdit WikiBio: concept, text, labels; the labels follow the text",
        matches=lambda content: content.has("text", "labels") and not content.has("target_true"),
        convert=wikibio,
    ),
    Format(
        name="known",
        makes="facts",
        about="facts for causal tracing: subject, attribute, template",
        matches=lambda content: content.has("subject", "attribute", "template"),
        convert=known,
        noted=ONE_ANSWER,
    ),
)
