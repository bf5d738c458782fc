"""A step's result: a folder with a `manifest.json`, published atomically.

A step works in `RUN/.work/<step>/`, which survives a kill, so that a step may go on from its own checkpoints.
When it is done, everything is flushed to disk and the folder is renamed to its place in one move. A folder in
its place therefore is always whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lingraft.atomic import flush, write_json
from lingraft.errors import RunError

MANIFEST = "manifest.json"


def key_of(**parts: Any) -> str:
    """A short hash of plain data: equal parts, equal key."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a published folder, or None where there is none."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise RunError(f"{folder / MANIFEST}: damaged manifest; delete {folder} to make this step again") from error


def publish(work: Path, place: Path, manifest: dict[str, Any]) -> None:
    """Flush the folder `work` with its manifest and move it to `place`, over what stood there before."""
    write_json(work / MANIFEST, manifest)
    for path in [*work.rglob("*"), work]:
        flush(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(work, place)
    flush(place.parent)
    shutil.rmtree(old, ignore_errors=True)


class Hashes:
    """Content hashes of input files, remembered by size and time so that large files are read once."""

    def __init__(self, memory: Path | None) -> None:
        self.memory = memory
        self.known: dict[str, list[Any]] = {}
        if memory and memory.is_file():
            try:
                self.known = json.loads(memory.read_text())
            except json.JSONDecodeError:
                self.known = {}  # only a cache: hash the files again

    def file(self, path: Path) -> str:
        """SHA-256 of the file's bytes, as 24 hex digits."""
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        known = self.known.get(str(path))
        if known and known[:2] == stamp:
            return known[2]
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:24]
        self.known[str(path)] = [*stamp, digest]
        return digest

    def files(self, paths: Iterable[Path]) -> dict[str, str]:
        """Hashes of several files in their order, by place and name (two folders may hold files of one name)."""
        return {f"{place}/{path.name}": self.file(path) for place, path in enumerate(paths)}

    def save(self) -> None:
        """Write the memory of hashes beside the run; in a folder that can't be written it is only forgotten."""
        if self.memory:
            with contextlib.suppress(OSError):
                write_json(self.memory, self.known)
