"""Continued BPE: learn merges over the base tokenizer's own output (Sennrich et al. 2016, arXiv 1508.07909,
started from a finished tokenizer's segmentation instead of from characters).

Why this cannot harm: the new merges rank below every old one, so text is first cut exactly as before, and
only then do some neighbours join. Why Hugging Face (ranked pairs) and SentencePiece (scored pieces) agree: a
stretch of text whose borders no merge has crossed goes through the same merges as it would alone, so a new
piece can only ever come about from the one pair that it was learnt from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from lingraft.errors import TokenizerError
from lingraft.progress import bar
from lingraft.tokenizer.count import count_characters, count_runs, count_units
from lingraft.tokenizer.load import BaseTokenizer
from lingraft.tokenizer.merges import merge_greedily
from lingraft.tokenizer.phrases import Sample, count_phrases, crosses_spaces, with_other_words
from lingraft.tokenizer.pieces import SPACE_MARK, Kind, to_bytes, wanted_characters


@dataclass(frozen=True)
class NewPiece:
    """A piece in the tokenizer's own spelling; a merge names the two pieces that it joins, a character none."""

    piece: str
    left: str | None
    right: str | None
    count: int
    kind: Literal["character", "merge"]


@dataclass(frozen=True)
class Learnt:
    """New pieces in the order in which they merge: characters first, then merges, frequent ones first."""

    pieces: list[NewPiece]


def learn(
    base: BaseTokenizer,
    texts: Iterable[tuple[str, float]],
    *,
    new_tokens: int,
    min_frequency: int = 2,
    scripts: frozenset[str] | None = None,
    max_piece_chars: int = 16,
    max_words: int = 4,
    characters_first: bool = False,
    nfc: bool = True,
) -> Learnt:
    """Learn at most `new_tokens` pieces from weighted texts, each with a weighted count of at least `min_frequency`.

    Two kinds compete for the places: characters that the base can only spell in bytes, and merges, each of which joins
    the neighbours most frequent at that point. A piece is worth the tokens that it saves: its count, times two for a
    character of three bytes. With `characters_first` characters go before all merges.

    Pieces hold letters of `scripts` only (Unicode script names; None = anything visible), and at most `max_piece_chars`
    characters. A space may stand in front and, where the base's pre-tokenizer lets merges cross it, between words, of
    which a piece holds at most `max_words`. `nfc`: see `count_units`.

    Raises TokenizerError when the texts yield no piece at all.
    """
    wanted = wanted_characters(scripts)
    sample = Sample() if max_words > 1 and crosses_spaces(base) else None
    units = count_units(base, sample.watch(texts) if sample else texts, nfc=nfc)
    characters = [
        NewPiece(char, None, None, round(count), "character")
        for char, count in islice(count_characters(base, units, wanted).items(), new_tokens)
        if count >= min_frequency
    ]
    known = frozenset(new.piece for new in characters)
    runs = count_runs(base, units, wanted, known)
    if sample:
        phrases = count_phrases(base, sample.texts(), wanted, known)
        runs = with_other_words(phrases, runs) if sample.rate < 1 else phrases
    taken = base.vocab.keys() | known

    def allowed(piece: str) -> bool:
        return piece not in taken and _is_whole(piece, base.kind, max_piece_chars) and _has_words(piece, max_words)

    with bar("learning merges", total=new_tokens, unit="pieces") as tick:
        merges = []
        for left, right, count in islice(merge_greedily(runs, min_frequency, allowed), new_tokens):
            merges.append(NewPiece(left + right, left, right, round(count), "merge"))
            tick(1)
    if not characters and not merges:
        raise TokenizerError(
            f"no new piece: nothing of {_names(scripts)} comes {min_frequency} times in {_length(units):,} characters "
            "of text; give more text, lower min_frequency, or check the scripts"
        )
    return Learnt(_best(characters, merges, new_tokens, characters_first))


def _best(
    characters: list[NewPiece], merges: list[NewPiece], new_tokens: int, characters_first: bool
) -> list[NewPiece]:
    """The pieces worth most, characters before merges, in the order learnt.

    A merge counts no more than its halves, so nothing is chosen without what it is made of.
    """

    def worth(new: NewPiece) -> float:
        if new.kind == "merge":
            return new.count
        return math.inf if characters_first else new.count * (len(new.piece.encode()) - 1)

    chosen = sorted([*characters, *merges], key=worth, reverse=True)[:new_tokens]
    return sorted(chosen, key=lambda new: new.kind)


def balance(sizes: Mapping[str, float], exponent: float) -> dict[str, float]:
    """Weights that keep small sources from being drowned: sizeᵉˣᵖᵒⁿᵉⁿᵗ is each one's share of the whole.

    At 1 each text counts as it is, at 0 each source counts the same. The weighted sizes add up to the real sizes' sum.

    >>> balance({"law": 900.0, "names": 100.0}, 0.5)
    {'law': 0.8333333333333334, 'names': 2.5}
    """
    present = {name: size for name, size in sizes.items() if size > 0}
    shares = {name: size**exponent for name, size in present.items()}
    scale = sum(present.values()) / sum(shares.values()) if present else 1.0
    return {name: scale * shares[name] / size for name, size in present.items()}


def _is_whole(piece: str, kind: Kind, max_chars: int) -> bool:
    """True for whole characters, at most `max_chars` of them, and for the first bytes of a single character.

    A byte-level piece must not begin or end inside a character and go on beyond it. Later bytes alone are
    refused too: unlike the first byte they say nothing of the script, and would cut other scripts' text anew.
    """
    spelling = to_bytes(piece, kind)
    try:
        return len(spelling.decode()) <= max_chars
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"


def _has_words(piece: str, max_words: int) -> bool:
    """True for at most `max_words` words, one space between them, none behind."""
    behind = piece[1:]
    return behind.count(SPACE_MARK) < max_words and not behind.endswith(SPACE_MARK) and SPACE_MARK * 2 not in piece


def _names(scripts: frozenset[str] | None) -> str:
    return "any script" if scripts is None else " or ".join(sorted(scripts))


def _length(units: Mapping[str, float]) -> int:
    return round(sum(len(unit) * weight for unit, weight in units.items()))
