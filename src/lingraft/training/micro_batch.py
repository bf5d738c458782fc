"""How many rows of a step go through the model at a time.

The result of a step is the same sum however it is split, so this is a matter of memory and speed alone. It is decided
by what `memory.py` counts for so many rows, once, and remembered: another split rounds differently.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lingraft.atomic import write_text
from lingraft.training.batches import Batches
from lingraft.training.free_memory import free_bytes
from lingraft.training.parallel import Parallel
from lingraft.training.settings import StageSettings

# More tokens at a time than this make no device faster.
ENOUGH_TOKENS = 8192
# The part of the free memory that may be used: allocators and drivers want some too.
USABLE = 0.8
REMEMBERED = "micro-batch.txt"


def micro_batch_for(
    work: Path, needed: Callable[[int], float], batches: Batches, settings: StageSettings, parallel: Parallel
) -> int:
    """The recipe's number, or the one chosen when the stage began; chosen now where there is neither. Never so many
    that a step's rows don't go round all processes.

    Args:
        work: the stage's own folder; needed: bytes that training with so many rows at a time takes beside the weights.
    """
    most = _share(settings, parallel)
    if settings.micro_batch is not None:
        return min(settings.micro_batch, most)
    path, remembered = work / REMEMBERED, 0
    with suppress(OSError, ValueError):
        remembered = int(path.read_text(encoding="utf-8"))
    chosen = int(parallel.most(remembered)[0])  # every process has read before one of them writes
    if not chosen:
        chosen = choose_micro_batch(needed, batches, settings, parallel)
        if parallel.first:
            write_text(path, f"{chosen}\n")
    return min(chosen, most)


def choose_micro_batch(
    needed: Callable[[int], float], batches: Batches, settings: StageSettings, parallel: Parallel
) -> int:
    """As many rows at a time as fit into every process's memory; one where none does, which may fit after all."""
    most = min(_share(settings, parallel), max(1, ENOUGH_TOKENS // batches.sequence_length))
    free = USABLE * free_bytes(parallel.device)
    fitting = max((count for count in range(1, most + 1) if needed(count) <= free), default=1)
    return int(-parallel.most(-fitting)[0])


def _share(settings: StageSettings, parallel: Parallel) -> int:
    """A process's rows of a step, at most."""
    return -(-settings.rows_per_step // parallel.size)
