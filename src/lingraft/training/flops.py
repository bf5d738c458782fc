"""How many floating-point operations a stage needs for one token, and how long they take.

What counts: the multiplications and additions of matrix products that the stage's mathematics asks for, once each.
Recomputing activations (gradient checkpointing) or logits does not count, nor do norms, activations and the optimiser,
whose time is memory traffic. A utilisation of 1 therefore means that nothing but needed products ran, at full rate.

A product of a token with a matrix of n values costs 2n forward, 2n for the gradient of its input, and 2n for the
gradient of the matrix. A stage needs the gradient of inputs all the way down where input rows or layers train, no
gradient inside the trunk where only output rows do, and gradients of matrices for those that train.
"""

from __future__ import annotations

from dataclasses import dataclass

from lingraft.model.dimensions import Dimensions
from lingraft.training.memory import OPTIMIZER_BYTES, passes_back, trained_values, vocabulary_rows
from lingraft.training.settings import StageSettings

ADAM_TRAFFIC = 20  # bytes read and written per value: value and gradient in float32, with clipping; state comes on top
NF4_TRAFFIC = 0.516 + 2 + 2  # bytes per value to unpack 4 bits to 16 and read them again


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one token. The vocabulary's part is per learnt token."""

    trunk_forward: float
    trunk_backward: float
    loss_forward: float
    loss_backward: float

    @property
    def total(self) -> float:
        return self.trunk_forward + self.trunk_backward + self.loss_forward + self.loss_backward


def flops_per_token(dims: Dimensions, settings: StageSettings, new_rows: int, sequence_length: int) -> Flops:
    """What one token costs in a row of `sequence_length` tokens that is a single document (shorter ones cost less)."""
    attention = sum(2 * 2 * dims.heads * dims.head_width * _seen(sequence_length, window) for window in dims.windows)
    forward = 2 * dims.linear + attention
    backward = 0.0
    if passes_back(dims, settings):
        backward = 2 * dims.linear + 2 * attention
    if settings.layers == "all":
        backward += 2 * dims.linear
    if settings.lora:
        adapters = settings.lora.r * sum(t.inputs + t.outputs for t in dims.targets(settings.lora.targets))
        forward += 2 * adapters
        backward += 4 * adapters
    _, output = vocabulary_rows(dims, settings)
    trained = {"none": 0, "new": new_rows, "all": dims.rows}[output] * dims.width
    return Flops(
        trunk_forward=forward,
        trunk_backward=backward,
        loss_forward=2 * dims.matrix,
        loss_backward=2 * trained + (2 * dims.matrix if passes_back(dims, settings) else 0),
    )


def _seen(length: int, window: int | None) -> float:
    """Positions that a token of a row sees on average, itself included."""
    if window is None or window >= length:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length


def seconds_per_token(
    dims: Dimensions,
    settings: StageSettings,
    new_rows: int,
    sequence_length: int,
    micro_batch: int,
    *,
    flops_per_second: float,
    bytes_per_second: float,
) -> float:
    """Training time of one token: products at the rate given, with what is recomputed, and the memory traffic beside.

    Args:
        flops_per_second: the rate that matrix products are expected to reach; bytes_per_second: memory bandwidth.
    """
    flops = flops_per_token(dims, settings, new_rows, sequence_length)
    needed = flops.total
    recomputes = settings.gradient_checkpointing and passes_back(dims, settings)
    if recomputes:
        needed += flops.trunk_forward
    values = trained_values(dims, settings, new_rows).total
    step = values * (ADAM_TRAFFIC + 2 * OPTIMIZER_BYTES[settings.optimizer])
    traffic = step / (settings.rows_per_step * sequence_length)
    if settings.quantise == "nf4":
        unpacked = 1 + recomputes + passes_back(dims, settings)
        traffic += unpacked * NF4_TRAFFIC * dims.linear / (micro_batch * sequence_length)
    return needed / flops_per_second + traffic / bytes_per_second
