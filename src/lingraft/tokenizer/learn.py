"""Continued BPE: learn merges over the base tokenizer's own output (Sennrich et al. 2016, arXiv 1508.07909,
started from a finished tokenizer's segmentation instead of from characters).

Why this cannot harm: the new merges rank below every old one, so text is first cut exactly as before, and
only then do some neighbours join. Why Hugging Face (ranked pairs) and SentencePiece (scored pieces) agree: a
stretch of text whose borders no merge has crossed goes through the same merges as it would alone, so a new
piece can only ever come about from the one pair that it was learnt from.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Literal

from lingraft.errors import TokenizerError
from lingraft.progress import bar
from lingraft.tokenizer.count import Run, count_characters, count_runs, count_units
from lingraft.tokenizer.load import BaseTokenizer
from lingraft.tokenizer.pieces import Kind, to_bytes, wanted_characters

Pair = tuple[str, str]


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
) -> Learnt:
    """Learn at most `new_tokens` pieces from weighted texts.

    First come the characters that the base can only spell in bytes, then merges, each of which joins the
    neighbours most frequent at that point. All have a weighted count of at least `min_frequency`. Pieces hold
    letters of `scripts` only (Unicode script names; None = anything visible), behind at most one space, and
    at most `max_piece_chars` characters with the space.

    Raises TokenizerError when the texts yield no piece at all.
    """
    wanted = wanted_characters(scripts)
    units = count_units(base, texts)
    characters = [
        NewPiece(char, None, None, round(count), "character")
        for char, count in islice(count_characters(base, units, wanted).items(), new_tokens)
        if count >= min_frequency
    ]
    runs = count_runs(base, units, wanted, frozenset(new.piece for new in characters))
    taken = base.vocab.keys() | {new.piece for new in characters}

    def allowed(piece: str) -> bool:
        return piece not in taken and _is_whole(piece, base.kind, max_piece_chars)

    budget = new_tokens - len(characters)
    with bar("learning merges", total=budget, unit="pieces") as tick:
        merges = []
        for merge in islice(merge_greedily(runs, min_frequency, allowed), budget):
            merges.append(merge)
            tick(1)
    if not characters and not merges:
        raise TokenizerError(
            f"no new piece: nothing of {_names(scripts)} comes {min_frequency} times in {_length(units):,} characters "
            "of text; give more text, lower min_frequency, or check the scripts"
        )
    return Learnt(characters + merges)


def merge_greedily(
    runs: Mapping[Run, float], min_frequency: float, allowed: Callable[[str], bool]
) -> Iterator[NewPiece]:
    """Yield merges, the most frequent pair first (ties: the pair that sorts first), until none is frequent enough.

    Pair counts are kept up to date run by run. The heap holds counts as they were when pushed: a pair's count
    only falls once its pieces exist, so a popped count that is out of date is pushed again with the new one.
    """
    words = [list(run) for run in runs]
    weights = list(runs.values())
    counts: dict[Pair, float] = {}
    words_with: dict[Pair, set[int]] = {}
    for index, word in enumerate(words):
        _add_pairs(word, index, weights[index], counts, words_with)
    made: set[str] = set()

    def entries(pairs: Iterable[Pair]) -> Iterator[tuple[float, Pair]]:
        for pair in pairs:
            if counts[pair] >= min_frequency and allowed(pair[0] + pair[1]):
                yield -counts[pair], pair

    heap = list(entries(counts))
    heapq.heapify(heap)
    while heap:
        negative, pair = heapq.heappop(heap)
        count = counts.get(pair, 0)
        if count != -negative:
            if count >= min_frequency:
                heapq.heappush(heap, (-count, pair))
            continue
        piece = pair[0] + pair[1]
        if piece in made:
            continue
        made.add(piece)
        born: dict[Pair, None] = {}
        for index in sorted(words_with[pair]):
            for old in pairwise(words[index]):
                counts[old] -= weights[index]
            words[index] = _join(words[index], pair, piece)
            _add_pairs(words[index], index, weights[index], counts, words_with)
            born.update((new, None) for new in pairwise(words[index]) if piece in new)
        for entry in entries(born):
            heapq.heappush(heap, entry)
        yield NewPiece(piece, *pair, round(count), "merge")


def _add_pairs(
    word: list[str], index: int, weight: float, counts: dict[Pair, float], words_with: dict[Pair, set[int]]
) -> None:
    for pair in pairwise(word):
        counts[pair] = counts.get(pair, 0) + weight
        words_with.setdefault(pair, set()).add(index)


def _join(word: list[str], pair: Pair, piece: str) -> list[str]:
    """The word with the pair joined wherever it stands, from the left: a a a → aa a."""
    joined: list[str] = []
    position = 0
    while position < len(word):
        found = tuple(word[position : position + 2]) == pair
        joined.append(piece if found else word[position])
        position += 1 + found
    return joined


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


def _names(scripts: frozenset[str] | None) -> str:
    return "any script" if scripts is None else " or ".join(sorted(scripts))


def _length(units: Mapping[str, float]) -> int:
    return round(sum(len(unit) * weight for unit, weight in units.items()))
