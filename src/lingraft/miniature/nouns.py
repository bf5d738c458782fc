"""Names that inflect in `str.format` templates: `{value:a}` takes an article, `{value:을/를}` a particle."""

from __future__ import annotations

from collections.abc import Sequence

from lingraft.miniature.particles import attach
from lingraft.miniature.world import Language


class EnglishNoun(str):
    """An English name; the format `a` puts the indefinite article before it."""

    def __format__(self, spec: str) -> str:
        if spec != "a":
            return str(self)
        # No name that takes an article starts with a silent h or a short u: "a urologist" is right.
        return f"an {self}" if self[0] in "aeio" else f"a {self}"


class KoreanNoun(str):
    """A Korean name; the format is a particle such as `은/는`, which is attached in the fitting form."""

    def __format__(self, spec: str) -> str:
        return attach(str(self), spec) if spec else str(self)


def noun(name: str, language: Language) -> EnglishNoun | KoreanNoun:
    """Return `name` as a noun of `language`."""
    return EnglishNoun(name) if language == "en" else KoreanNoun(name)


def listing(names: Sequence[str], language: Language) -> EnglishNoun | KoreanNoun:
    """Return two or more names as one phrase: "a, b and c", or "가, 나, 다"."""
    if language == "ko":
        return KoreanNoun(", ".join(names))
    return EnglishNoun(", ".join(names[:-1]) + " and " + names[-1])


def sentence_case(text: str) -> str:
    """Return `text` with its first letter in upper case and the rest as it is (COVID-19, Crohn's disease)."""
    return text[:1].upper() + text[1:]
