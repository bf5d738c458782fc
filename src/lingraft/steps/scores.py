"""Measure a checkpoint: one scoreboard entry, made the same way for the base, the graft and every stage."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from lingraft.artifact import Hashes
from lingraft.atomic import write_json
from lingraft.errors import ModelError
from lingraft.evaluation.bits_per_byte import bits_per_byte, unigram_bits_per_byte
from lingraft.evaluation.generation import generate_checks
from lingraft.evaluation.multiple_choice import multiple_choice
from lingraft.evaluation.scoreboard import build_entry
from lingraft.model.load import load, load_tokenizer, to_device
from lingraft.recipe import Recipe
from lingraft.steps import corpus
from lingraft.steps.context import Context, new_token_ids

BATCH_TOKENS = 4096
UNIGRAM_TEXTS = 5000


def run(context: Context, folder: Path, step: str, title: str, out: Path) -> dict[str, Any]:
    """Measure the checkpoint `folder` and write its entry to `out/scores.json`.

    Raises:
        ModelError: weights that are not finite.
    """
    begin = time.monotonic()
    recipe = context.recipe
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = to_device(load(folder), device)
    tokenizer = load_tokenizer(folder)
    languages: dict[str, Any] = {}
    generations: dict[str, Any] = {}
    for language in context.languages():
        length = recipe.evaluate.max_document_characters
        texts = [t[:length] for t in context.texts("held-out", language, recipe.evaluate.max_documents)]
        if not texts:
            continue
        span = recipe.evaluate.span_bytes
        measured = bits_per_byte(model, tokenizer, texts, span_bytes=span, batch_tokens=BATCH_TOKENS, device=device)
        if not math.isfinite(measured["bits_per_byte"]):
            raise ModelError(
                f"{folder}: the model needs {measured['bits_per_byte']} bits per byte of held-out {language} text, so "
                f"weights of it are not finite; see which with: lingraft doctor {folder}, then fetch or make it again"
            )
        languages[language] = measured | {
            "unigram_bits_per_byte": unigram_bits_per_byte(
                tokenizer, list(context.texts("train", language, UNIGRAM_TEXTS)), texts, span_bytes=span
            )
        }
        generations[language] = generate_checks(
            model,
            tokenizer,
            prompts(recipe, language, texts),
            language=language,
            max_new_tokens=recipe.evaluate.generation.max_new_tokens,
            new_token_ids=new_token_ids(folder),
            device=device,
        )
    asked = {}
    for i, questions in enumerate(recipe.evaluate.questions):
        asked[questions.name] = multiple_choice(
            model,
            tokenizer,
            corpus.questions(recipe, questions, f"evaluate.questions[{i}]"),
            language=questions.language,
            scoring=questions.scoring,
            batch_tokens=BATCH_TOKENS,
            device=device,
        )
    entry = build_entry(
        step=step,
        title=title,
        tokens_trained=0,  # filled in when the scoreboard is put together
        languages=languages,
        questions=asked,
        generations=generations,
        seconds=time.monotonic() - begin,
    )
    write_json(out / "scores.json", entry)
    return {"seconds": entry["seconds"]}


def prompts(recipe: Recipe, language: str, texts: list[str]) -> list[str]:
    """The recipe's prompts for a language, else the beginnings of held-out documents."""
    settings = recipe.evaluate.generation
    named = settings.prompts.get(language)
    if named:
        return named[: settings.count]
    return [" ".join(text.split()[:6])[:60] for text in texts[: settings.count]]


def inputs(recipe: Recipe, hashes: Hashes) -> dict[str, str]:
    """Hashes of the question files."""
    found: dict[str, str] = {}
    for i, questions in enumerate(recipe.evaluate.questions):
        found |= corpus.origin_inputs(recipe, questions, f"evaluate.questions[{i}]", hashes)
    return found
