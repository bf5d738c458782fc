"""How fast the stages run and how much memory they take, at a known model's shape with random weights.

Each stage is a real one, from loading the checkpoint to the last step, on synthetic tokens and in a process of its own,
so that its peak memory is its own. What stands beside each other was measured in the same process: the
stage's steps, and a plain matrix product for the rate that the device gives.

    lingraft bench --shape gemma-3-270m --stage 1 --dtype bf16 --tokens 512 --steps 5 --json
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from lingraft.atomic import write_json
from lingraft.errors import LingraftError, RecipeError, TrainingError
from lingraft.model.dimensions import dimensions, empty_model
from lingraft.model.load import DTYPES, read_config
from lingraft.presets import EEVE
from lingraft.recipe import Stage
from lingraft.steps.shape import config_of
from lingraft.steps.stage import stage_settings
from lingraft.training.batches import Batches
from lingraft.training.devices import product_rate, wait
from lingraft.training.flops import flops_per_token
from lingraft.training.loss import NextTokenLoss
from lingraft.training.memory import BYTES, NF4_BYTES, stage_memory
from lingraft.training.stage import train_stage
from lingraft.training.tokens import Encoded

ROW_TOKENS = 2048  # a step's tokens stand in rows of at most so many
NEW_TOKEN_SHARE = 0.3  # of the synthetic tokens
SHARD_BYTES = 2 * 10**9
STORED = torch.bfloat16  # as models are published, whatever they are trained in
GB = 1e9
LESS = "for less memory give fewer --tokens, --optimizer adamw_8bit or --quantise nf4"
# What the time between two marks was spent on, by the later one.
PARTS = ("data", "trunk_forward", "loss", "trunk_backward", "optimizer")


@dataclass(frozen=True)
class Setup:
    """A stage to run on a checkpoint of random weights: so many rows of tokens a step."""

    stage: Stage
    number: int
    row_tokens: int
    rows: int
    steps: int
    new_rows: int


def bench(
    shape: str,
    *,
    stage: str | None = None,
    dtype: str = "bf16",
    tokens: int = 512,
    steps: int = 5,
    new_rows: int = 6143,
    settings: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Run some steps of EEVE's stages at a shape, its matrices untied, and measure each.

    Args:
        shape: a name of `lingraft.families.shapes`, or a folder with a config.json.
        stage: number or name of the only one to run, by default all.
        dtype: `bf16` or `fp32`; tokens: of an optimiser step; steps: that are measured, after one that is not.
        new_rows: how many of the shape's rows count as new, the last ones.
        settings: keys of a recipe's stage, such as `{"optimizer": "adamw_8bit"}`. Unlike in a recipe, activations are
            kept unless `gradient_checkpointing` is set.
    Raises:
        LingraftError: no such shape or stage, a setting that the recipe would refuse, or too little memory.
    """
    config = text_model(config_of(shape))
    if new_rows >= config.vocab_size:
        raise RecipeError(f"--new-rows: the shape has {config.vocab_size:,} rows; give fewer than that")
    rows = -(-tokens // ROW_TOKENS)
    row_tokens = -(-tokens // rows)
    own = {"precision": dtype, "sequence_length": row_tokens, "gradient_checkpointing": False}
    settings = own | (settings or {})
    chosen = _chosen(stage)
    results = []
    with tempfile.TemporaryDirectory(prefix="lingraft-bench-") as folder:
        model = Path(folder) / "model"
        write_random(config, model, STORED)
        for number in chosen:
            setup = Setup(eeve_stage(number, settings), number, row_tokens, rows, steps, new_rows)
            results.append({"shape": shape, **in_own_process(setup, model, Path(folder))})
    return results


def text_model(config: Any) -> Any:
    """The configuration of the shape's language model alone, its matrices untied."""
    text = config.get_text_config()
    text.tie_word_embeddings = False
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    text.architectures = [kind.__name__]
    return text


def _chosen(stage: str | None) -> list[int]:
    """Numbers of the stages to run."""
    names = [entry["name"] for entry in EEVE]
    if stage is None:
        return list(range(1, len(names) + 1))
    if stage in names:
        return [names.index(stage) + 1]
    if stage.isdigit() and 1 <= int(stage) <= len(names):
        return [int(stage)]
    raise RecipeError(f"--stage: no stage {stage!r}; give 1 to {len(names)}, or one of {', '.join(names)}")


def eeve_stage(number: int, settings: dict[str, Any]) -> Stage:
    """One of EEVE's stages with other settings; `quantise` goes for adapters, too."""
    entry = {**EEVE[number - 1], **settings}
    if "quantise" in settings and "lora" in entry:
        entry["lora"] = {**entry["lora"], "quantise": settings["quantise"]}
    return Stage.model_validate(entry)


@torch.no_grad()
def write_random(config: Any, folder: Path, dtype: torch.dtype) -> None:
    """A checkpoint of random weights, written shard by shard: no more than one is ever in memory."""
    folder.mkdir(parents=True)
    config.dtype = dtype
    config.save_pretrained(folder)
    torch.manual_seed(0)
    files: dict[str, str] = {}
    for number, names in enumerate(_shards(empty_model(config).state_dict(), dtype.itemsize)):
        file = f"model-{number}.safetensors"
        tensors = {name: _random(shape, dtype) for name, shape in names.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        _let_go(folder / file)
        files |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


def _let_go(path: Path) -> None:
    """Have the file read from the disk, as a model usually is: of one just written, Linux maps larger pieces, so that
    rows looked up would count for more memory than they are."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _shards(tensors: dict[str, Tensor], itemsize: int) -> Iterator[dict[str, torch.Size]]:
    shard: dict[str, torch.Size] = {}
    size = 0
    for name, tensor in tensors.items():
        shard[name] = tensor.shape
        size += tensor.numel() * itemsize
        if size > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def _random(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Small numbers for a matrix, ones for a norm's gains: activations stay finite."""
    return torch.ones(shape, dtype=dtype) if len(shape) == 1 else torch.empty(shape, dtype=dtype).normal_(std=0.02)


# ---------------------------------------------------------------------------------------------- in a process of its own


def in_own_process(setup: Setup, model: Path, work: Path) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")  # a fork would begin with this process's memory
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_measure_and_send, args=(there, setup, model, work), daemon=True)
    process.start()
    there.close()
    try:
        result = here.recv()
    except EOFError:
        process.join()
        raise TrainingError(
            f"stage {setup.stage.name}: its process ended without a result (exit code {process.exitcode}; -9 is most "
            f"likely for want of memory, else what went wrong stands above); {LESS}"
        ) from None
    process.join()
    if isinstance(result, LingraftError):
        raise result
    return result


def _measure_and_send(connection: Connection, setup: Setup, model: Path, work: Path) -> None:
    try:
        with redirect_stdout(sys.stderr):  # where results go, JSON among them, progress is in the way
            connection.send(measure(setup, model, work))
    except LingraftError as error:
        connection.send(error)
    except torch.OutOfMemoryError as error:
        connection.send(TrainingError(f"stage {setup.stage.name}: {str(error).partition(chr(10))[0]}; {LESS}"))


def measure(setup: Setup, model: Path, work: Path) -> dict[str, Any]:
    """Run the stage in this process on the checkpoint `model`, and say what it took."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = read_config(model)
    dims = dimensions(config, tied=False)
    settings = replace(stage_settings(setup.stage, config.model_type, seed=0), rows_per_step=setup.rows)
    new_ids = list(range(dims.rows - setup.new_rows, dims.rows))
    before = 0 if device.type == "cuda" else psutil.Process().memory_info().rss
    with _Clock(device) as clock, tempfile.TemporaryDirectory(dir=work) as scratch:
        learnt = train_stage(
            model,
            Path(scratch),
            settings,
            synthetic_batches(setup, dims.rows),
            new_ids,
            loss=lambda trained: _TimedLoss(trained, clock),
        )
    rate = product_rate(device, DTYPES[settings.precision])
    step_tokens = setup.rows * setup.row_tokens
    flops = flops_per_token(dims, settings, setup.new_rows, setup.row_tokens)
    predicted = stage_memory(
        dims,
        settings,
        setup.new_rows,
        setup.row_tokens,
        clock.rows,
        stored_bytes=STORED.itemsize,
        device=device.type,
        stage_tokens=(setup.steps + 1) * step_tokens,
    )
    linear = NF4_BYTES if settings.quantise == "nf4" else BYTES[settings.precision]
    seconds = clock.seconds_per_step()
    step = statistics.median(map(sum, zip(*seconds.values(), strict=True)))
    return {
        "stage": setup.number,
        "name": setup.stage.name,
        "trains": settings.trains,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "dtype": settings.precision,
        "optimizer": settings.optimizer,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "tokens_per_step": step_tokens,
        "rows_at_a_time": clock.rows,
        "tokens_per_second": step_tokens / step,
        "peak_memory_gb": learnt.loop.peak_memory_gb - before / GB,
        "predicted_memory_gb": predicted.peak / GB,
        "weights_gb": ((dims.parameters - dims.linear) * BYTES[settings.precision] + dims.linear * linear) / GB,
        "matmul_utilisation": flops.total * step_tokens / step / rate,
        "matmul_gflops_per_second": rate / 1e9,
        "gflops_per_token": flops.total / 1e9,
        "seconds_per_step": step,
        "seconds": {part: statistics.median(values) for part, values in seconds.items()},
    }


class _Clock:
    """Marks in time, from which the parts of each step are read."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.rows = device, 0
        self.marks: list[tuple[str, float]] = []

    def __enter__(self) -> _Clock:
        self._hooks = (
            register_optimizer_step_pre_hook(lambda *_: self.mark("trunk_backward")),
            register_optimizer_step_post_hook(lambda *_: self.mark("optimizer")),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def mark(self, part: str) -> None:
        """What was done since the last mark belongs to `part`."""
        wait(self.device)
        self.marks.append((part, time.perf_counter()))

    def seconds_per_step(self) -> dict[str, list[float]]:
        """For each part, its seconds in every step but the first, which warms up."""
        ends = [i for i, (part, _) in enumerate(self.marks) if part == "optimizer"]
        steps: dict[str, list[float]] = {part: [0.0] * (len(ends) - 1) for part in PARTS}
        for step, (first, last) in enumerate(pairwise(ends)):
            for (_, begin), (part, end) in zip(self.marks[first:last], self.marks[first + 1 : last + 1], strict=True):
                steps[part][step] += end - begin
        return steps


class _TimedLoss(NextTokenLoss):
    """The stage's loss, with marks between its parts."""

    def __init__(self, model: Any, clock: _Clock) -> None:
        super().__init__(model)
        self.clock = clock

    def states(self, input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
        after_a_step = bool(self.clock.marks) and self.clock.marks[-1][0] == "optimizer"
        self.clock.mark("data" if after_a_step else "trunk_backward")
        self.clock.rows = max(self.clock.rows, len(input_ids_BT))
        states_BTD = super().states(input_ids_BT, position_ids_BT)
        self.clock.mark("trunk_forward")
        return states_BTD

    def of_states(self, hidden_ND: Tensor, labels_N: Tensor, scale: float = 1.0) -> Tensor:
        loss = super().of_states(hidden_ND, labels_N, scale)
        self.clock.mark("loss")
        return loss


def synthetic_batches(setup: Setup, vocabulary: int) -> Batches:
    """Rows of one document each: ids as frequent as their rank, as in text, and new ones among them."""
    numbers = np.random.default_rng(0)
    count = (setup.steps + 1) * setup.rows
    shape = (count, setup.row_tokens)
    ids = np.floor(vocabulary ** numbers.random(shape)).astype(np.int32) - 1
    new = numbers.random(shape) < NEW_TOKEN_SHARE
    ids[new] = vocabulary - 1 - numbers.integers(setup.new_rows, size=int(new.sum()))
    learnt = np.ones(setup.row_tokens, bool)
    documents = [Encoded(row, learnt, f"random#{number}") for number, row in enumerate(ids)]
    return Batches(
        {"random": documents},
        {"random": 1.0},
        sequence_length=setup.row_tokens,
        rows_per_step=setup.rows,
        pad=0,
        bos=None,
        seed=0,
        epochs=1,
    )
