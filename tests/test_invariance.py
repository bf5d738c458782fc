"""Settings that must not change what a stage learns give one saved series of losses.

`loss_series.json` holds the first 20 losses of three kinds of stage on a tiny Gemma 3 in float32. Write it anew with
`python tests/test_invariance.py` when what a stage learns was changed on purpose. Series of several processes are
compared in `test_processes.py`.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from lingraft.training.batches import Batches
from lingraft.training.settings import LoraSettings, StageSettings
from lingraft.training.stage import run_stage
from lingraft.training.tokens import Encoded

SAVED = Path(__file__).with_name("loss_series.json")
STEPS = 20
NEW_IDS = list(range(360, 460))
BASE = replace(tiny.STAGE_SETTINGS, learning_rate=3e-3, micro_batch=2, packing=True, gradient_checkpointing=False)
KINDS: dict[str, dict[str, Any]] = {
    "new rows": {"input_rows": "new", "output_rows": "new", "learning_rate": 2e-2},
    "all rows": {"input_rows": "new", "output_rows": "all"},
    "lora and rows": {
        "input_rows": "all",
        "output_rows": "all",
        "layers": "lora",
        "lora": LoraSettings(r=4, alpha=8, targets=("q_proj", "v_proj", "down_proj")),
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as saved": {},
    "one row at a time": {"micro_batch": 1},
    "three rows at a time": {"micro_batch": 3},
    "as many rows as fit": {"micro_batch": None},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "no packing": {"packing": False},
    "no packing, one row at a time": {"packing": False, "micro_batch": 1},
    "no packing, gradient checkpointing": {"packing": False, "gradient_checkpointing": True},
}


def documents() -> list[Encoded]:
    """Documents of many lengths, over old and new ids with a pattern to learn."""
    numbers = np.random.default_rng(0)
    found = []
    for number in range(400):
        first, step, length = numbers.integers(100), numbers.integers(1, 4), numbers.integers(5, 60)
        ids = (260 + (first + step * np.arange(length)) % 200).astype(np.int32)
        learnt = np.ones(length, bool)
        learnt[0] = False
        found.append(Encoded(ids, learnt, f"d#{number}"))
    return found


def series(source: Path, work: Path, settings: StageSettings) -> list[float]:
    batches = Batches(
        {"a": documents()},
        {"a": 1.0},
        sequence_length=64,
        rows_per_step=4,
        pad=0,
        bos=2,
        seed=0,
        packing=settings.packing,
        budget_tokens=STEPS * 4 * 64,
    )
    work.mkdir(parents=True)
    result = run_stage(source, work / "out", work, settings, batches, NEW_IDS)
    return [entry["loss"] for entry in result.loop.log[:STEPS]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("invariance") / "model", tiny_tokenizer, tied=False)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_series_is_the_saved_one(source: Path, tmp_path: Path, kind: str, variant: str) -> None:
    expected = json.loads(SAVED.read_text())[kind]
    assert expected[-1] < expected[0] - 0.1, "it trains"
    assert series(source, tmp_path / "work", replace(BASE, **KINDS[kind], **VARIANTS[variant])) == pytest.approx(
        expected, rel=1e-5
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        tiny.write_tokenizer(Path(folder) / "tokenizer")
        model = tiny.write_checkpoint(Path(folder) / "model", Path(folder) / "tokenizer", tied=False)
        saved = {kind: series(model, Path(folder) / kind, replace(BASE, **KINDS[kind])) for kind in KINDS}
    SAVED.write_text(json.dumps(saved, indent=1) + "\n")
