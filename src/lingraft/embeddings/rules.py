"""Initial rows for new tokens: pure functions, tensors in, tensors out, one per rule.

Each new token is described by its `parts`: the ids of the old rows that it is made of. That is its old segmentation
(a new piece 폐렴 was three byte tokens a syllable) or, where the bilingual dictionary translates the token, the old
tokens of its translation. The rules only differ in how they weigh the parts. None is random.

Shapes: V old vocabulary, N new tokens, P most parts of a token, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded_parts(parts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Parts as ids (N, P) padded with 0, and a mask (N, P) of which are real. Every token needs a part."""
    width = max(map(len, parts))
    ids = torch.tensor([[*p, *[0] * (width - len(p))] for p in parts])
    real = torch.tensor([[True] * len(p) + [False] * (width - len(p)) for p in parts])
    return ids, real


def weighted_mean(matrix_VD: Tensor, parts: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]) -> Tensor:
    """Rows (N, D) in float32: the mean of each token's part rows under the given weights."""
    ids_NP, real_NP = padded_parts(parts)
    width = ids_NP.shape[1]
    weights_NP = torch.tensor([[*w, *[0.0] * (width - len(w))] for w in weights]) * real_NP
    weights_NP = weights_NP / weights_NP.sum(dim=1, keepdim=True)
    return torch.einsum("np,npd->nd", weights_NP, matrix_VD[ids_NP].float())


def subword_mean(matrix_VD: Tensor, parts: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]]) -> Tensor:
    """The plain mean of the part rows (arXiv 2402.14714 for input rows)."""
    return weighted_mean(matrix_VD, parts, [[1.0] * len(p) for p in parts])


def first_subword(matrix_VD: Tensor, parts: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]]) -> Tensor:
    """The first part's row (arXiv 2402.14714 for output rows: the first step of what was predicted before)."""
    return matrix_VD[torch.tensor([p[0] for p in parts])].float()


def length_weighted(matrix_VD: Tensor, parts: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]]) -> Tensor:
    """The mean of the part rows, each weighted by the bytes it spells."""
    return weighted_mean(matrix_VD, parts, [[float(n) for n in row] for row in lengths])


RULES = {"subword_mean": subword_mean, "first_subword": first_subword, "length_weighted": length_weighted}


def calibrate_norm(rows_ND: Tensor, norm: float) -> Tensor:
    """Scale each row to the given length, keeping its direction. A mean of many rows is shorter than any of them."""
    lengths_N1 = rows_ND.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return rows_ND * (norm / lengths_N1)


def median_norm(matrix_VD: Tensor, ids: Sequence[int]) -> float:
    """The median length of the rows `ids`: what calibration aims at."""
    return float(matrix_VD[torch.tensor(ids)].float().norm(dim=1).median())
