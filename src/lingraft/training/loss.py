"""The loss of a model's micro-batch: next-token cross-entropy of what is learnt, for whichever rows train.

Shapes: B rows, T positions, N learnt positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lingraft.errors import ModelError
from lingraft.model.rows import RowwiseEmbedding, RowwiseHead
from lingraft.training.batches import IGNORED
from lingraft.training.cross_entropy import FrozenMatrixLoss, Scratch, TrainedMatrixLoss


class MixedPrecision(nn.Module):
    """A loss whose matrix products are in bfloat16 though the layers that train are float32 (rows convert themselves).

    It is part of the module that trains: engines around it, such as DeepSpeed's, switch off an autocast of their
    caller's. Nothing is cached: layers that processes share out would otherwise stay whole until the pass is over, and
    each is used once.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, input_ids_BT: Tensor, *others: Any) -> Tensor:
        with torch.autocast(input_ids_BT.device.type, torch.bfloat16, cache_enabled=False):
            return self.loss(input_ids_BT, *others)


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
        self.scratch = Scratch()
        replaced = [] if self.rows is None or self.rows.ids is None else self.rows.ids.tolist()
        self.unseen = sorted({*(excluded_ids or ()), *replaced})
        inside = (p for name, p in model.named_parameters() if p is not (self.rows.values if self.rows else None))
        self.shared = _shares_rows(model, self.rows)
        self.trunk_trains = any(p.requires_grad for p in inside) or self.shared

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
        values: Tensor | None = None if self.rows is None else self.rows.values
        if values is not None and not torch.is_grad_enabled():
            values = values.detach()  # or a Function would think that its gradient is wanted
        if self.rows is not None and self.rows.ids is None:
            return TrainedMatrixLoss.apply(hidden_ND, values, labels_N, self.softcap, scale, self.scratch, self.shared)
        matrix_VD = self.model.get_output_embeddings().weight
        places_N = labels_N
        if self.rows is not None:
            assert self.rows.place is not None
            new_N = self.rows.place[labels_N]
            places_N = torch.where(new_N >= 0, new_N + len(matrix_VD), labels_N)
        loss = FrozenMatrixLoss.apply(hidden_ND, values, matrix_VD, places_N, self.softcap, self.unseen, self.scratch)
        return scale * loss


def _shares_rows(model: Any, rows: Any) -> bool:
    """Whether the head's rows are the embedding's as well (a tied model)."""
    embedding = model.get_input_embeddings()
    return rows is not None and isinstance(embedding, RowwiseEmbedding) and embedding.rows is rows
