"""Step 4 and on: one training stage, from the folder before it to a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lingraft.artifact import write_json
from lingraft.corpus.build import Part, read_documents
from lingraft.errors import CorpusError
from lingraft.families import family
from lingraft.model.load import load_tokenizer, read_config
from lingraft.prompts import encode_chat
from lingraft.recipe import Recipe, Stage
from lingraft.steps.context import Context, new_token_ids
from lingraft.training.batches import Batches, Encoded
from lingraft.training.settings import LoraSettings, StageSettings
from lingraft.training.stage import run_stage

LOGGED_POINTS = 400
ENCODED_AT_ONCE = 1000


def run(context: Context, stage: Stage, index: int, source: Path, out: Path, work: Path) -> dict[str, Any]:
    """Train the stage; returns its log and proofs for the manifest."""
    recipe = context.recipe
    settings = stage_settings(recipe, stage, index, source)
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
        "changed_tensors": result.changed,
        "unchanged_tensors": result.unchanged,
    }


def stage_settings(recipe: Recipe, stage: Stage, index: int, source: Path) -> StageSettings:
    """The stage as the training loop wants it; projections by default those of the model's family."""
    lora = None
    if stage.lora:
        default = family(read_config(source).model_type).projections
        lora = LoraSettings(
            r=stage.lora.r,
            alpha=stage.lora.alpha,
            dropout=stage.lora.dropout,
            rank_stabilised=stage.lora.rank_stabilised,
            targets=tuple(stage.lora.targets or default),
            quantise=stage.lora.quantise,
        )
    return StageSettings(
        name=stage.name,
        input_rows=stage.train.input_rows,
        output_rows=stage.train.output_rows,
        layers=stage.train.layers,
        lora=lora,
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
        seed=recipe.seed * 1000 + index,
    )


def make_batches(
    context: Context,
    stage: Stage,
    settings: StageSettings,
    folder: Path,
    cut: Callable[[Encoded], list[Encoded]] = lambda document: [document],
) -> tuple[Batches, int]:
    """Tokenise the stage's documents with the folder's tokenizer and lay out its batches.

    A key of the stage's data that names a language shares its weight among that language's sources, in proportion to
    their tokens times their own weight. A chat longer than a row is left out, never cut.

    Args:
        cut: splits a text for a loss that needs it shorter than a row of the batch.
    Returns:
        The batches, and how many chats were left out.
    """
    recipe = context.recipe
    tokenizer = load_tokenizer(folder)
    groups: dict[str, list[Encoded]] = {}
    shares: dict[str, float] = {}
    left_out = 0
    for key, sources in recipe.sources_for(stage).items():
        sizes: dict[str, float] = {}
        for source in sources:
            documents = [piece for d in encode(context.corpus, "train", source.name, tokenizer) for piece in cut(d)]
            kept = [d for d in documents if source.format == "text" or len(d) <= stage.sequence_length]
            left_out += len(documents) - len(kept)
            if kept:
                groups[source.name] = kept
                sizes[source.name] = source.weight * sum(map(len, kept))
        if not sizes:
            raise CorpusError(
                f"stage {stage.name}: nothing to train on from {key!r}: it has no document, or only chats longer than "
                f"sequence_length {stage.sequence_length}; raise sequence_length or change data"
            )
        for name, size in sizes.items():
            share = recipe.stage_data(stage)[key] * size / sum(sizes.values())
            shares[name] = shares.get(name, 0.0) + share
    pad = tokenizer.pad_token_id
    batches = Batches(
        groups,
        shares,
        sequence_length=stage.sequence_length,
        batch_size=settings.micro_batch or stage.batch_size,
        rows_per_step=settings.rows_per_step,
        pad=0 if pad is None else pad,
        bos=tokenizer.bos_token_id,
        seed=settings.seed,
        budget_tokens=stage.tokens,
        epochs=stage.epochs,
    )
    return batches, left_out


def encode(corpus: Path, part: Part, source: str, tokenizer: Any) -> Iterator[Encoded]:
    """The documents of a source as tokens."""
    waiting: list[dict[str, Any]] = []
    for document in read_documents(corpus, part, source):
        if "messages" in document:
            ids, learnt = encode_chat(tokenizer, document["messages"])
            yield Encoded(np.array(ids, np.int32), np.array(learnt), document["id"])
            continue
        waiting.append(document)
        if len(waiting) == ENCODED_AT_ONCE:
            yield from _encode_texts(waiting, tokenizer)
            waiting = []
    yield from _encode_texts(waiting, tokenizer)


def _encode_texts(documents: list[dict[str, Any]], tokenizer: Any) -> Iterator[Encoded]:
    """BOS + text + EOS, as far as the tokenizer has them; everything after BOS is learnt."""
    if not documents:
        return
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tail = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = [document["text"] for document in documents]
    for document, ids in zip(documents, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        whole = [*head, *ids, *tail]
        learnt = np.ones(len(whole), bool)
        learnt[: len(head)] = False
        yield Encoded(np.array(whole, np.int32), learnt, document["id"])
