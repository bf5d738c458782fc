"""New rows as weighted sums of old rows: how the weights are found, and the one place where they are applied.

Weights are found either from a token's own parts or in a second `Space`, other than the base model's, in which new
tokens and some old ones both have a vector: static word vectors, or a donor model's rows.

Shapes: V old vocabulary, N new tokens, M terms of all sums together, O old tokens in the space, E its width,
K terms a token, D the base's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lingraft.progress import track

# New tokens at a time: 256 of them against 100,000 old tokens are 100 MB of similarities in float32.
CHUNK = 256


@dataclass(frozen=True)
class Mixture:
    """Sums of N tokens end to end: `ids_M` old ids and `weights_M`, of which `sizes_N[i]` belong to token i."""

    ids_M: Tensor
    weights_M: Tensor
    sizes_N: Tensor

    @classmethod
    def of(cls, ids: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]) -> Mixture:
        """From a list of old ids and of weights for each token."""
        flat_ids = torch.tensor([i for row in ids for i in row])
        flat_weights = torch.tensor([float(w) for row in weights for w in row])
        return cls(flat_ids, flat_weights, torch.tensor([len(row) for row in ids]))

    @classmethod
    def of_table(cls, ids_NK: Tensor, weights_NK: Tensor) -> Mixture:
        """From K terms for every token; terms of weight 0 are left out."""
        kept_NK = weights_NK != 0
        return cls(ids_NK[kept_NK], weights_NK[kept_NK].float(), kept_NK.sum(dim=1))


@dataclass(frozen=True)
class Space:
    """Vectors outside the base model: of some new tokens and of some old ones.

    `tokens_N` says which of the new tokens (by position) `new_NE` holds, `old_ids_O` which old ids `old_OE` holds.
    """

    tokens_N: Tensor
    new_NE: Tensor
    old_ids_O: Tensor
    old_OE: Tensor


def combine(matrix_VD: Tensor, mixture: Mixture) -> Tensor:
    """Rows (N, D) in float32: each token's weighted sum of rows of `matrix_VD`, of which only those are converted."""
    sizes = mixture.sizes_N.split(CHUNK)
    lengths = [int(size.sum()) for size in sizes]
    rows = []
    for ids, weights, size in zip(mixture.ids_M.split(lengths), mixture.weights_M.split(lengths), sizes, strict=True):
        used_U, positions = ids.unique(return_inverse=True)
        starts = size.cumsum(0) - size
        used_UD = matrix_VD[used_U].float()
        rows.append(F.embedding_bag(positions, used_UD, starts, mode="sum", per_sample_weights=weights))
    return torch.cat(rows)


def softmax_neighbours(space: Space, neighbours: int = 10, temperature: float = 0.1) -> Mixture:
    """WECHSEL's weights: softmax of the cosine similarities to the nearest old tokens (arXiv 2112.06598, eq. 2)."""
    old_OE = F.normalize(space.old_OE, dim=1)
    tables = []
    for new_NE in F.normalize(space.new_NE, dim=1).split(CHUNK):
        nearest = (new_NE @ old_OE.T).topk(min(neighbours, len(old_OE)), dim=1)
        tables.append((space.old_ids_O[nearest.indices], (nearest.values / temperature).softmax(dim=1)))
    return Mixture.of_table(torch.cat([ids for ids, _ in tables]), torch.cat([weights for _, weights in tables]))


def sparsemax_neighbours(space: Space) -> Mixture:
    """FOCUS's weights: sparsemax of the cosine similarities to all old tokens (arXiv 2305.14481, section 3)."""
    old_OE = F.normalize(space.old_OE, dim=1)
    mixtures = []
    for new_NE in F.normalize(space.new_NE, dim=1).split(CHUNK):
        similarities_NO = new_NE @ old_OE.T
        support = 64
        while True:  # weights beyond the support are 0, so it is enough to sort the most similar tokens
            top = similarities_NO.topk(min(support, len(old_OE)), dim=1)
            weights_NK = sparsemax(top.values)
            if support >= len(old_OE) or bool((weights_NK[:, -1] == 0).all()):
                break
            support *= 4
        mixtures.append(Mixture.of_table(space.old_ids_O[top.indices], weights_NK))
    return Mixture(
        torch.cat([m.ids_M for m in mixtures]),
        torch.cat([m.weights_M for m in mixtures]),
        torch.cat([m.sizes_N for m in mixtures]),
    )


def sparsemax(falling_NK: Tensor) -> Tensor:
    """The point of the simplex nearest to each row of scores (arXiv 1602.02068, algorithm 1).

    Args:
        falling_NK: scores, each row in falling order.
    """
    count_K = torch.arange(1, falling_NK.shape[1] + 1)
    sums_NK = falling_NK.cumsum(dim=1)
    support_N1 = (1 + count_K * falling_NK > sums_NK).sum(dim=1, keepdim=True)
    threshold_N1 = (sums_NK.gather(1, support_N1 - 1) - 1) / support_N1
    return (falling_NK - threshold_N1).clamp(min=0)


def pursuit(space: Space, atoms: int = 64) -> Mixture:
    """Weights by orthogonal matching pursuit: each new token from at most `atoms` old ones (arXiv 2506.06607).

    Runs on the GPU where there is one: the search costs 2·N·O·E·atoms operations, minutes on a CPU at full size.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    old_OE = space.old_OE.to(device)
    chunks = space.new_NE.split(CHUNK)
    found = [
        orthogonal_matching_pursuit(old_OE, new_NE.to(device), atoms)
        for new_NE in track(chunks, "matching pursuit", total=len(chunks))
    ]
    chosen_NK = torch.cat([chosen.cpu() for chosen, _ in found])
    return Mixture.of_table(space.old_ids_O[chosen_NK], torch.cat([weights.cpu() for _, weights in found]))


def orthogonal_matching_pursuit(old_OE: Tensor, new_NE: Tensor, atoms: int) -> tuple[Tensor, Tensor]:
    """Greedy sparse coding of each new vector in old ones: positions (N, K) in `old_OE`, and weights (N, K).

    Each step takes the old vector with the largest |cosine| to what is left, then fits all taken ones anew by least
    squares: an orthonormal basis grows by one vector a step, and the triangle of their products gives the weights.
    (Pati, Rezaiifar and Krishnaprasad 1993.) Old vectors are searched in their own precision, weights are float32.
    """
    atoms = min(atoms, *old_OE.shape)
    unit_OE = F.normalize(old_OE, dim=1)
    tokens, width = new_NE.shape
    left_NE = new_NE.float()
    basis_NKE = left_NE.new_zeros(tokens, atoms, width)
    triangle_NKK = torch.eye(atoms, device=new_NE.device).repeat(tokens, 1, 1)
    projections_NK = left_NE.new_zeros(tokens, atoms)
    chosen_NK = torch.zeros(tokens, atoms, dtype=torch.long, device=new_NE.device)
    for k in range(atoms):
        scores_NO = (left_NE.to(unit_OE.dtype) @ unit_OE.T).abs()
        scores_NO.scatter_(1, chosen_NK[:, :k], -1)
        chosen_NK[:, k] = scores_NO.argmax(dim=1)
        taken_NE = old_OE[chosen_NK[:, k]].float()
        rest_NE = taken_NE
        for _ in range(2):  # Gram and Schmidt twice is orthogonal to machine precision
            along_NK = torch.einsum("nke,ne->nk", basis_NKE[:, :k], rest_NE)
            rest_NE = rest_NE - torch.einsum("nke,nk->ne", basis_NKE[:, :k], along_NK)
            triangle_NKK[:, :k, k] += along_NK
        length_N = rest_NE.norm(dim=1)
        # an old vector that lies in the span of those taken adds nothing: weight 0
        adds_N = length_N > 1e-4 * taken_NE.norm(dim=1)
        basis_NKE[:, k] = torch.where(adds_N[:, None], rest_NE / length_N[:, None], 0)
        triangle_NKK[:, k, k] = torch.where(adds_N, length_N, 1)
        projections_NK[:, k] = (basis_NKE[:, k] * left_NE).sum(dim=1)
        left_NE = left_NE - projections_NK[:, k, None] * basis_NKE[:, k]
    weights_NK1 = torch.linalg.solve_triangular(triangle_NKK, projections_NK[..., None], upper=True)
    return chosen_NK, weights_NK1[..., 0]
