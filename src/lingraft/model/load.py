"""Reading and writing checkpoints: ordinary Hugging Face folders, safetensors only.

`check` finds what is wrong with a folder before anything heavy starts: missing files, pickle weights, truncated
shards, a tokenizer with more tokens than the model has rows.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lingraft.errors import ModelError
from lingraft.families import family

transformers_logging.set_verbosity_error()  # what matters of its messages is raised here as one line
transformers_logging.disable_progress_bar()

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Modules of a base model that text never passes, as Gemma 3 and its like call them.
IMAGE_PARTS = ("vision_tower", "multi_modal_projector")

NF4_BLOCK = 64  # weights that share a scale

# What belongs to a checkpoint beside weights and config, copied along unchanged.
PROCESSOR_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
TOKENIZER_FILES = (
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "graft.json",
)
COMPANIONS = PROCESSOR_FILES + TOKENIZER_FILES
# How configs call a factor on the logits (Granite, Cohere, Muse, Falcon H1), which losses and scores here don't apply.
LOGIT_FACTORS = ("logits_scaling", "logit_scale", "output_multiplier", "lm_head_multiplier")
# How configs call ids that have a meaning outside the text: eos_token_id, image_token_index, …
_SPECIAL_ID = re.compile(r"_token_(id|index)$")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights, checked against the index and for truncation.

    Raises:
        ModelError: no weights, pickle weights only, a missing or damaged file.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError) as error:
            raise ModelError(f"{index}: damaged weight index; fetch the model again") from error
        files = [folder / name for name in names]
        for file in files:
            if not file.is_file():
                raise ModelError(f"{folder}: {file.name} is missing, though the index names it; fetch the model again")
    else:
        files = [folder / "model.safetensors"]
    if not files[0].is_file():
        pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern)]
        if pickles:
            raise ModelError(
                f"{folder}: the weights are pickled ({pickles[0]}), which can run code when opened; "
                "convert them to safetensors first"
            )
        raise ModelError(f"{folder}: no model.safetensors here; base.model must be a folder with safetensors weights")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: damaged or cut short ({error}); fetch the file again") from error
    return files


def read_config(folder: Path) -> Any:
    """The model's configuration (transformers).

    Raises:
        ModelError: no readable config.json.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json here; a model folder needs one beside its weights")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, json.JSONDecodeError, KeyError) as error:
        raise ModelError(f"{folder}/config.json: not a configuration transformers can read: {_first(error)}") from error


def check(folder: Path, tokens: int | None = None) -> None:
    """Raise a ModelError where the folder is no whole, safe checkpoint that fits its tokenizer of `tokens` ids."""
    config = read_config(folder)
    weight_files(folder)
    rows = config.get_text_config().vocab_size
    if tokens is not None and tokens > rows + family(config.model_type).rowless_tokens:
        raise ModelError(
            f"{folder}: the tokenizer has {tokens:,} tokens but the model only {rows:,} rows: they don't belong "
            "together; use the tokenizer that came with these weights"
        )


def check_logits(folder: Path) -> None:
    """Raise a ModelError where the model's logits are not simply its output matrix's, perhaps soft-capped."""
    config = read_config(folder).get_text_config()
    for key in LOGIT_FACTORS:
        if getattr(config, key, None) not in (None, 1):
            raise ModelError(
                f"{folder}/config.json: the model multiplies or divides its logits by {key} = {getattr(config, key)}, "
                "which losses and scores here don't know; use another base"
            )


def special_ids(folder: Path) -> frozenset[int]:
    """The ids that a checkpoint's configs use by number, for example to end a turn or to mark an image."""
    paths = [folder / "config.json", folder / "generation_config.json"]
    return frozenset(i for path in paths if path.is_file() for i in _special_ids(json.loads(path.read_text("utf-8"))))


def _special_ids(section: dict[str, Any]) -> Iterator[int]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif _SPECIAL_ID.search(key) and value is not None:
            yield from value if isinstance(value, list) else [value]


def is_tied(config: Any) -> bool:
    """Whether input and output embeddings are one matrix."""
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", config.tie_word_embeddings))


def load(
    folder: Path,
    dtype: torch.dtype | None = None,
    quantise: str = "none",
    vision: bool = True,
) -> PreTrainedModel:
    """The model of a checkpoint folder, in its own architecture (text or multimodal), in evaluation mode.

    On the CPU, weights that keep their stored dtype are memory-mapped: only those that are used take memory.

    Args:
        dtype: of the weights in memory; by default the one they are stored in.
        quantise: `nf4` holds the linear layers in 4-bit NormalFloat with double quantisation (QLoRA,
            arXiv 2305.14314) through bitsandbytes.
        vision: False leaves out what only images need. Such a model reads text as the whole one does, and can't be
            saved as a whole one.
    Raises:
        ModelError: damaged or ill-fitting weights.
    """
    config = read_config(folder)
    loader: Any = _architecture(config, folder)
    if not vision:
        loader = _without_vision(loader)
    extra: dict[str, Any] = {}
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        extra["attn_implementation"] = "eager"  # torch's fused attention would leave the capping out (Gemma 2)
    if quantise == "nf4":
        extra["quantization_config"] = _nf4(folder, dtype or torch.bfloat16)
    try:
        model, info = loader.from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **extra,
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{folder}: cannot load the weights: {_first(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} tensors are missing from the weights, the first is {missing[0]}; "
            "fetch the model again"
        )
    mismatched = list(info["mismatched_keys"])
    if mismatched:
        raise ModelError(f"{folder}: the shape of {mismatched[0][0]} does not fit config.json; fetch the model again")
    _keep_packing(model)
    return model.eval()


def blank(folder: Path) -> PreTrainedModel:
    """The checkpoint's architecture without weights (on the meta device): names and shapes.

    Raises:
        ModelError: no architecture of transformers.
    """
    config = read_config(folder)
    with torch.device("meta"):
        return _architecture(config, folder)(config)


def _architecture(config: Any, folder: Path) -> type[PreTrainedModel]:
    import transformers

    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ModelError(
            f"{folder}/config.json: the architecture {name!r} is not one of transformers; models that bring their own "
            "code are not supported"
        )
    return kind


def _without_vision(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The same architecture, which drops its image parts before they get weights.

    It keeps name and module, by which transformers looks up how stored tensors are renamed.
    """

    def init(self: Any, config: Any, **settings: Any) -> None:
        kind.__init__(self, config, **settings)
        for name in IMAGE_PARTS:
            if hasattr(self.base_model, name):
                delattr(self.base_model, name)

    return type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})


def _nf4(folder: Path, compute: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ModelError(
            "quantise: nf4 needs bitsandbytes; install lingraft[quantise], or set quantise: none"
        ) from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=[f"{re.escape(name)}$" for name in _unquantised(blank(folder))],
    )


def _keep_packing(model: PreTrainedModel) -> None:
    """Keep 4-bit weights as they are. On a CPU with bfloat16 instructions, bitsandbytes packs them otherwise and rounds
    their scales when they are first used in evaluation mode: what trains over them then trains over other weights."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _unquantised(model: PreTrainedModel) -> Iterator[str]:
    """Linear modules that keep their precision: those of images, the head, whose rows may train, and the smallest.

    A weight of one block gains nothing from 4 bits, and Gemma 3n's AltUp reads such weights itself.
    """
    inside = {id(module) for module in model.get_decoder().modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (id(module) not in inside or module.weight.numel() <= NF4_BLOCK):
            yield name


def save(model: PreTrainedModel, folder: Path, companions: Path) -> None:
    """Write weights and config to `folder`, and copy tokenizer, templates and processor files from `companions`."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, safe_serialization=True)
    copy_companions(companions, folder)


def copy_companions(source: Path, folder: Path, names: Sequence[str] = COMPANIONS) -> None:
    """Copy the files that belong to a checkpoint beside weights and config, those of `names` that there are."""
    for name in names:
        if (source / name).is_file():
            shutil.copy2(source / name, folder / name)


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a folder.

    Raises:
        ModelError: no usable tokenizer files.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a damaged file
        raise ModelError(f"{folder}: cannot load its tokenizer: {_first(error)}") from error


def to_device(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """The model, moved in place."""
    movable: Any = model  # transformers wraps `.to` in a way that type checkers can't follow
    return movable.to(device)


def input_matrix(model: PreTrainedModel) -> nn.Parameter:
    """The (V, D) input embedding matrix."""
    embedding: Any = model.get_input_embeddings()
    return embedding.weight


def output_matrix(model: PreTrainedModel) -> nn.Parameter:
    """The (V, D) output matrix; the same object as the input matrix where they are tied."""
    head: Any = model.get_output_embeddings()
    return head.weight


def body_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The language model's own parameters beside the vocabulary's matrices: layers and norms, no vision tower."""
    matrices = {id(input_matrix(model)), id(output_matrix(model))}
    inside = {id(p) for p in model.get_decoder().parameters()}
    return {n: p for n, p in model.named_parameters() if id(p) in inside and id(p) not in matrices}


def _first(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]
