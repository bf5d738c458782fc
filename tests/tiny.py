"""Tiny checkpoints of every family, built in code: random weights, a real tokenizer, milliseconds to run."""

from __future__ import annotations

from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lingraft.miniature.sets import records
from lingraft.model.load import copy_companions, save
from lingraft.tokenizer.new import train_sentencepiece
from lingraft.training.settings import StageSettings

VOCABULARY = 640
UNUSED = 256

_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_TEXT = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
_GEMMA = {**_TEXT, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}


# A stage that trains nothing until a test says what.
STAGE_SETTINGS = StageSettings(
    name="test",
    input_rows="none",
    output_rows="none",
    layers="none",
    lora=None,
    quantise="none",
    learning_rate=1e-2,
    embedding_learning_rate=None,
    rows_per_step=4,
    micro_batch=2,
    packing=True,
    precision="fp32",
    optimizer="adamw",
    warmup=0.1,
    schedule="cosine",
    weight_decay=0.1,
    betas=(0.9, 0.95),
    clip=1.0,
    gradient_checkpointing=False,
    parallel="ddp",
    checkpoint_seconds=1e9,
    keep_checkpoints=2,
    keep="last",
    validate_every=None,
    seed=1,
)


def gemma3(tied: bool = True) -> Any:
    return Gemma3ForCausalLM(Gemma3TextConfig(**_GEMMA, tie_word_embeddings=tied))


def gemma3_multimodal(tied: bool = True) -> Any:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config={**_GEMMA, "tie_word_embeddings": tied},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=9,
        boi_token_index=10,
        eoi_token_index=11,
        tie_word_embeddings=tied,
    )
    model = Gemma3ForConditionalGeneration(config)
    # zeros by default, through which an image would leave no trace
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model


def llama(tied: bool = True) -> Any:
    return LlamaForCausalLM(LlamaConfig(**_TEXT, tie_word_embeddings=tied))


def qwen2(tied: bool = True) -> Any:
    """With biases on the queries, keys and values."""
    return Qwen2ForCausalLM(Qwen2Config(**_TEXT, tie_word_embeddings=tied))


def qwen3(tied: bool = True) -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**_TEXT, tie_word_embeddings=tied))


def qwen3_moe() -> Any:
    """With experts, which are stored one by one and joined when transformers loads them."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_TEXT, **experts))


def gemma3n(tied: bool = True) -> Any:
    """The text model; every unused slot lies in the per-layer table, which ends before the last ids."""
    layers = 4
    config = Gemma3nTextConfig(
        **{**_GEMMA, "num_hidden_layers": layers, "layer_types": _GEMMA["layer_types"] * 2},
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        altup_num_inputs=2,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * layers,
        tie_word_embeddings=tied,
    )
    return Gemma3nForCausalLM(config)


FAMILIES = {
    "gemma3": gemma3,
    "gemma3-multimodal": gemma3_multimodal,
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma3n": gemma3n,
}


@cache
def _texts(name: str, count: int) -> tuple[str, ...]:
    return tuple(record["text"] for record in islice(records(name, 0, "test"), count))


def english(count: int = 200) -> list[str]:
    return list(_texts("en-text", count))


def korean(count: int = 200) -> list[str]:
    return list(_texts("ko-text", count))


def write_tokenizer(folder: Path) -> None:
    """The tiny models' tokenizer: English pieces, Korean only in bytes, `UNUSED` free slots."""
    folder.mkdir(parents=True, exist_ok=True)
    train_sentencepiece(english(), VOCABULARY, UNUSED, folder)


def write_checkpoint(folder: Path, tokenizer: Path, family: str = "gemma3", tied: bool = True) -> Path:
    """A whole checkpoint: random weights of `family` beside a copy of the tokenizer."""
    torch.manual_seed(0)
    save(FAMILIES[family](tied), folder, companions=tokenizer)
    copy_companions(tokenizer, folder)
    return folder


def write_recipe(folder: Path, model: Path, **changes: Any) -> Path:
    """A recipe of two short stages over a few texts, in `folder/recipe.yaml`; `changes` replace top-level keys."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ko.txt").write_text("\n\n".join(korean(120)), encoding="utf-8")
    (folder / "en.txt").write_text("\n\n".join(english(80)), encoding="utf-8")
    recipe = {
        "name": "tiny",
        "languages": {"target": "ko", "old": "en"},
        "base": {"model": str(model)},
        "corpus": {
            "held_out": 0.1,
            "decontaminate": False,
            "sources": [
                {"name": "korean", "language": "ko", "path": "ko.txt"},
                {"name": "english", "language": "en", "path": "en.txt"},
            ],
        },
        "tokenizer": {"new_tokens": 100, "min_frequency": 3},
        "training": {
            "precision": "fp32",
            "gradient_checkpointing": False,
            "sequence_length": 128,
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "tokens": 2000,
        },
        "stages": [
            {"name": "rows", "train": {"input_rows": "new", "output_rows": "new"}},
            {"name": "lora", "train": {"layers": "lora"}, "lora": {"r": 4, "alpha": 8}},
        ],
        "evaluate": {"max_documents": 6, "span_bytes": 120, "generation": {"count": 1, "max_new_tokens": 4}},
    } | changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return path
