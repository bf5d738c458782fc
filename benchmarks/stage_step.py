"""A step of each vocabulary stage: ours, Hugging Face's Trainer with a gradient hook, and peft's trainable tokens.

    python benchmarks/stage_step.py --rounds 3 --stages 1 2 3 4 5 --dtypes bf16 fp32

The shape is Gemma 3 270M's, untied, with 6,143 rows added to its 262,208; 512 tokens a step, AdamW, no gradient
checkpointing, random weights in a bfloat16 checkpoint (as such models are published). Each contender loads that
checkpoint and trains in a process of its own; the contenders of a round run one after another, and what is printed are
medians of the rounds' ratios. Peak memory is the most that was resident in
training, less what was before the model was loaded.

- hook: a whole matrix requires a gradient, whose old rows a hook sets to zero. `bf16` holds everything in bfloat16, as
  users of `from_pretrained(dtype="bfloat16")` do; `fp32` holds everything in float32. For stages that train a whole
  matrix in bf16, `bf16 over fp32` is the Trainer's mixed precision, whose Adam is as exact as ours.
- peft: `TrainableTokensConfig` with the new tokens' indices, in the same Trainer (stages 1 to 3 only).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

SHAPE = "gemma-3-270m"
OLD_ROWS, NEW_ROWS = 262_208, 6_143
ROWS = OLD_ROWS + NEW_ROWS
TOKENS, STEPS = 512, 3
# What each stage trains: input rows, output rows.
STAGES = {
    1: ("new", "none"),
    2: ("none", "new"),
    3: ("new", "new"),
    4: ("none", "all"),
    5: ("new", "all"),
}
GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", type=int, nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--one", help="run one contender in this process: a JSON object (used by the benchmark itself)")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(**json.loads(arguments.one))))
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model"
        write_checkpoint(checkpoint)
        print("| stage | dtype | contender | s/step | peak GB | ours: time | ours: memory | ours: above weights |")
        print("|---|---|---|---|---|---|---|---|")
        for stage in arguments.stages:
            for dtype in arguments.dtypes:
                compare(checkpoint, stage, dtype, arguments.rounds)


def compare(checkpoint: Path, stage: int, dtype: str, rounds: int) -> None:
    """Print a stage's rows: ours in its variants, and each rival with our ratios to it."""
    whole = "all" in STAGES[stage]
    ours = [("ours", {}), *([("ours, 8-bit Adam", {"optimizer": "adamw_8bit"})] if whole else [])]
    rivals = ["hook", *(["hook, bf16 over fp32"] if whole and dtype == "bf16" else []), *([] if whole else ["peft"])]
    found: dict[str, list[dict[str, float]]] = {name: [] for name, _ in ours} | {name: [] for name in rivals}
    for _ in range(rounds):
        for name, changes in ours:
            found[name].append(in_process("ours", checkpoint, stage, dtype, changes))
        for name in rivals:
            found[name].append(in_process(name, checkpoint, stage, dtype, {}))
    for name, runs in found.items():
        line = f"| {stage} | {dtype} | {name} | {median(r['seconds'] for r in runs):.2f} | "
        line += f"{median(r['peak'] for r in runs):.2f} |"
        if name not in rivals:
            print(line + " | | |", flush=True)
            continue
        for own, _ in ours:
            pairs = list(zip(found[own], runs, strict=True))
            time_ = median(a["seconds"] / b["seconds"] for a, b in pairs)
            memory = median(a["peak"] / b["peak"] for a, b in pairs)
            above = median((a["peak"] - a["weights"]) / (b["peak"] - b["weights"]) for a, b in pairs)
            print(line + f" {time_:.2f} | {memory:.2f} | {above:.2f} |", flush=True)
            line = f"| {stage} | {dtype} | {name}, to 8-bit Adam | | |"


def median(values: Any) -> float:
    return statistics.median(values)


def in_process(contender: str, checkpoint: Path, stage: int, dtype: str, changes: dict[str, Any]) -> dict[str, float]:
    one = {
        "contender": contender,
        "checkpoint": str(checkpoint),
        "stage": stage,
        "dtype": dtype,
        "changes": changes,
    }
    command = [sys.executable, __file__, "--one", json.dumps(one)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def config() -> Any:
    from lingraft.steps.shape import config_of

    shape = config_of(SHAPE)
    shape.vocab_size = ROWS
    shape.tie_word_embeddings = False
    return shape


def write_checkpoint(folder: Path) -> None:
    import torch

    from lingraft.bench import write_random

    write_random(config(), folder, torch.bfloat16)


def run(contender: str, checkpoint: str, stage: int, dtype: str, changes: dict[str, Any]) -> dict[str, float]:
    """Seconds of the median step, and GB of memory."""
    folder = Path(checkpoint)
    if contender == "ours":
        return ours(folder, stage, dtype, changes)
    return trainer(folder, stage, "mixed" if "over" in contender else dtype, with_peft=contender == "peft")


def weights_gb(dtype: str) -> float:
    from lingraft.model.dimensions import dimensions

    return dimensions(config(), tied=False).parameters * (2 if dtype == "bf16" else 4) / GB


def ours(folder: Path, stage: int, dtype: str, changes: dict[str, Any]) -> dict[str, float]:
    from lingraft.bench import Setup, eeve_stage, measure

    settings = {
        "precision": dtype,
        "sequence_length": TOKENS,
        "gradient_checkpointing": False,
        "micro_batch": 1,
        **changes,
    }
    setup = Setup(eeve_stage(stage, settings), stage, row_tokens=TOKENS, rows=1, steps=STEPS, new_rows=NEW_ROWS)
    with tempfile.TemporaryDirectory() as work:
        result = measure(setup, folder, Path(work))
    return {
        "seconds": result["seconds_per_step"],
        "peak": result["peak_memory_gb"],
        "weights": weights_gb(dtype),
    }


def trainer(folder: Path, stage: int, dtype: str, with_peft: bool) -> dict[str, float]:
    """The Trainer, over the whole matrices with a hook, or with peft's copies of them."""
    import torch
    from torch import Tensor
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from lingraft.bench import Setup, eeve_stage, synthetic_batches
    from lingraft.training.watch import peak_memory_gb, reset_peak_memory

    before = 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    matrices = dict(zip(("embed_tokens", "lm_head"), STAGES[stage], strict=True))
    if with_peft:
        from peft import TrainableTokensConfig, get_peft_model

        names = [name for name, rows in matrices.items() if rows == "new"]
        tokens = list(range(OLD_ROWS, ROWS))
        model = get_peft_model(model, TrainableTokensConfig(target_modules=names, token_indices=tokens))
    else:

        def only_new_rows(gradient: Tensor) -> Tensor:
            gradient[:OLD_ROWS] = 0
            return gradient

        for module, rows in zip(
            (model.get_input_embeddings(), model.get_output_embeddings()), STAGES[stage], strict=True
        ):
            if rows != "none":
                module.weight.requires_grad_(True)
            if rows == "new":
                module.weight.register_hook(only_new_rows)

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.begin)

    setup = Setup(eeve_stage(stage, {}), stage, row_tokens=TOKENS, rows=1, steps=STEPS, new_rows=NEW_ROWS)
    batches = synthetic_batches(setup, ROWS)
    rows = [batches.step(number)[0].input_ids_BT[0] for number in range(STEPS + 1)]
    documents = [{"input_ids": row, "labels": row} for row in rows]
    reset_peak_memory()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=1,
            max_steps=STEPS + 1,
            learning_rate=1e-4,
            use_cpu=not torch.cuda.is_available(),
            bf16=dtype != "fp32",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=documents, callbacks=[Clock()]).train()  # type: ignore[arg-type]
    return {
        "seconds": statistics.median(seconds[1:]),
        "peak": peak_memory_gb() - before / GB,
        "weights": weights_gb("bf16" if dtype == "bf16" else "fp32"),
    }


if __name__ == "__main__":
    main()
