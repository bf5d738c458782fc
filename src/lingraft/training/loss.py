"""Cross-entropy over a large vocabulary, without the logits of a batch and without gradients that nobody asked for.

The output matrix is read a block of its rows at a time. Where it is frozen, one pass is enough, as in attention
(arXiv 2205.14135): the matrix stands for keys and values, and a running maximum and sum of each position's
exponentials give both the loss and the gradient of the hidden state. Where only new rows train, their few logits are
kept for the gradient of these rows. Where the whole matrix trains, the logits of a few positions at a time are kept
in the model's precision, since making them again would cost one more product.

Only positions that are learnt reach the output matrix. What a chunk of positions needs beside its result is at most
CHUNK_BYTES; the gradients are made in the forward pass, so nothing else waits for the backward pass.

Shapes: N learnt positions, D width, V vocabulary, M new rows, b rows of a block.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers import PreTrainedModel

from lingraft.errors import ModelError
from lingraft.model.rows import RowwiseEmbedding, RowwiseHead
from lingraft.training.batches import IGNORED

# Logits of a block: on a CPU they stay in its cache, on a GPU they are enough to keep it busy.
BLOCK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 25}
BLOCK_ROWS = 1024  # at least
BLOCK_WEIGHTS = 1 << 25  # at most: a block of a matrix that trains is converted, and its gradient made, beside it
# Logits that are kept at a time where the whole matrix trains: 512 positions of a 262 k vocabulary in bfloat16.
CHUNK_BYTES = {"cpu": 280_000_000, "cuda": 560_000_000}
CHUNK_POSITIONS = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class _Block:
    """Rows of an output matrix: `weight` (b, D) in the model's precision, `first` the first one's place; `unseen` are
    places in the block that no label has and no softmax sees."""

    weight: Tensor
    first: int
    unseen: Tensor | None = None

    def logits(self, hidden_ND: Tensor, softcap: float | None) -> Tensor:
        """(N, b) float32 logits; the product itself is in the model's precision."""
        logits_Nb = torch.mm(hidden_ND, self.weight.t()).float()
        if softcap is not None:
            logits_Nb = logits_Nb.div_(softcap).tanh_().mul_(softcap)
        if self.unseen is not None:
            logits_Nb.index_fill_(1, self.unseen, -torch.inf)
        return logits_Nb

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self.weight))


def _labels(rows: slice, places_N: Tensor) -> tuple[Tensor, Tensor]:
    """Positions whose label lies in a block of rows, and the labels' places in it."""
    positions = ((places_N >= rows.start) & (places_N < rows.stop)).nonzero().squeeze(1)
    return positions, places_N[positions] - rows.start


class _Softmax:
    """The running log-sum-exp of N positions over blocks, and the logits of their labels (Milakov, 1805.02867)."""

    def __init__(self, hidden_ND: Tensor) -> None:
        self.maximum_N = hidden_ND.new_full((len(hidden_ND), 1), -torch.inf, dtype=torch.float32)
        self.sum_N = torch.zeros_like(self.maximum_N)
        self.label_N = torch.zeros_like(self.maximum_N).squeeze(1)

    def add(self, block: _Block, logits_Nb: Tensor, places_N: Tensor) -> tuple[Tensor, Tensor]:
        """Take a block in. Returns exp(logits − maximum so far), written over the logits, and the factor by which
        what was summed up before has shrunk."""
        positions, inside = _labels(block.rows, places_N)
        self.label_N[positions] = logits_Nb[positions, inside]
        maximum = torch.maximum(self.maximum_N, logits_Nb.amax(dim=1, keepdim=True))
        shrunk_N = (self.maximum_N - maximum).exp_()
        weights_Nb = logits_Nb.sub_(maximum).exp_()
        self.sum_N = self.sum_N * shrunk_N + weights_Nb.sum(dim=1, keepdim=True)
        self.maximum_N = maximum
        return weights_Nb, shrunk_N

    def log_sum(self) -> Tensor:
        """(N, 1)"""
        return self.maximum_N + self.sum_N.log()

    @property
    def loss(self) -> Tensor:
        """Sum of the positions' cross-entropies, in nats."""
        return (self.log_sum().squeeze(1) - self.label_N).sum()


def _slope(logits: Tensor, softcap: float | None) -> Tensor | None:
    """The derivative of soft-capped logits with respect to the logits before; None where nothing is capped."""
    return None if softcap is None else 1 - (logits / softcap).square()


class FrozenMatrixLoss(Function):
    """Summed cross-entropy against a frozen output matrix, of which some rows may have trained stand-ins.

    forward(hidden_ND, new_MD, matrix_VD, places_N, softcap, unseen): `places_N` are the labels' ids, or V + m for the
    new row m of `new_MD` (float32, None where no row trains); `unseen` are the sorted ids whose logits don't count,
    the frozen ones of new rows among them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        new_MD: Tensor | None,
        matrix_VD: Tensor,
        places_N: Tensor,
        softcap: float | None,
        unseen: list[int],
    ) -> Tensor:
        moves, learns = ctx.needs_input_grad[:2]
        new = None if new_MD is None else new_MD.detach().to(hidden_ND.dtype)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        gradient_ND = torch.empty_like(hidden_ND) if moves else None
        gradient_MD = torch.zeros_like(new_MD) if new_MD is not None and learns else None
        for part in _chunks(len(hidden_ND), CHUNK_POSITIONS[hidden_ND.device.type]):
            total += _frozen_chunk(
                hidden_ND[part],
                new,
                matrix_VD,
                places_N[part],
                softcap,
                unseen,
                None if gradient_ND is None else gradient_ND[part],
                gradient_MD,
            )
        ctx.gradients = gradient_ND, gradient_MD
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        gradient_ND, gradient_MD = ctx.gradients
        ctx.gradients = None
        hidden = None if gradient_ND is None else gradient_ND.mul_(upstream)
        new = None if gradient_MD is None else gradient_MD.mul_(upstream)
        return hidden, new, None, None, None, None


def _frozen_chunk(
    hidden_ND: Tensor,
    new_MD: Tensor | None,
    matrix_VD: Tensor,
    places_N: Tensor,
    softcap: float | None,
    unseen: list[int],
    gradient_ND: Tensor | None,
    gradient_MD: Tensor | None,
) -> Tensor:
    """The loss of some positions. Writes the gradient of their hidden states, adds to that of the new rows."""
    rows, dtype = len(matrix_VD), hidden_ND.dtype
    softmax = _Softmax(hidden_ND)
    # what the hidden states move by: the rows, weighted by exp(logit); the labels' rows come off at the end
    pull_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
    kept_NM: Tensor | None = None

    def take(block: _Block, logits_Nb: Tensor) -> None:
        nonlocal pull_ND
        slope_Nb = _slope(logits_Nb, softcap) if gradient_ND is not None else None
        weights_Nb, shrunk_N = softmax.add(block, logits_Nb, places_N)
        if gradient_ND is not None:
            if slope_Nb is not None:
                weights_Nb = weights_Nb.mul_(slope_Nb.nan_to_num_(neginf=0.0))
            pull_ND = pull_ND.mul_(shrunk_N).add_(torch.mm(weights_Nb.to(dtype), block.weight))

    for block in _blocks(matrix_VD, hidden_ND, unseen):
        take(block, block.logits(hidden_ND, softcap))
    if new_MD is not None:
        block = _Block(new_MD, rows)
        logits_NM = block.logits(hidden_ND, softcap)
        kept_NM = logits_NM.clone() if gradient_MD is not None else None
        take(block, logits_NM)
    if gradient_ND is not None:
        own_ND = matrix_VD[places_N.clamp(max=rows - 1)].to(dtype)
        if new_MD is not None:
            is_new = places_N >= rows
            own_ND[is_new] = new_MD[places_N[is_new] - rows]
        slope_N = _slope(softmax.label_N, softcap)
        own_ND = own_ND.float() if slope_N is None else own_ND * slope_N.unsqueeze(1)
        gradient_ND.copy_(pull_ND.div_(softmax.sum_N).sub_(own_ND))
    if kept_NM is not None:
        assert gradient_MD is not None
        error_NM = _error(slice(rows, rows + len(gradient_MD)), kept_NM, softmax.log_sum(), places_N, softcap)
        gradient_MD += torch.mm(error_NM.to(dtype).t(), hidden_ND)
    return softmax.loss


def _error(rows: slice, logits_Nb: Tensor, log_sum_N: Tensor, places_N: Tensor, softcap: float | None) -> Tensor:
    """The gradient of the loss with respect to a block's logits before capping, written over them."""
    slope_Nb = _slope(logits_Nb, softcap)
    error_Nb = logits_Nb.sub_(log_sum_N).exp_()
    positions, inside = _labels(rows, places_N)
    error_Nb[positions, inside] -= 1
    return error_Nb if slope_Nb is None else error_Nb.mul_(slope_Nb)


class TrainedMatrixLoss(Function):
    """Summed cross-entropy against an output matrix that trains as a whole.

    forward(hidden_ND, values_VD, labels_N, softcap, scale): the loss is multiplied by `scale`. The gradient of
    `values_VD` (a float32 parameter) goes into the one that it has already, so that a step of many micro-batches
    holds it once; that is why the scale is needed here, and nothing may scale the loss afterwards.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, values_VD: Tensor, labels_N: Tensor, softcap: float | None, scale: float
    ) -> Tensor:
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        gradient_ND = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        gradient_VD = values_VD.grad if ctx.needs_input_grad[1] else None
        adds = gradient_VD is not None  # else the first chunk's is written, over whatever is there
        if ctx.needs_input_grad[1]:
            values_VD.grad = None  # taken away, as `pop_gradient` does
            if gradient_VD is None:
                gradient_VD = torch.empty_like(values_VD) if len(hidden_ND) else torch.zeros_like(values_VD)
        size = chunk_positions(len(hidden_ND), len(values_VD), hidden_ND.element_size(), hidden_ND.device.type)
        for part in _chunks(len(hidden_ND), size):
            hidden, labels = hidden_ND[part], labels_N[part]
            softmax = _Softmax(hidden)
            kept: list[tuple[slice, Tensor]] = []
            for block in _blocks(values_VD, hidden, []):
                logits = block.logits(hidden, softcap)
                if gradient_VD is not None:
                    kept.append((block.rows, logits.to(hidden.dtype, copy=True)))
                softmax.add(block, logits, labels)
            while kept and gradient_VD is not None:
                rows, logits = kept.pop()
                error = _error(rows, logits.float(), softmax.log_sum(), labels, softcap).mul_(scale).to(hidden.dtype)
                _multiply_into(gradient_VD[rows], error.t(), hidden, adds)
                if gradient_ND is not None:
                    gradient_ND[part] += torch.mm(error, values_VD[rows].detach().to(hidden.dtype))
            adds = True
            total += softmax.loss
        ctx.gradients = gradient_ND, gradient_VD
        return total * scale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        assert upstream == 1, "the gradients are made already: scale the loss by its own argument"
        gradients, ctx.gradients = ctx.gradients, None
        return *gradients, None, None, None


def _multiply_into(rows: Tensor, one: Tensor, other: Tensor, adds: bool) -> None:
    """rows (+)= one @ other, the product in its factors' precision."""
    if rows.dtype == one.dtype:
        rows.addmm_(one, other, beta=int(adds))  # with beta 0 what was there is not read
    elif adds:
        rows += torch.mm(one, other)
    else:
        rows.copy_(torch.mm(one, other))


def chunk_positions(positions: int, vocabulary: int, value_bytes: int, device: str) -> int:
    """How many positions have their logits kept at a time, in values of so many bytes, where the matrix trains."""
    chunks = -(-positions * vocabulary * value_bytes // CHUNK_BYTES[device])
    return -(-positions // max(chunks, 1))


def block_rows(positions: int, width: int, device: str) -> int:
    """How many rows of the output matrix are read at a time."""
    return min(max(BLOCK_LOGITS[device] // max(positions, 1), BLOCK_ROWS), BLOCK_WEIGHTS // width)


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, max(size, 1)))


def _blocks(matrix_VD: Tensor, hidden_ND: Tensor, unseen: list[int]) -> Iterator[_Block]:
    size = block_rows(len(hidden_ND), matrix_VD.shape[1], hidden_ND.device.type)
    for start in range(0, len(matrix_VD), size):
        weight = matrix_VD[start : start + size].detach().to(hidden_ND.dtype)
        first, last = bisect_left(unseen, start), bisect_left(unseen, start + len(weight))
        places = torch.tensor(unseen[first:last], device=hidden_ND.device) - start if last > first else None
        yield _Block(weight, start, places)


class NextTokenLoss(nn.Module):
    """Sum of the cross-entropy over a micro-batch's learnt positions, in nats (float32), times `scale`.

    Soft-capping of the logits is read from the model's config. Where nothing in the trunk trains, it runs without
    autograd. `excluded_ids` are left out of the softmax: no label may be one of them.

    Raises:
        ModelError: the head has a bias.
    """

    def __init__(self, model: PreTrainedModel, excluded_ids: list[int] | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self.softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        head: Any = model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise ModelError("the model's output matrix has a bias, which this loss does not know; use another base")
        self.rows = head.rows if isinstance(head, RowwiseHead) else None
        replaced = [] if self.rows is None or self.rows.ids is None else self.rows.ids.tolist()
        self.unseen = sorted({*(excluded_ids or ()), *replaced})
        inside = (p for name, p in model.named_parameters() if p is not (self.rows.values if self.rows else None))
        self.trunk_trains = any(p.requires_grad for p in inside) or _shares_rows(model, self.rows)

    def forward(self, input_ids_BT: Tensor, labels_BT: Tensor, position_ids_BT: Tensor, scale: float = 1.0) -> Tensor:
        learnt = labels_BT != IGNORED
        return self.of_states(self.states(input_ids_BT, position_ids_BT)[learnt], labels_BT[learnt], scale)

    def states(self, input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        """The last hidden states (B, T, D)."""
        with torch.set_grad_enabled(self.trunk_trains and torch.is_grad_enabled()):
            return self.model.base_model(
                input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False
            ).last_hidden_state

    def of_states(self, hidden_ND: Tensor, labels_N: Tensor, scale: float = 1.0) -> Tensor:
        """The summed cross-entropy of N last hidden states against the ids that come next, times `scale`."""
        device = hidden_ND.device.type
        if torch.is_autocast_enabled(device):
            hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
        values = None if self.rows is None else self.rows()
        if values is not None and not torch.is_grad_enabled():
            values = values.detach()  # or a Function would think that its gradient is wanted
        if self.rows is not None and self.rows.ids is None:
            return TrainedMatrixLoss.apply(hidden_ND, values, labels_N, self.softcap, scale)
        matrix_VD = self.model.get_output_embeddings().weight
        places_N = labels_N
        if self.rows is not None:
            assert self.rows.place is not None
            new_N = self.rows.place[labels_N]
            places_N = torch.where(new_N >= 0, new_N + len(matrix_VD), labels_N)
        return scale * FrozenMatrixLoss.apply(hidden_ND, values, matrix_VD, places_N, self.softcap, self.unseen)


def _shares_rows(model: Any, rows: Any) -> bool:
    """Whether the head's rows are the embedding's as well (a tied model)."""
    embedding = model.get_input_embeddings()
    return rows is not None and isinstance(embedding, RowwiseEmbedding) and embedding.rows is rows
