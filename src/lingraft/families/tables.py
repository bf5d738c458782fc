"""The table of model families, keyed by Hugging Face's `model_type`.

Sources: the families' published configs and tokenizers, transformers' modelling code, llama.cpp's
`convert_hf_to_gguf.py` (pre-tokenizer names) and `src/models/gemma3.cpp`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

LINEAR_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """One row: what grafting and training must know about a family that its config does not say.

    `unused_pattern` matches, in full, the pieces that a family reserved and never trained; its group 1 is
    their number. `protected_unused` are the numbers among them that fine-tunes of the family do use as marks
    (MedGemma 1.5 thinks between `<unused94>` and `<unused95>`): in a vocabulary of the family's own size, or
    one with further unused blocks, they are never given away.
    `slots_only` is the reason why new ids must lie inside the old vocabulary, empty where they need not.
    `rowless_tokens` counts the ids at the tokenizer's end that the weights have no rows for (Gemma 3's sizes without
    vision share the tokenizer of those with it, image mark included).
    `vocab_size_keys` are the paths in `config.json` that hold the vocabulary size, outer ones first; those absent
    are skipped.
    `llama_cpp_sliding_period` is n where llama.cpp takes every n-th layer for one of full attention, unless the config
    says otherwise by `sliding_window_pattern`; it does not read `layer_types`. 0 where there is no such assumption.
    `llama_cpp_pre_tokenizer` is the name llama.cpp knows the family's byte-level pre-tokenizer by; its
    converter finds it by hashing a check text, which a graft can change, so it is given explicitly.
    SentencePiece tokenizers are always "default" there.
    """

    model_type: str
    unused_pattern: str | None = None
    protected_unused: range = range(0)
    full_vocab_size: int = 0
    slots_only: str = ""
    rowless_tokens: int = 0
    projections: tuple[str, ...] = LINEAR_PROJECTIONS
    vocab_size_keys: tuple[tuple[str, ...], ...] = (("vocab_size",), ("text_config", "vocab_size"))
    llama_cpp_sliding_period: int = 0
    llama_cpp_pre_tokenizer: str = "default"


_GEMMA = Family(
    "gemma",
    unused_pattern=r"<unused(\d+)>",
    protected_unused=range(99),
    full_vocab_size=256_000,
)

_GEMMA_3N = "its per-layer table ends at vocab_size_per_layer_input, and every id from the audio offset on is audio"

_ROWS = (
    _GEMMA,
    replace(_GEMMA, model_type="gemma2"),
    replace(_GEMMA, model_type="gemma3", llama_cpp_sliding_period=6),
    replace(_GEMMA, model_type="gemma3_text", llama_cpp_sliding_period=6, rowless_tokens=1),
    replace(_GEMMA, model_type="gemma3n", slots_only=_GEMMA_3N),
    replace(_GEMMA, model_type="gemma3n_text", slots_only=_GEMMA_3N),
    # "llama" is SentencePiece up to Llama 2 and byte-level from Llama 3 on.
    Family("llama", llama_cpp_pre_tokenizer="llama-bpe"),
    Family("mistral", llama_cpp_pre_tokenizer="tekken"),
    Family("qwen2", llama_cpp_pre_tokenizer="qwen2"),
    Family("qwen3", llama_cpp_pre_tokenizer="qwen2"),
)

FAMILIES = {row.model_type: row for row in _ROWS}


def family(model_type: str) -> Family:
    """The row of `model_type`; a type not in the table gets the generic row (append only, BOS if it has one)."""
    return FAMILIES.get(model_type) or Family(model_type)


def family_of_pieces(pieces: Iterable[str]) -> Family:
    """The row of a tokenizer that comes without a model's config: the first whose unused pieces it has.

    What such a row says about slots holds; whether a model of this vocabulary can grow only its config tells.
    """
    pieces = list(pieces)
    for row in _ROWS:
        if row.unused_pattern and any(map(re.compile(row.unused_pattern).fullmatch, pieces)):
            return row
    return Family("unknown")
