"""Low-rank adapters through peft, on the language model's projections only, and their merge.

The merge adds each adapter's delta to the *unquantised* weights of the checkpoint the stage started from, so a
stage trained over 4-bit weights still ends in an ordinary full-precision checkpoint (arXiv 2106.09685, 2305.14314).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lingraft.errors import ModelError


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


def take_off(model: PreTrainedModel) -> dict[str, Tensor]:
    """Remove the adapters from the model, in place, and return what they added.

    Returns: full module name → (out, in) float32 matrix, scaled by α/r (α/√r when rank-stabilised).
    """
    added: dict[str, Tensor] = {}
    wrapped: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in wrapped:
        added[name] = layer.get_delta_weight("default").detach().float().cpu()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.base_layer)
    return added


def merge(model: PreTrainedModel, added: dict[str, Tensor]) -> None:
    """Add the deltas to the plain linear modules of a model, in float32, then round to its own precision."""
    with torch.no_grad():
        for name, delta in added.items():
            weight: Any = model.get_submodule(name).weight
            weight.copy_((weight.float() + delta.to(weight.device)).to(weight.dtype))
