"""Write a checkpoint with a grafted vocabulary, from safetensors shards to safetensors shards.

Bytes are copied in blocks (`lingraft.model.shards`), the rows of the new tokens put in their places. What is not the
vocabulary's is never decoded, so it stays bit-identical whatever its dtype, and `altered` proves it by reading both
checkpoints again. Tensors keep the names that the source gives them, legacy or new.

Shapes: V rows of the base, N new tokens, D width, L layers, P width of a layer's share of the per-layer table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from lingraft.errors import ModelError
from lingraft.families import family
from lingraft.model.load import is_tied, read_config, weight_files
from lingraft.model.shards import (
    BLOCK_BYTES,
    FLOATS,
    MEGABYTE,
    Change,
    Piece,
    Stored,
    differing_rows,
    read_header,
    write_shards,
)
from lingraft.progress import bar

# Rows are padded to a multiple of this, for tensor cores.
ROWS_MULTIPLE = 64

# What model classes call the matrices, after the last dot but one.
INPUT = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
OUTPUT = ("lm_head.weight", "embed_out.weight")
PER_LAYER = ("embed_tokens_per_layer.weight",)


@dataclass(frozen=True)
class VocabularyRows:
    """Rows of the matrices of the vocabulary, all of a model's or those of the new tokens.

    input: (·, D). output: (·, D), or None where one matrix serves both ends. per_layer: (·, L·P) in Gemma 3n's
    table of per-layer inputs, else None.
    """

    input: Tensor
    output: Tensor | None = None
    per_layer: Tensor | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint keeps its tensors, and the names of those with a row for each token."""

    tensors: dict[str, Stored]
    input: str
    output: str | None
    per_layer: str | None
    tied: bool

    def tensor(self, name: str) -> Tensor:
        """A tensor, memory-mapped: only the rows that are used are read."""
        with safe_open(self.tensors[name].file, framework="pt") as opened:
            return opened.get_tensor(name)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Find a checkpoint's tensors.

    Raises:
        ModelError: missing or damaged weights, or none that are a vocabulary's.
    """
    tensors: dict[str, Stored] = {}
    for file in weight_files(folder):
        tensors |= read_header(file)
    input_, output, per_layer = (_named(tensors, names, folder) for names in (INPUT, OUTPUT, PER_LAYER))
    if input_ is None:
        raise ModelError(
            f"{folder}: none of the {len(tensors):,} weights is named {' or '.join(INPUT)}; models that keep their "
            "input embeddings under another name are not supported"
        )
    checkpoint = Checkpoint(tensors, input_, output, per_layer, is_tied(read_config(folder)))
    _check_matrices(checkpoint, folder)
    return checkpoint


def vocabulary_rows(checkpoint: Checkpoint) -> VocabularyRows:
    """The rows that a checkpoint has, memory-mapped; `output` is None where it is tied."""
    head = None if checkpoint.tied else checkpoint.output
    return VocabularyRows(
        checkpoint.tensor(checkpoint.input),
        checkpoint.tensor(head) if head else None,
        checkpoint.tensor(checkpoint.per_layer) if checkpoint.per_layer else None,
    )


def write_grafted(source: Path, out: Path, ids: Sequence[int], new: VocabularyRows) -> int:
    """Write the weights and config of `source` into the folder `out`, with the `new` rows (N, ·) at `ids`.

    A tied model with `new.output` is untied: its head begins as a copy of the input matrix, and both configs say so.
    Ids past the last row make the matrices grow to a multiple of ROWS_MULTIPLE. Rows that no token has are the mean of
    the old ones: their logit is the mean logit, which is never the highest. They exist already where a model
    was padded, and are then left alone or taken by new ids.

    Returns:
        How many rows the matrices have now.
    Raises:
        ModelError: the family cannot take ids past its vocabulary.
    """
    checkpoint = open_checkpoint(source)
    assert checkpoint.tied or new.output is not None, "an untied model's head needs rows of its own"
    config = json.loads((source / "config.json").read_text("utf-8"))
    rows = _rows_for(checkpoint, ids, config["model_type"], source)
    pieces = {name: Piece(stored) for name, stored in checkpoint.tensors.items()}
    pieces[checkpoint.input] = _grown(checkpoint, checkpoint.input, rows, ids, new.input)
    untied = checkpoint.tied and new.output is not None
    head = checkpoint.output or (_head_name(checkpoint) if untied else None)
    if head:
        copied = checkpoint.output or checkpoint.input
        pieces[head] = _grown(checkpoint, copied, rows, ids, new.input if new.output is None else new.output)
    if checkpoint.per_layer and new.per_layer is not None:
        pieces[checkpoint.per_layer] = Piece(checkpoint.tensors[checkpoint.per_layer], rows_at(ids, new.per_layer))
    out.mkdir(parents=True, exist_ok=True)
    write_shards(out, pieces)
    patched = patch_config(config, rows, untied)
    (out / "config.json").write_text(json.dumps(patched, ensure_ascii=False, indent=2) + "\n", "utf-8")
    return rows


def patch_config(config: dict[str, Any], rows: int, untied: bool) -> dict[str, Any]:
    """A `config.json` with the vocabulary's size in every place that its family has for it, and untied if asked.

    The innermost place is filled even where it was left to a default, since tools other than transformers have none.
    For the same reason an order of layers that llama.cpp would guess wrong is written in the form that it reads.
    """
    config = json.loads(json.dumps(config))
    row = family(config["model_type"])
    found = [(_section(config, parents), key) for *parents, key in row.vocab_size_keys]
    places = [(section, key) for section, key in found if section is not None]
    innermost = places[-1][0]
    for section, key in places:
        if key in section or section is innermost:
            section[key] = rows
        if untied:
            section["tie_word_embeddings"] = False
    sliding = [kind == "sliding_attention" for kind in innermost.get("layer_types") or ()]
    period = row.llama_cpp_sliding_period
    if period and sliding != [number % period != 0 for number in range(1, len(sliding) + 1)]:
        innermost.setdefault("sliding_window_pattern", sliding)
    return config


def altered(source: Path, out: Path, ids: Sequence[int]) -> list[str]:
    """Names of the tensors of `out` that differ from the source's anywhere but in the rows `ids`; reads every byte.

    Rows past the source's last, and a head that an untied model gained (compared with the source's input matrix), are
    allowed. A tensor that is missing, or in excess, counts as differing.
    """
    before, after = open_checkpoint(source), open_checkpoint(out)
    expected = dict(before.tensors)
    with_rows = {before.input, *filter(None, (before.output, before.per_layer))}
    if before.tied and not after.tied and before.output is None:
        head = _head_name(before)
        expected[head] = before.tensors[before.input]
        with_rows.add(head)
    found = sorted(expected.keys() ^ after.tensors.keys())
    megabytes = sum(stored.nbytes for stored in expected.values()) / MEGABYTE
    with bar("proving the rest unchanged", total=megabytes, unit="MB") as tick:
        for name, old in expected.items():
            if name in after.tensors:
                new = after.tensors[name]
                free = ids if name in with_rows else ()
                differing = differing_rows(old, new, tick)
                grown = new.shape != old.shape and name not in with_rows
                if differing is None or grown or not np.isin(differing, free).all():
                    found.append(name)
    return found


def _named(tensors: Mapping[str, Stored], endings: Sequence[str], folder: Path) -> str | None:
    names = [name for name in tensors if ".".join(name.split(".")[-2:]) in endings]
    if len(names) > 1:
        raise ModelError(f"{folder}: {names[0]} and {names[1]} are both vocabularies; a model needs to have one")
    return names[0] if names else None


def _check_matrices(checkpoint: Checkpoint, folder: Path) -> None:
    for name in filter(None, (checkpoint.input, checkpoint.output, checkpoint.per_layer)):
        stored = checkpoint.tensors[name]
        if stored.dtype not in FLOATS:
            raise ModelError(
                f"{folder}: {name} is stored as {stored.dtype}, and rows can only be added to {', '.join(FLOATS)}; "
                "start from the model before it was quantised"
            )
    if checkpoint.output is None and not checkpoint.tied:
        raise ModelError(
            f"{folder}: config.json says untied, but the weights have no {OUTPUT[0]}; fetch the model again"
        )
    if checkpoint.output and checkpoint.tied:
        first, second = checkpoint.tensors[checkpoint.input], checkpoint.tensors[checkpoint.output]
        differing = differing_rows(first, second, lambda n=1, **fields: None)
        if differing is None or len(differing) or first.shape != second.shape:
            raise ModelError(
                f"{folder}: config.json says tied, but {checkpoint.output} differs from {checkpoint.input}; set "
                "tie_word_embeddings to false if the head was trained, or delete it from the weights"
            )


def _rows_for(checkpoint: Checkpoint, ids: Sequence[int], model_type: str, folder: Path) -> int:
    rows = checkpoint.tensors[checkpoint.input].shape[0]
    needed = max(ids) + 1
    if needed <= rows:
        return rows
    if reason := family(model_type).slots_only:
        raise ModelError(f"{folder}: new ids past its {rows:,} rows are impossible: {reason}; use unused slots only")
    return math.ceil(needed / ROWS_MULTIPLE) * ROWS_MULTIPLE


def _head_name(checkpoint: Checkpoint) -> str:
    """What the head is called beside the names that this source uses (older multimodal ones put it one level in)."""
    return f"language_model.{OUTPUT[0]}" if checkpoint.input.startswith("language_model.") else OUTPUT[0]


def _grown(checkpoint: Checkpoint, name: str, rows: int, ids: Sequence[int], new: Tensor) -> Piece:
    stored = checkpoint.tensors[name]
    pads = sorted(set(range(stored.shape[0], rows)) - set(ids))
    if pads:
        mean = _mean_row(checkpoint.tensor(name))
        new = torch.cat([new, mean.expand(len(pads), -1)])
    return Piece(stored, rows_at([*ids, *pads], new), rows)


def rows_at(ids: Sequence[int], new: Tensor) -> Change:
    """Puts the `new` rows (N, ·) at `ids`, rounded to the stored dtype; the other rows stay bit for bit."""
    sorted_N, order_N = torch.tensor(ids).sort()

    def change(first: int, block: Tensor) -> Tensor:
        begin, end = torch.searchsorted(sorted_N, torch.tensor([first, first + len(block)])).tolist()
        block[sorted_N[begin:end] - first] = new[order_N[begin:end]].to(block.dtype)
        return block

    return change


def _mean_row(matrix_VD: Tensor) -> Tensor:
    block_rows = max(1, BLOCK_BYTES // (matrix_VD.shape[1] * 8))
    total_D = sum(block.double().sum(dim=0) for block in matrix_VD.split(block_rows))
    return (total_D / matrix_VD.shape[0]).float()


def _section(config: dict[str, Any], path: Sequence[str]) -> dict[str, Any] | None:
    section: Any = config
    for key in path:
        section = section.get(key)
        if section is None:
            return None
    return section
