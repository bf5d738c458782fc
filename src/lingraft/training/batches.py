"""From documents to training batches: token mixture, packing without leaks, and a position to resume from.

Everything is decided before the first step, from the seed alone: which document goes where, in which order. A step
number therefore is the whole loader state, and a resumed run reads exactly what an undisturbed one would have read.

Packing: several documents share a row; position ids start again at 0 for each. With no attention mask and no cache,
transformers builds a block-diagonal causal mask from the position ids, so documents can't see one another.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
OPEN_ROWS = 16


@dataclass(frozen=True)
class Encoded:
    """A tokenised document: ids (T,) and, for each token, whether it is learnt (BOS and prompts are not)."""

    ids: np.ndarray
    learnt: np.ndarray
    origin: str

    def __len__(self) -> int:
        return len(self.ids)


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


def cut(document: Encoded, length: int, bos: int | None) -> list[Encoded]:
    """Pieces of at most `length` tokens; every piece after the first starts with BOS again, unlearnt."""
    if len(document) <= length:
        return [document]
    pieces = [Encoded(document.ids[:length], document.learnt[:length], document.origin)]
    head = [] if bos is None else [bos]
    step = length - len(head)
    for start in range(length, len(document), step):
        ids = np.concatenate([head, document.ids[start : start + step]]).astype(document.ids.dtype)
        learnt = np.concatenate([[False] * len(head), document.learnt[start : start + step]]).astype(bool)
        pieces.append(Encoded(ids, learnt, document.origin))
    return pieces


def mixture(
    groups: Mapping[str, Sequence[Encoded]], shares: Mapping[str, float], budget_tokens: int, seed: int
) -> list[Encoded]:
    """An order of documents whose tokens follow the shares, evenly over the whole stage.

    Each group runs through its documents in a new random order every epoch until its share of `budget_tokens` is
    filled; a group that is too small repeats, one that is too large stops. Documents are then merged by how far
    their group has come, so every stretch of the stage has the wanted mixture.
    """
    total = sum(shares.values())
    placed: list[tuple[float, str, int, Encoded]] = []
    for name in sorted(groups):
        quota = budget_tokens * shares[name] / total
        used = 0
        epoch = 0
        while used < quota:
            order = list(range(len(groups[name])))
            random.Random(f"{seed}/{name}/{epoch}").shuffle(order)
            for index in order:
                if used >= quota:
                    break
                placed.append((used / quota, name, len(placed), groups[name][index]))
                used += len(groups[name][index])
            epoch += 1
    placed.sort(key=lambda item: item[:3])
    return [item[3] for item in placed]


def epoch_tokens(groups: Mapping[str, Sequence[Encoded]], shares: Mapping[str, float]) -> int:
    """Tokens of one epoch: one pass over the group with the largest share, the others in proportion."""
    heaviest = max(sorted(shares), key=lambda name: shares[name])
    return math.ceil(sum(map(len, groups[heaviest])) * sum(shares.values()) / shares[heaviest])


def pack(pieces: Sequence[Encoded], length: int) -> list[list[Encoded]]:
    """Rows of at most `length` tokens: each piece goes into the first of a few open rows that has room."""
    rows: list[list[Encoded]] = []
    open_rows: list[list[Encoded]] = []
    room: list[int] = []
    for piece in pieces:
        fitting = next((i for i, free in enumerate(room) if free >= len(piece)), None)
        if fitting is None:
            if len(open_rows) == OPEN_ROWS:
                rows.append(open_rows.pop(0))
                room.pop(0)
            open_rows.append([piece])
            room.append(length - len(piece))
        else:
            open_rows[fitting].append(piece)
            room[fitting] -= len(piece)
    return rows + open_rows


def to_micro_batch(rows: Sequence[Sequence[Encoded]], pad: int) -> MicroBatch:
    """Tensors of some packed rows, padded to the longest. Padding is a segment of its own and never learnt."""
    width = max(sum(map(len, row)) for row in rows)
    ids = np.full((len(rows), width), pad, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    for r, row in enumerate(rows):
        start = 0
        for piece in row:
            end = start + len(piece)
            ids[r, start:end] = piece.ids
            labels[r, start : end - 1] = np.where(piece.learnt[1:], piece.ids[1:], IGNORED)
            positions[r, start:end] = np.arange(len(piece))
            start = end
        positions[r, start:] = np.arange(width - start)
    origins = tuple(piece.origin for row in rows for piece in row)
    size = sum(len(piece) for row in rows for piece in row)
    return MicroBatch(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(positions), origins, size)


class Batches:
    """The whole stage's rows, addressed by step.

    Args:
        groups: documents by data key; shares: their weights by tokens.
        budget_tokens: tokens of the stage; None takes `epochs` passes over the heaviest group.
        sequence_length: tokens a row; rows_per_step: rows of one optimiser step; batch_size: rows that go through
            the model at a time.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[Encoded]],
        shares: Mapping[str, float],
        *,
        sequence_length: int,
        batch_size: int,
        rows_per_step: int,
        pad: int,
        bos: int | None,
        seed: int,
        budget_tokens: int | None = None,
        epochs: float | None = None,
    ) -> None:
        pieces = {k: [p for d in docs for p in cut(d, sequence_length, bos)] for k, docs in groups.items()}
        if budget_tokens is None:
            budget_tokens = math.ceil(epoch_tokens(pieces, shares) * (epochs or 1))
        self.order = mixture(pieces, shares, budget_tokens, seed)
        self.rows = pack(self.order, sequence_length)
        self.tokens = sum(map(len, self.order))
        self.batch_size, self.rows_per_step, self.pad = batch_size, rows_per_step, pad

    def __len__(self) -> int:
        """Optimiser steps."""
        return math.ceil(len(self.rows) / self.rows_per_step)

    def step(self, number: int) -> list[MicroBatch]:
        """The micro-batches of one optimiser step."""
        rows = self.rows[number * self.rows_per_step : (number + 1) * self.rows_per_step]
        return [to_micro_batch(rows[i : i + self.batch_size], self.pad) for i in range(0, len(rows), self.batch_size)]
