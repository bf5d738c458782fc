"""Cut text into *units*: strings that the base segments on their own exactly as in their text.

Equal units need counting, storing and segmenting only once, so everything that learns from text starts here.
`cutter_of(base)` picks the way:

- SentencePiece BPE hardly pre-tokenizes, a "word" is the whole text. But BPE never joins two characters that
  stand side by side in no piece of the vocabulary, so a cut between them changes nothing. Before a space or a
  line break nearly every pair is of that kind. (Gemma 3 has one piece with a space inside, ">▁</", so ">" and a
  space stay together.)
- Byte-level BPE: a word of the pre-tokenizer is a unit. Pre-tokenizers are slow, so where their pattern is a known
  one, text is first cut into *chunks* at spaces where every such pattern begins a new word, equal chunks are
  counted once, and the pre-tokenizer sees each distinct chunk once.
- Anything else goes through the base's own normalizer and pre-tokenizer, text by text: slower, equally exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import pyarrow as pa
import pyarrow.compute as pc
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from lingraft.tokenizer.load import BaseTokenizer
from lingraft.tokenizer.pieces import SPACE_MARK

# Stands between texts and where text is to be cut; `_HIDDEN` stand for spaces and line breaks that begin no unit.
# They are halves of surrogate pairs, which no text that UTF-8 can encode holds.
CUT = "\ud800"
_HIDDEN = {" ": "\ud801", "\n": "\ud802"}

_REPLACE_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
_PREPEND_SPACE = {"type": "Prepend", "prepend": SPACE_MARK}

# Split patterns whose words hold a space only in front or among other white space, and which look ahead from
# white space only: Qwen 2 to 3, Llama 3. (GPT-2's, the third, is built into ByteLevel.)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_KNOWN_PATTERNS = {_CONTRACTION + number + _REST for number in (r"\p{N}", r"\p{N}{1,3}")}

# There a space between two visible characters always begins a word: none holds a space after something visible,
# and nothing to the left of the cut looks past it.
_LONE_SPACE = re.compile(r"(?<=\S) (?=\S)")


class Cutter(Protocol):
    """Two stages, so that what is slow is done once for equal chunks. Can be pickled."""

    cuts_units: ClassVar[bool]  # chunks are units already

    def cut(self, texts: Sequence[str]) -> pa.Array:
        """The chunks of all texts in order, as UTF-8 in an Arrow array; empty ones mean nothing."""

    def units(self, chunks: dict[str, int]) -> dict[str, int]:
        """The units of counted chunks with their counts, spelled in the tokenizer's alphabet ("▁가", "ìĿ´")."""


@lru_cache(maxsize=1)
def cutter_of(base: BaseTokenizer) -> Cutter:
    """The fastest exact cutter for a tokenizer."""
    normalizer, pre_tokenizer = base.json.get("normalizer"), base.json.get("pre_tokenizer")
    if base.kind == "byte_level":
        parts = base.tokenizer.normalizer, base.tokenizer.pre_tokenizer
        known = normalizer in (None, {"type": "NFC"}) and _is_known_byte_level(pre_tokenizer)
        return ByteLevelCutter(*parts) if known else WordCutter(*parts, together=None)
    together = _pairs_in_pieces(base.vocab)
    if normalizer == _REPLACE_SPACE and (pre_tokenizer is None or _splits_at(" ", pre_tokenizer)):
        return SentencePieceCutter(together, add_space="never")
    if normalizer == {"type": "Sequence", "normalizers": [_PREPEND_SPACE, _REPLACE_SPACE]} and pre_tokenizer is None:
        return SentencePieceCutter(together, add_space="always")
    if normalizer is None and pre_tokenizer and _is_whole_metaspace(pre_tokenizer):
        never = pre_tokenizer["prepend_scheme"] == "never"
        return SentencePieceCutter(together, add_space="never" if never else "unless there")
    return WordCutter(base.tokenizer.normalizer, base.tokenizer.pre_tokenizer, together)


def _splits_at(string: str, pre_tokenizer: dict[str, Any]) -> bool:
    """True for a split at a string, which after normalisation no text holds."""
    return pre_tokenizer["type"] == "Split" and pre_tokenizer["pattern"] == {"String": string}


def _is_whole_metaspace(pre_tokenizer: dict[str, Any]) -> bool:
    """True where spaces become "▁" and the text stays whole."""
    spaces = pre_tokenizer["type"] == "Metaspace" and pre_tokenizer["replacement"] == SPACE_MARK
    return spaces and pre_tokenizer.get("split") is False


def _is_known_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return True
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern in _KNOWN_PATTERNS
    return False


def _pairs_in_pieces(vocab: Iterable[str]) -> tuple[str, ...]:
    """Every pair of neighbours in a piece whose second is a space (written as such) or a line break."""
    pieces = CUT.join(vocab).replace(SPACE_MARK, " ")
    return tuple(sorted(set(re.findall(f"(?=([^{CUT}][ \n]))", pieces))))


def _cut_before_marks(texts: Iterable[str], together: Sequence[str]) -> pa.Array:
    """Units of SentencePiece texts: cut before spaces and line breaks, but not between the pairs in `together`.

    Plain replacements in one long string are several times as fast as a regular expression.
    """
    joined = CUT.join(texts).replace(SPACE_MARK, " ")
    for pair in together:
        joined = joined.replace(pair, pair[0] + _HIDDEN[pair[1]])
    # In a run of spaces matches overlap: a hidden one may hide the next.
    overlaps = {
        _HIDDEN[pair[0]] + pair[1]: _HIDDEN[pair[0]] + _HIDDEN[pair[1]] for pair in together if pair[0] in _HIDDEN
    }
    while found := [overlap for overlap in overlaps if overlap in joined]:
        for overlap in found:
            joined = joined.replace(overlap, overlaps[overlap])
    joined = joined.replace(" ", CUT + SPACE_MARK).replace("\n", CUT + "\n")
    for mark, hidden in ((SPACE_MARK, _HIDDEN[" "]), ("\n", _HIDDEN["\n"])):
        joined = joined.replace(hidden, mark)
    return _split(joined)


def _split(joined: str) -> pa.Array:
    """The strings between the cuts, as an Arrow array: Arrow counts equal strings without making Python objects."""
    text = pa.array([joined.encode("utf-8", "surrogatepass")], pa.large_binary())
    return pc.split_pattern(text, pattern=CUT.encode("utf-8", "surrogatepass")).flatten()


@dataclass(frozen=True)
class SentencePieceCutter:
    """For texts that are normalised by writing spaces as "▁", perhaps with one more in front."""

    together: tuple[str, ...]
    add_space: str  # "never", "always" or "unless there"
    cuts_units: ClassVar[bool] = True

    def cut(self, texts: Sequence[str]) -> pa.Array:
        if self.add_space != "never":
            texts = [self._with_space(text) for text in texts if text]
        return _cut_before_marks(texts, self.together)

    def _with_space(self, text: str) -> str:
        there = self.add_space == "unless there" and text.startswith((" ", SPACE_MARK))
        return text if there else SPACE_MARK + text

    def units(self, chunks: dict[str, int]) -> dict[str, int]:
        return chunks


@dataclass(frozen=True)
class ByteLevelCutter:
    """For pre-tokenizers of a known pattern: chunks are raw text, units come from the base's own parts.

    NFC, where it is the normalizer, does not reach across a cut: a space composes with nothing before it.
    """

    normalizer: Normalizer | None
    pre_tokenizer: PreTokenizer
    cuts_units: ClassVar[bool] = False

    def cut(self, texts: Sequence[str]) -> pa.Array:
        return _split(CUT.join(_LONE_SPACE.sub(CUT + " ", text) for text in texts))

    def units(self, chunks: dict[str, int]) -> dict[str, int]:
        units: dict[str, int] = {}
        for chunk, count in chunks.items():
            for unit in _words(chunk, self.normalizer, self.pre_tokenizer):
                units[unit] = units.get(unit, 0) + count
        return units


@dataclass(frozen=True)
class WordCutter:
    """For any other tokenizer: the base's own normalizer and pre-tokenizer run over every text.

    Words of a SentencePiece tokenizer (`together` is not None) are cut further at spaces and line breaks.
    """

    normalizer: Normalizer | None
    pre_tokenizer: PreTokenizer | None
    together: tuple[str, ...] | None
    cuts_units: ClassVar[bool] = True

    def cut(self, texts: Sequence[str]) -> pa.Array:
        words = [word for text in texts for word in _words(text, self.normalizer, self.pre_tokenizer)]
        return _split(CUT.join(words)) if self.together is None else _cut_before_marks(words, self.together)

    def units(self, chunks: dict[str, int]) -> dict[str, int]:
        return chunks


def _words(text: str, normalizer: Normalizer | None, pre_tokenizer: PreTokenizer | None) -> list[str]:
    normal = normalizer.normalize_str(text) if normalizer else text
    return [word for word, _ in pre_tokenizer.pre_tokenize_str(normal)] if pre_tokenizer else [normal]
