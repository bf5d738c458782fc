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


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny models' tokenizer."""
    import tiny

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A tied, tiny Gemma 3 checkpoint."""
    import tiny

    return tiny.write_checkpoint(tmp_path_factory.mktemp("gemma") / "model", tiny_tokenizer)
