"""What a change of facts should leave alone: keys of other facts, of retained passages, of edits already made.

Nobody has to name any. The model knows whom it would put in a subject's place (`namesakes`) and what it says of them by
itself (`own_sentences`); both stand in for the facts nobody lists. Ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from editors.base import Request
from editors.edit import Edit
from editors.facts.contexts import Row, Token, row_of, sample
from editors.facts.own_words import kin, namesakes
from editors.facts.together import likeliest, together
from memloc.passages import Fact, Facts, Passages, Prompt, encode
from memloc.sites import Site
from memloc.view import ModelView

NOTE = "keys"
"""Name of the note in which an edit says at which rows and tokens it wrote: enough to protect it later."""


@dataclass(frozen=True)
class Protected:
    """Rows of tokens and the places in them whose outputs should stay.

    Attributes:
        named: other facts and retained passages; the model's own namesakes.
        asked: of each of these the token behind which its answer stands.
        said: what the model says by itself, every token of it.
        past: where edits already made were written.
        counts: of each.
        others: those of `named` that nobody named, and no earlier edit protected.
        spared: those that an earlier edit did.
    """

    named: tuple[Row, ...] = ()
    asked: tuple[int, ...] = ()
    said: tuple[Row, ...] = ()
    past: tuple[Row, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    others: tuple[Row, ...] = ()
    spared: tuple[Row, ...] = ()

    def without(self, rows: Collection[Row]) -> Protected:
        """The same with these neither among the named ones nor in what the model says."""
        left = [(row, at) for row, at in zip(self.named, self.asked, strict=True) if row not in rows]
        said = tuple(row for row in self.said if row not in rows)
        return replace(self, named=tuple(row for row, _ in left), asked=tuple(at for _, at in left), said=said)

    def third(self) -> Protected:
        """Every third of those that nobody named: namesakes as `others`, spared ones as `named`, texts of its own."""
        texts = set(list(dict.fromkeys(row.ids for row in self.said))[2::3])
        said = tuple(row for row in self.said if row.ids in texts)
        rows = self.spared[2::3]
        return Protected(rows, tuple(len(row.ids) - 1 for row in rows), said, others=self.others[2::3])


class Amounts(NamedTuple):
    """How much the model is asked for where nobody names what to keep.

    Attributes:
        namesakes: prompts about other subjects, for each fact.
        sentences: texts of its own.
        length: of each, in tokens.
        spared: at most so many of the prompts that earlier edits spared, drawn; None for all.
    """

    namesakes: int = 0
    sentences: int = 0
    length: int = 16
    spared: int | None = None


@torch.no_grad()
def second_moment_at(
    view: ModelView, sites: Sequence[Site], rows: Sequence[Row], *, size: int = 256
) -> dict[Site, Tensor]:
    """Mean of k kᵀ over `rows`, each at its token: site to `[f, f]` float64. Rows of the same ids share a forward."""
    found = {
        site: torch.zeros(view.weight(site).shape[1], view.weight(site).shape[1], dtype=torch.float64) for site in sites
    }
    for part in together(view, rows, size=size):
        with view.record(sites, stop=True) as seen:
            view.hidden(part.batch)
        for site in sites:
            keys = seen[site][part.line, part.at].to("cpu", torch.float64)
            found[site] += keys.T @ keys / len(rows)
    return found


def rows_of_facts(facts: Facts | None, token: Token) -> tuple[Row, ...]:
    """The prompts of facts, and their other phrasings, at the edited token (those that have it)."""
    prompts = [prompt for fact in facts or () for prompt in (fact.prompt, *fact.paraphrases)]
    return tuple(row_of(prompt, token) for prompt in prompts if token == "prompt-last" or prompt.subject is not None)


def rows_predicting(passages: Passages | None) -> tuple[Row, ...]:
    """Every position of `passages` that predicts a token of a suffix."""
    return tuple(
        Row(item.ids, len(item.prefix) - 1 + step) for item in passages or () for step in range(len(item.suffix))
    )


def rows_of_past(past: Iterable[Edit]) -> tuple[Row, ...]:
    """Where earlier edits were written, by their notes; edits without such notes (of passages, say) have none."""
    return _noted(past, "rows")


def others_of_past(past: Iterable[Edit]) -> tuple[Row, ...]:
    """Prompts about others that earlier edits protected: what they spared, later ones should."""
    return tuple(dict.fromkeys(_noted(past, "others")))


def _noted(past: Iterable[Edit], name: str) -> tuple[Row, ...]:
    return tuple(
        Row(tuple(ids), at) for edit in past for ids, at in edit.notes.get(NOTE, {}).get(name, ()) if len(ids) > at
    )


def note_of(rows: Sequence[Row], layers: Sequence[int], others: Sequence[Row] = ()) -> dict[str, Any]:
    """What `rows_of_past` and `others_of_past` read back from an edit."""
    found: dict[str, Any] = {"layers": list(layers), "rows": [[list(row.ids), row.at] for row in rows]}
    return found if not others else {**found, "others": [[list(row.ids), row.at] for row in others]}


@torch.no_grad()
def own_sentences(
    view: ModelView, facts: Facts, token: Token, amounts: Amounts, generator: torch.Generator, *, top_k: int = 10
) -> tuple[Row, ...]:
    """Every token of texts the model writes when it is started with first tokens like those of the subjects.

    Tokens that would pin down what is to change are left out: after an edited subject, those where the model is about
    to give the present answer; where the subject's own token is edited, all from there on.

    Cost: a forward of `amounts.sentences` rows for each of `amounts.length` tokens, and one more.
    """
    starts = sorted({token for fact in facts for token in kin(view, _subject(fact)[0])})
    length = min(amounts.length, view.context or amounts.length)
    if not amounts.sentences or not starts:
        return ()
    drawn = torch.randint(len(starts), (amounts.sentences,), generator=generator)
    texts = sample(view, [(starts[index],) for index in drawn.tolist()], length, generator, top_k=top_k)
    edited = [(spellings(view, fact), fact.target_true[0]) for fact in facts]
    return _free(view, [Row(ids, at) for ids in texts for at in range(1, length)], edited, token)


def protected_rows(
    view: ModelView,
    facts: Facts,
    token: Token,
    request: Request,
    amounts: Amounts,
    generator: torch.Generator,
    *,
    made: Sequence[Prompt] | None = None,
) -> Protected:
    """What an edit of `facts` should leave alone: what `request` names, and what the model says itself.

    `made` are namesakes that are made up already. See the fields of `Protected`.
    """
    given, retained = rows_of_facts(request.keep_facts, token), rows_predicting(request.retain)
    edited = [(spellings(view, fact), fact.target_true[0]) for fact in facts]
    if made is None:
        made = [
            prompt for fact in facts for prompt in namesakes(view, fact.prompt, amounts.namesakes, generator)
        ]  # fmt: skip
    before = _drawn(others_of_past(request.past) if amounts.namesakes else (), amounts.spared, generator)
    own = tuple(dict.fromkeys(_free(view, [*(row_of(prompt, token) for prompt in made), *before], edited, token)))
    said = own_sentences(view, facts, token, amounts, generator)
    past = rows_of_past(request.past)
    counts = {"named": len(given) + len(retained), "namesakes": len(own), "said": len(said), "past": len(past)}
    # A fact is answered behind its prompt, wherever it is edited; of a passage every token is an answer.
    asked = (*(len(row.ids) - 1 for row in given + own), *(row.at for row in retained))
    known = set(before)
    fresh, spared = (tuple(row for row in own if (row in known) is old) for old in (False, True))
    return Protected(given + own + retained, asked, said, past, counts, fresh, spared)


def _drawn(rows: tuple[Row, ...], most: int | None, generator: torch.Generator) -> tuple[Row, ...]:
    if most is None or len(rows) <= most:
        return rows
    return tuple(rows[index] for index in sorted(torch.randperm(len(rows), generator=generator)[:most].tolist()))


def _subject(fact: Fact) -> tuple[int, ...]:
    if fact.prompt.subject is None:
        return fact.prompt.ids
    start, end = fact.prompt.subject
    return fact.prompt.ids[start:end]


def spellings(view: ModelView, fact: Fact) -> tuple[tuple[int, ...], ...]:
    """The fact's subject in tokens: as in its prompt, at the start of a text, and behind a word.

    Tokenizers spell it differently in the three places. Without one there is only the first.
    """
    found = [_subject(fact)]
    if view.tokenizer is not None:
        for text in (fact.subject, f"a {fact.subject}"):
            encoding = encode(view.tokenizer, text)
            start = len(text) - len(fact.subject)
            found.append(
                tuple(token for token, (_, end) in zip(encoding.ids, encoding.spans, strict=True) if end > start)
            )
    return tuple(dict.fromkeys(ids for ids in found if ids))


def _free(
    view: ModelView, rows: Sequence[Row], edited: Sequence[tuple[tuple[tuple[int, ...], ...], int]], token: Token
) -> tuple[Row, ...]:
    """Rows that may be kept: none of those that pin down what is to change."""
    best = likeliest(view, rows).tolist()
    return tuple(row for row, says in zip(rows, best, strict=True) if not pins(row.ids, row.at, says, edited, token))


def pins(
    ids: tuple[int, ...],
    at: int,
    says: int,
    edited: Sequence[tuple[tuple[tuple[int, ...], ...], int]],
    token: Token,
) -> bool:
    """Whether keeping the output at `at` would keep an answer that is to change.

    Args:
        ids: of the text.
        at: the token.
        says: the likeliest next token behind it.
        edited: of every fact its subject's `spellings` and the first token of its present answer.
        token: where the model is edited.
    """
    for spelled, answer in edited:
        if token == "prompt-last" and says != answer:
            continue
        if any(ids[start : start + len(one)] == one for one in spelled for start in range(at + 2 - len(one))):
            return True
    return False
