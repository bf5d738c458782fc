"""Documents as token ids: in memory, memory-mapped from disk, or cut to the length of a row.

On disk (`write_tokens`) a source's documents stand one after another, so a stage of any length is read from the
mapped file a step at a time and holds no document in memory:

    ids.bin       int32 (N,): all ids
    learnt.bin    bool (N,): whether each is learnt
    ends.npy      int64 (D,): where each document ends in these two
    numbers.npy   int64 (D,): the record that each document was in its source

Shapes: N tokens, D documents, P pieces, V vocabulary.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Encoded:
    """A tokenised document: ids (T,) and, for each token, whether it is learnt (BOS and prompts are not)."""

    ids: np.ndarray
    learnt: np.ndarray
    origin: str

    def __len__(self) -> int:
        return len(self.ids)


class Documents(Protocol):
    """Documents by number: a list of them, `Tokens` on disk, or `Pieces` of either."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Encoded: ...


def lengths_of(documents: Documents) -> np.ndarray:
    """Tokens of each document, int64 (D,)."""
    if isinstance(documents, Tokens | Pieces):
        return documents.lengths
    return np.fromiter((len(documents[i]) for i in range(len(documents))), np.int64, len(documents))


def write_tokens(folder: Path, documents: Iterable[Encoded]) -> None:
    """Write documents of one source, named `<source>#<record>`, into `folder`, one at a time.

    Raises:
        OSError: the disk is full.
    """
    ends, numbers, end = array("q"), array("q"), 0
    with open(folder / "ids.bin", "wb") as ids, open(folder / "learnt.bin", "wb") as learnt:
        for document in documents:
            ids.write(document.ids.astype(np.int32).tobytes())
            learnt.write(document.learnt.astype(bool).tobytes())
            end += len(document)
            ends.append(end)
            numbers.append(int(document.origin.rpartition("#")[2]))
    np.save(folder / "ends.npy", np.array(ends, np.int64))
    np.save(folder / "numbers.npy", np.array(numbers, np.int64))


class Tokens:
    """The documents of one source that `write_tokens` wrote, read from the mapped file when they are asked for."""

    def __init__(self, folder: Path, source: str) -> None:
        self.source = source
        # plain arrays over the mapped files: np.memmap's own slices take three times as long
        self._ends_D = np.asarray(np.load(folder / "ends.npy", mmap_mode="r"))
        self._numbers_D = np.asarray(np.load(folder / "numbers.npy", mmap_mode="r"))
        self._ids_N = _mapped(folder / "ids.bin", np.int32)
        self._learnt_N = _mapped(folder / "learnt.bin", np.bool_)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 (D,)."""
        return np.diff(self._ends_D, prepend=0)

    def __len__(self) -> int:
        return len(self._ends_D)

    def __getitem__(self, number: int) -> Encoded:
        here = slice(self._ends_D[number - 1] if number else 0, self._ends_D[number])
        return Encoded(self._ids_N[here], self._learnt_N[here], f"{self.source}#{self._numbers_D[number]}")


def _mapped(path: Path, dtype: type[np.generic]) -> np.ndarray:
    """A file's numbers, mapped for reads here and there: what lies around a document is not read along with it."""
    with open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return np.empty(0, dtype)  # an empty file can't be mapped
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype)


class Pieces:
    """Stretches of documents: piece p is the tokens `begin_P[p]:end_P[p]` of document number `document_P[p]`.

    A piece from the middle of a document starts with BOS again, unlearnt, where the tokenizer has it.
    """

    def __init__(
        self, documents: Documents, document_P: np.ndarray, begin_P: np.ndarray, end_P: np.ndarray, bos: int | None
    ) -> None:
        self._documents, self._bos = documents, bos
        self._document_P, self._begin_P, self._end_P = document_P, begin_P, end_P

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each piece with its BOS, int64 (P,)."""
        inside_P = self._begin_P > 0
        return self._end_P - self._begin_P + (inside_P if self._bos is not None else 0)

    def __len__(self) -> int:
        return len(self._document_P)

    def __getitem__(self, number: int) -> Encoded:
        document = self._documents[int(self._document_P[number])]
        begin, end = self._begin_P[number], self._end_P[number]
        head = [self._bos] if self._bos is not None and begin else []
        ids = np.concatenate([head, document.ids[begin:end]]).astype(document.ids.dtype)
        learnt = np.concatenate([[False] * len(head), document.learnt[begin:end]]).astype(bool)
        return Encoded(ids, learnt, document.origin)


def cut(documents: Documents, length: int, bos: int | None) -> Documents:
    """Pieces of at most `length` tokens, BOS included; the documents themselves where none is longer."""
    lengths_D = lengths_of(documents)
    if not len(lengths_D) or lengths_D.max() <= length:
        return documents
    step = length - (bos is not None)
    counts_D = 1 + np.maximum(0, -(-(lengths_D - length) // step))
    document_P = np.repeat(np.arange(len(lengths_D)), counts_D)
    nth_P = np.arange(len(document_P)) - np.repeat(np.cumsum(counts_D) - counts_D, counts_D)
    begin_P = np.where(nth_P > 0, length + (nth_P - 1) * step, 0)
    end_P = np.minimum(length + nth_P * step, lengths_D[document_P])
    return Pieces(documents, document_P, begin_P, end_P, bos)


def no_longer_than(documents: Documents, length: int) -> Documents:
    """The documents of at most `length` tokens, whole."""
    lengths_D = lengths_of(documents)
    kept_P = np.flatnonzero(lengths_D <= length)
    return Pieces(documents, kept_P, np.zeros_like(kept_P), lengths_D[kept_P], None)
