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
from torch.nn import functional as F
from transformers import PreTrainedModel


class TrainableRows(nn.Module):
    """The rows of a matrix that train, as one float32 parameter of shape (N, D).

    `ids` (N,) names the rows; None means the whole matrix.
    """

    def __init__(self, matrix_VD: Tensor, ids: Tensor | None) -> None:
        super().__init__()
        chosen = matrix_VD if ids is None else matrix_VD[ids]
        self.values = nn.Parameter(chosen.detach().to(torch.float32).clone())
        self.ids: Tensor | None
        self.place: Tensor | None
        if ids is None:
            self.ids = self.place = None
        else:
            place = torch.full((matrix_VD.shape[0],), -1, dtype=torch.long, device=ids.device)
            place[ids] = torch.arange(len(ids), device=ids.device)
            self.register_buffer("ids", ids, persistent=False)
            self.register_buffer("place", place, persistent=False)

    def write_to(self, matrix_VD: Tensor) -> None:
        """Write the trained rows back into the matrix, in its own precision."""
        with torch.no_grad():
            if self.ids is None:
                matrix_VD.copy_(self.values)
            else:
                matrix_VD[self.ids] = self.values.to(matrix_VD.dtype)


class RowwiseEmbedding(nn.Module):
    """An input embedding of which only `rows` train. Keeps the original module's scale (Gemma: √D)."""

    def __init__(self, original: Any, rows: TrainableRows) -> None:
        super().__init__()
        self.original: Any = original
        self.rows = rows

    @property
    def weight(self) -> Tensor:
        return self.original.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        frozen_VD = self.original.weight
        if self.rows.place is None:
            embedded_BTD = F.embedding(ids_BT, self.rows.values).to(frozen_VD.dtype)
        else:
            place_BT = self.rows.place[ids_BT]
            trained_BTD = F.embedding(place_BT.clamp(min=0), self.rows.values)
            embedded_BTD = torch.where(
                (place_BT >= 0).unsqueeze(-1), trained_BTD.to(frozen_VD.dtype), F.embedding(ids_BT, frozen_VD)
            )
        scale = getattr(self.original, "embed_scale", None)
        return embedded_BTD if scale is None else embedded_BTD * scale.to(embedded_BTD.dtype)


class RowwiseHead(nn.Module):
    """An output matrix of which only `rows` train."""

    def __init__(self, original: Any, rows: TrainableRows) -> None:
        super().__init__()
        self.original: Any = original
        self.rows = rows

    @property
    def weight(self) -> Tensor:
        return self.original.weight

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
    """

    def __init__(self, model: PreTrainedModel, input_rows: str, output_rows: str, new_ids: list[int]) -> None:
        self.model = model
        self.embedding: Any = model.get_input_embeddings()
        self.head: Any = model.get_output_embeddings()
        self.tied = self.embedding.weight is self.head.weight
        if self.tied:
            input_rows = output_rows = wider(input_rows, output_rows)
        matrix_VD: Any = self.embedding.weight
        new = torch.tensor(new_ids, dtype=torch.long, device=matrix_VD.device)
        self.input = self._rows(matrix_VD, input_rows, new)
        self.output = self.input if self.tied else self._rows(self.head.weight, output_rows, new)
        if self.input is not None:
            model.set_input_embeddings(RowwiseEmbedding(self.embedding, self.input))
        if self.output is not None:
            model.set_output_embeddings(RowwiseHead(self.head, self.output))

    @staticmethod
    def _rows(matrix_VD: Tensor, which: str, new: Tensor) -> TrainableRows | None:
        return None if which == "none" else TrainableRows(matrix_VD, None if which == "all" else new)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name: `input_rows` and `output_rows`, or `rows` where tied."""
        if self.tied:
            return {} if self.input is None else {"rows": self.input.values}
        named = {"input_rows": self.input, "output_rows": self.output}
        return {name: rows.values for name, rows in named.items() if rows is not None}

    def restore(self) -> None:
        """Give the model its plain modules again. The trained rows stay in `input` and `output`."""
        if self.input is not None:
            self.model.set_input_embeddings(self.embedding)
        if self.output is not None:
            self.model.set_output_embeddings(self.head)


def wider(one: str, other: str) -> str:
    """The larger of two row choices: none < new < all."""
    return max(one, other, key=("none", "new", "all").index)
