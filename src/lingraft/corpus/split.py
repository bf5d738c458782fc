"""Set documents aside for measuring, and keep training documents from holding parts of them.

Which documents are held out depends on the seed and each document's text alone: not on their order, and
hardly on what else there is, so that a corpus that grows keeps its held-out documents.
"""

from __future__ import annotations

import hashlib
import heapq
import re
import zlib
from collections.abc import Iterable

import numpy as np

HASH_RANGE = 2**64

# A letter of a script without spaces is a word of its own.
_WORD = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|\\w+")
_WINDOW_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that its powers modulo 2**64 never vanish


class HeldOutChoice:
    """Chooses about `fraction` of the documents offered: those whose hash of (seed, text) is the smallest.

    At most `max_documents` and `max_bytes` (UTF-8) are chosen, and at least one of two or more, however
    small the fraction; none if it is 0. Memory is bounded by `max_documents`.
    """

    def __init__(self, seed: int, fraction: float, max_documents: int, max_bytes: int) -> None:
        self._key = str(seed).encode()
        self._limit = int(fraction * HASH_RANGE)
        self._max_documents = max_documents
        self._max_bytes = max_bytes
        self._offered = 0
        self._smallest = (HASH_RANGE, -1)
        self._heap: list[tuple[int, int, int]] = []  # (-hash, index, bytes), the largest hash first
        self._bytes = 0

    def offer(self, index: int, text: str) -> None:
        """Consider the document `index`."""
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=8, key=self._key).digest()
        value = int.from_bytes(digest, "big")
        self._offered += 1
        self._smallest = min(self._smallest, (value, index))
        if value >= self._limit:
            return
        heapq.heappush(self._heap, (-value, index, len(data)))
        self._bytes += len(data)
        while len(self._heap) > self._max_documents or self._bytes > self._max_bytes:
            self._bytes -= heapq.heappop(self._heap)[2]

    def indices(self) -> set[int]:
        """The documents chosen."""
        if not self._limit or self._offered < 2:
            return set()
        return {index for _, index, _ in self._heap} or {self._smallest[1]}


class Overlap:
    """Tells whether a text shares at least `share` of its runs of `words` words with a held-out text.

    GPT-3 cut text around any shared run of 13 words (arXiv 2005.14165, appendix C). A field's formulas, such
    as the closing articles of laws, are longer than that and in most of its documents; so here a document is
    told by the share of shared runs, of the shorter of the two texts: a part of a held-out text, a text that
    holds one, or a near copy. `share` 0 is the strict rule: one run is enough. Case and punctuation don't
    count; texts of fewer words never overlap. Memory: 16 bytes a held-out word.
    """

    def __init__(self, held_out: Iterable[str], words: int, share: float) -> None:
        powers = [pow(_WINDOW_MULTIPLIER, exponent, HASH_RANGE) for exponent in range(words)]
        self._powers_W = np.array(powers, dtype=np.uint64)
        self._share = share
        runs = [self._runs(text) for text in held_out]
        self._lengths_D = np.array([len(each) for each in runs], dtype=np.int64)
        hashes = np.concatenate([np.empty(0, np.uint64), *runs])
        # A run that several held-out texts share is counted for the first.
        self._known_K, first = np.unique(hashes, return_index=True)
        self._owners_K = np.repeat(np.arange(len(runs)), self._lengths_D)[first]

    def _runs(self, text: str) -> np.ndarray:
        """The different runs of W words, each as the polynomial of its words' checksums modulo 2**64."""
        words = _WORD.findall(text.lower())
        if len(words) < len(self._powers_W):
            return np.empty(0, np.uint64)
        words_N = np.fromiter((zlib.crc32(word.encode()) for word in words), dtype=np.uint64)
        windows_NW = np.lib.stride_tricks.sliding_window_view(words_N, len(self._powers_W))
        return np.unique(windows_NW @ self._powers_W)

    def found_in(self, text: str) -> bool:
        runs = self._runs(text)
        if not len(runs) or not len(self._known_K):
            return False
        places = np.searchsorted(self._known_K, runs).clip(max=len(self._known_K) - 1)
        owners = self._owners_K[places[self._known_K[places] == runs]]
        shared_D = np.bincount(owners, minlength=len(self._lengths_D))
        needed_D = np.maximum(1, self._share * np.minimum(len(runs), self._lengths_D))
        return bool((shared_D >= needed_D).any())
