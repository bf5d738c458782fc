"""Initial rows for new tokens: pure functions, tensors in, tensors out, one per rule.

`RULES[name](matrix_VD, material)` gives a row in float32 for each new token, and how each was made. Most rules are
weighted sums of old rows: of the token's own parts (`embeddings/parts.py`), or of old tokens that resemble it in a
second space (`embeddings/mixtures.py`). A token that such a space doesn't know gets the mean of its parts.
`gaussian` and `random` are controls to measure the others by.

Shapes: V old vocabulary, N new tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lingraft.embeddings.mixtures import Mixture, Space, combine, pursuit, softmax_neighbours, sparsemax_neighbours
from lingraft.embeddings.parts import Parts
from lingraft.errors import RecipeError

BLOCK_ROWS = 8192  # of a matrix, converted to float32 at a time
COVARIANCE_ROWS = 65_536


@dataclass(frozen=True)
class Material:
    """What rules may use: the tokens' parts, a seed for the random ones, and the spaces that some need."""

    parts: Sequence[Parts]
    seed: int = 0
    words: Space | None = None
    corpus: Space | None = None
    donor: Space | None = None


class Rows(NamedTuple):
    """Rows (N, D) in float32, and for each token how its row was made."""

    rows_ND: Tensor
    made_by: list[str]


Rule = Callable[[Tensor, Material], Rows]


def subword_mean(matrix_VD: Tensor, material: Material) -> Rows:
    """The plain mean of the part rows (arXiv 2402.14714 for input rows)."""
    weights = [[1 / len(part.ids)] * len(part.ids) for part in material.parts]
    return _of_parts("subword_mean", matrix_VD, material, weights)


def first_subword(matrix_VD: Tensor, material: Material) -> Rows:
    """The first part's row (arXiv 2402.14714 for output rows: the first step of what was predicted before)."""
    weights = [[1.0] + [0.0] * (len(part.ids) - 1) for part in material.parts]
    return _of_parts("first_subword", matrix_VD, material, weights)


def length_weighted(matrix_VD: Tensor, material: Material) -> Rows:
    """The mean of the part rows, each weighted by the characters it spells (arXiv 2608.03494, for output rows)."""
    weights = [[n / sum(part.characters) for n in part.characters] for part in material.parts]
    return _of_parts("length_weighted", matrix_VD, material, weights)


def wechsel(matrix_VD: Tensor, material: Material) -> Rows:
    """Old tokens near the token in aligned word vectors of both languages (arXiv 2112.06598)."""
    return _of_space("wechsel", matrix_VD, material, material.words, softmax_neighbours)


def focus(matrix_VD: Tensor, material: Material) -> Rows:
    """Old tokens near the token in vectors trained on the corpus in the new tokenization (arXiv 2305.14481)."""
    return _of_space("focus", matrix_VD, material, material.corpus, sparsemax_neighbours)


def omp(matrix_VD: Tensor, material: Material) -> Rows:
    """The old tokens that make up the token's row in a donor model, in the same shares (arXiv 2506.06607)."""
    return _of_space("omp", matrix_VD, material, material.donor, pursuit)


def global_mean(matrix_VD: Tensor, material: Material) -> Rows:
    """The mean of all old rows for every token.

    Transformers' `resize_token_embeddings` does this but for noise of a covariance of 1e-9 of the rows'.
    As output rows appended to V old ones, N new ones take at most N / (N + V) of the probability of any text: the
    exponential of a mean logit is at most the mean exponential (Hewitt 2021).
    """
    count = len(material.parts)
    return Rows(_mean(matrix_VD).expand(count, -1).clone(), ["global_mean"] * count)


def gaussian(matrix_VD: Tensor, material: Material) -> Rows:
    """Draws from the normal distribution with the old rows' mean and covariance (Hewitt 2021). A control.

    The covariance is that of at most COVARIANCE_ROWS rows evenly spread over the vocabulary.
    """
    mean_D = _mean(matrix_VD)
    sample_SD = matrix_VD[:: -(-len(matrix_VD) // COVARIANCE_ROWS)]
    covariance_DD = torch.zeros(len(mean_D), len(mean_D))
    for block in _blocks(sample_SD):
        covariance_DD.addmm_((block - mean_D).T, block - mean_D, alpha=1 / len(sample_SD))
    # too few rows, or rows in a subspace, leave directions without variance, which rounding may make negative
    covariance_DD.diagonal().add_(1e-5 * covariance_DD.diagonal().mean())
    noise_ND = _noise(len(material.parts), len(mean_D), material.seed)
    rows_ND = mean_D + noise_ND @ torch.linalg.cholesky(covariance_DD).T
    return Rows(rows_ND, ["gaussian"] * len(rows_ND))


def random(matrix_VD: Tensor, material: Material) -> Rows:
    """Independent normal numbers with the spread of the old rows' numbers. A control: it knows nothing."""
    squares = sum(float(block.square().sum()) for block in _blocks(matrix_VD))
    rows_ND = _noise(len(material.parts), matrix_VD.shape[1], material.seed) * (squares / matrix_VD.numel()) ** 0.5
    return Rows(rows_ND, ["random"] * len(rows_ND))


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        subword_mean,
        first_subword,
        length_weighted,
        wechsel,
        focus,
        omp,
        global_mean,
        gaussian,
        random,
    )
}

SEEDED = {"focus", "gaussian", "random"}

NEEDS = {
    "wechsel": "embeddings.vectors (static word vectors of both languages) and embeddings.dictionary",
    "focus": "the corpus step's text in the new tokenization",
    "omp": "embeddings.donor (a model that has many of the new tokens)",
}


def _of_parts(name: str, matrix_VD: Tensor, material: Material, weights: Sequence[Sequence[float]]) -> Rows:
    made_by = [name if p.origin == "subwords" else f"{name} of the translation" for p in material.parts]
    return Rows(combine(matrix_VD, Mixture.of([p.ids for p in material.parts], weights)), made_by)


def _of_space(
    name: str, matrix_VD: Tensor, material: Material, space: Space | None, mix: Callable[[Space], Mixture]
) -> Rows:
    """Rows by `mix` for the tokens that the space knows, and the mean of their parts for the others."""
    if space is None:
        raise RecipeError(f"embeddings: the rule {name} needs {NEEDS[name]}; give it or choose another rule")
    rows_ND, made_by = subword_mean(matrix_VD, material)
    if len(space.tokens_N):
        rows_ND[space.tokens_N] = combine(matrix_VD, mix(space))
    for position in space.tokens_N.tolist():
        made_by[position] = name
    return Rows(rows_ND, made_by)


def _blocks(matrix_VD: Tensor) -> Iterator[Tensor]:
    return (block.float() for block in matrix_VD.split(BLOCK_ROWS))


def _mean(matrix_VD: Tensor) -> Tensor:
    """The mean row (D,) in float32, summed in float64."""
    total_D = sum(block.sum(dim=0, dtype=torch.float64) for block in _blocks(matrix_VD))
    return (torch.as_tensor(total_D) / len(matrix_VD)).float()


def _noise(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
