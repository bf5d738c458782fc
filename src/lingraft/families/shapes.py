"""Named shapes: the configurations of well-known models, for planning and measuring where their files are not at hand.

Each is what stands in the model's `config.json`, as far as it decides sizes; the rest is the family's default.

Sources: Gemma 3: its report (arXiv 2503.19786, table 1) and the published config files; MedGemma has the shapes of
Gemma 3 (arXiv 2507.05201). Llama 3.2 and 3.1, Qwen3: the published config files. Their numbers of parameters agree with
those published to the last digit (`tests/test_plan.py`), except for this: published configs of MedGemma 27B without
vision differ in 64 rows, and 262,144 is one of the two.
"""

from __future__ import annotations

from typing import Any

_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}


def _gemma3(width: int, hidden: int, layers: int, heads: int, kv_heads: int, head: int, window: int) -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": 262_144,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "sliding_window": window,
        "tie_word_embeddings": True,
    }


def _with_vision(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {**text, "vocab_size": 262_208},
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 256,
        "tie_word_embeddings": True,
    }


def _dense(
    kind: tuple[str, str],
    rows: int,
    tied: bool,
    width: int,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head: int,
) -> dict[str, Any]:
    return {
        "architectures": [kind[0]],
        "model_type": kind[1],
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "tie_word_embeddings": tied,
    }


_GEMMA_4B = _gemma3(2560, 10_240, 34, 8, 4, 256, 1024)
_GEMMA_12B = _gemma3(3840, 15_360, 48, 16, 8, 256, 1024)
_GEMMA_27B = _gemma3(5376, 21_504, 62, 32, 16, 128, 1024)
_LLAMA = ("LlamaForCausalLM", "llama")
_QWEN = ("Qwen3ForCausalLM", "qwen3")

SHAPES: dict[str, dict[str, Any]] = {
    "gemma-3-270m": _gemma3(640, 2048, 18, 4, 1, 256, 512),
    "gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1, 256, 512),
    "gemma-3-4b": _with_vision(_GEMMA_4B),
    "gemma-3-12b": _with_vision(_GEMMA_12B),
    "gemma-3-27b": _with_vision(_GEMMA_27B),
    "medgemma-4b": _with_vision(_GEMMA_4B),
    "medgemma-27b": _with_vision(_GEMMA_27B),
    "medgemma-27b-text": _GEMMA_27B,
    "llama-3.2-1b": _dense(_LLAMA, 128_256, True, 2048, 8192, 16, 32, 8, 64),
    "llama-3.2-3b": _dense(_LLAMA, 128_256, True, 3072, 8192, 28, 24, 8, 128),
    "llama-3.1-8b": _dense(_LLAMA, 128_256, False, 4096, 14_336, 32, 32, 8, 128),
    "qwen3-0.6b": _dense(_QWEN, 151_936, True, 1024, 3072, 28, 16, 8, 128),
    "qwen3-1.7b": _dense(_QWEN, 151_936, True, 2048, 6144, 28, 16, 8, 128),
    "qwen3-4b": _dense(_QWEN, 151_936, True, 2560, 9728, 36, 32, 8, 128),
    "qwen3-8b": _dense(_QWEN, 151_936, False, 4096, 12_288, 36, 32, 8, 128),
}


def shape_of_hub_name(name: str) -> str | None:
    """The shape of a model on the hub: `google/medgemma-4b-it` has that of `medgemma-4b`; None where none is known."""
    last = name.rpartition("/")[2].lower().removesuffix("-instruct")
    for ending in ("-it", "-pt", "-base"):
        last = last.removesuffix(ending)
    last = last.replace("medgemma-1.5-", "medgemma-")
    return last if last in SHAPES else None
