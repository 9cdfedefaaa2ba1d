"""A fact as rows of tokens: its prompt, bare and behind prefixes, and where in each row the model is edited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from memloc.errors import InputError
from memloc.passages import Fact, Prompt, encode
from memloc.running.decoding import continuation
from memloc.view import ModelView

Token = Literal["subject-last", "prompt-last"]

JOINT = ". "
"""Between a prefix and the prompt."""

ESSENCE = "{} is a"
"""The prompt whose answer should stay as it is, {} being the subject."""


@dataclass(frozen=True)
class Row:
    """A prompt in tokens, and the index of the token at which the model is edited."""

    ids: tuple[int, ...]
    at: int


def row_of(prompt: Prompt, token: Token) -> Row:
    """`prompt`, edited at its subject's last token or at its own.

    Raises:
        InputError: the subject's token is asked for and the prompt does not hold its subject.
    """
    if token == "prompt-last":
        return Row(prompt.ids, len(prompt.ids) - 1)
    if prompt.subject is None:
        raise InputError(f"the prompt {prompt.text!r} does not hold its subject; edit at prompt-last")
    return Row(prompt.ids, prompt.subject[1] - 1)


@dataclass(frozen=True)
class Demand:
    """One fact as rows.

    Attributes:
        id: of the fact.
        prompts: the bare prompt first, then the same prompt behind each prefix.
        target: tokens that should follow each of them.
        essence: "{subject} is a", whose answer should stay; None where nobody asks for it.
    """

    id: str
    prompts: tuple[Row, ...]
    target: tuple[int, ...]
    essence: Row | None = None

    @property
    def longest(self) -> int:
        """Tokens of its longest row, the target's last token left out (nothing is asked after it)."""
        rows = [len(row.ids) + len(self.target) - 1 for row in self.prompts]
        return max([*rows, len(self.essence.ids) if self.essence else 0])


def demand(fact: Fact, tokenizer: Any, prefixes: Sequence[str], token: Token, *, essence: bool = True) -> Demand:
    """The rows of `fact`.

    A prefixed prompt is tokenised jointly, as `prefix + ". " + prompt`; the target's tokens are put behind it. The
    essence is edited, and its answer compared, at the last token of the subject, or of "{subject} is a" where the
    prompt is edited at its own last token.

    Args:
        fact: what to make the model say.
        tokenizer: not needed where there are no prefixes and no essence.
        prefixes: texts to put in front.
        token: where to edit.
        essence: whether "{subject} is a" is wanted.

    Raises:
        InputError: the prompt does not hold the subject, or text without a tokenizer.
    """
    bare = row_of(fact.prompt, token)
    place = max(0, fact.template.find("{}" if "{}" in fact.template else fact.subject))
    rows = [bare]
    for prefix in prefixes:
        head = prefix + JOINT
        rows.append(_row(tokenizer, head + fact.prompt.text, len(head) + place, fact.subject, token))
    kept = _row(tokenizer, ESSENCE.replace("{}", fact.subject), 0, fact.subject, token) if essence else None
    return Demand(fact.id, tuple(rows), fact.target, kept)


def check_context(demands: Sequence[Demand], context: int | None) -> None:
    """Refuse rows longer than the model's context.

    Raises:
        InputError: names the fact.
    """
    for entry in demands:
        if context is not None and entry.longest > context:
            raise InputError(f"fact {entry.id!r}: {entry.longest} tokens with its prefix, the context holds {context}")


@torch.no_grad()
def sample(
    view: ModelView,
    starts: Sequence[Sequence[int]],
    length: int,
    generator: torch.Generator,
    *,
    top_k: int = 5,
    size: int = 512,
) -> list[tuple[int, ...]]:
    """Text of the model's own, a row for each of `starts`, which all have one length.

    Args:
        view: the model.
        starts: ids that the rows begin with.
        length: tokens of each row, its start included; longer starts are cut.
        generator: on the CPU.
        top_k: each token is drawn from the k likeliest.
        size: rows at once; what is drawn depends on it.

    Cost: a forward over the starts, then one of a token a row for each that is added.
    """
    found: list[tuple[int, ...]] = []
    for first in range(0, len(starts), size):
        ids = torch.tensor([list(start) for start in starts[first : first + size]], device=view.device)
        more = max(0, length - ids.shape[1])
        if more:
            ids = continuation(view, ids, more, temperature=1.0, top_k=top_k, generator=generator).ids
        found += [tuple(row[:length]) for row in ids.tolist()]
    return found


def sample_prefixes(
    view: ModelView, lengths: Sequence[int], count: int, generator: torch.Generator, *, top_k: int = 5
) -> tuple[str, ...]:
    """Prefixes the model writes itself: `count` of each of `lengths` tokens (the start token counts and is dropped).

    Raises:
        InputError: there is no tokenizer, or it knows no token to start from.
    """
    if view.tokenizer is None:
        raise InputError("prefixes are text and the model came without a tokenizer; give prefixes=() to do without")
    start = next((token for token in (view.tokenizer.bos_token_id, view.tokenizer.eos_token_id) if token is not None),
                 None)  # fmt: skip
    if start is None:
        raise InputError("the tokenizer has no start token to sample prefixes from; give prefixes")
    found = []
    for length in lengths:
        for row in sample(view, [[start]] * count, length, generator, top_k=top_k):
            text = view.tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            # A cut inside a character decodes to U+FFFD, which would come back as other tokens.
            found.append(" ".join(text.replace("�", "").split("\n")))
    return tuple(found)


def _row(tokenizer: Any, text: str, start: int, subject: str, token: Token) -> Row:
    encoding = encode(tokenizer, text)
    if token == "prompt-last":
        return Row(encoding.ids, len(encoding.ids) - 1)
    end = start + len(subject)
    inside = [index for index, (a, b) in enumerate(encoding.spans) if a < end and b > start]
    if not inside:
        raise InputError(f"the subject {subject!r} has no token of its own in {text!r}")
    return Row(encoding.ids, inside[-1])
