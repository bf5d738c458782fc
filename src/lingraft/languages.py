"""Languages the package can name, prompt in and recognise the script of. A table; a language is one row.

`scripts` holds the first words of the Unicode names of the language's letters ("가" is HANGUL SYLLABLE GA),
so that the standard library alone can tell scripts apart.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    name: str  # in English, for people
    scripts: tuple[str, ...]
    answer_label: str  # what comes before the answer in a multiple-choice prompt


LANGUAGES = {
    "ar": Language("Arabic", ("ARABIC",), "الإجابة:"),
    "cs": Language("Czech", ("LATIN",), "Odpověď:"),
    "de": Language("German", ("LATIN",), "Antwort:"),
    "el": Language("Greek", ("GREEK",), "Απάντηση:"),
    "en": Language("English", ("LATIN",), "Answer:"),
    "es": Language("Spanish", ("LATIN",), "Respuesta:"),
    "fr": Language("French", ("LATIN",), "Réponse :"),
    "he": Language("Hebrew", ("HEBREW",), "תשובה:"),
    "hi": Language("Hindi", ("DEVANAGARI",), "उत्तर:"),
    "id": Language("Indonesian", ("LATIN",), "Jawaban:"),
    "it": Language("Italian", ("LATIN",), "Risposta:"),
    "ja": Language("Japanese", ("HIRAGANA", "KATAKANA", "CJK"), "答え:"),
    "ko": Language("Korean", ("HANGUL",), "정답:"),
    "nl": Language("Dutch", ("LATIN",), "Antwoord:"),
    "pl": Language("Polish", ("LATIN",), "Odpowiedź:"),
    "pt": Language("Portuguese", ("LATIN",), "Resposta:"),
    "ru": Language("Russian", ("CYRILLIC",), "Ответ:"),
    "sv": Language("Swedish", ("LATIN",), "Svar:"),
    "th": Language("Thai", ("THAI",), "คำตอบ:"),
    "tr": Language("Turkish", ("LATIN",), "Cevap:"),
    "uk": Language("Ukrainian", ("CYRILLIC",), "Відповідь:"),
    "vi": Language("Vietnamese", ("LATIN",), "Trả lời:"),
    "zh": Language("Chinese", ("CJK",), "答案:"),
}
LANGUAGE_NAMES = {code: language.name for code, language in LANGUAGES.items()}
_CODES = {name.lower(): code for code, name in LANGUAGE_NAMES.items()}


def language_of(code: str) -> Language:
    """The language's row; for a code without one, a row that names it by its code and knows no script."""
    return LANGUAGES.get(code, Language(code, (), "Answer:"))


def language_code(language: str) -> str:
    """The code of a language given by its English name in lower case, or else what was given."""
    return _CODES.get(language, language)


def in_scripts(letter: str, scripts: tuple[str, ...]) -> bool:
    """Whether one letter belongs to one of the scripts."""
    return unicodedata.name(letter, "").split(" ", 1)[0] in scripts
