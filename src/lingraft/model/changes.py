"""The end of a stage in little memory: what it learnt, put into a copy of the checkpoint it started from.

Everything else is copied byte for byte (`lingraft.model.shards`), and the tensors that change are made a block of rows
at a time in float32, then rounded to the dtype they are stored in. The model that trained is not needed: it may have
held its weights in 4 bits, in another dtype or without its vision tower. Adapters are merged into the unquantised
weights (arXiv 2106.09685, 2305.14314).

Two proofs follow, both from the files. What the stage did not train is bit-identical. And each merged layer, on
random inputs, gives what the layer and its adapter gave apart, within the rounding of the stored dtype.

Shapes: V vocabulary, N trained rows, D width, R rank of an adapter, I and O width of a layer's input and output,
K random inputs.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lingraft.errors import ModelError, TrainingError
from lingraft.model.load import copy_companions
from lingraft.model.names import stored_names
from lingraft.model.shards import BLOCK_BYTES, FLOATS, MEGABYTE, Change, Piece, differing_rows, write_shards
from lingraft.model.surgery import Checkpoint, open_checkpoint, rows_at
from lingraft.progress import bar, track

INPUTS = 4  # random inputs on which a merged layer is compared

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """Trained rows of a vocabulary matrix: values (N, D) at `ids`, or (V, D) for all of them where `ids` is None."""

    ids: Sequence[int] | None
    values: Tensor


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter of a linear layer: it adds scaling · B @ A to the weight (O, I). A (R, I), B (O, R)."""

    A: Tensor
    B: Tensor
    scaling: float

    def delta(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` of what it adds, in float32."""
        return self.scaling * (self.B[first:last].detach().float().cpu() @ self.A.detach().float().cpu())


@dataclass(frozen=True)
class Changes:
    """Everything a stage learnt.

    output: None where one matrix serves both ends. adapters: by the full name of the linear module. parameters: whole
    tensors by their name in the model. All in any float dtype, on any device.
    """

    input: Rows | None = None
    output: Rows | None = None
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    parameters: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Proof:
    """What the new checkpoint was seen to be, beside the old one.

    changed: names of the stored tensors that differ, those of the vocabulary as `<name>[old rows]` and
    `<name>[new rows]`. unchanged: how many tensors or such parts are bit-identical. merge_error: the largest relative
    error of a merged layer's output, None without adapters.
    """

    changed: list[str]
    unchanged: int
    merge_error: float | None


def write_changed(source: Path, out: Path, changes: Changes, new_ids: Sequence[int]) -> Proof:
    """Write the checkpoint `source` with the changes to the folder `out`, config and companions along, and prove it.

    Args:
        new_ids: the grafted tokens, whose rows are the "new rows" of the proof.
    Raises:
        ModelError: the source has no tensor for a name (`check_writable` says so before a stage begins).
        TrainingError: what was learnt is not finite in the stored dtype, or does not merge.
        AssertionError: a tensor differs that the changes don't name (a defect of ours).
    """
    checkpoint = open_checkpoint(source)
    adapters = _by_stored_name(source, checkpoint, {f"{name}.weight": a for name, a in changes.adapters.items()})
    parameters = _by_stored_name(source, checkpoint, changes.parameters)
    rows = _vocabulary(checkpoint, changes)
    edits: dict[str, Change] = {
        name: _rows_changed(name, new, FLOATS[checkpoint.tensors[name].dtype]) for name, new in rows.items()
    }
    edits |= {name: _merged(name, adapter) for name, adapter in adapters.items()}
    edits |= {name: _replaced(name, values) for name, values in parameters.items()}

    out.mkdir(parents=True, exist_ok=True)
    write_shards(out, {name: Piece(stored, edits.get(name)) for name, stored in checkpoint.tensors.items()})
    shutil.copy2(source / "config.json", out / "config.json")
    copy_companions(source, out)

    written = open_checkpoint(out)
    merge_error = _merge_error(checkpoint, written, adapters)
    free = {name: None if name not in rows else rows[name].ids for name in edits}
    return Proof(*_compare(checkpoint, written, free, new_ids), merge_error)


def check_writable(source: Path, modules: Iterable[str], parameters: Iterable[str]) -> None:
    """Raise a ModelError where `write_changed` could not put adapters of `modules`, or `parameters`, into `source`."""
    wanted = [*parameters, *(f"{module}.weight" for module in modules)]
    _by_stored_name(source, open_checkpoint(source), dict.fromkeys(wanted))


def _by_stored_name(folder: Path, checkpoint: Checkpoint, values: Mapping[str, T]) -> dict[str, T]:
    """The values by the stored tensors' names instead of the model's."""
    if not values:
        return {}
    names = stored_names(folder, checkpoint.tensors, values)
    for name in names.values():
        if (dtype := checkpoint.tensors[name].dtype) not in FLOATS:
            raise ModelError(
                f"{folder}: {name} is stored as {dtype}, and only {', '.join(FLOATS)} can be trained; start from the "
                "model before it was quantised"
            )
    return {names[parameter]: value for parameter, value in values.items()}


def _vocabulary(checkpoint: Checkpoint, changes: Changes) -> dict[str, Rows]:
    """The trained rows by the matrices they belong to; a head that a tied checkpoint stores too stays its copy."""
    assert not (checkpoint.tied and changes.output), "the rows of tied matrices are input rows"
    output = changes.input if checkpoint.tied else changes.output
    found = {checkpoint.input: changes.input, checkpoint.output: output}
    return {name: rows for name, rows in found.items() if name is not None and rows is not None}


def _rows_changed(name: str, rows: Rows, dtype: torch.dtype) -> Change:
    if rows.ids is None:
        return _replaced(name, rows.values)
    return rows_at(rows.ids, _finite(name, rows.values.detach().cpu().to(dtype)))


def _replaced(name: str, values: Tensor) -> Change:
    rows = torch.atleast_1d(values)

    def change(first: int, block: Tensor) -> Tensor:
        return _finite(name, rows[first : first + len(block)].detach().cpu().to(block.dtype))

    return change


def _merged(name: str, adapter: Adapter) -> Change:
    def change(first: int, block: Tensor) -> Tensor:
        return _finite(name, (block.float() + adapter.delta(first, first + len(block))).to(block.dtype))

    return change


def _finite(name: str, block: Tensor) -> Tensor:
    if not block.isfinite().all():
        raise TrainingError(
            f"{name} is not finite any more in {str(block.dtype).removeprefix('torch.')}: the training diverged; lower "
            "learning_rate, or look for NaN in the model that the stage started from"
        )
    return block


def _merge_error(before: Checkpoint, after: Checkpoint, adapters: Mapping[str, Adapter]) -> float | None:
    """The largest relative error of a merged layer's output.

    Raises:
        TrainingError: an error above the rounding of the stored dtype, and of R products summed in float32.
    """
    errors = []
    for name, adapter in track(adapters.items(), "checking the merge"):
        old, new = before.tensor(name), after.tensor(name)
        allowed = torch.finfo(old.dtype).eps + len(adapter.A) * torch.finfo(torch.float32).eps
        errors.append(layer_error(old, new, adapter))
        if not errors[-1] <= allowed:
            raise TrainingError(
                f"{name}: merged, the layer's output differs from that with its adapter beside it by {errors[-1]:.1e} "
                f"({allowed:.1e} is rounding); the disk or memory may be damaged: run the stage again"
            )
    return max(errors, default=None)


def layer_error(old_OI: Tensor, merged_OI: Tensor, adapter: Adapter) -> float:
    """‖(merged − old − scaling·B·A) x‖ / ‖(old + scaling·B·A) x‖ over some random inputs x, in float64.

    The adapter is applied as a layer applies it, A first, and not as the merge multiplied it out.
    """
    x_IK = torch.randn(old_OI.shape[1], INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A, B = adapter.A.detach().cpu().double(), adapter.B.detach().cpu().double()
    low_RK = adapter.scaling * (A @ x_IK)
    rows = max(1, BLOCK_BYTES // (8 * old_OI.shape[1]))
    error = size = 0.0
    for old, merged, up in zip(old_OI.split(rows), merged_OI.split(rows), B.split(rows), strict=True):
        apart = old.double() @ x_IK + up @ low_RK
        error += float((merged.double() @ x_IK - apart).square().sum())
        size += float(apart.square().sum())
    return math.sqrt(error / max(size, sys.float_info.min))  # a layer of zeros has no error


def _compare(
    before: Checkpoint, after: Checkpoint, free: Mapping[str, Sequence[int] | None], new_ids: Sequence[int]
) -> tuple[list[str], int]:
    """Names of the parts that differ, and how many don't; `free` has the rows of a tensor that may, None for all."""
    assert before.tensors.keys() == after.tensors.keys()
    changed: list[str] = []
    unchanged = 0
    drifted: list[str] = []
    megabytes = sum(stored.nbytes for stored in before.tensors.values()) / MEGABYTE
    with bar("proving the rest unchanged", total=megabytes, unit="MB") as tick:
        for name, old in before.tensors.items():
            differing = differing_rows(old, after.tensors[name], tick)
            assert differing is not None, f"{name} has another shape"
            allowed = free.get(name, ())
            if allowed is not None and not np.isin(differing, allowed).all():
                drifted.append(name)
            parts = {name: differing}
            if name in (before.input, before.output):
                new = np.isin(differing, new_ids)
                parts = {f"{name}[old rows]": differing[~new]}
                if len(new_ids):
                    parts[f"{name}[new rows]"] = differing[new]
            here = [part for part, rows in parts.items() if len(rows)]
            changed += here
            unchanged += len(parts) - len(here)
    if drifted:
        raise AssertionError(f"frozen tensors changed: {', '.join(drifted)}")
    return sorted(changed), unchanged
