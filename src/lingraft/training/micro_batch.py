"""How many rows of a step go through the model at a time.

The result of a step is the same sum however it is split, so this is a matter of memory and speed alone. What one row
needs is measured with a trial on the model as it is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lingraft.training.batches import Batches, MicroBatch
from lingraft.training.settings import StageSettings

# More tokens at a time than this make no device faster.
ENOUGH_TOKENS = 8192
# The part of the free memory that may be used: allocators and drivers want some too.
USABLE = 0.8
# Bytes a token needs in a layer that keeps nothing: 16 vectors of width 4,096 in float32.
WORKING_BYTES = 16 * 4096 * 4
# Bytes a trained value needs beside itself: its gradient and the optimiser's moments.
STATE_BYTES = {"adamw": 12, "adamw_8bit": 7, "paged_adamw_8bit": 7}


def choose_micro_batch(
    loss_model: nn.Module, batches: Batches, settings: StageSettings, work: Path, accelerator: Accelerator
) -> int:
    """Rows at a time: the recipe's number, else the one that an earlier start of this stage chose (a resumed stage
    must round as the first one did), else as many as fit into memory."""
    if settings.micro_batch:
        return settings.micro_batch
    memory = work / "micro_batch.json"
    if memory.is_file():
        return json.loads(memory.read_text())
    rows = -(-settings.rows_per_step // accelerator.num_processes)
    row = batches.step(0, 1)[0]
    most = min(rows, max(1, ENOUGH_TOKENS // max(row.input_ids_BT.shape[1], 1)))
    chosen = 1
    if most > 1:
        trained = sum(p.numel() for p in loss_model.parameters() if p.requires_grad)
        free = (_free_bytes(accelerator.device) - trained * STATE_BYTES[settings.optimizer]) * USABLE
        fitting = torch.tensor(free // max(_row_bytes(loss_model, row, accelerator), 1), device=accelerator.device)
        chosen = int(min(max(int(accelerator.gather(fitting).min()), 1), most))
    if accelerator.is_main_process:
        partial = memory.with_suffix(".partial")
        partial.write_text(json.dumps(chosen))
        os.replace(partial, memory)
    return chosen


def _row_bytes(loss_model: nn.Module, row: MicroBatch, accelerator: Accelerator) -> int:
    """Bytes that one row keeps until its backward pass. Leaves no gradient and no used random number behind."""
    held = {t.untyped_storage().data_ptr() for t in (*loss_model.parameters(), *loss_model.buffers())}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tensors = [t.to(accelerator.device) for t in (row.input_ids_BT, row.labels_BT, row.position_ids_BT)]
    with (
        torch.random.fork_rng(),
        accelerator.no_sync(loss_model),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        loss_model(*tensors)
    for parameter in loss_model.parameters():
        parameter.grad = None
    # as much again while gradients are made; where nothing is kept, what a layer works with
    return max(2 * sum(saved.values()), row.input_ids_BT.numel() * WORKING_BYTES)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available
