"""Runs that go on across spaces, from which pieces of several words are learnt (SuperBPE, arXiv 2503.13423).

Phrases hardly repeat, so unlike words they cannot be counted for a whole corpus in bounded memory. Streams of up to
`SAMPLE_CHARACTERS` are kept whole. A longer one is sampled evenly: what goes on within words stays exact, and what goes
on between them is estimated.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, pairwise

from lingraft.progress import track
from lingraft.tokenizer.count import Run, Wanted, spell_characters
from lingraft.tokenizer.cut import SentencePieceCutter, cutter_of
from lingraft.tokenizer.load import BaseTokenizer
from lingraft.tokenizer.pieces import SPACE_MARK, is_byte_piece

SAMPLE_CHARACTERS = 20_000_000
# A text longer than this is sampled in parts, cut before line breaks.
BLOCK_CHARACTERS = 100_000
# Cut at once: enough for the cutter to work at speed.
BATCH_CHARACTERS = 1_000_000

Texts = Iterable[tuple[str, float]]


class Sample:
    """An even sample of a stream that passes through, decided by position: the same stream gives the same sample."""

    def __init__(self, limit: int = SAMPLE_CHARACTERS) -> None:
        self.limit = limit
        self.rate = 1.0
        self._kept: list[tuple[float, str, float]] = []
        self._characters = 0

    def watch(self, texts: Texts) -> Iterator[tuple[str, float]]:
        """The texts, unchanged; on the way some are kept."""
        number = 0
        for text, weight in texts:
            for block in _blocks(text):
                number += 1
                place = zlib.crc32(number.to_bytes(8, "little")) / 2**32
                if place < self.rate:
                    self._kept.append((place, block, weight))
                    self._characters += len(block)
            while self._characters > self.limit:
                self.rate /= 2
                self._kept = [kept for kept in self._kept if kept[0] < self.rate]
                self._characters = sum(len(block) for _, block, _ in self._kept)
            yield text, weight

    def texts(self) -> list[tuple[str, float]]:
        """What was kept, with weights that make up for what was not."""
        return [(block, weight / self.rate) for _, block, weight in self._kept]


def _blocks(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > BLOCK_CHARACTERS:
        end = text.find("\n", start + BLOCK_CHARACTERS)
        if end < 0:
            break
        yield text[start:end]
        start = end
    yield text[start:]


def crosses_spaces(base: BaseTokenizer) -> bool:
    """Whether merges may join what stands on both sides of a space: whether no pre-tokenizer cuts there."""
    return isinstance(cutter_of(base), SentencePieceCutter)


def count_phrases(
    base: BaseTokenizer, texts: Iterable[tuple[str, float]], wanted: Wanted, characters: frozenset[str]
) -> dict[Run, float]:
    """Weighted counts of the runs of wanted tokens, spaces included; `characters` as in `count_runs`."""
    cutter = cutter_of(base)
    stretches: dict[bytes, tuple[Run, ...]] = {b"": ((),)}
    phrases: dict[Run, float] = {}
    for batch, weight in track(list(_batches(texts)), "reading phrases"):
        # no phrase goes on across a line break, so one ends every text
        chunks = cutter.cut([part for text in batch for part in (text, "\n")]).dictionary_encode()
        distinct = chunks.dictionary.to_pylist()
        fresh = [chunk for chunk in distinct if chunk not in stretches]
        for chunk, ids in zip(fresh, base.segment([chunk.decode() for chunk in fresh]), strict=True):
            stretches[chunk] = tuple(_stretches([base.piece_of[i] for i in ids], wanted, characters))
        open_end: list[str] = []
        for number in chunks.indices.to_pylist():
            first, *others = stretches[distinct[number]]
            open_end.extend(first)
            for stretch in others:
                if len(open_end) > 1:
                    phrase = tuple(open_end)
                    phrases[phrase] = phrases.get(phrase, 0.0) + weight
                open_end = list(stretch)
    return phrases


def _batches(texts: Iterable[tuple[str, float]]) -> Iterator[tuple[list[str], float]]:
    """Neighbouring texts of one weight, cut together."""
    for weight, group in groupby(texts, key=lambda item: item[1]):
        batch: list[str] = []
        size = 0
        for text, _ in group:
            batch.append(text)
            size += len(text)
            if size > BATCH_CHARACTERS:
                yield batch, weight
                batch, size = [], 0
        if batch:
            yield batch, weight


def _stretches(tokens: list[str], wanted: Wanted, characters: frozenset[str]) -> Iterator[Run]:
    """The tokens between those that no run may hold: the first and the last stretch may go on in the chunks beside."""
    stretch: list[str] = []
    for token in spell_characters(tokens, characters):
        if all(map(wanted, token.removeprefix(SPACE_MARK))) and not is_byte_piece(token):
            stretch.append(token)
        else:
            yield tuple(stretch)
            stretch = []
    yield tuple(stretch)


def with_other_words(phrases: Mapping[Run, float], words: Mapping[Run, float]) -> dict[Run, float]:
    """Sampled phrases, and beside them, on its own, what the sample misses of each word.

    So pairs within words begin with at least their exact counts, and more only where the sample holds too many.
    """
    missing = dict(words)
    for phrase, weight in phrases.items():
        for word in words_of(phrase):
            if len(word) > 1:
                missing[word] = missing.get(word, 0.0) - weight
    combined = dict(phrases)
    for word, weight in missing.items():
        if weight > 0:
            combined[word] = combined.get(word, 0.0) + weight
    return combined


def words_of(phrase: Run) -> Iterator[Run]:
    """A phrase cut before its spaces."""
    starts = [0, *(i for i, token in enumerate(phrase) if i and token.startswith(SPACE_MARK)), len(phrase)]
    return (phrase[start:end] for start, end in pairwise(starts))
