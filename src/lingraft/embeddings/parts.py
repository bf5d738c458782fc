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
    """Old ids of one new token, the characters each spells, and where they come from: `subwords` or `dictionary`.

    A part that spells one byte of a three-byte character counts as a third of a character.
    """

    ids: list[int]
    characters: list[float]
    origin: str = "subwords"


def find_parts(
    texts: Sequence[str],
    decompositions: Sequence[Sequence[int]],
    dictionary: Mapping[str, str],
    encode: Callable[[str], list[int]],
    spelling: Callable[[int], bytes],
) -> list[Parts]:
    """Parts of every new token.

    Args:
        texts: the tokens' readable text, word-start space included.
        decompositions: their ids in the old tokenizer.
        dictionary: target-language term → old-language translation.
        encode: the old tokenizer on a term as it stands inside a sentence, with the space before it.
        spelling: the bytes that an old token stands for.
    """
    found = []
    for text, decomposition in zip(texts, decompositions, strict=True):
        translation = dictionary.get(text.strip(WORD_START))
        ids = encode(translation) if translation else list(decomposition)
        origin = "dictionary" if translation else "subwords"
        found.append(Parts(ids, count_characters([spelling(i) for i in ids]), origin))
    return found


def count_characters(spellings: Sequence[bytes]) -> list[float]:
    """Characters that each of a text's consecutive pieces spells, the bytes of one character sharing it equally.

    >>> count_characters([b"a ", "폐".encode()[:1], "폐".encode()[1:]])
    [2.0, 0.3333333333333333, 0.6666666666666666]
    """
    share_of_byte = [
        1 / len(char.encode(errors="surrogateescape"))
        for char in b"".join(spellings).decode(errors="surrogateescape")
        for _ in char.encode(errors="surrogateescape")
    ]
    counts, start = [], 0
    for spelling in spellings:
        counts.append(sum(share_of_byte[start : start + len(spelling)]))
        start += len(spelling)
    return counts


def first_translation(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Target-language term → translation; the first of several translations counts."""
    found: dict[str, str] = {}
    for term, translation in pairs:
        found.setdefault(term.strip(), translation.strip().lower())
    return found
