"""Cross-entropy over a large vocabulary, a chunk of positions at a time.

Only positions that are learnt reach the output matrix. Where they don't fit into one chunk, each chunk's logits are
made again in the backward pass instead of being kept: memory stays at one chunk × V however long the batch is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lingraft.training.batches import IGNORED

CHUNK_LOGITS = 2**25  # 128 MiB in float32: 128 positions of a 262 k vocabulary, 8,192 of a 4 k one


class NextTokenLoss(nn.Module):
    """Sum of the cross-entropy over a micro-batch's learnt positions, in nats (float32).

    `excluded_ids` are left out of the softmax: no label may be one of them.
    """

    def __init__(self, model: PreTrainedModel, excluded_ids: Tensor | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self.excluded_ids: Tensor | None
        self.register_buffer("excluded_ids", excluded_ids, persistent=False)
        self.softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def forward(self, input_ids_BT: Tensor, labels_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        hidden_BTD = self.model.base_model(
            input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False
        ).last_hidden_state
        learnt = labels_BT != IGNORED
        return self.of_states(hidden_BTD[learnt], labels_BT[learnt])

    def of_states(self, hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
        """The summed cross-entropy of N last hidden states against the ids that come next."""
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        rows = max(1, CHUNK_LOGITS // self.model.get_output_embeddings().weight.shape[0])
        if len(labels_N) <= rows:
            return total + self._chunk(hidden_ND, labels_N)
        for hidden, labels in zip(hidden_ND.split(rows), labels_N.split(rows), strict=True):
            total = total + checkpoint(self._chunk, hidden, labels, use_reentrant=False)
        return total

    def _chunk(self, hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
        logits_NV = self.model.get_output_embeddings()(hidden_ND).float()
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        if self.excluded_ids is not None:
            logits_NV = logits_NV.index_fill(1, self.excluded_ids, -torch.inf)
        return F.cross_entropy(logits_NV, labels_N, reduction="sum")
