"""From documents to training batches: token mixture, steps, packing without leaks, and a position to resume from.

Everything is decided before the first step, from lengths and the seed alone: which documents a step reads, in which
order. A step number therefore is the whole loader state, and a resumed run reads exactly what an undisturbed one would
have read. Neither packing nor the number of rows that go through the model at a time changes what a step learns.

Packing: several documents share a row; position ids start again at 0 for each. With no attention mask and no cache,
transformers builds a block-diagonal causal mask from the position ids, so documents can't see one another.

Shapes: B rows, T tokens of a row, D documents of a group, P places in the stage (a document that is read), S steps.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from lingraft.training.tokens import Documents, Encoded, cut, lengths_of

IGNORED = -100
# Rows that the next document may go into; the oldest of more are closed, which are the fullest.
OPEN_ROWS = 16
# Documents that find no room in a step before it is closed. They begin the next one.
LOOKAHEAD = 32
# Share of a micro-batch that may be padding. Without a bound, long and short rows that stand alone share one: a third.
MOST_PADDING = 0.2
# Steps whose tensors are made while the device works on the one before.
STEPS_AHEAD = 2


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together. All tensors are (B, T); labels are already shifted."""

    input_ids_BT: Tensor
    labels_BT: Tensor
    position_ids_BT: Tensor
    origins: tuple[str, ...]
    size: int  # tokens without padding

    @property
    def tokens(self) -> int:
        """Tokens that are learnt."""
        return int((self.labels_BT != IGNORED).sum())


def mixture(lengths: Sequence[np.ndarray], shares: Sequence[float], budget_tokens: int, seed: int) -> np.ndarray:
    """An order of documents whose tokens follow the shares, evenly over the whole stage.

    Each group runs through its documents in a new random order every epoch until its share of `budget_tokens` is
    filled; a group that is too small repeats, one that is too large stops. Documents are then merged by how far
    their group has come, so every stretch of the stage has the wanted mixture.

    Args:
        lengths: tokens of each document, one array (D,) a group; shares: the groups' weights.
    Returns:
        int64 (P,): documents by number, counted through all groups.
    """
    documents: list[np.ndarray] = []
    progress: list[np.ndarray] = []
    first = 0
    for group, (lengths_D, share) in enumerate(zip(lengths, shares, strict=True)):
        quota = budget_tokens * share / sum(shares)
        used, epoch = 0, 0
        while used < quota:
            order = np.random.default_rng([seed, group, epoch]).permutation(len(lengths_D))
            ends = used + np.cumsum(lengths_D[order])
            begins = ends - lengths_D[order]
            read = np.searchsorted(begins, quota)
            documents.append(first + order[:read])
            progress.append(begins[:read] / quota)
            used, epoch = int(ends[-1]), epoch + 1
        first += len(lengths_D)
    merged = np.argsort(np.concatenate(progress), kind="stable")
    return np.concatenate(documents)[merged]


def epoch_tokens(lengths: Sequence[np.ndarray], shares: Sequence[float]) -> int:
    """Tokens of one epoch: one pass over the group with the largest share, the others in proportion."""
    heaviest = int(np.argmax(shares))
    return math.ceil(int(lengths[heaviest].sum()) * sum(shares) / shares[heaviest])


@dataclass(frozen=True)
class Places:
    """Where documents go: step s reads `order_P[starts_S[s]:starts_S[s + 1]]`, each in its row `row_P` of the step."""

    order_P: np.ndarray
    row_P: np.ndarray
    starts_S: np.ndarray


def pack(lengths_P: np.ndarray, length: int, rows_per_step: int) -> Places:
    """First-fit packing into steps of at most `rows_per_step` rows of at most `length` tokens.

    A document that finds no room in a step waits for the next one, and is the first there. A step is closed when
    `LOOKAHEAD` documents wait, so that its last holes are filled, too. (Krell et al. 2021, arXiv 2107.02027, pack
    whole data sets; here the order is the mixture, and must stay.)
    """
    order, rows, starts = array("q"), array("i"), array("q", [0])
    coming = enumerate(_plain_numbers(lengths_P))
    waiting: list[tuple[int, int]] = []
    while len(order) < len(lengths_P):
        room: list[int] = []
        first = 0
        documents, waiting = chain(waiting, coming), []
        for place, size in documents:
            for row in range(first, len(room)):
                if room[row] >= size:
                    break
            else:
                if len(room) == rows_per_step:
                    waiting.append((place, size))
                    if len(waiting) == LOOKAHEAD:
                        break
                    continue
                row = len(room)
                room.append(length)
                first = max(0, row + 1 - OPEN_ROWS)
            room[row] -= size
            order.append(place)
            rows.append(row)
        starts.append(len(order))
    return Places(np.array(order), np.array(rows), np.array(starts))


def _plain_numbers(values: np.ndarray) -> Iterator[int]:
    """The values as Python's own integers, which the loop above is several times faster with; a part at a time."""
    return chain.from_iterable(values[i : i + 2**16].tolist() for i in range(0, len(values), 2**16))


def to_micro_batch(rows: Sequence[Sequence[Encoded]], pad: int) -> MicroBatch:
    """Tensors of some packed rows, padded to the longest. Padding is a segment of its own and never learnt."""
    documents = [document for row in rows for document in row]
    lengths_D = np.array([len(document) for document in documents])
    ends_D = np.cumsum(lengths_D)
    ids_N = np.concatenate([document.ids for document in documents])
    learnt_N = np.concatenate([document.learnt for document in documents])
    labels_N = np.where(np.roll(learnt_N, -1), np.roll(ids_N, -1), IGNORED)
    labels_N[ends_D - 1] = IGNORED
    positions_N = np.arange(len(ids_N)) - np.repeat(ends_D - lengths_D, lengths_D)

    lengths_B = np.array([row_length(row) for row in rows])[:, None]
    place_BT = np.broadcast_to(np.arange(lengths_B.max()), (len(rows), lengths_B.max()))
    filled_BT = place_BT < lengths_B
    ids_BT, labels_BT, positions_BT = np.full_like(place_BT, pad), np.full_like(place_BT, IGNORED), place_BT - lengths_B
    ids_BT[filled_BT], labels_BT[filled_BT], positions_BT[filled_BT] = ids_N, labels_N, positions_N
    return MicroBatch(
        torch.from_numpy(ids_BT),
        torch.from_numpy(labels_BT),
        torch.from_numpy(positions_BT),
        origins=tuple(document.origin for document in documents),
        size=len(ids_N),
    )


def row_length(row: Sequence[Encoded]) -> int:
    """Tokens of a row, without padding."""
    return sum(map(len, row))


def together(rows: Iterable[Sequence[Encoded]], tokens: int) -> Iterator[list[Sequence[Encoded]]]:
    """Rows that go through the model at a time: the longest first, at most `tokens` with their padding."""
    group: list[Sequence[Encoded]] = []
    used = 0
    for row in sorted(rows, key=row_length, reverse=True):
        length = row_length(row)
        padded = (len(group) + 1) * row_length(group[0] if group else row)
        if group and (padded > tokens or used + length < (1 - MOST_PADDING) * padded):
            yield group
            group, used = [], 0
        group.append(row)
        used += length
    if group:
        yield group


class Batches:
    """The whole stage, addressed by step. Holds a few numbers for each document that the stage reads, none of its ids.

    Args:
        groups: documents by data key; shares: their weights by tokens. Documents longer than a row are cut.
        sequence_length: tokens of a row; rows_per_step: full rows of one optimiser step.
        packing: several documents share a row; without it a step's same documents have a row each.
        bos: begins the pieces of a document that is cut; None where the tokenizer has none.
        budget_tokens, epochs: tokens of the stage, or passes over the heaviest group; the shorter where both are given.
    """

    def __init__(
        self,
        groups: Mapping[str, Documents],
        shares: Mapping[str, float],
        *,
        sequence_length: int,
        rows_per_step: int,
        pad: int,
        bos: int | None,
        seed: int,
        packing: bool = True,
        budget_tokens: int | None = None,
        epochs: float | None = None,
    ) -> None:
        names = sorted(groups)
        weights = [shares[name] for name in names]
        self._groups = [cut(groups[name], sequence_length, bos) for name in names]
        lengths = [lengths_of(documents) for documents in self._groups]
        self._firsts = np.cumsum([0, *map(len, lengths)])
        epoch = epoch_tokens(lengths, weights)
        asked = [budget_tokens, epochs and math.ceil(epochs * epoch)]
        budget = min((tokens for tokens in asked if tokens), default=epoch)
        order_P = mixture(lengths, weights, budget, seed)
        lengths_P = np.concatenate(lengths)[order_P]
        places = pack(lengths_P, sequence_length, rows_per_step)
        self._documents_P = order_P[places.order_P]
        self._row_P, self._starts_S = places.row_P, places.starts_S
        self.tokens = int(lengths_P.sum())
        self.epochs = budget / max(epoch, 1)
        self.sequence_length, self.packing, self.pad = sequence_length, packing, pad

    def __len__(self) -> int:
        """Optimiser steps."""
        return len(self._starts_S) - 1

    def step(self, number: int, micro_batch: int = 1) -> list[MicroBatch]:
        """The micro-batches of one optimiser step, longest rows first.

        Args:
            micro_batch: full rows that go through the model at a time, or as many tokens in more, shorter rows.
        """
        groups = together(self._rows(number), micro_batch * self.sequence_length)
        return [to_micro_batch(rows, self.pad) for rows in groups]

    def from_step(self, first: int, micro_batch: int = 1) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Each step from `first` on with its micro-batches, which a thread makes ahead of time: no device waits."""
        with ThreadPoolExecutor(1, "batches") as thread:
            ahead: deque[tuple[int, Future[list[MicroBatch]]]] = deque()
            for number in range(first, len(self)):
                ahead.append((number, thread.submit(self.step, number, micro_batch)))
                if len(ahead) > STEPS_AHEAD:
                    ready, batches = ahead.popleft()
                    yield ready, batches.result()
            for ready, batches in ahead:
                yield ready, batches.result()

    def _rows(self, number: int) -> list[list[Encoded]]:
        here = slice(self._starts_S[number], self._starts_S[number + 1])
        rows: dict[int, list[Encoded]] = {}
        for place, (document, row) in enumerate(zip(self._documents_P[here], self._row_P[here], strict=True)):
            rows.setdefault(int(row) if self.packing else place, []).append(self._document(document))
        return list(rows.values())

    def _document(self, number: np.int64) -> Encoded:
        group = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return self._groups[group][int(number - self._firsts[group])]
