"""Row-wise trainable embedding matrices.

A stage that trains some rows of a V × D matrix holds just these rows as a small float32 parameter beside the frozen
matrix. Nothing else has a gradient or an optimiser state, so weight decay and momentum cannot move a frozen row:
it is frozen because it is not there to be moved. (Zeroing gradients does not freeze: AdamW still decays the rows.)

Shapes: V vocabulary, N trainable rows, D width, B batch, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from transformers import PreTrainedModel


class TrainableRows(nn.Module):
    """The rows of a matrix that train, as one float32 parameter of shape (N, D).

    `ids` (N,) names the rows; None means the whole matrix, which the parameter then replaces: it is not held twice.
    """

    def __init__(self, matrix_VD: Tensor, ids: Tensor | None) -> None:
        super().__init__()
        chosen = matrix_VD if ids is None else matrix_VD[ids]
        self.values = nn.Parameter(chosen.detach().to(torch.float32, copy=True))
        self.ids: Tensor | None
        self.place: Tensor | None
        if ids is None:
            self.ids = self.place = None
        else:
            place = torch.full((matrix_VD.shape[0],), -1, dtype=torch.long, device=ids.device)
            place[ids] = torch.arange(len(ids), device=ids.device)
            self.register_buffer("ids", ids, persistent=False)
            self.register_buffer("place", place, persistent=False)


def take_gradient(parameter: Any) -> tuple[Tensor, bool]:
    """Take a parameter's gradient away from it; whether there is one, or only memory for it with anything inside.

    To write or add to it in place and to give it back as this backward pass's result: autograd then keeps it as it is.
    Left in its place, a step of several micro-batches would hold every gradient twice.
    """
    gradient, parameter.grad = parameter.grad, None
    spare = getattr(parameter, "spare", None)
    parameter.spare = None  # autograd would copy what has a second owner
    if gradient is not None:
        return gradient, True
    return torch.empty_like(parameter) if spare is None else spare, False


def drop_gradient(parameter: Any) -> None:
    """Drop a parameter's gradient after a step. Where it was taken by `take_gradient`, a CPU keeps its memory for the
    next one: getting new pages takes longer than filling them."""
    if parameter.device.type == "cpu" and hasattr(parameter, "spare"):
        parameter.spare = parameter.grad
    parameter.grad = None


class _Lookup(Function):
    """values_ND[places_T] with a gradient that is added in place, in an order that does not change between runs."""

    @staticmethod
    def forward(ctx: Any, values_ND: Tensor, places_T: Tensor) -> Tensor:
        ctx.values, ctx.places = values_ND, places_T
        return values_ND[places_T]

    @staticmethod
    def backward(ctx: Any, gradient_TD: Tensor) -> Any:  # type: ignore[override]
        # every place once: adding to rows in parallel would otherwise round differently each time
        places_U, which_T = ctx.places.unique(return_inverse=True)
        rows_UD = torch.ops.aten.embedding_dense_backward(gradient_TD, which_T, len(places_U), -1, False)
        whole_ND, filled = take_gradient(ctx.values)
        if not filled:
            whole_ND.zero_()
        whole_ND[places_U] += rows_UD
        return whole_ND, None


class RowwiseEmbedding(nn.Module):
    """An input embedding of which only `rows` train, or none. Keeps the original module's scale (Gemma: √D).

    Gives vectors of `dtype`; the frozen matrix may be held in a narrower one.
    """

    def __init__(self, original: Any, rows: TrainableRows | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.original: Any = original
        self.rows = rows
        self.dtype = dtype

    @property
    def weight(self) -> Tensor:
        whole = self.rows is not None and self.rows.ids is None
        return self.rows.values if self.rows is not None and whole else self.original.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        embedded_BTD = self._embedded(ids_BT)
        scale = getattr(self.original, "embed_scale", None)
        return embedded_BTD if scale is None else embedded_BTD * scale.to(embedded_BTD.dtype)

    def _embedded(self, ids_BT: Tensor) -> Tensor:
        if self.rows is None:
            return F.embedding(ids_BT, self.original.weight).to(self.dtype)
        values_ND = self.rows.values
        if self.rows.place is None:
            return _Lookup.apply(values_ND, ids_BT.flatten()).view(*ids_BT.shape, -1).to(self.dtype)
        place_BT = self.rows.place[ids_BT]
        trained_BT = place_BT >= 0
        frozen_BTD = F.embedding(ids_BT, self.original.weight).to(self.dtype)
        trained_TD = _Lookup.apply(values_ND, place_BT[trained_BT]).to(self.dtype)
        return frozen_BTD.index_put(trained_BT.nonzero(as_tuple=True), trained_TD)


class RowwiseHead(nn.Module):
    """An output matrix of which only `rows` train."""

    def __init__(self, original: Any, rows: TrainableRows) -> None:
        super().__init__()
        self.original: Any = original
        self.rows = rows

    @property
    def weight(self) -> Tensor:
        return self.rows.values if self.rows.ids is None else self.original.weight

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        values_ND = self.rows.values.to(hidden_BTD.dtype)
        if self.rows.ids is None:
            return F.linear(hidden_BTD, values_ND)
        frozen_BTV = F.linear(hidden_BTD, self.original.weight.to(hidden_BTD.dtype))
        trained_BTN = F.linear(hidden_BTD, values_ND)
        return frozen_BTV.index_copy(-1, self.rows.ids, trained_BTN.to(frozen_BTV.dtype))


class VocabularyTraining:
    """Puts row-wise modules into a model for a stage, and takes them out again.

    Args:
        input_rows, output_rows: `none`, `new` (the rows `new_ids`) or `all`. In a tied model the two matrices are
            one, so the wider of the two counts for both.
        new_ids: ids of the grafted tokens.
        dtype: that the model computes in, by default that of its matrices.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_rows: str,
        output_rows: str,
        new_ids: list[int],
        dtype: torch.dtype | None = None,
    ) -> None:
        embedding: Any = model.get_input_embeddings()
        self.model, self.embedding = model, embedding
        self.head: Any = model.get_output_embeddings()
        self.tied = self.embedding.weight is self.head.weight
        if self.tied:
            input_rows = output_rows = wider(input_rows, output_rows)
        self.dtype: torch.dtype = embedding.weight.dtype
        self.new_ids = new_ids
        self.input = self._rows(self.embedding, input_rows)
        self.output = self.input if self.tied else self._rows(self.head, output_rows)
        model.set_input_embeddings(RowwiseEmbedding(self.embedding, self.input, dtype or self.dtype))
        if self.output is not None:
            model.set_output_embeddings(RowwiseHead(self.head, self.output))

    def _rows(self, module: Any, which: str) -> TrainableRows | None:
        if which == "none":
            return None
        if which == "new":
            new = torch.tensor(self.new_ids, dtype=torch.long, device=module.weight.device)
            return TrainableRows(module.weight, new)
        rows = TrainableRows(module.weight, None)
        for holder in (self.embedding, self.head) if self.tied else (module,):
            holder.weight = None
        return rows

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name: `input_rows` and `output_rows`, or `rows` where tied."""
        if self.tied:
            return {} if self.input is None else {"rows": self.input.values}
        named = {"input_rows": self.input, "output_rows": self.output}
        return {name: rows.values for name, rows in named.items() if rows is not None}

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model its plain modules again, with the trained rows in them, in the matrix's own precision."""
        self.model.set_input_embeddings(self.embedding)
        if self.input is not None:
            self._write(self.input, self.embedding)
        if self.output is not None:
            self.model.set_output_embeddings(self.head)
            if self.tied:
                self.head.weight = self.embedding.weight
            else:
                self._write(self.output, self.head)

    def _write(self, rows: TrainableRows, module: Any) -> None:
        values_ND = rows.values.detach().to(self.dtype)
        if rows.ids is None:
            module.weight = nn.Parameter(values_ND, requires_grad=False)
        else:
            module.weight[rows.ids] = values_ND


def wider(one: str, other: str) -> str:
    """The larger of two row choices: none < new < all."""
    return max(one, other, key=("none", "new", "all").index)
