"""Attention on a CPU that skips what no position sees: later positions, other documents, what lies before a window.

torch's fused attention on a CPU multiplies everything a mask hides, and repeats shared keys and values for every head.
Here a block of queries meets the keys between the first and the last one that any of them sees, and all heads that
share keys are one matrix product. A GPU keeps torch's own kernels.

Shapes: B rows, H heads, K heads of keys and values, T positions, W width of a head, q queries of a block, k its keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

NAME = "lingraft_blocks"
BLOCK_QUERIES = 128


@dataclass(frozen=True)
class Block:
    """Some queries and the keys between the first and the last that they see; `hidden` (B, 1, q, k) are those in
    between that they don't, None where there is none."""

    queries: slice
    keys: slice
    hidden: Tensor | None


@contextmanager
def blocks_on_cpu(model: PreTrainedModel) -> Iterator[None]:
    """Let the model, where it is on a CPU, attend by blocks instead of torch's fused attention."""
    before = model.config.get_text_config()._attn_implementation
    if model.device.type != "cpu" or before != "sdpa":
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _blocks(batch_size: int, q_length: int, q_offset: int = 0, **mask: Any) -> list[Block]:
    """What `sdpa_mask` describes, a block of queries at a time. Its arguments."""
    mask["allow_is_causal_skip"] = False
    blocks = []
    for first in range(0, q_length, BLOCK_QUERIES):
        count = min(BLOCK_QUERIES, q_length - first)
        seen_B1qT = sdpa_mask(batch_size, count, q_offset=q_offset + first, **mask)
        assert seen_B1qT is not None
        places = seen_B1qT.any(dim=2).flatten(0, 1).any(dim=0).nonzero().squeeze(1)
        keys = slice(int(places[0]), int(places[-1]) + 1)
        hidden = ~seen_B1qT[..., keys]
        blocks.append(Block(slice(first, first + count), keys, hidden if bool(hidden.any()) else None))
    return blocks


def _attend(
    module: Any,
    query_BHTW: Tensor,
    key_BKTW: Tensor,
    value_BKTW: Tensor,
    attention_mask: list[Block],
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention of all blocks (B, T, H, W), as transformers' attention functions give it."""
    B, H, _T, W = query_BHTW.shape
    K = key_BKTW.shape[1]
    query_BHTW = query_BHTW * (W**-0.5 if scaling is None else scaling)
    results = []
    for block in attention_mask:
        q = block.queries.stop - block.queries.start
        query = query_BHTW[:, :, block.queries].reshape(B, K, H // K * q, W)
        scores = query @ key_BKTW[:, :, block.keys].transpose(-1, -2)
        scores = scores.view(B, H, q, -1)
        if block.hidden is not None:
            scores = scores.masked_fill(block.hidden, -torch.inf)
        weights = torch.nn.functional.dropout(scores.softmax(-1), dropout, module.training)
        results.append((weights.view(B, K, H // K * q, -1) @ value_BKTW[:, :, block.keys]).view(B, H, q, W))
    return torch.cat(results, dim=2).transpose(1, 2), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _blocks)
