"""Passages as texts: memloc's own, questions and answers (TOFU, MUSE), prompts with what follows, paragraphs, text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from memloc.errors import InputError
from memloc.formats.content import Content, Row
from memloc.formats.format import PASSAGE_KEYS, PLACE, Format, Settings, carried, ids_at, object_at, shown, text_at
from memloc.passages import encode

JOINS = {
    "muse-verbmem": ("prompt", "gt"),
    "completions": ("prompt", "completion"),
    "copybench": ("input", "reference"),
    "goldfish": ("test_input", "gt_output"),
    "quotes": ("prefix", "target_suffix"),
}
"""Formats that are a text and what follows it, and the keys of both; tried in this order."""


def own(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A passage as memloc writes it: ids, prefix and suffix, or text."""
    entry = object_at(record)
    if "prefix_ids" in entry or "suffix_ids" in entry:
        halves = {key: ids_at(entry, key) for key in ("prefix_ids", "suffix_ids")}
        return [{**entry, **halves}]
    for key in ("prefix", "suffix") if "prefix" in entry or "suffix" in entry else ("text",):
        text_at(entry, key)
    return [dict(entry)]


def question(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A question and its answer; paraphrased and perturbed ones go along as tags."""
    entry = object_at(record)
    prompt = settings.template.replace(PLACE, text_at(entry, "question"))
    answer = text_at(entry, "answer")
    space = "" if answer[:1].isspace() or prompt[-1:].isspace() else " "
    rest = carried(entry, ("id", "answer"), PASSAGE_KEYS)
    return [{**_named(entry), "prefix": prompt, "suffix": space + answer, "template": settings.template,
             "format": "question-answer", **rest}]  # fmt: skip


def joined(name: str) -> Any:
    """A reader of texts with what follows them; a space is put between two halves that have none, and said so."""
    head_key, tail_key = JOINS[name]

    def convert(record: Any, settings: Settings) -> list[dict[str, Any]]:
        entry = object_at(record)
        head, tail = text_at(entry, head_key), text_at(entry, tail_key)
        apart = head[-1:].isspace() or not (tail[0].isalnum() and head[-1:].isprintable())
        rest = carried(entry, ("id", head_key, tail_key), PASSAGE_KEYS)
        added = {} if apart else {"joined-with": " "}
        return [{**_named(entry), "prefix": head, "suffix": tail if apart else " " + tail, "format": name, **added,
                 **rest}]  # fmt: skip

    return convert


def mempi(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A MemPi manual record: `all` begins with `prompt`; what is left is the suffix."""
    entry = object_at(record)
    prompt, whole = text_at(entry, "prompt"), text_at(entry, "all")
    if not whole.startswith(prompt) or len(whole) == len(prompt):
        raise InputError(f"key 'all': expected the prompt {shown(prompt)} and more, found {shown(whole)}")
    rest = carried(entry, ("id", "prompt", "all"), PASSAGE_KEYS)
    return [{**_named(entry), "prefix": prompt, "suffix": whole[len(prompt) :], "format": "mempi", **rest}]


def under(key: str, name: str) -> Any:
    """A reader of records whose text stands under `key`."""

    def convert(record: Any, settings: Settings) -> list[dict[str, Any]]:
        entry = object_at(record)
        rest = carried(entry, ("id", key), PASSAGE_KEYS)
        return [{**_named(entry), "text": text_at(entry, key), "format": name, **rest}]

    return convert


def tokens(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A record of token ids: Pythia's memorized sequences of 64 (32 and 32), or any row under tokens or input_ids."""
    from memloc.formats.matrices import halves

    entry = object_at(record)
    key = next(key for key in ("tokens", "Tokens", "input_ids") if key in entry)
    ids = ids_at(entry, key)
    head, tail, name = halves(ids, settings)
    number = entry.get("index", entry.get("Index"))
    named = {"id": str(number)} if number is not None else _named(entry)
    rest = carried(entry, ("id", key), PASSAGE_KEYS)
    return [{**named, "prefix_ids": head, "suffix_ids": tail, "format": name, **rest}]


def lone(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A text in a list of texts."""
    if not isinstance(record, str) or not record.strip():
        raise InputError(f"expected a text that is not empty, found {shown(record)}")
    return [{"text": record, "format": "texts"}]


def continuations(content: Content, settings: Settings) -> Iterable[Row]:
    """The pairs under "data": a prefix, and the prefix with what follows or what follows alone."""
    for index, pair in enumerate(content.first["data"].items()):
        yield f"entry {index} of 'data'", pair


def continuation(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A HELM copyright pair."""
    head, whole = record
    if not isinstance(whole, str) or not head.strip() or whole in ("", head):
        raise InputError(f"expected a text that follows {shown(head)}, found {shown(whole)}")
    tail = whole[len(head) :] if whole.startswith(head) else whole
    space = "" if whole.startswith(head) or head[-1:].isspace() or tail[:1].isspace() else " "
    return [{"prefix": head, "suffix": space + tail, "format": "helm-copyright"}]


def windows(content: Content, settings: Settings) -> Iterable[Row]:
    """Windows of plain text in token space: prefix + suffix tokens, every `stride`; a shorter rest is dropped.

    Raises:
        InputError: no tokenizer, or a text shorter than one window.
    """
    if settings.tokenizer is None:
        raise InputError(f"{content.path}: plain text is cut in tokens; name the --model (or --tokenizer) to cut for")
    ids = encode(settings.tokenizer, content.text).ids
    width = settings.prefix + settings.suffix
    if len(ids) < width:
        raise InputError(f"{content.path}: {len(ids)} tokens, a window takes {width}; set --prefix and --suffix")
    for start in range(0, len(ids) - width + 1, settings.stride or width):
        yield f"token {start}", (start, ids[start : start + width])


def window(record: Any, settings: Settings) -> list[dict[str, Any]]:
    """A window, called by the token it starts at."""
    start, ids = record
    return [{"id": f"at-{start}", "prefix_ids": list(ids[: settings.prefix]),
             "suffix_ids": list(ids[settings.prefix :]), "format": "plain-text", "start": start}]  # fmt: skip


def _named(entry: Any) -> dict[str, str]:
    return {"id": str(entry["id"])} if entry.get("id") not in (None, "") else {}


def _own(content: Content) -> bool:
    ids, halves = content.has("prefix_ids", "suffix_ids"), content.has("prefix", "suffix")
    return ids or halves or (content.has("text") and not content.keys.intersection({"labels", "tokens", "input_ids"}))


def _tokens(content: Content) -> bool:
    return len(content.keys.intersection({"tokens", "Tokens", "input_ids"})) == 1 and not content.has("prefix_ids")


def _helm(content: Content) -> bool:
    return content.has("data") and isinstance(content.first["data"], dict) and content.container == "JSON object"


def _passages(name: str, about: str, matches: Any, convert: Any, **more: Any) -> Format:
    return Format(name=name, makes="passages", about=about, matches=matches, convert=convert, **more)


def _join(name: str, about: str) -> Format:
    head, tail = JOINS[name]
    return _passages(name, f"{about}: {head}, {tail}", lambda content: content.has(head, tail), joined(name))


FORMATS = (
    _passages("passages", "memloc's own passages: text, prefix and suffix, or prefix_ids and suffix_ids", _own, own),
    _passages(
        "question-answer",
        "TOFU and MUSE knowmem: question, answer (asked as --template says)",
        lambda content: content.has("question", "answer"),
        question,
    ),
    _join("muse-verbmem", "MUSE verbmem"),
    _join("completions", "prompts with completions"),
    _join("copybench", "CopyBench"),
    _join("goldfish", "goldfish loss evaluations"),
    _join("quotes", "memorized quotes"),
    _passages(
        "mempi",
        "MemPi manual set: prompt, all, prompt_len, category",
        lambda content: content.has("prompt", "all"),
        mempi,
    ),
    _passages(
        "definitions",
        "ECBD definitions, to inject: definition",
        lambda content: content.has("definition"),
        under("definition", "definitions"),
    ),
    _passages(
        "wikimia",
        "WikiMIA: input, label (1 for members)",
        lambda content: content.has("input", "label"),
        under("input", "wikimia"),
    ),
    _passages(
        "paragraphs",
        "paragraph localization's table: paragraph, id, count, em, nll",
        lambda content: content.has("paragraph", "id"),
        under("paragraph", "paragraphs"),
    ),
    _passages("tokens", "Pythia's memorized sequences (index, tokens: 32 + 32) and rows of input_ids", _tokens, tokens),
    _passages("texts", "a list of texts (MUSE raw and privleak)", lambda content: isinstance(content.first, str), lone),
    _passages("helm-copyright", "HELM copyright: data, metadata", _helm, continuation, rows=continuations),
    _passages(
        "plain-text",
        "plain text, cut into windows of --prefix + --suffix tokens every --stride",
        lambda content: content.container == "text",
        window,
        rows=windows,
    ),
)
