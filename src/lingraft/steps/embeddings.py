"""Step 3: give the base model the grafted vocabulary: rows for every new token, the old ones untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lingraft.artifact import Hashes
from lingraft.errors import CorpusError
from lingraft.miniature.sets import source_files as miniature_files
from lingraft.model import load as models
from lingraft.model.fingerprint import differences, fingerprint
from lingraft.recipe import Recipe
from lingraft.steps.context import Context
from lingraft.steps.rows import initial_rows
from lingraft.tokenizer.graft import read_graft

ROWS_MULTIPLE = 64
LOGITS_TEXTS, LOGITS_TOKENS = 4, 64
# of a logit's spread; zero in practice, but a matrix with more rows may be multiplied in another order
LOGITS_TOLERANCE = 1e-3


def run(context: Context, out: Path, work: Path) -> dict[str, Any]:
    """Write the grafted checkpoint into `out`; returns statistics by method."""
    settings = context.recipe.embeddings
    base_folder = context.base.folder
    model = models.load(base_folder)
    base_shape = {"parameters": sum(p.numel() for p in model.parameters()), "tied": models.is_tied(model.config)}
    tokens = read_graft(context.tokenizer)
    ids = [token.id for token in tokens]

    old_rows = models.input_matrix(model).detach()
    old_ids = torch.tensor(sorted(set(range(old_rows.shape[0])) - set(ids)))
    old_text = _old_text(context)
    logits_before = _logits(model, old_text, old_ids)
    if settings.tie == "untie" and models.output_matrix(model) is models.input_matrix(model):
        models.untie(model)
    before = fingerprint(model, ids)
    rows_before = old_rows.shape[0]
    if max(ids) >= rows_before:
        models.resize(model, -(-(max(ids) + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE)

    tied = models.output_matrix(model) is models.input_matrix(model)
    old_head = None if tied else models.output_matrix(model).detach()[:rows_before]
    new = initial_rows(context.recipe, base_folder, tokens, old_rows, old_head)
    with torch.no_grad():
        if new.output is not None:
            models.output_matrix(model)[ids] = new.output.to(old_rows.dtype)
        models.input_matrix(model)[ids] = new.input.to(old_rows.dtype)

    frozen = {name for name in before if not name.endswith("[new rows]")}
    changed = differences(before, _same_rows(model, ids, rows_before)) & frozen
    assert not changed, f"the graft changed what it must not: {sorted(changed)}"
    logits_difference = _largest_difference(logits_before, _logits(model, old_text, old_ids))
    assert logits_difference < LOGITS_TOLERANCE, f"the graft moved old tokens' logits by {logits_difference:.2g}"
    models.save(model, out, companions=base_folder)
    models.copy_companions(context.tokenizer, out)
    return {
        "old_logits_largest_difference": logits_difference,
        "base": base_shape,
        "rows_before": rows_before,
        "rows_after": models.input_matrix(model).shape[0],
        "tied": tied,
        "input": new.input_methods,
        "output": new.output_methods,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


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
    """The largest change of a logit, relative to the spread of the logits at its position."""
    return max(
        (float(((b - a).abs().amax(dim=1) / b.std(dim=1)).max()) for b, a in zip(before, after, strict=True)),
        default=0.0,
    )


def inputs(recipe: Recipe, hashes: Hashes) -> dict[str, str]:
    """Hash of the dictionary, if there is one."""
    dictionary = recipe.embeddings.dictionary
    if dictionary is None:
        return {}
    if dictionary.path is None:
        return hashes.files(miniature_files())
    path = recipe.path(dictionary.path)
    if not path.is_file():
        raise CorpusError(f"embeddings.dictionary.path: no such file {path}; paths are relative to the recipe")
    return {"dictionary": hashes.file(path)}


def _same_rows(model: Any, ids: list[int], rows: int) -> dict[str, str]:
    """Fingerprint of the grafted model with its vocabulary cut back to the rows it had before."""
    full_input, full_output = models.input_matrix(model), models.output_matrix(model)
    cut = torch.nn.Parameter(full_input.detach()[:rows])
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.weight = cut
    head.weight = cut if full_output is full_input else torch.nn.Parameter(full_output.detach()[:rows])
    prints = fingerprint(model, [i for i in ids if i < rows])
    embedding.weight, head.weight = full_input, full_output
    return prints
