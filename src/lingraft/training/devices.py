"""What accelerators can do at most, and what the machine at hand does.

Sources: NVIDIA's data sheets and architecture white papers. Matrix rates are dense, with float32 sums; float32 without
TF32, which torch leaves off for matrix products.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Peak rates in FLOP/s and bytes/s."""

    bf16: float
    fp32: float
    bandwidth: float

    def rate(self, precision: str) -> float:
        return self.bf16 if precision == "bf16" else self.fp32


DEVICES = {
    "t4": Device(8.1e12, 8.1e12, 300e9),  # has no bfloat16: it is computed in float32
    "a5000": Device(111e12, 27.8e12, 768e9),
    "a6000": Device(155e12, 38.7e12, 768e9),
    "rtx-3090": Device(71e12, 35.6e12, 936e9),
    "rtx-4090": Device(165e12, 82.6e12, 1008e9),
    "l40s": Device(362e12, 91.6e12, 864e9),
    "a100": Device(312e12, 19.5e12, 2039e9),
    "h100": Device(989e12, 67e12, 3350e9),
    "h200": Device(989e12, 67e12, 4800e9),
}

_PRODUCT = 2048  # rows and columns on a CPU; on a GPU four times as many, to be long against the launch
_COPIED_BYTES = 2**28
_TRIES = 5


def measured(device: torch.device) -> Device:
    """The rates of this machine's device: a plain square matrix product in each precision, and a plain copy."""
    return Device(product_rate(device, torch.bfloat16), product_rate(device, torch.float32), _copy_rate(device))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a plain square matrix product, the best of a few."""
    size = _PRODUCT if device.type == "cpu" else 4 * _PRODUCT
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: a @ b, device)


def _copy_rate(device: torch.device) -> float:
    """Bytes read and written a second."""
    source, target = (torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * _COPIED_BYTES / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    work()
    seconds = []
    for _ in range(_TRIES):
        wait(device)
        begin = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
