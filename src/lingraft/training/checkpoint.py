"""Checkpoints inside a stage: what training has changed so far, enough to go on bit for bit.

Only trainable parameters and their optimiser state are kept; everything else is in the stage's input folder. Tensors
go to safetensors, the rest to JSON; nothing is pickled. A checkpoint is a folder that appears in one rename.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lingraft.progress import say

KEPT = 2


def save(work: Path, step: int, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Write `work/checkpoint-<step>` atomically and drop all but the newest `KEPT`."""
    tensors: dict[str, Tensor] = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    for name, parameter in parameters.items():
        tensors[f"value/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
    place = work / f"checkpoint-{step}"
    partial = work / f".checkpoint-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, partial / "state.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step}))
    for file in partial.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    shutil.rmtree(place, ignore_errors=True)
    os.replace(partial, place)
    for old in _newest_first(work)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def resume(work: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Load the newest whole checkpoint into parameters, optimiser and random state; return its step (0: none)."""
    for folder in _newest_first(work):
        try:
            step = int(json.loads((folder / "state.json").read_text())["step"])
            tensors = load_file(folder / "state.safetensors")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            say(f"  {folder.name} is damaged ({error}); going back to the one before", style="yellow")
            continue
        _restore(tensors, parameters, optimizer)
        return step
    return 0


def _restore(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"value/{name}"])
            state = {}
            for key in {k.split("/")[1] for k in tensors if k.startswith("optimizer/") and k.endswith(f"/{name}")}:
                value = tensors[f"optimizer/{key}/{name}"]
                state[key] = value if value.dim() == 0 else value.to(parameter.device)
            if state:
                optimizer.state[parameter] = state
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])


def _newest_first(work: Path) -> list[Path]:
    return sorted(work.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
