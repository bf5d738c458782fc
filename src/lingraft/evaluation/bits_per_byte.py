"""Bits per byte: how many bits a model needs for one UTF-8 byte of text it has never seen. Lower is better.

Per-token loss and perplexity can't be compared across vocabularies: a tokenizer with longer tokens has fewer
and harder ones. Dividing the whole text's negative log-likelihood by its bytes takes the tokenizer out of the
unit, so a model before and after vocabulary expansion, or two models of different families, stand on one
scale. (The Pile, arXiv 2101.00027, section 3.1.)

The number needs a tokenizer that loses nothing (byte fallback or byte level). It is an upper bound of what
the model knows: only the tokenizer's own segmentation of the text is scored, and each span starts without
earlier context.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lingraft.errors import CorpusError
from lingraft.evaluation.forward import (
    batches_by_length,
    context_id,
    hidden_states,
    logits_in_chunks,
    measuring,
    padded,
)
from lingraft.progress import bar


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    span_bytes: int,
    batch_tokens: int,
    device: torch.device | str,
) -> dict[str, Any]:
    """Score documents in spans of at most `span_bytes` bytes, each from BOS (EOS where there is none).

    The spans depend on the text alone, so every tokenizer is scored on the same ones; every token counts, and
    the end of a text is not scored. `batch_tokens` bounds a batch, padding included. Raises CorpusError
    without text.

    Returns `bits_per_byte` with its 95 % interval `low`, `high` over documents (None with fewer than two),
    `nats` (the summed negative log-likelihood), and the counts `bytes`, `characters`, `documents`, `tokens`
    and `tokens_per_character`.
    """
    _require_text(texts)
    pieces = [(index, span) for index, text in enumerate(texts) for span in split_spans(text, span_bytes)]
    documents, spans = [index for index, _ in pieces], [span for _, span in pieces]
    span_ids = tokenizer(spans, add_special_tokens=False)["input_ids"]
    nats = np.zeros(len(texts))
    np.add.at(nats, documents, _span_nats(model, span_ids, context_id(tokenizer), batch_tokens, device))

    document_bytes = np.array([len(text.encode()) for text in texts])
    tokens, characters = sum(map(len, span_ids)), sum(map(len, texts))
    bits = nats / math.log(2)
    low, high = _interval(bits, document_bytes)
    return {
        "bits_per_byte": float(bits.sum() / document_bytes.sum()),
        "low": low,
        "high": high,
        "nats": float(nats.sum()),
        "bytes": int(document_bytes.sum()),
        "characters": characters,
        "documents": len(texts),
        "tokens": tokens,
        "tokens_per_character": tokens / characters,
    }


def unigram_bits_per_byte(
    tokenizer: PreTrainedTokenizerBase,
    train_texts: Sequence[str],
    held_out_texts: Sequence[str],
    *,
    span_bytes: int,
) -> float:
    """Bits per byte of the tokenizer's tokens drawn by frequency alone: any trained model should be below.

    Frequencies are those of the training text, with one added to each vocabulary entry, so that unseen tokens
    have a price. `span_bytes` as for the model, so that both score the same tokens.
    """
    _require_text(held_out_texts)
    counts = Counter(_tokens(tokenizer, train_texts, span_bytes))
    total = counts.total() + len(tokenizer)
    held_out = _tokens(tokenizer, held_out_texts, span_bytes)
    bits = -sum(math.log2((counts[token] + 1) / total) for token in held_out)
    return bits / sum(len(text.encode()) for text in held_out_texts)


def split_spans(text: str, span_bytes: int) -> Iterator[str]:
    """Cut a text between characters into pieces of at most `span_bytes` (4 or more) UTF-8 bytes."""
    raw = text.encode()
    start = 0
    while start < len(raw):
        end = start + span_bytes
        while end < len(raw) and raw[end] & 0xC0 == 0x80:  # a byte inside a character
            end -= 1
        yield raw[start:end].decode()
        start = end


def _require_text(texts: Sequence[str]) -> None:
    if not any(texts):
        raise CorpusError("the held-out text is empty, so there is nothing to measure; give the evaluation some text")


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], span_bytes: int) -> Iterator[int]:
    for text in texts:
        for span in split_spans(text, span_bytes):
            yield from tokenizer.encode(span, add_special_tokens=False)


def _span_nats(
    model: PreTrainedModel,
    span_ids: list[list[int]],
    first_id: int,
    batch_tokens: int,
    device: torch.device | str,
) -> np.ndarray:
    """Negative log-likelihood of each span after `first_id`, in nats."""
    nats = np.zeros(len(span_ids))
    lengths = [len(ids) for ids in span_ids]
    with measuring(model), bar("bits per byte", total=sum(lengths), unit="tokens") as tick:
        for batch in batches_by_length(lengths, batch_tokens):
            ids_BT, mask_BT = padded([[first_id, *span_ids[i][:-1]] for i in batch], first_id, device)
            hidden_ND = hidden_states(model, ids_BT, mask_BT)[mask_BT.bool()]
            targets_N = torch.tensor([token for i in batch for token in span_ids[i]], device=device)
            nats[batch] = _sums(_token_nats(model, hidden_ND, targets_N), [lengths[i] for i in batch])
            tick(len(targets_N))
    return nats


def _token_nats(model: PreTrainedModel, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    nats = []
    done = 0
    for logits_NV in logits_in_chunks(model, hidden_ND):
        targets = targets_N[done : done + len(logits_NV)]
        nats.append(F.cross_entropy(logits_NV, targets, reduction="none"))
        done += len(logits_NV)
    return torch.cat(nats)


def _sums(values_N: torch.Tensor, lengths: list[int]) -> list[float]:
    return torch.stack([part.sum() for part in values_N.double().split(lengths)]).tolist()


def _interval(bits: np.ndarray, document_bytes: np.ndarray) -> tuple[float | None, float | None]:
    """95 % interval of Σ bits / Σ bytes over documents: the ratio estimator's normal approximation.

    Documents, not spans, are the sample: what stands in one document is not independent. (Cochran, Sampling
    Techniques, section 6.4.)
    """
    documents = len(bits)
    if documents < 2:
        return None, None
    ratio = bits.sum() / document_bytes.sum()
    residuals = bits - ratio * document_bytes
    error = math.sqrt(documents / (documents - 1) * (residuals**2).sum()) / document_bytes.sum()
    return float(ratio - 1.96 * error), float(ratio + 1.96 * error)
