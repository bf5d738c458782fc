"""AdamW over named groups of parameters, in float32 or with 8-bit states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from lingraft.errors import TrainingError
from lingraft.training.settings import StageSettings

# bitsandbytes' 8-bit states: values that share a scale, and how many a CPU updates at a time.
SCALED = 256
PART = 1 << 18


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
    """bitsandbytes' update of a parameter; on a CPU part after part, by torch's fused AdamW.

    There bitsandbytes works on float32 copies of both moments: of a whole vocabulary matrix they are more than what
    8 bits save, and fit no cache. States have a scale for each 256 values, so parts come out as the whole would.
    """
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    state = optimizer.state[parameter]
    if parameter.device.type != "cpu" or state["state1"].dtype != torch.uint8:
        whole(group, parameter, group_index, index)
        return
    assert parameter.grad is not None
    beta1, beta2 = group["betas"]
    gradient, values = parameter.grad.reshape(-1), parameter.data.view(-1)
    moments = [(state[f"state{n}"].view(-1), state[f"absmax{n}"], state[f"qmap{n}"]) for n in (1, 2)]
    for first in range(0, parameter.numel(), PART):
        part, scales = slice(first, first + PART), slice(first // SCALED, (first + PART) // SCALED)
        means = [
            dequantize_blockwise(codes[part], absmax=scale[scales], code=code, blocksize=SCALED)
            for codes, scale, code in moments
        ]
        adamw(
            [values[part]],
            [gradient[part]],
            [means[0]],
            [means[1]],
            [],
            [torch.tensor(float(state["step"]))],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for mean, (codes, scale, code) in zip(means, moments, strict=True):
            quantised, found = quantize_blockwise(mean, code=code, blocksize=SCALED)
            codes[part] = quantised
            scale[scales] = found.absmax
    state["step"] += 1


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
