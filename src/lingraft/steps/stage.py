"""Step 4 and on: one training stage, from the folder before it to a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lingraft.families import family
from lingraft.model.load import read_config
from lingraft.processes import together
from lingraft.recipe import Recipe, Stage
from lingraft.steps.batches import make_batches, make_tokens, validation_batches
from lingraft.steps.context import Context, new_token_ids
from lingraft.training.settings import LoraSettings, StageSettings
from lingraft.training.stage import Learnt, train_stage, write_stage
from lingraft.training.watch import LOG, Entry, named, reset_peak_memory, write_log

LOGGED_POINTS = 400
LISTED_SPIKES = 20


def run(context: Context, stage: Stage, index: int, source: Path, out: Path, work: Path) -> dict[str, Any]:
    """Train the stage; returns its log and proofs for the manifest."""
    settings = stage_settings(stage, read_config(source).model_type, stage_seed(context.recipe, index))
    make_tokens(context, stage, source)
    learnt, left_out = together(_train, context, stage, settings, source, work)
    result = write_stage(source, out, learnt, new_token_ids(source))
    log = result.loop.log
    write_log(out / LOG, log)
    every = max(1, len(log) // LOGGED_POINTS)
    spikes = [_spike(entry) for entry in log if "spike" in entry]
    return {
        "trains": settings.trains,
        "trainable": result.trainable,
        "parameters": sum(result.trainable.values()),
        "learning_rate": settings.learning_rate,
        "tokens": result.loop.tokens,
        "steps": result.loop.steps,
        "chats_left_out": left_out,
        "seconds": result.loop.seconds,
        "seconds_by_part": result.loop.seconds_by_part,
        "tokens_per_second": result.loop.tokens_per_second,
        "peak_memory_gb": result.loop.peak_memory_gb,
        "loss": [[entry["step"], entry["loss"]] for entry in log[::every]],
        "first_loss": log[0]["loss"],
        "last_loss": float(np.mean([entry["loss"] for entry in log[-10:]])),
        "validation": [[entry["step"], entry["validation_loss"]] for entry in log if "validation_loss" in entry],
        "keep": settings.keep,
        "kept_step": result.loop.kept_step,
        "spikes": len(spikes),
        "first_spikes": spikes[:LISTED_SPIKES],
        "changed_tensors": result.proof.changed,
        "unchanged_tensors": result.proof.unchanged,
        "merge_error": result.proof.merge_error,
    }


def _spike(entry: Entry) -> dict[str, Any]:
    spike = entry["spike"]
    return {"step": entry["step"], "loss": entry["loss"], "usual": spike["usual"], "read": named(spike["documents"])}


def _train(context: Context, stage: Stage, settings: StageSettings, source: Path, work: Path) -> tuple[Learnt, int]:
    """What every process of the run does for the stage; returns also how many chats were left out."""
    batches, left_out = make_batches(context, stage, settings, source)
    validation = validation_batches(context, stage, settings, source) if settings.validates else None
    reset_peak_memory()
    learnt = train_stage(
        source,
        work,
        settings,
        batches,
        new_token_ids(source),
        validation=validation,
        events=context.events / work.name,
    )
    return learnt, left_out


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
        parallel=stage.parallel,
        checkpoint_seconds=stage.checkpoint_seconds,
        keep_checkpoints=stage.keep_checkpoints,
        keep=stage.keep,
        validate_every=stage.validate_every,
        seed=seed,
    )


def stage_seed(recipe: Recipe, index: int) -> int:
    """The seed of the recipe's stage number `index`."""
    return recipe.seed * 1000 + index
