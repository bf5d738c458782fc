"""Static vectors: reading those of words, aligning two languages, and training vectors of tokens on a corpus.

Shapes: W words, P dictionary pairs, E vector width, U tokens.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lingraft.errors import CorpusError

# Files list words from frequent to rare: the first 200,000 are the custom of cross-lingual work (MUSE, fastText).
MAX_WORDS = 200_000
COUNT_TOKENS = 1 << 20  # tokens whose pairs are counted at a time


@dataclass(frozen=True)
class WordVectors:
    """Words from frequent to rare, and their vectors (W, E) in float32."""

    words: list[str]
    vectors_WE: Tensor


def read_vectors(path: Path, where: str, max_words: int = MAX_WORDS) -> WordVectors:
    """Word vectors from a `.vec` or `.txt` file (fastText, GloVe, word2vec text) or word2vec's `.bin`, maybe `.gz`.

    Raises CorpusError, one line that begins with `where`, for a file that is missing or of another kind.
    """
    try:
        with _open(path) as file:
            binary = path.name.removesuffix(".gz").endswith(".bin")
            rows = list(islice(_binary_rows(file) if binary else _text_rows(file), max_words))
    except OSError as error:
        reason = error.strerror or error
        raise CorpusError(f"{where}: cannot read '{path}' ({reason}); paths are relative to the recipe") from None
    except (ValueError, EOFError) as error:
        raise CorpusError(f"{where}: '{path}' is no file of word vectors ({error}); give a .vec file") from None
    if not rows:
        raise CorpusError(f"{where}: '{path}' is empty; give a .vec file")
    return WordVectors([word for word, _ in rows], torch.from_numpy(np.stack([vector for _, vector in rows])))


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else open(path, "rb")


def _text_rows(file: Iterable[bytes]) -> Iterator[tuple[str, np.ndarray]]:
    lines = iter(file)
    first = next(lines, b"")
    # word2vec and fastText begin with a line "words width", GloVe doesn't
    rows = lines if len(first.split()) == 2 else chain([first] if first else [], lines)
    width = 0
    for number, line in enumerate(rows, start=1):
        word, _, numbers = line.decode().rstrip().partition(" ")
        vector = np.array(numbers.split(), np.float32)
        width = width or len(vector)
        if len(vector) != width or not width:
            raise ValueError(f"word {number} has {len(vector)} numbers, the first {width}")
        yield word, vector


def _binary_rows(file: IO[bytes]) -> Iterator[tuple[str, np.ndarray]]:
    words, width = map(int, file.readline().split())
    for _ in range(words):
        word = b"".join(iter(lambda: _byte(file), b" "))
        yield word.decode(errors="replace").strip(), np.frombuffer(file.read(4 * width), np.float32)


def _byte(file: IO[bytes]) -> bytes:
    byte = file.read(1)
    if not byte:
        raise EOFError("it ends before its last word")
    return byte


def align(target: WordVectors, old: WordVectors, dictionary: Mapping[str, str], where: str) -> tuple[Tensor, Tensor]:
    """Unit vectors of both languages (W, E) in the old language's space: the rotation of the target's vectors that
    brings the dictionary's pairs closest (orthogonal Procrustes, Schönemann 1966).

    Raises CorpusError where the widths differ or no pair has vectors on both sides.
    """
    if target.vectors_WE.shape[1] != old.vectors_WE.shape[1]:
        widths = f"{target.vectors_WE.shape[1]} and {old.vectors_WE.shape[1]}"
        raise CorpusError(f"{where}: the two files' vectors have different widths ({widths}); give two of one width")
    target_WE, old_WE = F.normalize(target.vectors_WE, dim=1), F.normalize(old.vectors_WE, dim=1)
    target_row = {word: row for row, word in reversed(list(enumerate(target.words)))}
    old_row = {word.lower(): row for row, word in reversed(list(enumerate(old.words)))}
    pairs = [
        (target_row[t], old_row[o.lower()]) for t, o in dictionary.items() if t in target_row and o.lower() in old_row
    ]
    if not pairs:
        raise CorpusError(
            f"{where}: none of the dictionary's {len(dictionary):,} pairs has vectors in both files; check which "
            "language is in which file, and give a dictionary with single words"
        )
    target_rows, old_rows = torch.tensor(pairs).T
    return target_WE @ procrustes(target_WE[target_rows], old_WE[old_rows]), old_WE


def procrustes(source_PE: Tensor, target_PE: Tensor) -> Tensor:
    """The orthogonal matrix (E, E) with the least squared distance of `source @ matrix` from `target`."""
    left_EE, _, right_EE = torch.linalg.svd(source_PE.T @ target_PE)
    return left_EE @ right_EE


def vectors_of_tokens(words_WE: Tensor, tokens_of_word: Sequence[Iterable[int]]) -> tuple[Tensor, Tensor]:
    """Ids (U,) of the tokens that occur in words, and their vectors (U, E): the mean over those words by frequency.

    WECHSEL's way for vectors without character n-grams. The files give the words' order but not their counts, so a
    word's frequency is taken as 1 / rank (Zipf's law).
    """
    pairs = [(token, word) for word, tokens in enumerate(tokens_of_word) for token in set(tokens)]
    tokens_M, words_M = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    ids_U, columns_M = tokens_M.unique(return_inverse=True)
    frequencies_M = 1 / (words_M + 1.0)
    weights_UW = _sparse(columns_M, words_M, frequencies_M, (len(ids_U), len(words_WE)))
    totals_U1 = torch.zeros(len(ids_U)).index_add_(0, columns_M, frequencies_M)[:, None]
    return ids_U, weights_UW @ words_WE / totals_U1


def train_token_vectors(
    documents: Iterable[Sequence[int]], width: int = 300, window: int = 5, min_count: int = 10, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Ids (U,) of the tokens that occur at least `min_count` times in documents, and static vectors (U, E) of them.

    Positive pointwise mutual information of tokens within `window` of each other, contexts smoothed by the power
    0.75, factorised by truncated SVD with the singular values' square roots (Levy, Goldberg and Dagan 2015, TACL 3).
    It is deterministic and needs no library beside torch, where FOCUS trains fastText; on one corpus the two come
    close, and character n-grams say little about tokens that are as short as most pieces are.
    """
    tokens_S = torch.from_numpy(np.fromiter(chain.from_iterable((*ids, -1) for ids in documents), np.int64))
    ids_U, counts_U = tokens_S[tokens_S >= 0].unique(return_counts=True)
    ids_U = ids_U[counts_U >= min_count]
    if len(ids_U) == 0:
        return ids_U, torch.zeros(0, width)
    positions_S = torch.searchsorted(ids_U, tokens_S).clamp(max=len(ids_U) - 1)
    rare_S = (tokens_S >= 0) & (ids_U[positions_S] != tokens_S)
    known_S = torch.where(tokens_S >= 0, positions_S, -1)[~rare_S]  # as in word2vec, rare tokens close up
    keys_C, counts_C = _count_pairs(known_S, len(ids_U), window)
    rows_C, columns_C = keys_C // len(ids_U), keys_C % len(ids_U)
    totals_U = torch.zeros(len(ids_U)).index_add_(0, rows_C, counts_C)
    smoothed_U = totals_U**0.75 / (totals_U**0.75).sum()
    information_C = (counts_C / (totals_U[rows_C] * smoothed_U[columns_C])).log()
    kept_C = information_C > 0
    size = (len(ids_U), len(ids_U))
    matrix_UU = _sparse(rows_C[kept_C], columns_C[kept_C], information_C[kept_C], size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left_UE, values_E, _ = torch.svd_lowrank(matrix_UU, q=min(width, len(ids_U)), niter=2)
    return ids_U, left_UE * values_E.sqrt()


def _sparse(rows_C: Tensor, columns_C: Tensor, values_C: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.sparse_coo_tensor(torch.stack([rows_C, columns_C]), values_C, size, check_invariants=True).coalesce()


def _count_pairs(tokens_S: Tensor, vocabulary: int, window: int) -> tuple[Tensor, Tensor]:
    """Keys (C,) `token * vocabulary + neighbour` of the pairs at most `window` apart, both ways, and their counts.

    -1 ends a document; no pair reaches over it.
    """
    document_S = (tokens_S < 0).cumsum(dim=0)
    keys, counts = torch.zeros(0, dtype=torch.long), torch.zeros(0)
    for start in range(0, len(tokens_S), COUNT_TOKENS):
        found = []
        for distance in range(1, window + 1):
            one, two = tokens_S[start : start + COUNT_TOKENS], tokens_S[start + distance :][:COUNT_TOKENS]
            one = one[: len(two)]
            same = document_S[start : start + len(two)] == document_S[start + distance :][: len(two)]
            inside = same & (one >= 0) & (two >= 0)
            found += [one[inside] * vocabulary + two[inside], two[inside] * vocabulary + one[inside]]
        new_keys, new_counts = torch.cat(found).unique(return_counts=True)
        both = torch.cat([keys, new_keys])
        keys, places = both.unique(return_inverse=True)
        counts = torch.zeros(len(keys)).index_add_(0, places, torch.cat([counts, new_counts.float()]))
    return keys, counts
