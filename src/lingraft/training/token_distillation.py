"""Token distillation: learn the new input rows from what the base itself makes of the same text in its old tokens.

The base reads a text in its old segmentation, the student, which is the same frozen model, in the new one; only the
new input rows train. Where a new token ends, the two have read the same characters, so their hidden states should
agree, there and after it. (Token Distillation, arXiv 2505.20133.)

How we differ: the text is the corpus as it comes, not a fixed number of snippets for each token, so a frequent token
is seen more often. The squared error is relative to the teacher's state, so that one weight serves every model.

Continued BPE merges on from the base's own segmentation. Writing each new token as its old tokens therefore *is* the
old segmentation, and both passes need one batch of new ids and a table.

Shapes: V vocabulary, N new tokens, P most old tokens of a new one, B rows, T new and S old tokens of a row, D width,
M positions that are matched.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lingraft.errors import TrainingError
from lingraft.model.load import input_matrix, output_matrix
from lingraft.training.batches import IGNORED, MicroBatch
from lingraft.training.loss import NextTokenLoss
from lingraft.training.tokens import Documents, Pieces


@dataclass(frozen=True)
class OldTokens:
    """A batch in the old segmentation: ids and positions (B, S), and the last old token of each new one (B, T)."""

    ids_BS: Tensor
    position_ids_BS: Tensor
    ends_BT: Tensor


class Segmentation(nn.Module):
    """The table from new tokens to the old tokens that they are made of; old tokens stand for themselves.

    Args:
        vocabulary: rows V of the model.
        new_ids: ids of the N new tokens; old_ids: the old tokens of each, in reading order.
    """

    def __init__(self, vocabulary: int, new_ids: Sequence[int], old_ids: Sequence[Sequence[int]]) -> None:
        super().__init__()
        most = max(map(len, old_ids))
        new = torch.tensor(new_ids)
        place_V = torch.full((vocabulary,), -1)
        place_V[new] = torch.arange(len(new))
        lengths_V = torch.ones(vocabulary, dtype=torch.long)
        lengths_V[new] = torch.tensor([len(ids) for ids in old_ids])
        self.place_V: Tensor
        self.lengths_V: Tensor
        self.parts_NP: Tensor
        self.register_buffer("place_V", place_V, persistent=False)
        self.register_buffer("lengths_V", lengths_V, persistent=False)
        parts_NP = torch.tensor([[*ids, *[0] * (most - len(ids))] for ids in old_ids])
        self.register_buffer("parts_NP", parts_NP, persistent=False)

    def is_new(self, ids: Tensor) -> Tensor:
        """Which ids are new tokens, in the shape of `ids`."""
        return self.place_V[ids] >= 0

    def part(self, ids: Tensor, offset: Tensor) -> Tensor:
        """The old token number `offset` of each id, both of one shape."""
        place = self.place_V[ids]
        return torch.where(place >= 0, self.parts_NP[place.clamp(min=0), offset], ids)

    def old(self, ids_BT: Tensor, position_ids_BT: Tensor) -> OldTokens:
        """A packed batch in the old segmentation, packed alike; what fills a row up is a segment of its own."""
        lengths_BT = self.lengths_V[ids_BT]
        ends_BT = lengths_BT.cumsum(dim=1) - 1
        begins_BT = ends_BT - lengths_BT + 1
        size_B1 = ends_BT[:, -1:] + 1
        slots_BS = torch.arange(int(size_B1.max()), device=ids_BT.device).expand(len(ids_BT), -1).contiguous()
        filling_BS = slots_BS >= size_B1
        # the new token that each old token belongs to: the first one that doesn't end before it
        token_BS = torch.searchsorted(ends_BT, slots_BS).clamp(max=ids_BT.shape[1] - 1)
        offset_BS = (slots_BS - begins_BT.gather(1, token_BS)).masked_fill(filling_BS, 0)
        first_BS = token_BS - position_ids_BT.gather(1, token_BS)
        position_BS = slots_BS - begins_BT.gather(1, first_BS)
        return OldTokens(
            self.part(ids_BT.gather(1, token_BS), offset_BS),
            torch.where(filling_BS, slots_BS - size_B1, position_BS),
            ends_BT,
        )

    def reached(self, ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        """Positions (B, T) at or after a document's first new token: before it, both segmentations are the same."""
        new_BT = self.is_new(ids_BT).long()
        seen_BT = new_BT.cumsum(dim=1)
        first_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) - position_ids_BT
        seen_before_BT = (seen_BT - new_BT).gather(1, first_BT)
        return seen_BT > seen_before_BT


class TokenDistillationLoss(nn.Module):
    """Sum over a micro-batch's matched positions: |student − teacher|² / |teacher|² + weight × cross-entropy.

    The next-token term asks for the next *old* token, over the old ids alone: the output rows of new tokens are not
    trained here, and what they say before they are would only disturb. In a tied model the new rows are output rows
    as well; there the term is the ordinary one over the whole vocabulary, which also keeps their norms in bounds.

    Args:
        model: holds the trainable rows already (`lingraft.model.rows`), so that it is student and teacher in one.
        layer: whose hidden states are matched, counted as transformers does: 0 the embeddings, -1 the last, after
            the final norm.
        next_token_weight: weight of the cross-entropy (nats) against the relative squared error.
    Raises:
        TrainingError: the model has no such layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        new_ids: Sequence[int],
        old_ids: Sequence[Sequence[int]],
        *,
        layer: int,
        next_token_weight: float,
    ) -> None:
        super().__init__()
        layers = model.config.get_text_config().num_hidden_layers
        if not -layers - 1 <= layer <= layers:
            raise TrainingError(
                f"embeddings.distillation.layer: the model has no layer {layer}; give 0 (embeddings) to {layers}, or "
                f"-1 (the last) to {-layers - 1}"
            )
        self.layer, self.next_token_weight = layer, next_token_weight
        self.segmentation = Segmentation(input_matrix(model).shape[0], new_ids, old_ids)
        self.tied = input_matrix(model) is output_matrix(model)
        self.next_token = NextTokenLoss(model, excluded_ids=None if self.tied else list(new_ids))

    def forward(self, input_ids_BT: Tensor, labels_BT: Tensor, position_ids_BT: Tensor, scale: float = 1.0) -> Tensor:
        matched_BT = self.matched(input_ids_BT, labels_BT, position_ids_BT)
        old = self.segmentation.old(input_ids_BT, position_ids_BT)
        with torch.no_grad():
            states_BSD, _ = self._states(old.ids_BS, old.position_ids_BS)
            rows = torch.arange(len(input_ids_BT), device=input_ids_BT.device).unsqueeze(1)
            teacher_MD = states_BSD[rows, old.ends_BT][matched_BT].float()
        states_BTD, last_BTD = self._states(input_ids_BT, position_ids_BT)
        error_MD = states_BTD[matched_BT].float() - teacher_MD
        loss = scale * (error_MD.square().sum(dim=1) / teacher_MD.square().sum(dim=1)).sum()
        if not self.next_token_weight:
            return loss
        labels_M = labels_BT[matched_BT]
        if not self.tied:
            labels_M = self.segmentation.part(labels_M, torch.zeros_like(labels_M))
        return loss + self.next_token.of_states(last_BTD[matched_BT], labels_M, scale * self.next_token_weight)

    def matched(self, input_ids_BT: Tensor, labels_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        """Positions (B, T) that count: learnt ones that a new token can have changed."""
        return (labels_BT != IGNORED) & self.segmentation.reached(input_ids_BT, position_ids_BT)

    def _states(self, ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of the chosen layer, and of the last one."""
        body: Any = self.next_token.model.base_model
        wanted = self.layer != -1
        out = body(input_ids=ids, position_ids=position_ids, use_cache=False, output_hidden_states=wanted)
        return (out.hidden_states[self.layer] if wanted else out.last_hidden_state), out.last_hidden_state


@torch.inference_mode()
def hidden_state_error(loss: TokenDistillationLoss, batches: Iterable[MicroBatch]) -> float:
    """Mean |student − teacher|² / |teacher|² over the matched positions of some batches; 0 is perfect.

    Args:
        loss: with `next_token_weight` 0.
    """
    device = loss.segmentation.place_V.device
    total = count = 0.0
    for batch in batches:
        tensors = [t.to(device) for t in (batch.input_ids_BT, batch.labels_BT, batch.position_ids_BT)]
        total += float(loss(*tensors))
        count += int(loss.matched(*tensors).sum())
    return total / max(count, 1)


def cut_by_old_tokens(documents: Documents, old_lengths_V: np.ndarray, limit: int, bos: int | None) -> Pieces:
    """Pieces of at most `limit` *old* tokens, so that the teacher never reads further than it was trained to.

    Args:
        old_lengths_V: how many old tokens each id stands for.
        bos: begins every piece after the first, unlearnt, as in `lingraft.training.tokens.cut`.
    """
    pieces = array("q")
    for number in range(len(documents)):
        ends = np.cumsum(old_lengths_V[documents[number].ids])
        begin = 0
        while begin < len(ends):
            before, room = (ends[begin - 1], limit - (bos is not None)) if begin else (0, limit)
            end = max(int(np.searchsorted(ends, before + room, side="right")), begin + 1)
            pieces.extend((number, begin, end))
            begin = end
    document_P, begin_P, end_P = np.array(pieces, np.int64).reshape(-1, 3).T
    return Pieces(documents, document_P, begin_P, end_P, bos)
