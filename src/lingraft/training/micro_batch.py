"""How many rows of a step go through the model at a time.

The result of a step is the same sum however it is split, so this is a matter of memory and speed alone. What one row
needs is measured with a trial on the model as it is.
"""

from __future__ import annotations

import psutil
import torch
from torch import Tensor, nn

from lingraft.training.batches import Batches, MicroBatch
from lingraft.training.parallel import Parallel, here
from lingraft.training.settings import StageSettings

# More tokens at a time than this make no device faster.
ENOUGH_TOKENS = 8192
# The part of the free memory that may be used: allocators and drivers want some too.
USABLE = 0.8
# Bytes a token needs in a layer that keeps nothing: 16 vectors of width 4,096 in float32.
WORKING_BYTES = 16 * 4096 * 4
# Bytes a trained value needs beside itself: its gradient and the optimiser's moments.
STATE_BYTES = {"adamw": 12, "adamw_8bit": 7, "paged_adamw_8bit": 7}


def choose_micro_batch(loss_model: nn.Module, batches: Batches, settings: StageSettings, parallel: Parallel) -> int:
    """As many rows at a time as fit into every process's memory."""
    rows = -(-settings.rows_per_step // parallel.size)
    row = batches.step(0, 1)[0]
    most = min(rows, max(1, ENOUGH_TOKENS // batches.sequence_length))
    if most == 1:
        return 1
    trained = sum(here(p).numel() for p in loss_model.parameters() if p.requires_grad)
    free = (_free_bytes(parallel.device) - trained * STATE_BYTES[settings.optimizer]) * USABLE
    full_row = _row_bytes(loss_model, row, parallel.device) * batches.sequence_length / row.input_ids_BT.numel()
    fitting = free // full_row
    return min(max(int(-parallel.most(-fitting)[0]), 1), most)


def _row_bytes(loss_model: nn.Module, row: MicroBatch, device: torch.device) -> int:
    """Bytes that one row keeps until its backward pass. Leaves no gradient behind."""
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    tensors = [t.to(device) for t in (row.input_ids_BT, row.labels_BT, row.position_ids_BT)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_model(*tensors)
    for parameter in loss_model.parameters():
        parameter.grad = None
    # weights are no part of a row's; those that were gathered for a layer are empty again by now
    for tensor in (*loss_model.parameters(), *loss_model.buffers()):
        saved.pop(here(tensor).untyped_storage().data_ptr(), None)
    # as much again while gradients are made; where nothing is kept, what a layer works with
    kept = sum(storage.nbytes() for storage in saved.values())
    return max(2 * kept, row.input_ids_BT.numel() * WORKING_BYTES)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available
