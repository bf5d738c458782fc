"""Running a causal language model to measure it: batches, hidden states, logits in bounded memory.

Shapes: B sequences, T tokens (padded), N real tokens of a batch, D hidden width, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lingraft.errors import TokenizerError

LOGIT_ROWS = 256  # 256 rows of a 262k vocabulary are 268 MB in float32


@contextmanager
def measuring(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def context_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before a text: BOS, or EOS for tokenizers without one (Qwen)."""
    token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token_id is None:
        raise TokenizerError(
            "the tokenizer names neither a BOS nor an EOS token, so nothing can stand before a text's first "
            "token; set bos_token in its tokenizer_config.json"
        )
    return token_id


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices grouped by similar length, longest first (so that memory runs out at once or never).

    A group times its longest member, its size with padding, is at most `batch_tokens`; a longer one stands
    alone.
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and lengths[group[0]] * (len(group) + 1) > batch_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def padded(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str, side: str = "right"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, T) and attention mask (B, T) of sequences padded on one side."""
    width = max(map(len, sequences))
    rows, masks = [], []
    for sequence in sequences:
        padding = width - len(sequence)
        row, mask = [*sequence], [1] * len(sequence)
        rows.append(row + [pad_id] * padding if side == "right" else [pad_id] * padding + row)
        masks.append(mask + [0] * padding if side == "right" else [0] * padding + mask)
    return torch.tensor(rows, device=device), torch.tensor(masks, device=device)


def hidden_states(model: PreTrainedModel, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """What the language-model trunk hands to the head (B, T, D); a vision tower is left out."""
    output = model.get_decoder()(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    return output.last_hidden_state


def logits_in_chunks(model: PreTrainedModel, hidden_ND: torch.Tensor) -> Iterator[torch.Tensor]:
    """The model's own logits for rows of hidden states, in order, float32 (at most LOGIT_ROWS, V) at a time.

    Head and final soft-capping (Gemma 2 and 3n) as in the model's forward, which would hold all rows at once.
    """
    head = model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    for rows_ND in hidden_ND.split(LOGIT_ROWS):
        logits_NV = head(rows_ND).float()
        yield torch.tanh(logits_NV / cap) * cap if cap is not None else logits_NV
