"""The last step: `RUN/model/`, the final checkpoint, always in the same place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lingraft.artifact import MANIFEST
from lingraft.training.watch import LOG


def run(source: Path, out: Path, work: Path) -> dict[str, Any]:
    """Link the last stage's files into `out` (or copy them where the file system has no links)."""
    for path in sorted(source.iterdir()):
        if path.name in (MANIFEST, LOG):
            continue
        try:
            os.link(path, out / path.name)
        except OSError:
            shutil.copy2(path, out / path.name)
    return {"from": source.name}
