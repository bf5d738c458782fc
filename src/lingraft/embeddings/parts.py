"""What each new token is made of: its old segmentation, or its translation's.

A token whose text (without the word-start mark) is a term of the bilingual dictionary takes the old tokens of the
translation; every other token takes the old tokens of its own text. The initialisation rules then treat both alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

WORD_START = "▁ "


@dataclass(frozen=True)
class Parts:
    """Old ids of one new token, the bytes each spells, and where they come from: `subwords` or `dictionary`."""

    ids: list[int]
    lengths: list[int]
    origin: str


def find_parts(
    texts: Sequence[str],
    decompositions: Sequence[Sequence[int]],
    dictionary: Mapping[str, str],
    encode: Callable[[str], list[int]],
    byte_length: Callable[[int], int],
) -> list[Parts]:
    """Parts of every new token.

    Args:
        texts: the tokens' readable text, word-start space included.
        decompositions: their ids in the old tokenizer.
        dictionary: target-language term → old-language translation.
        encode: the old tokenizer on a term as it stands inside a sentence, with the space before it.
        byte_length: bytes that an old token spells.
    """
    found = []
    for text, decomposition in zip(texts, decompositions, strict=True):
        translation = dictionary.get(text.strip(WORD_START))
        if translation:
            ids, origin = encode(translation), "dictionary"
        else:
            ids, origin = list(decomposition), "subwords"
        found.append(Parts(ids, [max(byte_length(i), 1) for i in ids], origin))
    return found


def first_translation(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Target-language term → translation; the first of several translations counts."""
    found: dict[str, str] = {}
    for term, translation in pairs:
        found.setdefault(term.strip(), translation.strip().lower())
    return found
