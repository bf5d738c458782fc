"""The training loop, the only one: read → loss → clip → step → validate → log → save.

Every method is a choice of trainable parameters, data and loss for this loop. The gradient of an optimiser step is
the mean over all tokens that the step learns, however they are split into micro-batches and processes.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lingraft.errors import TrainingError
from lingraft.progress import bar, say
from lingraft.training import checkpoint
from lingraft.training.batches import Batches, MicroBatch
from lingraft.training.devices import wait
from lingraft.training.free_memory import keep_freed_memory
from lingraft.training.micro_batch import micro_batch_for
from lingraft.training.parallel import Parallel
from lingraft.training.settings import StageSettings
from lingraft.training.validation import Best, validation_steps
from lingraft.training.watch import LOG, Entry, LossWatch, StageLog, peak_memory_gb


@dataclass
class LoopResult:
    """What the loop saw.

    log: an entry for each step, counted from 1: `loss` (mean over its learnt tokens), `lr/<group>`, `gradient_norm`
        (before clipping), `tokens`, `tokens_per_second`, `seconds/<part>`, `peak_memory_gb` (so far); where they were
        measured or seen, `validation_loss` and `spike`.
    kept_step: after how many steps the parameters were as they are now: the last, or the best (`keep`).
    """

    log: list[Entry]
    kept_step: int
    peak_memory_gb: float

    @property
    def steps(self) -> int:
        return len(self.log)

    @property
    def tokens(self) -> int:
        return int(sum(entry["tokens"] for entry in self.log))

    @property
    def seconds_by_part(self) -> dict[str, float]:
        """Seconds of all steps, those before a resume too, each measured until the device was done.

        data: waited for micro-batches; gradients: forward and backward passes, and the gradients' norm; update: the
        optimiser's step; validation. Checkpoints are in none of them.
        """
        parts = ("data", "gradients", "update", "validation")
        return {part: sum(entry.get(f"seconds/{part}", 0.0) for entry in self.log) for part in parts}

    @property
    def seconds(self) -> float:
        return sum(self.seconds_by_part.values())

    @property
    def tokens_per_second(self) -> float:
        """The rate of training, validation left out."""
        return self.tokens / (self.seconds - self.seconds_by_part["validation"])


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
    parallel: Parallel,
    needed: Callable[[int], float],
    validation: Batches | None = None,
    events: Path | None = None,
) -> LoopResult:
    """Train `parameters` through `loss_model` over `batches`, going on from the newest checkpoint in `work`.

    Args:
        loss_model: maps a micro-batch and a scale to the scaled sum of the loss over its learnt tokens.
        groups: optimiser groups (`params`, `lr`, `weight_decay`, `name`).
        needed: bytes that training with so many rows at a time takes beside the weights, for `micro_batch: auto`.
        validation: held-out text, measured as `settings.validate_every` says; `keep: best` needs it.
        events: folder for TensorBoard.
    Raises:
        TrainingError: the loss is not finite or explodes; names the step and the documents.
        KeyboardInterrupt: after a signal, once the step's checkpoint is written.
    """
    keep_freed_memory()
    loss_model, optimizer = parallel.prepare(loss_model, groups, settings)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    position = checkpoint.resume(work, parameters, optimizer, parallel)
    first = position.step
    micro_batch = micro_batch_for(work, needed, batches, settings, parallel)
    if position.micro_batch and position.micro_batch < micro_batch:  # it became smaller, or the recipe's is larger now
        micro_batch = position.micro_batch
        say(f"  going on with {micro_batch} row(s) at a time, as this stage did: with more it would round otherwise")
    feed = _Feed(batches, first, micro_batch)
    due = validation_steps(len(batches), batches.epochs, settings.validate_every) if validation else set()
    best = Best(work / "best.safetensors", parallel) if settings.keep == "best" else None
    last_saved = time.monotonic()
    loss_model.train()
    with (
        _stop_signals() as stopped,
        closing(StageLog(work / LOG, first, events, parallel.first)) as log,
        bar(settings.name, batches.tokens, "tokens", sum(entry["tokens"] for entry in log.entries)) as tick,
    ):
        watch = LossWatch(settings.name, log.entries)
        shown: dict[str, float] = {}
        for step in range(first, len(batches)):
            clock = _Clock(parallel.device)
            factor = learning_rate_factor(step, len(batches), settings.warmup, settings.schedule)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            micro_batches = feed.next()
            clock.lap("data")
            micro_batches, loss = _gradients(loss_model, feed, micro_batches, step, settings, parallel)
            norm = parallel.clip(parameters.values(), settings.clip)
            clock.lap("gradients")
            spike = watch.check(step + 1, loss, norm, micro_batches)
            try:
                parallel.step(optimizer)  # Adam's states are made by the first one
            except torch.OutOfMemoryError as error:
                raise TrainingError(_no_room(settings, step, feed)) from error
            clock.lap("update")

            tokens = sum(m.size for m in micro_batches)
            entry: Entry = {
                "step": step + 1,
                "loss": loss,
                **{f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups},
                "gradient_norm": norm,
                "tokens": tokens,
                "tokens_per_second": tokens / sum(clock.seconds.values()),
            }
            if spike is not None:
                entry["spike"] = asdict(spike)
            if validation is not None and step + 1 in due:
                entry["validation_loss"] = _validate(loss_model, validation, feed.micro_batch, settings, parallel)
                if best is not None:
                    best.offer(step + 1, entry["validation_loss"], parameters)
                clock.lap("validation")
            entry |= {f"seconds/{part}": seconds for part, seconds in clock.seconds.items()}
            log.add(entry | {"peak_memory_gb": peak_memory_gb()})
            shown |= {key.removesuffix("_loss"): value for key, value in entry.items() if key.endswith("loss")}
            tick(tokens, **shown, step=f"{step + 1}/{len(batches)}")
            done = step + 1 == len(batches)
            if done:
                optimizer.state.clear()
            stop, save = parallel.most(bool(stopped), time.monotonic() - last_saved > settings.checkpoint_seconds)
            if stop or save or done:
                reached = checkpoint.Position(step + 1, feed.micro_batch)
                checkpoint.save(work, reached, parameters, optimizer, settings.keep_checkpoints, parallel, log.flush)
                last_saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt
    if best is not None:
        best.restore(parameters)
    return LoopResult(log.entries, best.step if best else len(batches), parallel.most(peak_memory_gb())[0])


class _Clock:
    """Seconds of a step by part, each from the end of the one before until the device is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        # the loss and the norm are read in every step, so only the update's end is waited for on its own account
        wait(self.device)
        now = time.perf_counter()
        self.seconds[part] = now - self._since
        self._since = now


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
    micro_batches: list[MicroBatch],
    step: int,
    settings: StageSettings,
    parallel: Parallel,
) -> tuple[list[MicroBatch], float]:
    """The gradients of a step, and its mean loss. Where its micro-batches don't fit into memory, they are halved."""
    while True:
        _seed(settings.seed, step, parallel.rank)
        try:
            return micro_batches, _accumulate(loss_model, micro_batches, parallel)
        except torch.OutOfMemoryError as error:
            for parameter in loss_model.parameters():
                parameter.grad = None
            if feed.micro_batch == 1 or parallel.size > 1:
                raise TrainingError(_no_room(settings, step, feed)) from error
        torch.cuda.empty_cache()
        micro_batches = feed.again_smaller(step)


def _no_room(settings: StageSettings, step: int, feed: _Feed) -> str:
    """What to change where a step doesn't fit: only what is not so already."""
    changes = {
        "a smaller micro_batch": feed.micro_batch > 1,
        "gradient_checkpointing: true": not settings.gradient_checkpointing
        and (settings.input_rows != "none" or settings.layers != "none"),
        "optimizer: adamw_8bit": settings.optimizer == "adamw" and settings.parallel == "ddp",
        "quantise: nf4": settings.quantise == "none" and settings.layers != "all" and settings.parallel == "ddp",
        "a shorter sequence_length": True,
    }
    return (
        f"stage {settings.name}, step {step + 1}: out of memory with {feed.micro_batch} row(s) of "
        f"{feed.batches.sequence_length} tokens at a time; set {', or '.join(c for c, new in changes.items() if new)} "
        "(lingraft plan shows what each saves) and give the same command again"
    )


def _seed(seed: int, step: int, process: int) -> None:
    """Make a step's random numbers (dropout) follow from its number, so that a resumed stage draws the same ones."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, process]).generate_state(1)[0]))


def _accumulate(loss_model: nn.Module, step: list[MicroBatch], parallel: Parallel) -> float:
    """Backward over all micro-batches of a step; returns the mean loss per learnt token over all processes."""
    micro_batches = parallel.share(step)
    scale = parallel.loss_scale / max(sum(m.tokens for m in step), 1)
    total = torch.zeros((), dtype=torch.float64, device=parallel.device)
    for batch in micro_batches:
        loss = _loss(loss_model, batch, scale, parallel.device)
        parallel.backward(loss, last=batch is micro_batches[-1])
        total += loss.detach()
    return parallel.sum(float(total)) / parallel.loss_scale


def _loss(loss_model: nn.Module, batch: MicroBatch, scale: float, device: torch.device) -> Tensor:
    """The summed loss of a micro-batch, times `scale`."""
    tensors = (batch.input_ids_BT, batch.labels_BT, batch.position_ids_BT)
    return loss_model(*(tensor.to(device) for tensor in tensors), scale)


@torch.no_grad()
def _validate(
    loss_model: nn.Module, held_out: Batches, micro_batch: int, settings: StageSettings, parallel: Parallel
) -> float:
    """The mean loss per learnt token of held-out text, over all processes. Leaves no gradient behind, and draws no
    random number.

    Raises:
        TrainingError: it is not finite, or nothing in the text is learnt.
    """
    loss_model.eval()
    total = torch.zeros((), dtype=torch.float64, device=parallel.device)
    learnt = 0
    for _, micro_batches in held_out.from_step(0, micro_batch):
        learnt += sum(m.tokens for m in micro_batches)
        for batch in parallel.share(micro_batches):
            total += _loss(loss_model, batch, 1.0, parallel.device)
    loss_model.train()
    if not learnt:
        raise TrainingError(
            f"stage {settings.name}: nothing in its held-out documents is learnt (chats without an answer?), so there "
            "is no validation loss; give other documents, or set keep: last and no validate_every"
        )
    loss = parallel.sum(float(total)) / learnt
    if not math.isfinite(loss):
        raise TrainingError(
            f"stage {settings.name}: the validation loss is {loss}; lower learning_rate, or look at the held-out text; "
            "finished stages and the newest checkpoint are kept"
        )
    return loss


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
    if caught:  # after the last step had looked
        raise KeyboardInterrupt
