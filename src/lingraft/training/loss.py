"""Cross-entropy over a large vocabulary, a few hundred positions at a time.

Only positions that are learnt reach the output matrix, and each chunk's logits are made again in the backward pass
instead of being kept: memory stays at one chunk × V however long the batch is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lingraft.training.batches import IGNORED

CHUNK = 512


class NextTokenLoss(nn.Module):
    """Sum of the cross-entropy over a micro-batch's learnt positions, in nats (float32)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def forward(self, input_ids_BT: Tensor, labels_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        hidden_BTD = self.model.base_model(
            input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False
        ).last_hidden_state
        learnt = labels_BT != IGNORED
        hidden_ND, labels_N = hidden_BTD[learnt], labels_BT[learnt]
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for hidden, labels in zip(hidden_ND.split(CHUNK), labels_N.split(CHUNK), strict=True):
            total = total + checkpoint(self._chunk, hidden, labels, use_reentrant=False)
        return total

    def _chunk(self, hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
        logits_NV = self.model.get_output_embeddings()(hidden_ND).float()
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return F.cross_entropy(logits_NV, labels_N, reduction="sum")
