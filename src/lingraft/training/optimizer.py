"""AdamW over named groups of parameters, in float32 or with 8-bit states."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lingraft.errors import TrainingError
from lingraft.training.settings import StageSettings


def make_optimizer(groups: list[dict[str, Any]], settings: StageSettings) -> torch.optim.Optimizer:
    """The optimiser that a stage asks for; `paged` ones move their states to the host when a GPU is full.

    Raises:
        TrainingError: bitsandbytes is not installed.
    """
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=settings.betas, fused=True)
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise TrainingError(
            f"stage {settings.name}: optimizer {settings.optimizer} needs bitsandbytes; install lingraft[quantise], "
            "or set optimizer: adamw"
        ) from error
    kind = {"adamw_8bit": optim.AdamW8bit, "paged_adamw_8bit": optim.PagedAdamW8bit}[settings.optimizer]
    return kind(groups, betas=settings.betas)


def parameter_groups(
    rows: Iterable[nn.Parameter], layers: Iterable[nn.Parameter], settings: StageSettings
) -> list[dict[str, Any]]:
    """Optimiser groups. Weight decay acts on matrices of the layers only: not on rows, norms or biases.

    Args:
        rows: of the vocabulary's matrices; layers: adapters, or the layers' own parameters.
    """
    layers = list(layers)
    rows_lr = settings.embedding_learning_rate or settings.learning_rate
    name = "lora" if settings.lora else "layers"
    groups = [
        ("rows", list(rows), rows_lr, 0.0),
        (name, [p for p in layers if p.dim() > 1], settings.learning_rate, settings.weight_decay),
        ("norms", [p for p in layers if p.dim() <= 1], settings.learning_rate, 0.0),
    ]
    return [
        {"name": name, "params": parameters, "lr": lr, "weight_decay": decay}
        for name, parameters, lr, decay in groups
        if parameters
    ]


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale the gradients down where their norm over all parameters is above `limit`; returns the norm before."""
    with_gradient = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
    if norm > limit:  # not finite: nothing to scale, the caller stops
        torch.nn.utils.clip_grads_with_norm_(with_gradient, limit, norm)
    return float(norm)
