"""Step 4 and on: one training stage, from the folder before it to a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lingraft.artifact import write_json
from lingraft.families import family
from lingraft.model.load import read_config
from lingraft.recipe import Recipe, Stage
from lingraft.steps.batches import make_batches
from lingraft.steps.context import Context, new_token_ids
from lingraft.training.settings import LoraSettings, StageSettings
from lingraft.training.stage import run_stage

LOGGED_POINTS = 400


def run(context: Context, stage: Stage, index: int, source: Path, out: Path, work: Path) -> dict[str, Any]:
    """Train the stage; returns its log and proofs for the manifest."""
    recipe = context.recipe
    settings = stage_settings(stage, read_config(source).model_type, stage_seed(recipe, index))
    new_ids = new_token_ids(source)
    batches, left_out = make_batches(context, stage, settings, source)
    result = run_stage(
        source,
        out,
        work,
        settings,
        batches,
        new_ids,
    )
    log = result.loop.log
    write_json(out / "log.json", log)
    every = max(1, len(log) // LOGGED_POINTS)
    return {
        "trains": settings.trains,
        "trainable": result.trainable,
        "parameters": sum(result.trainable.values()),
        "learning_rate": settings.learning_rate,
        "tokens": result.loop.tokens,
        "steps": result.loop.steps,
        "chats_left_out": left_out,
        "seconds": result.loop.seconds,
        "tokens_per_second": result.loop.tokens / max(result.loop.seconds, 1e-9),
        "peak_memory_gb": result.loop.peak_memory_gb,
        "loss": [[entry["step"], entry["loss"]] for entry in log[::every]],
        "first_loss": log[0]["loss"],
        "last_loss": float(np.mean([entry["loss"] for entry in log[-10:]])),
        "changed_tensors": result.proof.changed,
        "unchanged_tensors": result.proof.unchanged,
        "merge_error": result.proof.merge_error,
    }


def stage_settings(stage: Stage, model_type: str, seed: int) -> StageSettings:
    """The stage as the training loop wants it; projections by default those of the model's family."""
    lora = None
    if stage.lora:
        default = family(model_type).projections
        lora = LoraSettings(
            r=stage.lora.r,
            alpha=stage.lora.alpha,
            dropout=stage.lora.dropout,
            rank_stabilised=stage.lora.rank_stabilised,
            targets=tuple(stage.lora.targets or default),
        )
    return StageSettings(
        name=stage.name,
        input_rows=stage.train.input_rows,
        output_rows=stage.train.output_rows,
        layers=stage.train.layers,
        lora=lora,
        quantise=stage.quantised,
        learning_rate=stage.learning_rate,
        embedding_learning_rate=stage.embedding_learning_rate,
        rows_per_step=stage.batch_size * stage.gradient_accumulation_steps,
        micro_batch=None if stage.micro_batch == "auto" else stage.micro_batch,
        packing=stage.packing,
        precision=stage.precision,
        optimizer=stage.optimizer,
        warmup=stage.warmup,
        schedule=stage.schedule,
        weight_decay=stage.weight_decay,
        betas=stage.betas,
        clip=stage.clip,
        gradient_checkpointing=stage.gradient_checkpointing,
        checkpoint_seconds=stage.checkpoint_seconds,
        keep=stage.keep,
        seed=seed,
    )


def stage_seed(recipe: Recipe, index: int) -> int:
    """The seed of the recipe's stage number `index`."""
    return recipe.seed * 1000 + index
