"""Cross-entropy over a large vocabulary, without the logits of a batch and without gradients that nobody asked for.

The output matrix is read a block of its rows at a time. Where it is frozen, one pass is enough, as in attention
(arXiv 2205.14135): the matrix stands for keys and values, and a running maximum and sum of each position's
exponentials give both the loss and the gradient of the hidden state. Where only new rows train, they are read last,
and their exponentials give the gradient of these rows too. Where the whole matrix trains, the exponentials of a few
positions at a time are kept in the model's precision, since making them again would cost one more product.

Only positions that are learnt reach the output matrix. What a chunk of positions needs beside its result is at most
CHUNK_BYTES and the logits of new rows; the gradients are made in the forward pass, so nothing else waits for the
backward pass.

Shapes: N learnt positions, D width, V vocabulary, M new rows, b rows of a block.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lingraft.model.rows import take_gradient

# Logits of a block: on a CPU they stay in its cache, on a GPU they are enough to keep it busy.
BLOCK_LOGITS = {"cpu": 1 << 19, "cuda": 1 << 25}
BLOCK_ROWS = 1024  # at least
BLOCK_WEIGHTS = 1 << 25  # at most: a block of a matrix that trains is converted, and its gradient made, beside it
# Exponentials that are kept at a time where the whole matrix trains: 256 positions of a 262 k vocabulary in bfloat16.
CHUNK_BYTES = {"cpu": 140_000_000, "cuda": 560_000_000}
CHUNK_POSITIONS = {"cpu": 1024, "cuda": 8192}


class Scratch:
    """Memory for logits by name and dtype. A CPU uses it again for each block, chunk and step: in new pages each time,
    a step would take a fifth longer. A GPU's allocator does as well by itself."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with anything in it, which holds until the name is asked for again."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size = shape[0] * shape[1]
        memory = self._memory.get((name, dtype))
        if memory is None or len(memory) < size:
            memory = self._memory[name, dtype] = torch.empty(size, dtype=dtype)
        return memory[:size].view(shape)

    def converted(self, name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The values in another dtype; themselves where it is theirs."""
        if values.dtype == dtype:
            return values
        return self.get(name, (values.shape[0], values.shape[1]), dtype, values.device).copy_(values)


@dataclass(frozen=True)
class _Block:
    """Rows of an output matrix: `weight` (b, D) in the model's precision, `first` the first one's place; `unseen` are
    places in the block that no label has and no softmax sees."""

    weight: Tensor
    first: int
    unseen: Tensor | None = None

    def product(self, hidden_ND: Tensor, out: Tensor) -> Tensor:
        """(N, b) logits before capping, in the model's precision."""
        return torch.mm(hidden_ND, self.weight.t(), out=out)

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self.weight))


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    """The logits after soft-capping, written over them."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


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

    def probability_factor(self, maximum_N: Tensor) -> Tensor:
        """(N, 1): what makes exponentials below such a maximum probabilities; not by the log-sum, whose rounding is
        that of a number far from zero."""
        return (maximum_N - self.maximum_N).exp_().div_(self.sum_N)

    def label_error(self, softcap: float | None) -> Tensor:
        """(N,): the gradient of the loss with respect to the labels' logits before capping."""
        error_N = self.probability_factor(self.label_N.unsqueeze(1)).squeeze(1).sub_(1)
        slope_N = _slope(self.label_N, softcap)
        return error_N if slope_N is None else error_N.mul_(slope_N)


def _slope(logits: Tensor, softcap: float | None) -> Tensor | None:
    """The derivative of soft-capped logits with respect to the logits before; None where nothing is capped."""
    return None if softcap is None else 1 - (logits / softcap).square()


class FrozenMatrixLoss(Function):
    """Summed cross-entropy against a frozen output matrix, of which some rows may have trained stand-ins.

    forward(hidden_ND, new_MD, matrix_VD, places_N, softcap, unseen, scratch): `places_N` are the labels' ids, or V + m
    for the new row m of `new_MD` (float32, None where no row trains); `unseen` are the sorted ids whose logits don't
    count, the frozen ones of new rows among them.
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
        scratch: Scratch,
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
                scratch,
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
        return hidden, new, None, None, None, None, None


def _frozen_chunk(
    hidden_ND: Tensor,
    new_MD: Tensor | None,
    matrix_VD: Tensor,
    places_N: Tensor,
    softcap: float | None,
    unseen: list[int],
    scratch: Scratch,
    gradient_ND: Tensor | None,
    gradient_MD: Tensor | None,
) -> Tensor:
    """The loss of some positions. Writes the gradient of their hidden states, adds to that of the new rows."""
    positions, rows = len(hidden_ND), len(matrix_VD)
    dtype, device = hidden_ND.dtype, hidden_ND.device
    softmax = _Softmax(hidden_ND)
    # what the hidden states move by: the rows, weighted by exp(logit); the labels' rows come off at the end
    pull_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)

    def logits_of(block: _Block) -> Tensor:
        product_Nb = block.product(hidden_ND, scratch.get("product", (positions, len(block.weight)), dtype, device))
        logits_Nb = _capped(scratch.converted("logits", product_Nb, torch.float32), softcap)
        return logits_Nb if block.unseen is None else logits_Nb.index_fill_(1, block.unseen, -torch.inf)

    def take(block: _Block, logits_Nb: Tensor) -> Tensor:
        teaches = gradient_ND is not None or (gradient_MD is not None and block.first == rows)
        slope_Nb = _slope(logits_Nb, softcap) if teaches else None
        weights_Nb, shrunk_N = softmax.add(block, logits_Nb, places_N)
        if slope_Nb is not None:
            weights_Nb.mul_(slope_Nb.nan_to_num_(neginf=0.0))
        if gradient_ND is not None:
            pull_ND.mul_(shrunk_N).add_(torch.mm(scratch.converted("product", weights_Nb, dtype), block.weight))
        return weights_Nb

    for block in _blocks(matrix_VD, hidden_ND, unseen):
        if block.unseen is None or len(block.unseen) < len(block.weight):
            take(block, logits_of(block))
    if new_MD is not None and len(new_MD):
        block = _Block(new_MD, rows)
        weights_NM = take(block, logits_of(block))
        if gradient_MD is not None:  # after the last block, the running maximum and sum are those of all rows
            label_error_N = softmax.label_error(softcap)
            error_NM = _error(weights_NM, 1 / softmax.sum_N, block.rows, places_N, label_error_N)
            gradient_MD += torch.mm(scratch.converted("product", error_NM, dtype).t(), hidden_ND)
    if gradient_ND is not None:
        own_ND = matrix_VD[places_N.clamp(max=rows - 1)].to(dtype)
        if new_MD is not None:
            is_new = places_N >= rows
            own_ND[is_new] = new_MD[places_N[is_new] - rows]
        slope_N = _slope(softmax.label_N, softcap)
        own_ND = own_ND.float() if slope_N is None else own_ND * slope_N.unsqueeze(1)
        gradient_ND.copy_(pull_ND.div_(softmax.sum_N).sub_(own_ND))
    return softmax.loss


def _error(weights_Nb: Tensor, factor_N: Tensor, rows: slice, places_N: Tensor, label_error_N: Tensor) -> Tensor:
    """The gradient of the loss with respect to a block's logits before capping, written over their exponentials.

    Args:
        weights_Nb: exponentials below the maximum of then, times the slope of the cap; factor_N: (N, 1), what makes
            them probabilities; label_error_N: what stands where a label does.
    """
    error_Nb = weights_Nb.mul_(factor_N)
    positions, inside = _labels(rows, places_N)
    error_Nb[positions, inside] = label_error_N[positions]
    return error_Nb


class TrainedMatrixLoss(Function):
    """Summed cross-entropy against an output matrix that trains as a whole.

    forward(hidden_ND, values_VD, labels_N, softcap, scale, scratch, shared): the loss is multiplied by `scale`. The
    gradient of `values_VD` (a float32 parameter) goes into the one that it has already, so that a step of many
    micro-batches holds it once; that is why the scale is needed here, and nothing may scale the loss afterwards.
    Where the input embedding shares the rows, it is left with the parameter, for the embedding's own to be added.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        values_VD: Tensor,
        labels_N: Tensor,
        softcap: float | None,
        scale: float,
        scratch: Scratch,
        shared: bool,
    ) -> Tensor:
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        gradient_VD: Tensor | None = None
        adds = False  # the first chunk's gradient is written over whatever is there
        if ctx.needs_input_grad[1]:
            gradient_VD, adds = take_gradient(values_VD)
            if not len(hidden_ND) and not adds:
                gradient_VD.zero_()
        dtype, device = hidden_ND.dtype, hidden_ND.device

        size = chunk_positions(len(hidden_ND), len(values_VD), hidden_ND.element_size(), device.type)
        for part in _chunks(len(hidden_ND), size):
            hidden, labels = hidden_ND[part], labels_N[part]
            positions = len(hidden)
            softmax = _Softmax(hidden)
            # exponentials of the logits, each block's together, and the maximum that they are below
            kept_values = 0 if gradient_VD is None else positions * len(values_VD)
            kept = scratch.get("kept", (1, kept_values), dtype, device).squeeze(0)
            blocks: list[tuple[slice, Tensor, Tensor]] = []
            for block in _blocks(values_VD, hidden, []):
                shape = positions, len(block.weight)
                if gradient_VD is None:
                    out_Nb = scratch.get("product", shape, dtype, device)
                else:
                    out_Nb = kept[positions * block.first :][: positions * len(block.weight)].view(shape)
                product_Nb = block.product(hidden, out_Nb)
                logits_Nb = _capped(scratch.converted("logits", product_Nb, torch.float32), softcap)
                slope_Nb = _slope(logits_Nb, softcap) if gradient_VD is not None else None
                weights_Nb, _ = softmax.add(block, logits_Nb, labels)
                if gradient_VD is not None:
                    if slope_Nb is not None:
                        weights_Nb.mul_(slope_Nb)
                    if dtype != torch.float32:  # else they stand there already
                        out_Nb.copy_(weights_Nb)
                    blocks.append((block.rows, softmax.maximum_N, out_Nb))
            pull_ND = torch.zeros_like(hidden, dtype=torch.float32)
            label_error_N = softmax.label_error(softcap).mul_(scale)
            for rows, maximum_N, weights_Nb in reversed(blocks):
                assert gradient_VD is not None
                factor_N = softmax.probability_factor(maximum_N).mul_(scale)
                weights_Nb = scratch.converted("logits", weights_Nb, torch.float32)
                error_Nb = _error(weights_Nb, factor_N, rows, labels, label_error_N)
                error_Nb = scratch.converted("product", error_Nb, dtype)
                _multiply_into(gradient_VD[rows], error_Nb.t(), hidden, adds)
                if gradient_ND is not None:
                    # the block's own sum first: added product by product to what is there, it rounds more
                    pull_ND += torch.mm(error_Nb, values_VD[rows].detach().to(dtype))
            if gradient_ND is not None:
                gradient_ND[part] = pull_ND
            adds = True
            total += softmax.loss
        ctx.gradients = gradient_ND, gradient_VD
        ctx.shared = values_VD if shared else None
        return total * scale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # type: ignore[override]
        assert upstream == 1, "the gradients are made already: scale the loss by its own argument"
        gradient_ND, gradient_VD = ctx.gradients
        ctx.gradients = None
        if ctx.shared is not None:
            ctx.shared.grad, gradient_VD = gradient_VD, None
        return gradient_ND, gradient_VD, None, None, None, None, None


def _multiply_into(out: Tensor, one: Tensor, other: Tensor, adds: bool) -> None:
    """out (+)= one @ other, the product in its factors' precision."""
    if out.dtype == one.dtype:
        out.addmm_(one, other, beta=int(adds))  # with beta 0 what was there is not read
    elif adds:
        out += torch.mm(one, other)
    else:
        out.copy_(torch.mm(one, other))


def chunk_positions(positions: int, vocabulary: int, value_bytes: int, device: str) -> int:
    """How many positions have their exponentials kept at a time, of so many bytes each, where the matrix trains."""
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
