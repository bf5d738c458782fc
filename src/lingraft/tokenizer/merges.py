"""The merges of byte-pair encoding over weighted runs of tokens, in numpy (Sennrich et al. 2016, arXiv 1508.07909).

All runs lie in one array, with links to the next and the previous living token. A pair of tokens is born when its newer
half is: from then on its places can only die, never grow. So nothing has to be kept up to date. A pair's places are
looked at again when the heap offers it, and if some have died it goes back with its new count.

Legend: P places of one pair.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from lingraft.tokenizer.count import Run

Merge = tuple[str, str, float]

_NONE = -1  # a token that was swallowed by its neighbour, or the border between two runs
_SHIFT = 32


def merge_greedily(runs: Mapping[Run, float], min_frequency: float, allowed: Callable[[str], bool]) -> Iterator[Merge]:
    """Yield (left, right, count), the most frequent pair first, until none has a count of `min_frequency`.

    `allowed` is asked once for each pair that could be merged. Of equal counts the pair goes first whose left piece,
    then whose right piece, sorts first; pieces from merges sort behind the runs' own, in order of their birth.
    """
    state = _Runs(runs)
    heap = state.born(np.flatnonzero(state.token != _NONE), min_frequency)
    heapq.heapify(heap)
    made: set[str] = set()
    while heap:
        _, code, places = heapq.heappop(heap)
        living = state.living(code, places)
        if len(living) < len(places):
            count = float(state.weight[living].sum())
            if count >= min_frequency:
                heapq.heappush(heap, (-count, code, living))
            continue
        left, right = state.pieces[code >> _SHIFT], state.pieces[code & 0xFFFFFFFF]
        piece = left + right
        if piece in made or not allowed(piece):
            continue
        made.add(piece)
        yield left, right, float(state.weight[living].sum())
        for entry in state.born(state.merge(code, living), min_frequency):
            heapq.heappush(heap, entry)


class _Runs:
    """The runs' tokens, one after the other, each run followed by a border.

    token[i] is a number in `pieces`; following[i] and previous[i] are the places of its living neighbours.
    """

    def __init__(self, runs: Mapping[Run, float]) -> None:
        self.pieces = sorted({token for run in runs for token in run})
        number = {piece: n for n, piece in enumerate(self.pieces)}
        lengths = np.fromiter((len(run) + 1 for run in runs), np.int64, len(runs))
        size = int(lengths.sum()) + 1  # the border before the first run is the last element, index -1
        self.token: NDArray[np.int64] = np.fromiter(
            (n for run in runs for n in (*(number[token] for token in run), _NONE)), np.int64, size - 1
        )
        self.token = np.append(self.token, _NONE)
        weights = np.fromiter(runs.values(), np.float64, len(runs))
        self.weight: NDArray[np.float64] = np.append(np.repeat(weights, lengths), 0.0)
        self.following: NDArray[np.int64] = np.append(np.arange(1, size), 0)
        self.previous: NDArray[np.int64] = np.arange(-1, size - 1)

    def living(self, code: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those places where the pair still stands."""
        here = self.token[places] == code >> _SHIFT
        return places[here & (self.token[self.following[places]] == code & 0xFFFFFFFF)]

    def merge(self, code: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Join the pair at its places; returns the places (P') of the pairs that this brings about."""
        if code >> _SHIFT == code & 0xFFFFFFFF:
            places = self._apart(places)
        new = len(self.pieces)
        self.pieces.append(self.pieces[code >> _SHIFT] + self.pieces[code & 0xFFFFFFFF])
        swallowed = self.following[places]
        after = self.following[swallowed]
        self.token[places] = new
        self.token[swallowed] = _NONE
        self.following[places] = after
        self.previous[after] = places
        before = self.previous[places]
        # two new pieces side by side are one pair, which the first one's place stands for
        return np.concatenate([places, before[self.token[before] != new]])

    def _apart(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of a piece beside itself, from the left: a a a → aa a."""
        kept: list[int] = []
        taken = _NONE
        for place in np.sort(places).tolist():
            if place != taken:
                kept.append(place)
                taken = int(self.following[place])
        return np.array(kept, np.int64)

    def born(self, places: NDArray[np.int64], min_frequency: float) -> list[tuple[float, int, NDArray[np.int64]]]:
        """(−count, code, places) of each pair that begins at one of the places and is frequent enough."""
        right = self.token[self.following[places]]
        left = self.token[places]
        whole = (left != _NONE) & (right != _NONE)
        places, codes = places[whole], left[whole] << _SHIFT | right[whole]
        if not len(places):
            return []
        order = np.argsort(codes, kind="stable")
        places, codes = places[order], codes[order]
        starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
        counts = np.add.reduceat(self.weight[places], starts)
        ends = np.append(starts[1:], len(places))
        return [
            (-float(counts[i]), int(codes[starts[i]]), places[starts[i] : ends[i]].copy())
            for i in np.flatnonzero(counts >= min_frequency)
        ]
