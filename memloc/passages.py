"""Passages and Facts: token-level data. A text is tokenised once, jointly, and cut in token space.

Every method sees the same tokens: prefix and suffix are never tokenised apart, and a row whose cut falls inside a
token is kept and marked (`boundary_merged`), because a model that saw the text never saw that cut.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from memloc.errors import InputError
from memloc.lazy import method
from memloc.provenance import digest_json

SLOT = "[MASK]"
"""Where the answer stands inside a prompt."""
FORMS = '{"id","text"}, {"prefix","suffix"} or {"prefix_ids","suffix_ids"}'


@dataclass(frozen=True)
class Passage:
    """A prefix to prompt with and the suffix that should, or should not, follow.

    Attributes:
        id: unique in its set.
        prefix: token ids, at least one.
        suffix: token ids, at least one.
        tags: whatever else the record carried (`dose`, `relation`, ...), JSON values.
        boundary_merged: the cut the caller asked for falls inside a token; that token went to the suffix.
        after: token ids behind the suffix: the rest of a cloze sentence, and the token a tokenizer ends texts with.
            Only models that read both ways read them.
    """

    id: str
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    tags: Mapping[str, Any] = field(default_factory=dict)
    boundary_merged: bool = False
    after: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.prefix or not self.suffix:
            raise InputError(f"passage {self.id!r}: prefix {len(self.prefix)} and suffix {len(self.suffix)} tokens; "
                             "each needs at least one")  # fmt: skip

    @property
    def ids(self) -> tuple[int, ...]:
        """Prefix and suffix, joined."""
        return self.prefix + self.suffix


@dataclass(frozen=True)
class Passages(Sequence[Passage]):
    """A set of passages with unique ids; slices and filters give Passages again.

    Raises:
        InputError: two passages share an id.
    """

    items: tuple[Passage, ...]
    origin: str = ""

    __repr__ = method("memloc.notebook:plain")
    _repr_html_ = method("memloc.notebook:html")

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for item in self.items:
            if item.id in seen:
                raise InputError(f"{self.origin or 'passages'}: the id {item.id!r} occurs twice")
            seen.add(item.id)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Passage]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> Passage: ...
    @overload
    def __getitem__(self, index: slice) -> Passages: ...
    def __getitem__(self, index: int | slice) -> Passage | Passages:
        return Passages(self.items[index], self.origin) if isinstance(index, slice) else self.items[index]

    def __add__(self, other: Passages) -> Passages:
        origin = " + ".join(dict.fromkeys(part for part in (self.origin, other.origin) if part))
        return Passages(self.items + other.items, origin)

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids, in order."""
        return tuple(item.id for item in self.items)

    @cached_property
    def digest(self) -> str:
        """Digest of ids and tokens, in order; tags and origin do not count."""
        return digest_json(
            [[item.id, item.prefix, item.suffix, *([item.after] if item.after else ())] for item in self.items]
        )

    def where(self, keep: Callable[[Passage], bool]) -> Passages:
        """Those for which `keep` holds."""
        return Passages(tuple(item for item in self.items if keep(item)), self.origin)

    def named(self, ids: Iterable[str]) -> Passages:
        """Those called `ids`, in that order.

        Raises:
            InputError: an id is not there.
        """
        known = {item.id: item for item in self.items}
        wanted = list(ids)
        for name in wanted:
            if name not in known:
                raise InputError(f"{self.origin or 'passages'}: no passage has the id {name!r}")
        return Passages(tuple(known[name] for name in wanted), self.origin)

    @classmethod
    def read(cls, path: str | Path, tokenizer: Any = None, *, prefix: int = 50, suffix: int = 50) -> Passages:
        """Read JSONL, one record a line: `{"id","text"}`, `{"prefix","suffix"}` or `{"prefix_ids","suffix_ids"}`.

        Ids already given win over text in the same record. Beside the last two, `"after"` and `"after_ids"` say what
        stands behind the suffix, for models that read both ways. Other keys are kept as tags.

        Args:
            path: the file, UTF-8.
            tokenizer: a transformers tokenizer; not needed for records of ids.
            prefix: tokens of a `text` that make its prefix.
            suffix: at most that many tokens of a `text` after the prefix make its suffix.

        Raises:
            InputError: no such file, no record, or a line that cannot be used (its number is named).
        """
        return cls.from_records(_lines(path), tokenizer, prefix=prefix, suffix=suffix, path=path)

    @classmethod
    def from_records(
        cls,
        records: Iterable[tuple[str, dict[str, Any]]],
        tokenizer: Any = None,
        *,
        prefix: int = 50,
        suffix: int = 50,
        path: str | Path = "records",
    ) -> Passages:
        """Records as `read` takes them, each with where it stands ("line 3"), for whoever reads another kind of file.

        Raises:
            InputError: a record that cannot be used; `path` and where it stands are named.
        """
        items = []
        for where, record in records:
            try:
                items.append(_passage(record, where, tokenizer, prefix, suffix))
            except InputError as error:
                raise InputError(f"{path}, {where}: {error}") from error
        return cls(tuple(items), str(Path(path).name))

    @classmethod
    def from_texts(cls, texts: Iterable[str], tokenizer: Any, *, window: int, origin: str = "text") -> Passages:
        """Ordinary text as windows: consecutive `window` tokens of each text, the first being the prefix.

        Windows never cross texts; a rest of fewer than two tokens is dropped.

        Raises:
            InputError: no text gives a window, or a window has no room for a suffix.
        """
        if window < 2:
            raise InputError(f"{origin}: window {window}; expected at least 2 tokens, a prefix of one and a suffix")
        items = []
        for index, text in enumerate(texts):
            ids = encode(tokenizer, text).ids
            for start in range(0, len(ids) - 1, window):
                part = ids[start : start + window]
                if len(part) > 1:
                    items.append(Passage(f"{origin}-{index}-{start}", part[:1], part[1:]))
        if not items:
            raise InputError(f"{origin}: no text of two tokens or more")
        return cls(tuple(items), origin)

    def check(self, vocab: int, context: int | None, *, behind: bool = False) -> None:
        """Refuse tokens outside the vocabulary and rows longer than the context.

        Args:
            vocab: how many tokens there are.
            context: how many a row may have; None for any number.
            behind: what stands behind the suffix is read too.

        Raises:
            InputError: names the passage.
        """
        for item in self.items:
            ids = item.ids + item.after if behind else item.ids
            worst = max(ids) if min(ids) >= 0 else min(ids)
            if not 0 <= worst < vocab:
                raise InputError(f"passage {item.id!r}: token id {worst} outside the vocabulary of {vocab}")
            if context is not None and len(ids) > context:
                raise InputError(
                    f"passage {item.id!r}: {len(ids)} tokens, the model's context holds {context}; "
                    "shorten the prefix or the suffix"
                )


@dataclass(frozen=True)
class Prompt:
    """A prompt in tokens.

    Attributes:
        ids: token ids.
        subject: the subject's tokens as [start, end), or None where the prompt does not hold it.
        text: the prompt's text, up to the answer.
        after: token ids behind the answer, which only models that read both ways read.
    """

    ids: tuple[int, ...]
    subject: tuple[int, int] | None
    text: str
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Neighbor:
    """A prompt about something else, whose own answer should stay."""

    prompt: Prompt
    target: tuple[int, ...]


@dataclass(frozen=True)
class Fact:
    """A statement to change: `target` should replace `target_true` after `prompt`.

    Attributes:
        id: unique in its set.
        template: the prompt as written, with {} for the subject.
        subject: the subject's text.
        prompt: the template filled in.
        target: tokens of the new answer (a space before it included).
        target_true: tokens of the present answer.
        target_text: text of the new answer.
        target_true_text: text of the present answer.
        paraphrases: other phrasings of the prompt.
        neighbors: prompts whose answers should stay.
        tags: whatever else the record carried.
    """

    id: str
    template: str
    subject: str
    prompt: Prompt
    target: tuple[int, ...]
    target_true: tuple[int, ...]
    target_text: str
    target_true_text: str
    paraphrases: tuple[Prompt, ...] = ()
    neighbors: tuple[Neighbor, ...] = ()
    tags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """Its own prompt, the paraphrases', the neighbours'."""
        return (self.prompt, *self.paraphrases, *(entry.prompt for entry in self.neighbors))


@dataclass(frozen=True)
class Facts(Sequence[Fact]):
    """A set of facts; slices and filters give Facts again."""

    items: tuple[Fact, ...]
    origin: str = ""

    __repr__ = method("memloc.notebook:plain")
    _repr_html_ = method("memloc.notebook:html")

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> Fact: ...
    @overload
    def __getitem__(self, index: slice) -> Facts: ...
    def __getitem__(self, index: int | slice) -> Fact | Facts:
        return Facts(self.items[index], self.origin) if isinstance(index, slice) else self.items[index]

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids, in order."""
        return tuple(item.id for item in self.items)

    @cached_property
    def digest(self) -> str:
        """Digest of ids and tokens of everything that is asked or answered."""
        return digest_json(
            [
                [f.id, f.prompt.ids, f.target, f.target_true, [p.ids for p in f.paraphrases],
                 [[n.prompt.ids, n.target] for n in f.neighbors],
                 *([behind] if any(behind := [p.after for p in f.prompts]) else ())]
                for f in self.items
            ]
        )  # fmt: skip

    def where(self, keep: Callable[[Fact], bool]) -> Facts:
        """Those for which `keep` holds."""
        return Facts(tuple(item for item in self.items if keep(item)), self.origin)

    def as_passages(self, which: str = "true", *, paraphrases: bool = False) -> Passages:
        """Prompts as prefixes with the present ("true") or the wanted ("new") answer as suffix.

        A passage keeps its fact's tags, and says in two more which fact it asks about ("fact") and where in its prefix
        the subject stands ("subject": [start, end), or None). With `paraphrases`, each fact's other phrasings follow
        its own prompt as passages of their own, called ID/1, ID/2, …
        """
        if which not in ("true", "new"):
            raise InputError(f"which={which!r}: expected 'true' or 'new'")
        items = []
        for item in self.items:
            prompts = (item.prompt, *item.paraphrases) if paraphrases else (item.prompt,)
            answer = item.target_true if which == "true" else item.target
            for index, prompt in enumerate(prompts):
                tags = {**item.tags, "fact": item.id, "subject": prompt.subject and list(prompt.subject)}
                name = f"{item.id}/{index}" if index else item.id
                items.append(Passage(name, prompt.ids, answer, tags, after=prompt.after))
        return Passages(tuple(items), self.origin)

    @classmethod
    def read(cls, path: str | Path, tokenizer: Any) -> Facts:
        """Read JSONL: `{"id","prompt" with {},"subject","target","target_true","paraphrases","neighbors"}`.

        A prompt whose answer stands inside has [MASK] in its place; what follows it is read by models that read both
        ways only. Without it the answer follows the prompt.

        Paraphrases are strings, with {} for the subject or without it. A neighbour is a string (its answer is
        `target_true`) or `{"prompt","target"}`; {} in one is an error, for the subject is not asked about there.

        Raises:
            InputError: no such file, no record, or a line that cannot be used (its number is named).
        """
        return cls.from_records(_lines(path), tokenizer, path=path)

    @classmethod
    def from_records(
        cls, records: Iterable[tuple[str, dict[str, Any]]], tokenizer: Any, *, path: str | Path = "records"
    ) -> Facts:
        """Records as `read` takes them, each with where it stands ("line 3"), for whoever reads another kind of file.

        Raises:
            InputError: a record that cannot be used (`path` and where it stands are named), or an id twice.
        """
        items = []
        for where, record in records:
            try:
                items.append(_fact(record, where, tokenizer))
            except InputError as error:
                raise InputError(f"{path}, {where}: {error}") from error
        if len({item.id for item in items}) < len(items):
            raise InputError(f"{path}: two facts share an id")
        return cls(tuple(items), str(Path(path).name))


@dataclass(frozen=True)
class Encoding:
    """Token ids with the character span of each ([start, end); empty for tokens the tokenizer added)."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def closing(self) -> int:
        """How many tokens the tokenizer put behind the text."""
        found = 0
        while found < len(self.ids) and self.spans[-1 - found] == (0, 0):
            found += 1
        return found if found < len(self.ids) else 0


def encode(tokenizer: Any, text: str) -> Encoding:
    """Tokenise with the tokenizer's own rules (a start token where it adds one), with character spans.

    Raises:
        InputError: no tokenizer, or one without spans (only the "fast" ones know them).
    """
    if tokenizer is None:
        raise InputError(
            "text needs a tokenizer and the model came without one; give prefix_ids and suffix_ids instead"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{type(tokenizer).__name__} gives no character spans; use its fast version")
    found = tokenizer(text, return_offsets_mapping=True, verbose=False)
    return Encoding(tuple(found["input_ids"]), tuple((start, end) for start, end in found["offset_mapping"]))


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of token ids; the ids themselves, spelled out, where there is no tokenizer."""
    if tokenizer is None:
        return " ".join(f"⟨{token}⟩" for token in ids)
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and record of every line that is not blank.

    Raises:
        InputError: no such file, not UTF-8, a line that is no JSON object (its number is named), or no record at all.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a byte order mark is no JSON
    except (OSError, UnicodeDecodeError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise InputError(f"{path}: {why}") from error
    empty = True
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        empty = False
        try:
            record = json.loads(text)
        except ValueError as error:
            raise InputError(f"{path}, line {line}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {line}: expected an object, found {type(record).__name__}")
        yield line, record
    if empty:
        raise InputError(f"{path}: no record in it; expected one JSON object a line")


def _lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line, record in read_jsonl(path):
        yield f"line {line}", record


def _name(record: dict[str, Any], where: str) -> str:
    """Its id; a record without one is called by its line."""
    return str(record.get("id", where.replace("line ", "row-")))


def _passage(record: dict[str, Any], where: str, tokenizer: Any, prefix: int, suffix: int) -> Passage:
    name = _name(record, where)
    used = {"id", "text", "prefix", "suffix", "prefix_ids", "suffix_ids", "after", "after_ids"}
    tags = {key: value for key, value in record.items() if key not in used}
    if "prefix_ids" in record or "suffix_ids" in record:
        after = _ids(record, "after_ids") if record.get("after_ids") else ()
        return Passage(name, _ids(record, "prefix_ids"), _ids(record, "suffix_ids"), tags, after=after)
    if "prefix" in record or "suffix" in record:
        head = record["prefix"] if record.get("prefix") == "" else _text(record, "prefix")
        tail = _text(record, "suffix")
        behind = _text(record, "after") if record.get("after") else ""
        encoding = encode(tokenizer, head + tail + behind)
        inner = encoding.spans[: len(encoding.ids) - encoding.closing]
        cut = sum(end <= len(head) for _, end in inner)
        if not cut and not head:  # what a tokenizer begins texts with would do
            _text(record, "prefix")
        stop = sum(start < len(head + tail) for start, _ in inner) if behind else len(inner)
        merged = any(start < edge < end for start, end in inner for edge in (len(head), len(head + tail)))
        return Passage(name, encoding.ids[:cut], encoding.ids[cut:stop], tags, merged, encoding.ids[stop:])
    if "text" in record:
        whole = encode(tokenizer, _text(record, "text"))
        end = len(whole.ids) - whole.closing
        ids, closing = whole.ids[:end], whole.ids[end:]
        if len(ids) <= prefix:
            raise InputError(f"text of {len(ids)} tokens, shorter than its prefix of {prefix} and one token of suffix")
        return Passage(name, ids[:prefix], ids[prefix : prefix + suffix], tags, after=closing)
    raise InputError(f"found keys {', '.join(sorted(record)) or 'none'}; expected {FORMS}")


def _fact(record: dict[str, Any], where: str, tokenizer: Any) -> Fact:
    template, subject = _text(record, "prompt"), _text(record, "subject")
    if template.count("{}") != 1 and subject not in template:
        raise InputError(f"subject {subject!r} is not in the prompt {template!r}; mark its place with {{}}")
    prompt = _prompt(tokenizer, template, subject)
    target, true = _text(record, "target"), _text(record, "target_true")
    paraphrases = tuple(_prompt(tokenizer, text, subject) for text in _strings(record, "paraphrases"))
    neighbors = tuple(_neighbor(tokenizer, entry, true) for entry in _list(record, "neighbors"))
    used = {"id", "prompt", "subject", "target", "target_true", "paraphrases", "neighbors"}
    return Fact(
        id=_name(record, where),
        template=template,
        subject=subject,
        prompt=prompt,
        target=_answer(tokenizer, prompt, target),
        target_true=_answer(tokenizer, prompt, true),
        target_text=target,
        target_true_text=true,
        paraphrases=paraphrases,
        neighbors=neighbors,
        tags={key: value for key, value in record.items() if key not in used},
    )


def _neighbor(tokenizer: Any, entry: Any, true: str) -> Neighbor:
    text, answer = (entry, true) if isinstance(entry, str) else (_text(entry, "prompt"), _text(entry, "target"))
    if "{}" in text:
        raise InputError(f"neighbour {text!r} holds {{}}; write its own subject out")
    prompt = _prompt(tokenizer, text, None)
    return Neighbor(prompt, _answer(tokenizer, prompt, answer))


def _prompt(tokenizer: Any, template: str, subject: str | None) -> Prompt:
    filled = template if subject is None else template.replace("{}", subject)
    text, slot, rest = filled.partition(SLOT)
    text = text.rstrip() if slot else text
    if rest.strip(" .") and getattr(tokenizer, "mask_token_id", None) is None:
        raise InputError(f"the answer to {filled!r} stands inside it, and the model reads from left to right")
    encoding = encode(tokenizer, text)
    end = len(encoding.ids) - encoding.closing
    encoding, after = Encoding(encoding.ids[:end], encoding.spans[:end]), encoding.ids[end:]
    after = _behind(tokenizer, rest) if rest.strip() else after
    start = -1 if subject is None else (template.find("{}") if "{}" in template else text.find(subject))
    start = start if start + len(subject or "") <= len(text) else -1
    if subject is None or start < 0:
        return Prompt(encoding.ids, None, text, after)
    end = start + len(subject)
    inside = [index for index, (a, b) in enumerate(encoding.spans) if a < end and b > start]
    if not inside:
        raise InputError(f"the subject {subject!r} has no token of its own in {text!r}")
    return Prompt(encoding.ids, (inside[0], inside[-1] + 1), text, after)


def _behind(tokenizer: Any, rest: str) -> tuple[int, ...]:
    """Tokens of what stands behind an answer, and those that end a text, without those that begin one."""
    found = encode(tokenizer, rest)
    return found.ids[next((index for index, span in enumerate(found.spans) if span != (0, 0)), 0) :]


def _answer(tokenizer: Any, prompt: Prompt, answer: str) -> tuple[int, ...]:
    """Tokens of the answer as they follow the prompt: tokenised jointly, cut where the prompt ends."""
    spaced = answer if answer[:1].isspace() or prompt.text[-1:].isspace() else " " + answer
    joint = encode(tokenizer, prompt.text + spaced)
    cut = len(prompt.ids)
    end = len(joint.ids) - joint.closing
    if joint.ids[:cut] != prompt.ids or cut >= end:
        raise InputError(f"{prompt.text!r} and {answer!r} share a token; end the prompt before its last space")
    return joint.ids[cut:end]


def _text(record: Any, key: str) -> str:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value:
        raise InputError(f"{key!r} should be a text that is not empty, found {value!r}")
    return value


def _strings(record: dict[str, Any], key: str) -> list[str]:
    value = record.get(key, [])
    if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
        raise InputError(f"{key!r} should be a list of texts, found {value!r}")
    return value


def _list(record: dict[str, Any], key: str) -> list[Any]:
    value = record.get(key, [])
    if not isinstance(value, list):
        raise InputError(f"{key!r} should be a list, found {value!r}")
    return value


def _ids(record: dict[str, Any], key: str) -> tuple[int, ...]:
    value = record.get(key)
    plain = isinstance(value, list) and all(isinstance(entry, int) and not isinstance(entry, bool) for entry in value)
    if not plain or not value:
        raise InputError(f"{key!r} should be a list of token ids that is not empty, found {value!r}")
    return tuple(value)
