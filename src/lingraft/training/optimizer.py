"""AdamW over named groups of parameters, in float32 or with 8-bit states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from lingraft.errors import TrainingError
from lingraft.training.settings import StageSettings

# bitsandbytes' 8-bit states: values that share a scale, and how many a CPU updates at a time (of twice as many, malloc
# sometimes gives the memory back after each part, and a step takes half as long again).
SCALED = 256
PART = 1 << 17


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
    optimizer = kind(groups, betas=settings.betas)
    optimizer.update_step = partial(_update_step, optimizer, optimizer.update_step)  # called for each parameter
    return optimizer


def _update_step(
    optimizer: Any,
    whole: Callable[..., None],
    group: dict[str, Any],
    parameter: nn.Parameter,
    group_index: int,
    index: int,
) -> None:
    """bitsandbytes' update of a parameter; on a CPU part after part.

    There it works on float32 copies of both moments: of a whole vocabulary matrix they are more than what 8 bits save,
    and fit no cache. States have a scale for each 256 values, so parts come out as the whole would.
    """
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    state = optimizer.state[parameter]
    if parameter.device.type != "cpu" or state["state1"].dtype != torch.uint8:
        whole(group, parameter, group_index, index)
        return
    state["step"] += 1
    assert parameter.grad is not None
    beta1, beta2 = group["betas"]
    for first in range(0, parameter.numel(), PART):
        values, scales = slice(first, first + PART), slice(first // SCALED, (first + PART) // SCALED)
        optimizer_update_8bit_blockwise(
            "adam",
            g=parameter.grad.reshape(-1)[values],
            p=parameter.data.view(-1)[values],
            state1=state["state1"].view(-1)[values],
            state2=state["state2"].view(-1)[values],
            beta1=beta1,
            beta2=beta2,
            beta3=0.0,
            alpha=0.0,
            eps=group["eps"],
            step=state["step"],
            lr=group["lr"],
            qmap1=state["qmap1"],
            qmap2=state["qmap2"],
            absmax1=state["absmax1"][scales],
            absmax2=state["absmax2"][scales],
            weight_decay=group["weight_decay"],
        )


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
