"""The training loop, the only one: read → loss → clip → step → log → save.

Every method is a choice of trainable parameters, data and loss for this loop. The gradient of an optimiser step is
the mean over all tokens that the step learns, however they are split into micro-batches and processes.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lingraft.errors import TrainingError
from lingraft.progress import bar, say
from lingraft.training import checkpoint
from lingraft.training.batches import IGNORED, Batches, MicroBatch
from lingraft.training.micro_batch import choose_micro_batch
from lingraft.training.optimizer import clip_gradients, make_optimizer
from lingraft.training.settings import StageSettings

WATCH_AFTER_STEPS = 20


@dataclass
class LoopResult:
    """What the loop saw: one log entry a step, and its speed."""

    log: list[dict[str, float]]
    steps: int
    tokens: int
    seconds: float
    peak_memory_gb: float


def learning_rate_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """The factor on the peak learning rate at `step` of `steps`: linear warm-up, then the schedule down to 0."""
    warm = math.ceil(steps * warmup)
    if step < warm:
        return (step + 1) / (warm + 1)
    done = (step - warm) / max(steps - warm, 1)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]


def train(
    loss_model: nn.Module,
    groups: list[dict[str, Any]],
    parameters: Mapping[str, nn.Parameter],
    batches: Batches,
    settings: StageSettings,
    work: Path,
    accelerator: Accelerator,
) -> LoopResult:
    """Train `parameters` through `loss_model` over `batches`, going on from the newest checkpoint in `work`.

    Args:
        loss_model: maps a micro-batch and a scale to the scaled sum of the loss over its learnt tokens.
        groups: optimiser groups (`params`, `lr`, `weight_decay`, `name`).
    Raises:
        TrainingError: the loss is not finite or explodes; names the step and the documents.
        KeyboardInterrupt: after a signal, once the step's checkpoint is written.
    """
    optimizer: Any = make_optimizer(groups, settings)
    loss_model, optimizer = accelerator.prepare(loss_model, optimizer)
    inner = getattr(optimizer, "optimizer", optimizer)
    for group in inner.param_groups:
        group["peak_lr"] = group["lr"]
    first = checkpoint.resume(work, parameters, inner)
    log = _read_log(work / "log.jsonl", first)
    watch = LossWatch([entry["loss"] for entry in log], settings.name)
    begin = last_saved = time.monotonic()
    loss_model.train()
    feed = _Feed(batches, first, choose_micro_batch(loss_model, batches, settings, work, accelerator))
    with (
        _stop_signals() as stopped,
        open(work / "log.jsonl", "a", encoding="utf-8") as log_file,
        bar(settings.name, total=batches.tokens, unit="tokens") as tick,
    ):
        tick(sum(entry["tokens"] for entry in log))
        for step in range(first, len(batches)):
            factor = learning_rate_factor(step, len(batches), settings.warmup, settings.schedule)
            for group in inner.param_groups:
                group["lr"] = group["peak_lr"] * factor
            micro_batches, loss = _gradients(loss_model, feed, step, settings, accelerator)
            norm = clip_gradients(parameters.values(), settings.clip)
            watch.check(step, loss, norm, micro_batches)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            tokens = sum(m.size for m in micro_batches)
            entry = {
                "step": step,
                "loss": loss,
                "lr": settings.learning_rate * factor,
                "norm": norm,
                "tokens": tokens,
            }
            log.append(entry)
            log_file.write(json.dumps(entry) + "\n")
            tick(tokens, loss=loss)
            now = time.monotonic()
            if stopped or (step + 1 < len(batches) and now - last_saved > settings.checkpoint_seconds):
                log_file.flush()
                os.fsync(log_file.fileno())
                checkpoint.save(work, step + 1, parameters, inner)
                last_saved = now
            if stopped:
                raise KeyboardInterrupt
    trained = int(sum(entry["tokens"] for entry in log))
    return LoopResult(log, len(batches), trained, time.monotonic() - begin, peak_memory_gb())


class _Feed:
    """The steps' micro-batches in order, made ahead of time; smaller ones from a step on that did not fit."""

    def __init__(self, batches: Batches, first: int, micro_batch: int) -> None:
        self.batches, self.micro_batch = batches, micro_batch
        self.steps = batches.from_step(first, micro_batch)

    def next(self) -> list[MicroBatch]:
        return next(self.steps)[1]

    def again_smaller(self, step: int) -> list[MicroBatch]:
        self.micro_batch //= 2
        say(f"  out of memory: going on with {self.micro_batch} rows at a time", style="yellow")
        self.steps = self.batches.from_step(step, self.micro_batch)
        return self.next()


def _gradients(
    loss_model: nn.Module,
    feed: _Feed,
    step: int,
    settings: StageSettings,
    accelerator: Accelerator,
) -> tuple[list[MicroBatch], float]:
    """The gradients of a step, and its mean loss. Where its micro-batches don't fit into memory, they are halved."""
    micro_batches = feed.next()
    while True:
        try:
            return micro_batches, _accumulate(loss_model, micro_batches, settings, accelerator)
        except torch.OutOfMemoryError as error:
            for parameter in loss_model.parameters():
                parameter.grad = None
            if feed.micro_batch == 1 or accelerator.num_processes > 1:
                raise TrainingError(
                    f"stage {settings.name}, step {step + 1}: out of memory with {feed.micro_batch} rows of "
                    f"{feed.batches.sequence_length} tokens at a time; set a smaller micro_batch, "
                    "gradient_checkpointing: true, optimizer: adamw_8bit or a shorter sequence_length (lingraft plan "
                    "shows what each saves)"
                ) from error
        torch.cuda.empty_cache()
        micro_batches = feed.again_smaller(step)


def _accumulate(
    loss_model: nn.Module, step: list[MicroBatch], settings: StageSettings, accelerator: Accelerator
) -> float:
    """Backward over all micro-batches of a step; returns the mean loss per learnt token over all processes."""
    device = accelerator.device
    # only trained layers are float32 among bfloat16 ones; rows convert what they give
    mixed = settings.precision == "bf16" and settings.layers != "none"
    micro_batches = _share(step, accelerator)
    learnt = max(sum(m.tokens for m in step), 1)
    # DDP averages gradients over processes; the sum over them is wanted
    scale = accelerator.num_processes / learnt
    total = torch.zeros((), dtype=torch.float64, device=device)
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(loss_model):
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                loss = loss_model(
                    batch.input_ids_BT.to(device, non_blocking=True),
                    batch.labels_BT.to(device, non_blocking=True),
                    batch.position_ids_BT.to(device, non_blocking=True),
                    scale,
                )
            accelerator.backward(loss)
        total += loss.detach()
    return float(accelerator.reduce(total, "mean"))


def _share(micro_batches: list[MicroBatch], accelerator: Accelerator) -> list[MicroBatch]:
    """This process's part of a step; all processes get equally many, the last ones filled up with unlearnt copies."""
    world, rank = accelerator.num_processes, accelerator.process_index
    mine = micro_batches[rank::world]
    if len(mine) < math.ceil(len(micro_batches) / world):
        first = micro_batches[0]
        silent = torch.full_like(first.labels_BT, IGNORED)
        mine.append(MicroBatch(first.input_ids_BT, silent, first.position_ids_BT, (), 0))
    return mine


class LossWatch:
    """Stops a stage whose loss is not finite or explodes, and says at which step and on which documents."""

    def __init__(self, losses: list[float], stage: str) -> None:
        self.average: float | None = None
        self.seen = 0
        self.stage = stage
        for loss in losses:
            self._add(loss)

    def _add(self, loss: float) -> None:
        self.average = loss if self.average is None else 0.9 * self.average + 0.1 * loss
        self.seen += 1

    def check(self, step: int, loss: float, norm: float, micro_batches: list[MicroBatch]) -> None:
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise self._error(step, f"the loss is {loss}, the gradient norm {norm}", micro_batches)
        if self.average is not None and self.seen >= WATCH_AFTER_STEPS and loss > 2 * self.average + 2:
            raise self._error(step, f"the loss jumped from about {self.average:.2f} to {loss:.2f}", micro_batches)
        self._add(loss)

    def _error(self, step: int, what: str, micro_batches: list[MicroBatch]) -> TrainingError:
        documents = list(dict.fromkeys(o for m in micro_batches for o in m.origins))
        shown = ", ".join(documents[:5]) + (f" and {len(documents) - 5} more" if len(documents) > 5 else "")
        return TrainingError(
            f"stage {self.stage}, step {step + 1}: {what}; the step read {shown}; "
            "lower learning_rate or look at these documents; finished steps and stages are kept"
        )


def _read_log(path: Path, steps: int) -> list[dict[str, float]]:
    """The log's first `steps` entries; later ones (written after the checkpoint we resume from) are cut off."""
    lines = path.read_text(encoding="utf-8").splitlines()[:steps] if path.is_file() else []
    beside = path.with_suffix(".partial")
    beside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(beside, path)
    return [json.loads(line) for line in lines]


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that a step is never torn; a second signal stops at once."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread (a notebook's worker): signals are not ours to take
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_memory_gb() -> float:
    """Peak memory so far: the GPU's where there is one, else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
