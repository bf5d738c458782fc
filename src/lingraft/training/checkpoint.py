"""Checkpoints inside a stage: what training has changed so far, enough to go on bit for bit.

    checkpoint-<steps done>/
        state.safetensors   value/<parameter> and optimizer/<key>/<parameter>
        state.json          the position, what the optimiser counts in plain numbers, and the digest of both files

Nothing else has a state: a step's documents, learning rate and random numbers follow from its number alone, and frozen
weights are in the stage's input folder. A checkpoint appears in one rename, once all its bytes are on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lingraft.atomic import flush
from lingraft.errors import TrainingError
from lingraft.progress import say
from lingraft.training.parallel import Parallel

TENSORS, FACTS = "state.safetensors", "state.json"
# The code tables of bitsandbytes' 8-bit states: constants, and one tensor for all parameters.
CONSTANTS = frozenset({"qmap1", "qmap2"})


@dataclass(frozen=True)
class Position:
    """Where a stage stands: steps done, and the rows that go through the model at a time (None: not chosen yet), by
    which sums round."""

    step: int = 0
    micro_batch: int | None = None


def save(
    work: Path,
    position: Position,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    kept: int,
    parallel: Parallel,
    flush_log: Callable[[], None],
) -> None:
    """Write `work/checkpoint-<step>`, the stage's log first, then drop all but the newest `kept`.

    Where it can't be written (the disk is full), that is said and the older ones stay: a lost checkpoint costs less
    than a lost run.
    """
    state = _state(parameters, optimizer, parallel)
    tensors = {key: parallel.whole(value) for key, value in state.items() if isinstance(value, Tensor)}
    if not parallel.first:
        return
    tensors = {key: value.contiguous().cpu() for key, value in tensors.items()}
    # of this step or a later one: damaged, since the stage went on from before them
    for old in (*work.glob(".checkpoint-*"), *(f for f in _newest_first(work) if _step(f) >= position.step)):
        shutil.rmtree(old, ignore_errors=True)
    numbers = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    partial = work / f".checkpoint-{position.step}.partial"
    try:
        flush_log()
        partial.mkdir()
        save_file(tensors, partial / TENSORS)
        facts = {"position": asdict(position), "numbers": numbers}
        digest = _digest(partial, facts)
        (partial / FACTS).write_text(json.dumps({"facts": facts, "digest": digest}), encoding="utf-8")
        for path in (partial / TENSORS, partial / FACTS, partial):
            flush(path)
        os.replace(partial, work / f"checkpoint-{position.step}")
        flush(work)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        size = sum(tensor.nbytes for tensor in tensors.values())
        say(f"  {_unwritten(work, position.step, size, error)}", style="yellow")
        return
    for old in _newest_first(work)[kept:]:
        shutil.rmtree(old, ignore_errors=True)


def resume(
    work: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, parallel: Parallel
) -> Position:
    """Load the newest whole checkpoint into parameters and optimiser; without one, they stay as they are.

    Raises:
        TrainingError: it is of another kind of stage, or the processes don't find the same one.
    """
    folders = _newest_first(work)
    if folders:
        _make_states(optimizer)
    live = _state(parameters, optimizer, parallel)
    position, state = Position(), None
    for folder, older in zip_longest(folders, folders[1:]):
        try:
            position, state = _read(folder, parameters, live)
            break
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            instead = f"going back to {older.name}" if older else "the stage starts again"
            say(f"  {folder.name} is damaged ({error}): {instead}", style="yellow")
    latest, earliest = parallel.most(position.step, -position.step)
    if latest != -earliest:
        raise TrainingError(
            f"{work}: the processes find different checkpoints, of steps {-earliest:.0f} to {latest:.0f}; the run's "
            "folder has to be on a disk that all machines see alike, then give the same command again"
        )
    if state is not None:
        _restore(state, live, parameters, optimizer, parallel)
    elif folders:
        optimizer.state.clear()
    return position


def _state(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, parallel: Parallel
) -> dict[str, Any]:
    """Everything that training changes, by name: tensors, which are the live ones, and the optimiser's numbers."""
    state: dict[str, Any] = {f"value/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, stepped in parallel.stepped(parameters, optimizer).items():
        for key, value in optimizer.state.get(stepped, {}).items():
            if key not in CONSTANTS:
                state[f"optimizer/{key}/{name}"] = parallel.state(value) if isinstance(value, Tensor) else value
    return state


def _make_states(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimiser make its states as it wants them (paged, in 8 bits), by a step that changes no parameter."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in stepped]
    for parameter in stepped:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, gradient in zip(stepped, gradients, strict=True):
        parameter.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _read(
    folder: Path, parameters: Mapping[str, nn.Parameter], live: Mapping[str, Any]
) -> tuple[Position, dict[str, Any]]:
    """A checkpoint's position and state. The tensors are mapped from the file, not read.

    Raises:
        OSError, ValueError, KeyError, TypeError, SafetensorError: it is damaged.
        TrainingError: it is whole, but of another kind of stage.
    """
    written = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    facts = written["facts"]
    if _digest(folder, facts) != written["digest"]:
        raise ValueError("its bytes are not those that were written")
    saved: dict[str, Any] = dict(facts["numbers"])
    with safe_open(folder / TENSORS, "pt") as stored:
        saved |= {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (not a mapping)
    values = {f"value/{name}" for name in parameters}
    if not values <= saved.keys() <= live.keys() or any(_kind(saved[key]) != _kind(live[key]) for key in saved):
        raise TrainingError(
            f"{folder}: this half-done stage was begun in another way (optimizer, parallel, or zero2's number of "
            f"processes); go on as it was begun, or delete {folder.parent} to begin it again"
        )
    return Position(**facts["position"]), saved


def _kind(value: Any) -> tuple[Any, ...]:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else (type(value),)


def _restore(
    saved: Mapping[str, Any],
    live: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    parallel: Parallel,
) -> None:
    """Put a checkpoint's state into the live one. A parameter that had no gradient so far has no optimiser state."""
    stepped = parallel.stepped(parameters, optimizer)
    for name in stepped.keys() - {key.split("/", 2)[2] for key in saved if key.startswith("optimizer/")}:
        optimizer.state.pop(stepped[name], None)
    for key, value in saved.items():
        if isinstance(value, Tensor):
            parallel.fill(live[key], value)
        else:
            _, kind, name = key.split("/", 2)
            optimizer.state[stepped[name]][kind] = value
    parallel.filled()


def _digest(folder: Path, facts: Mapping[str, Any]) -> str:
    """SHA-256 of a checkpoint's tensors and facts."""
    with open(folder / TENSORS, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def _unwritten(work: Path, step: int, size: int, error: OSError | SafetensorError) -> str:
    """Why there is no checkpoint, and what that means."""
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    free = shutil.disk_usage(work).free
    newest = next(iter(_newest_first(work)), None)
    return (
        f"no checkpoint at step {step}: {reason} (it needs {size / 1e9:.3g} GB, {free / 1e9:.3g} GB are free); a stop "
        f"now would go back to {newest.name if newest else 'the beginning of the stage'}"
    )


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _newest_first(work: Path) -> list[Path]:
    return sorted(work.glob("checkpoint-*"), key=_step, reverse=True)
