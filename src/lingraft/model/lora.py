"""Low-rank adapters through peft, on the language model's projections only (arXiv 2106.09685).

Over 4-bit weights too (QLoRA, arXiv 2305.14314). `lingraft.model.changes` merges them into the stored weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from lingraft.errors import ModelError
from lingraft.model.changes import Adapter


def add_lora(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: int,
    dropout: float,
    targets: Sequence[str],
    rank_stabilised: bool = False,
) -> list[str]:
    """Wrap every projection of the decoder whose last name is in `targets`; return the wrapped modules' names.

    Vision towers are left alone. Only the adapters have gradients afterwards. A starts random (the process's seed),
    B zero: the model's output is unchanged at first.
    """
    names = target_modules(model, targets)
    if not names:
        raise ModelError(
            f"lora.targets: the model has no linear module named {', '.join(targets)}; "
            "leave targets out for the usual ones"
        )
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=rank_stabilised,
        target_modules="|".join(re.escape(name) for name in names),
        bias="none",
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return names


def target_modules(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Full names of the decoder's linear modules that end in one of `targets`."""
    inside = {id(module) for module in model.get_decoder().modules()}
    return [
        name
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    ]


def lora_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The adapters' parameters, by name."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def adapters(model: PreTrainedModel) -> dict[str, Adapter]:
    """The model's adapters, by the names of the modules that they were added to; the tensors are the live ones."""
    wrapped: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    return {
        name: Adapter(layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"])
        for name, layer in wrapped
    }
