"""From text to weighted runs of base tokens, the input of continued BPE.

1. Text is cut into *units*, strings that the base segments on their own exactly as in their text (cut.py), and
   equal units are counted once, on all cores and in bounded memory (tally.py).
2. Each unit is segmented once by the base tokenizer itself.
3. Its tokens are cut into *runs*: neighbours that new pieces may join. A run holds wanted characters only,
   and at most one space, in front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from lingraft.progress import track
from lingraft.tokenizer.cut import cutter_of
from lingraft.tokenizer.load import BaseTokenizer
from lingraft.tokenizer.pieces import SPACE_MARK, is_byte_piece, to_bytes
from lingraft.tokenizer.tally import Counting, tally

Wanted = Callable[[str], bool]
Run = tuple[str, ...]

# Enough units for the tokenizer's threads to be busy, few enough to keep the encodings small.
SEGMENT_BATCH = 10_000
# Units kept in memory. 3 million take 0.7 GB; rarer ones of a large corpus cannot reach any useful frequency.
MAX_UNITS = 3_000_000


def count_units(
    base: BaseTokenizer,
    texts: Iterable[tuple[str, float]],
    *,
    nfc: bool = True,
    workers: int | None = None,
    max_units: int = MAX_UNITS,
    folder: Path | None = None,
) -> dict[str, float]:
    """Weighted counts of units, spelled in the tokenizer's own alphabet.

    One text is one document and counts `weight` times (rounded to a multiple of 2**-24). Added tokens inside
    a text are counted as ordinary text.

    nfc: count composed what a text writes decomposed (Korean in Jamo, as macOS stores it). This changes what is
        learnt from, never how text is tokenised: new pieces are not found in text that stays decomposed.
    workers, max_units, folder: see `lingraft.tokenizer.tally.tally`.
    """
    counting = Counting(cutter_of(base), nfc)
    return tally(texts, counting, max_units=max_units, workers=workers, folder=folder)


def count_characters(base: BaseTokenizer, units: Mapping[str, float], wanted: Wanted) -> dict[str, float]:
    """Weighted counts of the wanted characters that the base spells only in bytes, most frequent first.

    Empty for byte-level BPE, where bytes are ordinary pieces that merges can join.
    """
    if base.kind == "byte_level":
        return {}
    counts: dict[str, float] = {}
    for unit, weight in units.items():
        for char in unit:
            if wanted(char) and char not in base.vocab:
                counts[char] = counts.get(char, 0) + weight
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def count_runs(
    base: BaseTokenizer, units: Mapping[str, float], wanted: Wanted, characters: frozenset[str]
) -> dict[Run, float]:
    """Weighted counts of the runs of two or more tokens; `characters` are new pieces in place of their bytes."""
    split = _sentencepiece_runs if base.kind == "sentencepiece" else _byte_level_runs
    useful = [unit for unit in units if any(map(wanted, _text_of(unit, base)))]
    runs: dict[Run, float] = {}
    starts = range(0, len(useful), SEGMENT_BATCH)
    for start in track(starts, "segmenting words", total=len(starts)):
        batch = useful[start : start + SEGMENT_BATCH]
        for unit, ids in zip(batch, base.segment(batch), strict=True):
            for run in split([base.piece_of[i] for i in ids], wanted, characters):
                if len(run) > 1:
                    runs[run] = runs.get(run, 0) + units[unit]
    return runs


def _text_of(unit: str, base: BaseTokenizer) -> str:
    return unit if base.kind == "sentencepiece" else to_bytes(unit, base.kind).decode()


def _sentencepiece_runs(tokens: list[str], wanted: Wanted, characters: frozenset[str]) -> Iterator[Run]:
    """Byte pieces never join a run: Hugging Face could merge them, SentencePiece cannot."""
    run: list[str] = []
    for token in spell_characters(tokens, characters):
        if token.startswith(SPACE_MARK) or not all(map(wanted, token)) or is_byte_piece(token):
            yield tuple(run)
            run = []
        if all(map(wanted, token.removeprefix(SPACE_MARK))) and not is_byte_piece(token):
            run.append(token)
    yield tuple(run)


def spell_characters(tokens: list[str], characters: frozenset[str]) -> Iterator[str]:
    """The tokens, with the byte pieces of each new character replaced by that character."""
    position = 0
    while position < len(tokens):
        width = 1
        if is_byte_piece(tokens[position]):
            width = _utf8_width(to_bytes(tokens[position], "sentencepiece")[0])
            char = b"".join(to_bytes(t, "sentencepiece") for t in tokens[position : position + width]).decode()
            yield from [char] if char in characters else tokens[position : position + width]
        else:
            yield tokens[position]
        position += width


def _byte_level_runs(tokens: list[str], wanted: Wanted, characters: frozenset[str]) -> Iterator[Run]:
    """A token may hold part of a character; it joins a run if every character that it touches is wanted."""
    spellings = [to_bytes(token, "byte_level") for token in tokens]
    is_wanted = [wanted(char) for char in b"".join(spellings).decode() for _ in char.encode()]
    run: list[str] = []
    start = 0
    for token, spelling in zip(tokens, spellings, strict=True):
        spaced = spelling.startswith(b" ")
        joins = all(is_wanted[start + spaced : start + len(spelling)])
        start += len(spelling)
        if spaced or not joins:
            yield tuple(run)
            run = []
        if joins:
            run.append(token)
    yield tuple(run)


def _utf8_width(lead_byte: int) -> int:
    """Bytes of the UTF-8 character that begins with this byte."""
    return 1 if lead_byte < 0xC0 else 2 if lead_byte < 0xE0 else 3 if lead_byte < 0xF0 else 4
