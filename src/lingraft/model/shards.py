"""Safetensors files, read and written as streams of bytes.

No tensor is ever whole in memory: bytes are copied in blocks, and only tensors that change are decoded, a block of
rows at a time. What is only copied stays bit-identical, whatever its dtype.

Format: an unsigned little-endian 64-bit header length, a JSON header, then the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). The library's own writer wants whole tensors, hence this one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lingraft.progress import Tick, bar

SHARD_BYTES = 1_000_000_000
BLOCK_BYTES = 1 << 24
MEGABYTE = 1e6
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# Takes a block's first row and its rows in the stored dtype; returns the rows to write, in the same dtype.
Change = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a safetensors file: `start` is its first byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry along the first dimension."""
        return max(self.nbytes // max(self.shape[0], 1), 1) if self.shape else self.nbytes

    @property
    def block_bytes(self) -> int:
        """About `BLOCK_BYTES`, in whole rows."""
        return max(BLOCK_BYTES // self.row_bytes, 1) * self.row_bytes


@dataclass(frozen=True)
class Piece:
    """A tensor to write: the source's bytes, or where given what `change` makes of them, grown to `rows` rows.

    Rows past the source's last reach `change` as zeros.
    """

    source: Stored
    change: Change | None = None
    rows: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape if self.rows is None else (self.rows, *self.source.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.source.nbytes if self.rows is None else self.rows * self.source.row_bytes

    def blocks(self) -> Iterator[bytes | memoryview]:
        """Its bytes, in order."""
        if self.change is None:
            yield from read_blocks(self.source)
            return
        first = 0
        for block in self._row_blocks():
            changed = self.change(first, block)
            assert (changed.shape, changed.dtype) == (block.shape, block.dtype)
            first += len(block)
            yield changed.contiguous().flatten().view(torch.uint8).numpy().data

    def _row_blocks(self) -> Iterator[Tensor]:
        dtype, width = FLOATS[self.source.dtype], self.shape[1:]
        for block in read_blocks(self.source):
            yield torch.frombuffer(bytearray(block), dtype=dtype).view(-1, *width)
        missing = self.shape[0] - self.source.shape[0]
        rows = self.source.block_bytes // self.source.row_bytes
        for begin in range(0, missing, rows):
            yield torch.zeros(min(rows, missing - begin), *width, dtype=dtype)


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return found


def read_blocks(stored: Stored) -> Iterator[bytes]:
    """A tensor's bytes, in blocks of whole rows."""
    with open(stored.file, "rb") as file:
        file.seek(stored.start)
        left = stored.nbytes
        while block := file.read(min(stored.block_bytes, left)):
            left -= len(block)
            yield block


def write_shards(out: Path, pieces: Mapping[str, Piece]) -> None:
    """Write the tensors into the folder `out`, in shards of about `SHARD_BYTES` with their index."""
    shards: list[dict[str, Piece]] = [{}]
    for name, piece in pieces.items():
        if shards[-1] and sum(p.nbytes for p in shards[-1].values()) + piece.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = piece
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    total = sum(piece.nbytes for piece in pieces.values())
    with bar("writing weights", total=total / MEGABYTE, unit="MB") as tick:
        for file_name, shard in zip(names, shards, strict=True):
            _write_shard(out / file_name, shard, tick)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write_shard(path: Path, shard: Mapping[str, Piece], tick: Tick) -> None:
    # wide elements first: every tensor then begins at a multiple of its element's size
    ordered = sorted(shard.items(), key=lambda item: -item[1].nbytes / max(math.prod(item[1].shape), 1))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, piece in ordered:
        span = [offset, offset + piece.nbytes]
        header[name] = {"dtype": piece.source.dtype, "shape": list(piece.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, piece in ordered:
            for block in piece.blocks():
                file.write(block)
                tick(len(block) / MEGABYTE)


def differing_rows(old: Stored, new: Stored, tick: Tick) -> np.ndarray | None:
    """Numbers of the old tensor's rows that differ in any byte of the new one; rows that the new one has more are free.

    None where they can't be compared: another dtype, another width, or fewer rows.
    """
    if (old.dtype, old.shape[1:]) != (new.dtype, new.shape[1:]) or len(old.shape) != len(new.shape):
        return None
    if new.nbytes < old.nbytes:
        return None
    found: list[np.ndarray] = []
    first = 0
    # a grown tensor goes on where the old one ends, so the shorter one ends the comparison
    for one, other in zip(read_blocks(old), read_blocks(new), strict=False):
        tick(len(one) / MEGABYTE)
        if one != other[: len(one)]:
            pair = (np.frombuffer(block[: len(one)], np.uint8).reshape(-1, old.row_bytes) for block in (one, other))
            found.append(first + np.flatnonzero(np.not_equal(*pair).any(axis=1)))
        first += len(one) // old.row_bytes
    return np.concatenate(found) if found else np.empty(0, int)
