"""Other ways to the same passage: prefixes exchanged, shifted, shortened, restyled or put in other words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import torch

from editors.verification.material import Effort, Material, fitting, renewed
from editors.verification.scores import Heard, Scores, heard
from memloc.errors import InputError
from memloc.passages import Passage, Passages, decode, encode
from memloc.patching.perturbation import own_generator
from memloc.view import ModelView

Change = Callable[[Passage], Passage]


def as_given(view: ModelView, data: Material, effort: Effort, seed: int) -> Scores:
    """The prefix as it is."""
    del effort, seed
    return _asked(view, data, {"as given": lambda item: item})


def exchanged(view: ModelView, data: Material, effort: Effort, seed: int) -> Scores:
    """Random tokens of the prefix exchanged: one, a tenth and a quarter of them, several times each."""
    ways: dict[str, Change] = {}
    for share in (0.0, 0.1, 0.25):
        for draw in range(effort.draws):
            name = f"{f'{share:.0%} of the tokens' if share else 'one token'}, draw {draw + 1}"
            ways[name] = _exchange(view.vocab, share, 1000 * seed + draw)
    return _asked(view, data, ways)


def shifted(view: ModelView, data: Material, effort: Effort, seed: int) -> Scores:
    """Other text in front of the prefix, which stands later then; cut on the left where the context is full."""
    del effort
    filler = _filler(view, data, seed)
    ways = {f"{count} tokens before it": _shift(filler[:count], view.context) for count in (1, 3, 7, 16)}
    return _asked(view, data, ways)


def lengths(view: ModelView, data: Material, effort: Effort, seed: int) -> Scores:
    """Less of the prefix, and the suffix begun: what is hidden at one place comes up at another."""
    del effort, seed
    ways: dict[str, Change] = {f"last {share:.0%} of the prefix": _shorter(share) for share in (0.25, 0.5, 0.75)}
    ways |= {f"and {count} of the suffix": _begun(count) for count in (1, 2, 4, 8)}
    return _asked(view, data, ways)


def restyled(view: ModelView, data: Material, effort: Effort, seed: int) -> Scores:
    """The prefix's text in other dress: case, punctuation, spaces, accents; the suffix as it was.

    Raises:
        InputError: the model has no tokenizer.
    """
    del effort, seed
    styles: dict[str, Callable[[str], str]] = {
        "lower case": str.lower,
        "upper case": str.upper,
        "no punctuation": lambda text: re.sub(r"[^\w\s]", "", text),
        "a space after every line": lambda text: text.replace("\n", " \n"),
        "spaces doubled": lambda text: re.sub(r"(?<=\S) (?=\S)", "  ", text),
        "as a quotation": lambda text: f"“{text}",
        "plain letters": lambda text: unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode(),
    }
    if view.tokenizer is None:
        raise InputError("the model has no tokenizer, so its prefixes cannot be restyled")
    return _asked(view, data, {name: _restyle(view, style) for name, style in styles.items()})


def paraphrased(view: ModelView, data: Material, effort: Effort, seed: int) -> Scores:
    """Prefixes in the user's own words: the tag `paraphrases` of a record, a list of texts.

    Controls are asked with theirs, or as they are where they have none.

    Raises:
        InputError: no target has the tag.
    """
    del effort, seed
    most = max((len(_told(item)) for item in data.targets), default=0)
    if not most:
        raise InputError("no target has paraphrases (a tag of that name, a list of texts)")
    return _asked(view, data, {f"paraphrase {at + 1}": _paraphrase(view, at) for at in range(most)})


def _asked(view: ModelView, data: Material, ways: dict[str, Change]) -> Scores:
    found: list[Heard] = []
    for part in (data.targets, data.controls):
        sets = [Passages(tuple(change(item) for item in part), part.origin) for change in ways.values()]
        found.append(heard(view, sets, part.ids))
    return Scores.of(tuple(ways), found)


def _exchange(vocab: int, share: float, seed: int) -> Change:
    def change(item: Passage) -> Passage:
        generator = own_generator(seed, item)
        count = max(1, round(share * len(item.prefix)))
        where = torch.randperm(len(item.prefix), generator=generator)[:count].tolist()
        step = torch.randint(1, vocab, (count,), generator=generator).tolist()
        prefix = list(item.prefix)
        for at, by in zip(where, step, strict=True):
            prefix[at] = (prefix[at] + by) % vocab
        return renewed(item, prefix=prefix)

    return change


def _shift(filler: Sequence[int], context: int | None) -> Change:
    def change(item: Passage) -> Passage:
        # The filler stays and the passage's own beginning goes, where both do not fit.
        room = None if context is None else context - len(filler)
        return renewed(item, prefix=(*filler, *fitting(item.prefix, item.suffix, room)))

    return change


def _filler(view: ModelView, data: Material, seed: int) -> tuple[int, ...]:
    """Tokens of ordinary text, or random ones where none is given."""
    if data.text is not None:
        longest = max(data.text, key=lambda item: len(item.ids))
        if len(longest.ids) >= 16:
            return longest.ids[:16]
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, view.vocab, (16,), generator=generator).tolist())


def _shorter(share: float) -> Change:
    return lambda item: renewed(item, prefix=item.prefix[-max(1, round(share * len(item.prefix))) :])


def _begun(count: int) -> Change:
    def change(item: Passage) -> Passage:
        # At least half of the suffix is left to be written: one token alone would come up by chance.
        given = min(count, len(item.suffix) // 2)
        return renewed(item, prefix=(*item.prefix, *item.suffix[:given]), suffix=item.suffix[given:])

    return change


def _restyle(view: ModelView, style: Callable[[str], str]) -> Change:
    def change(item: Passage) -> Passage:
        start, rest = _opened(view, item.prefix)
        ids = (*start, *_tokens(view, style(decode(view.tokenizer, rest)))) or item.prefix
        return renewed(item, prefix=fitting(ids, item.suffix, view.context))

    return change


def _paraphrase(view: ModelView, at: int) -> Change:
    def change(item: Passage) -> Passage:
        told = _told(item)
        if not told:
            return item
        ids = (*_opened(view, item.prefix)[0], *_tokens(view, told[at % len(told)])) or item.prefix
        return renewed(item, prefix=fitting(ids, item.suffix, view.context))

    return change


def _opened(view: ModelView, prefix: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The start tokens a tokenizer sets in front, and the text after them."""
    special = set(getattr(view.tokenizer, "all_special_ids", ()))
    cut = next((at for at, token in enumerate(prefix) if token not in special), len(prefix))
    return tuple(prefix[:cut]), tuple(prefix[cut:])


def _tokens(view: ModelView, text: str) -> tuple[int, ...]:
    """The text's own tokens, without what the tokenizer sets before or behind it."""
    special = set(getattr(view.tokenizer, "all_special_ids", ()))
    return tuple(token for token in encode(view.tokenizer, text).ids if token < view.vocab and token not in special)


def _told(item: Passage) -> list[str]:
    told: Any = item.tags.get("paraphrases", ())
    return [text for text in told if isinstance(text, str) and text] if isinstance(told, list | tuple) else []
