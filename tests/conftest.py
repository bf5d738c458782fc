"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real tokenizers, models and texts: `LINGRAFT_DATA`, or `../shared/data` beside the project."""
    folder = Path(os.environ.get("LINGRAFT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set LINGRAFT_DATA to its folder")
    return folder
