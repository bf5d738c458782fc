"""Watching a stage: one log line a step, the same numbers for TensorBoard, and an eye on the loss.

log.jsonl       one JSON object a step, see `LoopResult`
tensorboard/    event files; what goes wrong with them is said once, and never stops a run
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from lingraft.errors import TrainingError
from lingraft.progress import say
from lingraft.training.batches import MicroBatch

LOG = "log.jsonl"
# Steps that a loss is compared with, and how many of them there must be.
WINDOW = 50
FEWEST = 20
# Far above: so many standard deviations over the median, and at least this part of it. In 42 stages without a spike
# (6,564 steps of generated and of real text) 3 deviations warn nine times, 4 once, and 5 never.
FAR = 6.0
FAR_PART = 0.05
# The standard deviation of a normal distribution whose median absolute deviation is 1.
DEVIATION = 1.4826
# Nats a token, in every step: a blind guess among 262 k tokens costs 12.5, so the model has come apart.
HOPELESS = 100.0
NAMED_DOCUMENTS = 5

Entry = dict[str, Any]

# Linux's own record of a process's memory, whose peak can be set back.
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Spike:
    """A loss far above the usual one: the median of the steps before, and the documents that the step read."""

    usual: float
    documents: list[str]


class LossWatch:
    """Warns of a loss that is far above those of the steps before it, and stops a stage that can't go on.

    The spread is taken from the median absolute deviation, which outliers don't move; it is wider where a step has
    fewer tokens than the others, as a stage's last one may. Steps in a row that are far above count as one spike.
    """

    def __init__(self, stage: str, log: Sequence[Entry] = ()) -> None:
        self.stage = stage
        self._recent: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._high = False
        for entry in log[-2 * WINDOW :]:  # a window for each of the window's own steps
            self._add(entry["loss"], entry["tokens"])

    def check(self, step: int, loss: float, norm: float, micro_batches: Sequence[MicroBatch]) -> Spike | None:
        """Judge a step's loss and gradient norm before they are used. Returns a spike at its first step.

        Args:
            step: counted from 1.
        Raises:
            TrainingError: one of them is not finite, or the loss is hopeless or has exploded; names the step and its
                documents.
        """
        documents = list(dict.fromkeys(origin for batch in micro_batches for origin in batch.origins))
        if not (loss <= HOPELESS and math.isfinite(norm)):
            raise self._error(step, f"the loss is {loss:.4g}, the gradient norm {norm:.4g}", documents)
        usual = self._usual()
        if usual is not None and loss > 2 * usual + 2:
            raise self._error(step, f"the loss jumped from about {usual:.2f} to {loss:.2f}", documents)
        was_high = self._high
        self._add(loss, sum(batch.size for batch in micro_batches))
        if usual is None or was_high or not self._high:
            return None
        say(
            f"  step {step}: the loss is {loss:.2f}, far above the usual {usual:.2f}; it read {named(documents)}",
            style="yellow",
        )
        return Spike(usual, documents)

    def _usual(self) -> float | None:
        """The median loss of the steps before; None where there are too few."""
        return statistics.median(loss for loss, _ in self._recent) if len(self._recent) >= FEWEST else None

    def _add(self, loss: float, tokens: int) -> None:
        usual = self._usual()
        if usual is not None:
            spread = DEVIATION * statistics.median(abs(loss - usual) for loss, _ in self._recent)
            fewer = math.sqrt(max(statistics.median(count for _, count in self._recent) / max(tokens, 1), 1.0))
            self._high = loss > usual + max(FAR * spread, FAR_PART * usual) * fewer
        self._recent.append((loss, tokens))

    def _error(self, step: int, what: str, documents: Sequence[str]) -> TrainingError:
        return TrainingError(
            f"stage {self.stage}, step {step}: {what}; the step read {named(documents)}; "
            "lower learning_rate or look at these documents; finished stages and the newest checkpoint are kept"
        )


def named(documents: Sequence[str]) -> str:
    """The first few of some documents, and how many more there are."""
    more = len(documents) - NAMED_DOCUMENTS
    return ", ".join(documents[:NAMED_DOCUMENTS]) + (f" and {more} more" if more > 0 else "")


class StageLog:
    """A stage's log on disk, one line a step, and its events for TensorBoard.

    `entries` are all of them, those of the first `steps` steps from an earlier start. What stands on disk beyond
    them was written after the checkpoint that the stage goes on from, and is cut off.

    Args:
        events: the folder for TensorBoard; None for none.
        writes: whether this is the process that writes; the others only read.
    Raises:
        TrainingError: the log on disk is damaged.
    """

    def __init__(self, path: Path, steps: int, events: Path | None, writes: bool = True) -> None:
        self.entries = _read_log(path, steps)
        self._path = path
        self._file: FileIO | None = None
        self._torn = False
        self._events: TensorBoard | None = None
        if writes:
            self._file = self._rewritten()
            if events is not None:
                with self._harmless():
                    self._events = TensorBoard(events, steps)

    def add(self, entry: Entry) -> None:
        """Log a step; its numbers go to TensorBoard by their names."""
        self.entries.append(entry)
        if self._file is not None and not self._torn:
            try:
                self._torn = self._file.write(line := _line(entry)) < len(line)
            except OSError:  # the disk is full
                self._torn = True
        if self._events is not None:
            with self._harmless():
                self._events.add(entry)

    def flush(self) -> None:
        """Bring all lines to the disk, with those that found no room before: a checkpoint needs those before it.

        Raises:
            OSError: they can't be written.
        """
        if self._file is None:
            return
        if self._torn:
            self._file.close()
            self._file = self._rewritten()
            self._torn = False
        os.fsync(self._file.fileno())

    def _rewritten(self) -> FileIO:
        """The file anew with all entries, open for more. Without a buffer: each line is there at once, or never."""
        beside = self._path.with_suffix(".partial")
        write_log(beside, self.entries)
        os.replace(beside, self._path)
        return open(self._path, "ab", buffering=0)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            with self._harmless():
                self._events.close()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """TensorBoard must not stop a run, whatever fails: a missing library, a full disk. It is said once."""
        try:
            yield
        except Exception as error:
            self._events = None
            say(f"  nothing for TensorBoard from here on ({type(error).__name__}: {error})", style="yellow")


def write_log(path: Path, entries: Iterable[Entry]) -> None:
    """Write a whole log."""
    path.write_bytes(b"".join(map(_line, entries)))


def _read_log(path: Path, steps: int) -> list[Entry]:
    """The entries of the first `steps` steps."""
    try:
        lines = path.read_bytes().splitlines()[:steps] if steps else []
        entries = [json.loads(line) for line in lines]
        if len(entries) < steps:
            raise ValueError(f"it ends at step {len(entries)} of {steps}")
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{path}: the stage's log is damaged ({error}); delete {path.parent} and give the same command again: the "
            "stage starts anew"
        ) from error
    return entries


def _line(entry: Entry) -> bytes:
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode()


class TensorBoard:
    """Event files of one stage: one event a step, written at once so that it can be watched.

    A stage that starts anew (`steps` 0) removes those of an earlier version of it; where it goes on, TensorBoard is
    told to forget later steps. The usual writers cost 5 ms a step (torch's `add_scalar`, for a dozen numbers) and write
    in a thread, which would show a full disk as a traceback.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        if steps == 0:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads them in the order of their names
        self._writer: Any = RecordWriter((folder / f"events.out.tfevents.{time.time():.6f}.lingraft").open("wb"))
        self._write(file_version="brain.Event:2")
        self._write(step=steps + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, entry: Entry) -> None:
        """Write the numbers of a step under their names."""
        numbers = {name: value for name, value in entry.items() if isinstance(value, int | float) and name != "step"}
        values = [self._summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._write(step=entry["step"], summary=self._summary(value=values))

    def close(self) -> None:
        self._writer.close()

    def _write(self, **event: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **event).SerializeToString())
        self._writer.flush()


def reset_peak_memory() -> None:
    """Let `peak_memory_gb` begin anew, where the system can do that."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _STATUS.is_file():
        with suppress(OSError):  # some containers don't allow it
            _RESET.write_text("5")


def peak_memory_gb() -> float:
    """Peak memory so far: the GPU's where there is one, else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if _STATUS.is_file():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # macOS: in bytes
