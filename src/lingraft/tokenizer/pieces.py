"""How the two kinds of BPE spell text: SentencePiece marks a space as "▁" and an unknown byte as "<0xEA>",
byte-level BPE writes every byte as one printable character (GPT-2's alphabet)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Literal

Kind = Literal["sentencepiece", "byte_level"]

SPACE_MARK = "▁"
# Pieces come back millions of times while counting; more than any vocabulary holds.
_CACHE = 1 << 20
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_level_alphabet()


@lru_cache(maxsize=_CACHE)
def is_byte_piece(piece: str) -> bool:
    """True for SentencePiece's byte-fallback pieces, `<0x00>` to `<0xFF>`."""
    return _BYTE_PIECE.fullmatch(piece) is not None


@lru_cache(maxsize=_CACHE)
def to_bytes(piece: str, kind: Kind) -> bytes:
    """The bytes of text that a piece stands for. Added tokens of a byte-level tokenizer stand for their own text."""
    if kind == "sentencepiece":
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace(SPACE_MARK, " ").encode()
    if all(char in BYTE_OF for char in piece):
        return bytes(BYTE_OF[char] for char in piece)
    return piece.encode()


def readable(piece: str, kind: Kind) -> str:
    """A piece as a person reads it: spaces as "▁", bytes that are no whole character as "<EA>".

    >>> readable("ìĿ´", "byte_level"), readable("<0xEA>", "sentencepiece")
    ('이', '<EA>')
    """
    text = to_bytes(piece, kind).decode("utf-8", errors="surrogateescape").replace(" ", SPACE_MARK)
    return "".join(f"<{ord(char) - 0xDC00:02X}>" if "\udc80" <= char <= "\udcff" else char for char in text)


# Unicode's scripts whose letters' names begin with the script's own name, and "Han", whose do not.
_SCRIPTS = """
Adlam Ahom Arabic Armenian Balinese Bamum Batak Bengali Bopomofo Buginese Buhid Chakma Cham Cherokee Coptic Cyrillic
Deseret Devanagari Ethiopic Georgian Glagolitic Gothic Grantha Greek Gujarati Gurmukhi Han Hangul Hanunoo Hebrew
Hiragana Javanese Kaithi Kannada Katakana Kharoshthi Khmer Khojki Khudawadi Lao Latin Lepcha Limbu Lisu Malayalam
Mandaic Miao Mongolian Multani Myanmar Newa Nko Ogham Oriya Osage Rejang Runic Samaritan Saurashtra Sharada Siddham
Sinhala Sogdian Sundanese Syriac Tagalog Tagbanwa Takri Tamil Tangut Telugu Thaana Thai Tibetan Tifinagh Tirhuta
Ugaritic Vai Wancho Yi
"""
SCRIPTS = tuple(_SCRIPTS.split())
WHY_NO_UNITS = (
    "Latin units such as mg/dL can't be learnt alone: BPE merges know no context, so a merge that builds one in Korean "
    "text joins the same letters in English text, whose tokens must not change"
)


def wanted_characters(scripts: frozenset[str] | None) -> Callable[[str], bool]:
    """A test of one character: is it a letter (or combining mark) of one of the scripts?

    Scripts go by their Unicode names, those in `SCRIPTS` ("Hangul", "Cyrillic", "Han" for Chinese characters,
    Hanja too). None wants every visible character, digits and punctuation included.

    Units of measurement in Latin letters (mg/dL, mmHg) are no script and can't be had: see `WHY_NO_UNITS`. "Latin"
    itself is for target languages written in it; no old language written in it then keeps its tokens.
    """
    prefixes = tuple(("CJK" if script == "Han" else script.upper()) + " " for script in scripts or ())

    @cache
    def wanted(char: str) -> bool:
        category = unicodedata.category(char)
        if scripts is None:
            return category[0] not in "CZ" and char != SPACE_MARK
        # Python's standard library has no script property, but a letter's name begins with its script.
        return category[0] in "LM" and unicodedata.name(char, "").startswith(prefixes)

    return wanted
