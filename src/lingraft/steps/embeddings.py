"""Step 3: give the base model the grafted vocabulary: rows for every new token, the old ones untouched."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lingraft.artifact import Hashes
from lingraft.embeddings.rules import SEEDED
from lingraft.errors import CorpusError
from lingraft.miniature.sets import source_files as miniature_files
from lingraft.model import load as models
from lingraft.model.surgery import VocabularyRows, altered, open_checkpoint, vocabulary_rows, write_grafted
from lingraft.recipe import Embeddings, Recipe
from lingraft.steps import distillation
from lingraft.steps.context import Context
from lingraft.steps.donor import donor_key
from lingraft.steps.rows import NewRows, dictionary_pairs, initial_rows, plain_rows
from lingraft.tokenizer.graft import GraftedPiece, read_graft

LOGITS_TEXTS, LOGITS_TOKENS = 4, 64
# of a logit's spread; zero in practice, but a matrix with more rows may be multiplied in another order
LOGITS_TOLERANCE = 1e-3


def run(context: Context, out: Path, work: Path) -> dict[str, Any]:
    """Write the grafted checkpoint into `out`; returns statistics by method."""
    settings = context.recipe.embeddings
    base_folder = context.base.folder
    tokens = read_graft(context.tokenizer)
    old_text = _old_text(context)
    base, logits_before = _measure(base_folder, old_text, tokens)
    grafted = out if settings.distillation is None else work / "grafted"
    written = write_checkpoint(
        base_folder,
        context.tokenizer,
        grafted,
        lambda input_VD, output_VD: initial_rows(context.recipe, base_folder, tokens, input_VD, output_VD, context),
        untie=settings.tie == "untie",
    )
    after, logits_after = _measure(grafted, old_text, tokens)
    logits_difference = _largest_difference(logits_before, logits_after)
    assert logits_difference < LOGITS_TOLERANCE, f"the graft moved old tokens' logits by {logits_difference:.2g}"
    distilled = settings.distillation and distillation.run(
        context, settings.distillation, grafted, out, work / "distillation"
    )
    return written | {
        "old_logits_largest_difference": logits_difference,
        "base": base,
        "distillation": distilled,
        "parameters": after["parameters"],
    }


def write_checkpoint(
    base: Path,
    tokenizer: Path,
    out: Path,
    rows: Callable[[Tensor, Tensor | None], NewRows],
    *,
    untie: bool,
) -> dict[str, Any]:
    """Write the checkpoint `base` with the vocabulary of the grafted `tokenizer` into `out`, never whole in memory.

    `rows` gives the new tokens' rows from the base's input and output rows (V, D), None for the latter where the graft
    stays tied. What is not the new tokens' is proven bit-identical by reading it again.

    Returns:
        Plain data: rows before and after, whether tied, how the rows were made, and the seconds that each part took.
    Raises:
        ModelError: the weights are not of a kind that can be grafted.
    """
    tokens = read_graft(tokenizer)
    ids = [token.id for token in tokens]
    checkpoint = open_checkpoint(base)
    old = vocabulary_rows(checkpoint)
    times = [time.monotonic()]
    new = rows(old.input, old.input if checkpoint.tied and untie else old.output)
    per_layer = None if old.per_layer is None else plain_rows(Embeddings(), base, tokens, old.per_layer, None).input
    times.append(time.monotonic())
    rows_after = write_grafted(base, out, ids, VocabularyRows(new.input, new.output, per_layer))
    models.copy_companions(base, out, models.PROCESSOR_FILES)
    models.copy_companions(tokenizer, out, models.TOKENIZER_FILES)
    times.append(time.monotonic())
    changed = altered(base, out, ids)
    assert not changed, f"the graft changed what it must not: {changed}"
    times.append(time.monotonic())
    return {
        "rows_before": len(old.input),
        "rows_after": rows_after,
        "tied": checkpoint.tied and not untie,
        "input": new.input_methods,
        "output": new.output_methods,
        "seconds": dict(zip(("rows", "write", "proof"), (b - a for a, b in pairwise(times)), strict=True)),
    }


def _measure(folder: Path, texts: list[list[int]], tokens: list[GraftedPiece]) -> tuple[dict[str, Any], list[Tensor]]:
    """A checkpoint's size, and its logits (T, rows less the new tokens') on each text; loaded for this alone."""
    model = models.load(folder)
    new = {token.id for token in tokens}
    old_ids = torch.tensor([i for i in range(models.input_matrix(model).shape[0]) if i not in new])
    shape = {"parameters": sum(p.numel() for p in model.parameters()), "tied": models.is_tied(model.config)}
    return shape, _logits(model, texts, old_ids)


def _old_text(context: Context) -> list[list[int]]:
    """A few old-language held-out texts as tokens of the base (no new token can occur in them)."""
    tokenizer = models.load_tokenizer(context.base.folder)
    texts = list(context.texts("held-out", context.recipe.languages.old, LOGITS_TEXTS))
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"][:LOGITS_TOKENS] for text in texts]
    return [ids for ids in encoded if ids]


@torch.inference_mode()
def _logits(model: Any, texts: list[list[int]], old_ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits (T, old ids) of each text."""
    return [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0][:, old_ids].float() for ids in texts]


def _largest_difference(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """The largest change of a logit of the base's ids, relative to the spread of the logits at its position."""
    both = ((b, a[:, : b.shape[1]]) for b, a in zip(before, after, strict=True))
    return max(
        (float(((b - a).abs().amax(dim=1) / b.std(dim=1)).max()) for b, a in both),
        default=0.0,
    )


def inputs(recipe: Recipe, hashes: Hashes) -> dict[str, str]:
    """Hashes of what the rules read beside base, corpus and tokenizer: dictionary, word vectors, donor."""
    settings = recipe.embeddings
    found: dict[str, str] = {}
    files: dict[str, str] = {}
    if settings.dictionary and settings.dictionary.path is None:
        found = hashes.files(miniature_files())
    elif settings.dictionary:
        files["dictionary.path"] = settings.dictionary.path or ""
    if settings.vectors:
        files |= {"vectors.target": settings.vectors.target, "vectors.old": settings.vectors.old}
    for key, name in files.items():
        path = recipe.path(name)
        if not path.is_file():
            raise CorpusError(f"embeddings.{key}: no such file {path}; paths are relative to the recipe")
        found[key] = hashes.file(path)
    if settings.dictionary:
        dictionary_pairs(recipe, settings.dictionary)  # wrong columns are found before any step runs
    if settings.donor:
        found["donor"] = donor_key(recipe, hashes)
    if {settings.input, settings.output} & SEEDED:
        found["seed"] = str(recipe.seed)
    return found
