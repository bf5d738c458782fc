"""Setting the scale of new rows: input rows to the norm of old ones, output rows to a share of the probability.

Shapes: V old vocabulary, N new tokens, T positions of text, D width.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

BLOCK_ROWS = 8192
# A script with fewer tokens in the base than this has no norm to speak of.
MIN_SCRIPT_ROWS = 16
# Logits at a few hundred positions tell a share well enough, and 512 x 262,208 of them take seconds.
SHARE_STATES = 512
# Nats by which new logits may be lowered: e⁻³² of anything is nothing.
MOST_SHIFT, SHIFT_TOLERANCE = 32.0, 1e-4


def script_of(text: str) -> str | None:
    """The script of most of the text's letters, as the first word of their Unicode names; None without letters.

    >>> script_of(" 폐렴A"), script_of("12")
    ('HANGUL', None)
    """
    scripts = Counter(_script(char) for char in text if char.isalpha())
    return scripts.most_common(1)[0][0] if scripts else None


@cache
def _script(char: str) -> str:
    return unicodedata.name(char, "").split(" ")[0]


def target_norms(
    matrix_VD: Tensor, old_texts: Mapping[int, str], new_texts: Sequence[str], parts: Sequence[Sequence[int]]
) -> Tensor:
    """The norm (N,) that each new row should have: the median norm of the old rows whose text is of its script.

    Tokens without letters, or of a script with fewer than MIN_SCRIPT_ROWS old tokens, get the median norm of all
    parts. (arXiv 2608.03494.)
    """
    rows_of: dict[str | None, list[int]] = defaultdict(list)
    for index, text in old_texts.items():
        rows_of[script_of(text)].append(index)
    scripts = [script_of(text) for text in new_texts]
    known = {s for s in scripts if s is not None and len(rows_of[s]) >= MIN_SCRIPT_ROWS}
    norms = {script: median_norm(matrix_VD, rows_of[script]) for script in sorted(known)}
    of_parts = median_norm(matrix_VD, sorted({i for ids in parts for i in ids}))
    return torch.tensor([norms.get(script, of_parts) if script else of_parts for script in scripts])


def median_norm(matrix_VD: Tensor, ids: Sequence[int]) -> float:
    """The median length of the rows `ids`."""
    blocks = torch.tensor(ids).split(BLOCK_ROWS)
    return float(torch.cat([matrix_VD[block].float().norm(dim=1) for block in blocks]).median())


def calibrate_norm(rows_ND: Tensor, norms_N: Tensor) -> Tensor:
    """Scale each row to its given length, keeping its direction. A mean of many rows is shorter than any of them."""
    return rows_ND * (norms_N / rows_ND.norm(dim=1).clamp(min=1e-12))[:, None]


def bias_direction(hidden_TD: Tensor, ridge: float = 0.1) -> Tensor:
    """The vector (D,) whose product with a final hidden state comes nearest to 1: a bias for a head without one.

    Least squares over the given states; the ridge, in units of their mean square, keeps it sound where they are
    fewer than the width.
    """
    hidden_TD = hidden_TD.float()
    gram_DD = hidden_TD.T @ hidden_TD / len(hidden_TD)
    gram_DD.diagonal().add_(ridge * gram_DD.diagonal().mean())
    return torch.linalg.solve(gram_DD, hidden_TD.mean(dim=0))


def calibrate_share(
    rows_ND: Tensor, matrix_VD: Tensor, hidden_TD: Tensor, share: float, left_out: Sequence[int] = ()
) -> Tensor:
    """Lower all new output rows along `bias_direction` until they take `share` of the probability of old text.

    A new output row that was never trained competes with old tokens: thousands of copies of old rows take most of
    the probability of text that holds none of them. One shift for all new rows lowers each of their logits by about
    the same amount, as a bias would, and leaves their differences alone. Rows that take less already stay as
    they are.

    Args:
        rows_ND: the new rows.
        matrix_VD: the old output rows; those of the ids `left_out` are replaced by new ones and don't count.
        hidden_TD: final hidden states of old-language text.
        share: of the probability, between 0 and 1, in the mean over the positions.
    """
    hidden_TD = hidden_TD.float()
    direction_D = bias_direction(hidden_TD)
    hidden_TD = hidden_TD[:: -(-len(hidden_TD) // SHARE_STATES)]
    odds_T = _log_sum_exp(hidden_TD, rows_ND) - _log_sum_exp(hidden_TD, matrix_VD, left_out)
    slope_T = hidden_TD @ direction_D

    def taken(shift: float) -> float:
        return float((odds_T - shift * slope_T).sigmoid().mean())

    if taken(0.0) <= share:
        return rows_ND
    low, high = 0.0, MOST_SHIFT
    while high - low > SHIFT_TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if taken(middle) > share else (low, middle)
    return rows_ND - high * direction_D


def _log_sum_exp(hidden_TD: Tensor, matrix_VD: Tensor, left_out: Sequence[int] = ()) -> Tensor:
    """log Σ exp of the logits over the rows of a matrix, block by block (T,)."""
    penalty_V = torch.zeros(len(matrix_VD))
    penalty_V[list(left_out)] = torch.inf
    blocks = zip(matrix_VD.split(BLOCK_ROWS), penalty_V.split(BLOCK_ROWS), strict=True)
    sums = [(hidden_TD @ rows.float().T - penalty).logsumexp(dim=1) for rows, penalty in blocks]
    return torch.stack(sums).logsumexp(dim=0)
