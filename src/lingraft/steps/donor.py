"""A donor: another model whose vocabulary has tokens that the base lacks. Only its two vocabulary matrices are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lingraft.artifact import Hashes, key_of
from lingraft.embeddings.mixtures import Space
from lingraft.embeddings.rules import NEEDS
from lingraft.errors import ModelError, RecipeError
from lingraft.model import load as models
from lingraft.recipe import Recipe
from lingraft.steps.base import WANTED, fetch
from lingraft.tokenizer.load import BaseTokenizer
from lingraft.tokenizer.load import load as load_tokenizer
from lingraft.tokenizer.pieces import to_bytes

BLOCK_ROWS = 8192


def donor_folder(recipe: Recipe) -> Path:
    """The folder of `embeddings.donor`, fetched from the hub where it is no local folder.

    Raises:
        RecipeError: the recipe names no donor. ModelError: it is out of reach.
    """
    donor = recipe.embeddings.donor
    if donor is None:
        raise RecipeError(f"embeddings: the rule omp needs {NEEDS['omp']}; give it or choose another rule")
    local = recipe.path(donor.model)
    if local.is_dir():
        return local
    if donor.model.startswith((".", "/", "~")) or donor.model.count("/") != 1:
        raise ModelError(f"embeddings.donor.model: no such folder {local}; give a model folder or a hub id")
    return fetch(donor.model, donor.revision, where="embeddings.donor.model")


def donor_key(recipe: Recipe, hashes: Hashes) -> str:
    """What changes when the donor does: its files' hash, or the repository and revision on the hub."""
    assert recipe.embeddings.donor is not None
    local = recipe.path(recipe.embeddings.donor.model)
    if local.is_dir():
        return key_of(files=hashes.files(sorted(p for pattern in WANTED for p in local.glob(pattern))))
    return key_of(**recipe.embeddings.donor.model_dump())


def donor_spaces(folder: Path, base: BaseTokenizer, new_texts: Sequence[bytes]) -> tuple[Space, Space]:
    """The donor's rows of the new tokens that it has, and of the tokens that it shares with the base.

    One space of its input rows and one of its output rows, in the precision they are stored in. Tokens are the same
    where they spell the same bytes, whichever way their tokenizers write them.
    """
    donor = load_tokenizer(folder)
    donor_ids = _ids_by_bytes(donor)
    known = [position for position, text in enumerate(new_texts) if text in donor_ids]
    shared = {base_id: donor_ids[text] for text, base_id in _ids_by_bytes(base).items() if text in donor_ids}
    new_donor_ids = torch.tensor([donor_ids[new_texts[position]] for position in known], dtype=torch.long)
    old_donor_ids = torch.tensor(list(shared.values()), dtype=torch.long)
    old_ids_O, tokens_N = torch.tensor(list(shared), dtype=torch.long), torch.tensor(known, dtype=torch.long)

    def space(matrix: str) -> Space:
        return Space(
            tokens_N, read_rows(folder, matrix, new_donor_ids), old_ids_O, read_rows(folder, matrix, old_donor_ids)
        )

    of_input = space("embed_tokens.weight")
    tied = models.is_tied(models.read_config(folder))
    return of_input, of_input if tied else space("lm_head.weight")


def read_rows(folder: Path, matrix: str, ids_N: Tensor) -> Tensor:
    """Rows (N, D) of the tensor whose name ends in `matrix`, read block by block.

    Raises ModelError where the checkpoint has no such tensor.
    """
    for file in models.weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                if name.endswith(matrix) and "vision" not in name:
                    return _pick(opened.get_slice(name), ids_N)
    raise ModelError(f"{folder}: no tensor named …{matrix}, so its rows can't be used; choose another embeddings.donor")


def _pick(rows: Any, ids_N: Tensor) -> Tensor:
    """The rows `ids_N` of a tensor on disk."""
    count, width = rows.get_shape()
    picked_ND = torch.empty(len(ids_N), width, dtype=rows[:1].dtype)
    for start in range(0, count, BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        inside_N = (ids_N >= start) & (ids_N < start + BLOCK_ROWS)
        picked_ND[inside_N] = block[ids_N[inside_N] - start]
    return picked_ND


def _ids_by_bytes(tokenizer: BaseTokenizer) -> dict[bytes, int]:
    """Bytes that a piece spells → its id; added tokens are no text and are left out."""
    added = {token["id"] for token in tokenizer.json["added_tokens"]}
    found: dict[bytes, int] = {}
    for index in sorted(tokenizer.piece_of.keys() - added):
        found.setdefault(to_bytes(tokenizer.piece_of[index], tokenizer.kind), index)
    return found
