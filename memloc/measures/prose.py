"""What free text is like: how varied its words are, how close it is to other text, whether it names an answer."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

WORD = re.compile(r"\w+|[^\w\s]")
"""A run of letters and digits, or one mark."""

ARTICLES = frozenset({"a", "an", "the"})


def words(text: str) -> list[str]:
    """Words and marks of `text`, in order."""
    return WORD.findall(text)


def ngram_entropy(text: str, sizes: Sequence[int] = (2, 3), weights: Sequence[float] = (2 / 3, 4 / 3)) -> float:
    """Weighted mean of the entropies of a text's n-grams of words, in bits; 0 for text shorter than an n-gram.

    Healthy prose of 100 tokens has about 6 bits, text that repeats itself below 5; papers print it times 100.

    Source: Zhang et al. 2018, arXiv:1809.05972, with the weights of Meng et al. 2022, arXiv:2202.05262.
    """
    said = words(text)
    found = [_entropy(zip(*(said[start:] for start in range(size)), strict=False)) for size in sizes]
    return sum(weight * bits for weight, bits in zip(weights, found, strict=True)) / len(sizes)


def _entropy(grams: Iterable[tuple[str, ...]]) -> float:
    counts = Counter(grams).values()
    total = sum(counts)
    return -sum(count / total * math.log2(count / total) for count in counts) if total else 0.0


def inverse_frequencies(texts: Sequence[str]) -> dict[str, float]:
    """log((1 + n) / (1 + texts with the word)) + 1 for every word (lower case) of `texts`."""
    held = Counter(word for text in texts for word in set(_terms(text)))
    return {word: math.log((1 + len(texts)) / (1 + count)) + 1 for word, count in held.items()}


def similarity(first: str, second: str, inverse: Mapping[str, float]) -> float:
    """Cosine of two texts' TF-IDF vectors over the words of `inverse`, in [0, 1]; 0 where one holds none of them."""
    one, two = (_vector(text, inverse) for text in (first, second))
    norm = math.sqrt(sum(value**2 for value in one.values()) * sum(value**2 for value in two.values()))
    return sum(value * two.get(word, 0.0) for word, value in one.items()) / norm if norm else 0.0


def _vector(text: str, inverse: Mapping[str, float]) -> dict[str, float]:
    return {word: count * inverse[word] for word, count in Counter(_terms(text)).items() if word in inverse}


def _terms(text: str) -> list[str]:
    return [word for word in words(text.lower()) if word[0].isalnum()]


def plain(text: str) -> tuple[str, ...]:
    """Words in lower case, without marks, accents and articles: what two spellings of one answer share."""
    bare = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return tuple(word for word in _terms(bare) if word not in ARTICLES)


def names(text: str, answers: Iterable[str]) -> bool:
    """Whether `text` holds one of `answers`, as whole words next to each other; see `plain`."""
    said = plain(text)
    for answer in answers:
        wanted = plain(answer)
        width = len(wanted)
        if width and any(said[at : at + width] == wanted for at in range(len(said) - width + 1)):
            return True
    return False
