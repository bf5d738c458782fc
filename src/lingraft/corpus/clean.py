"""Clean text, and decide what to keep: each filter gives the reason to drop a text, or None to keep it."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from lingraft.corpus.files import closest
from lingraft.errors import CorpusError

Filter = Callable[[str], str | None]

_LINE_ENDS = re.compile("\r\n?|[\v\f\x85]")
# Control characters but tab and newline, byte order marks inside the text, halves of surrogate pairs.
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ud800-\udfff]+")
_TRAILING_SPACE = re.compile(r"[^\S\n]+$", re.MULTILINE)


def normalise(text: str) -> str:
    """NFC, newlines as line ends, no control characters, no space at line ends or empty lines around.

    Nothing else is touched: width, quotation marks, indentation and inner blank lines are the text's own.
    """
    text = _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))
    return _TRAILING_SPACE.sub("", unicodedata.normalize("NFC", text)).strip("\n")


_HAN = r"\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"

# The letters and marks of each script, as the inside of a regular expression class, and who writes in it.
_SCRIPTS = (
    (
        r"A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff",
        "af ca cs da de en es et eu fi fr hr hu id is it lt lv ms nl no pl pt ro sk sl sq sv sw tl tr vi",
    ),
    (r"\u0400-\u052f", "be bg kk ky mk mn ru sr uk"),
    (
        r"\u0620-\u065f\u066e-\u06d3\u06d5-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufefc",
        "ar fa ps ur",
    ),
    (r"\u0900-\u0963\u0971-\u097f", "hi mr ne"),
    (r"\u0370-\u03ff\u1f00-\u1fff", "el"),
    (r"\u0531-\u0587", "hy"),
    (r"\u0591-\u05f4", "he"),
    (r"\u0980-\u09e5\u09f0-\u09ff", "bn"),
    (r"\u0a01-\u0a5e", "pa"),
    (r"\u0a81-\u0ae5", "gu"),
    (r"\u0b82-\u0bd7", "ta"),
    (r"\u0c00-\u0c63", "te"),
    (r"\u0c80-\u0ce3", "kn"),
    (r"\u0d00-\u0d63", "ml"),
    (r"\u0e01-\u0e3a\u0e40-\u0e4e", "th"),
    (r"\u0e81-\u0ecd", "lo"),
    (r"\u1000-\u103f", "my"),
    (r"\u10a0-\u10ff\u1c90-\u1cbf", "ka"),
    (r"\u1780-\u17d3", "km"),
    (r"\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7a3\ud7b0-\ud7fb", "ko"),
    (r"\u3041-\u3096\u3099-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f", "ja"),
    (_HAN, "zh"),
)
SCRIPTS = {language: letters for letters, languages in _SCRIPTS for language in languages.split()}
COMPANIONS = {"ko": _HAN, "ja": _HAN}


@cache
def _letter_patterns(language: str) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Runs of the language's own script, of its companion script, and of any other letters."""
    if language not in SCRIPTS:
        raise CorpusError(
            f"the script of language '{language}' is unknown{closest(language, SCRIPTS)}; "
            f"known are {', '.join(sorted(SCRIPTS))}"
        )
    own, companion = SCRIPTS[language], COMPANIONS.get(language, "")
    nothing = "(?!)"
    return (
        re.compile(f"[{own}]+"),
        re.compile(f"[{companion}]+" if companion else nothing),
        re.compile(rf"[^\W\d_{own}{companion}]+"),
    )


def script_share(text: str, language: str) -> float:
    """The share of the text's letters in the script of `language`, 0 to 1; 0 if there are no letters.

    Chinese characters count as Korean or Japanese up to the number of Hangul or kana beside them, so that
    Chinese passes for neither. Languages of one script are not told apart. Raises CorpusError for an unknown
    language.
    """
    own, companion, other = (sum(map(len, pattern.findall(text))) for pattern in _letter_patterns(language))
    letters = own + companion + other
    return (own + min(companion, own)) / letters if letters else 0.0


def is_empty(text: str) -> str | None:
    return None if text.strip() else "empty"


def shorter_than(min_characters: int) -> Filter:
    return lambda text: "too short" if len(text) < min_characters else None


def longer_than(max_characters: int) -> Filter:
    return lambda text: "too long" if len(text) > max_characters else None


def other_language_than(language: str, min_share: float) -> Filter:
    """Drops text of which less than `min_share` of the letters are in the script of `language`."""
    _letter_patterns(language)  # an unknown language is told before anything is read
    return lambda text: "not the language" if script_share(text, language) < min_share else None


def without_keywords(keywords: Sequence[str]) -> Filter:
    """Drops text that holds none of the keywords, in whatever case."""
    pattern = re.compile("|".join(map(re.escape, keywords)), re.IGNORECASE)
    return lambda text: None if pattern.search(text) else "no keyword"


class Duplicates:
    """Drops text seen before, told by 128-bit hashes (about 100 bytes of memory for each text kept)."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def __call__(self, text: str) -> str | None:
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest in self._seen:
            return "duplicate"
        self._seen.add(digest)
        return None


def reason_to_drop(text: str, filters: Iterable[Filter]) -> str | None:
    """The reason of the first filter that drops the text, or None."""
    return next((reason for keep in filters if (reason := keep(text))), None)
