"""Several processes for one run: they learn what one process learns, stop together, and go on after a loss.

The processes are real ones, started by torchrun on the CPU (gloo). This file is also what they run:

    torchrun --nproc-per-node 2 tests/test_processes.py FOLDER CASE[:STEP AND RANK OF A KILL] …
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import lingraft
from lingraft import processes
from lingraft.errors import RecipeError, RunError
from lingraft.training.batches import Batches, MicroBatch
from lingraft.training.settings import LoraSettings, StageSettings
from lingraft.training.stage import run_stage, train_stage, write_stage
from lingraft.training.tokens import Encoded

NEW_IDS = [*range(400, 416), 450]  # 17: shared out unevenly
STEPS = 20
LORA = LoraSettings(r=4, alpha=8, dropout=0.1, targets=("q_proj", "v_proj", "down_proj"))
STAGES: dict[str, dict[str, Any]] = {
    "rows": {"input_rows": "new", "output_rows": "new", "keep": "best", "validate_every": 5},
    "output": {"output_rows": "new"},
    "all-rows": {"input_rows": "all", "output_rows": "all", "gradient_checkpointing": True},
    # one process draws other random numbers for its micro-batches than two for theirs
    "lora": {"input_rows": "all", "layers": "lora", "lora": replace(LORA, dropout=0.0), "gradient_checkpointing": True},
    "qlora": {"output_rows": "all", "layers": "lora", "lora": replace(LORA, dropout=0.0), "quantise": "nf4"},
    "dropout": {"input_rows": "new", "layers": "lora", "lora": LORA},
    "layers": {"output_rows": "new", "layers": "all"},
    "tied": {"input_rows": "all", "gradient_checkpointing": True},
    "bf16-rows": {"input_rows": "new", "output_rows": "all", "precision": "bf16"},
    "bf16-lora": {
        "layers": "lora",
        "lora": replace(LORA, dropout=0.0),
        "precision": "bf16",
        "gradient_checkpointing": True,
    },
    "bf16-layers": {"layers": "all", "precision": "bf16"},
}
# How far several processes may be from one, relatively: sums that round to bfloat16 do so in another order.
NEAR, NEAR_BF16 = 1e-5, 2e-2
WAYS = ["ddp", "fsdp", *(["zero2"] if importlib.util.find_spec("deepspeed") else [])]


def settings_of(case: str) -> StageSettings:
    """Of a case `<stage>-<way>`."""
    stage, _, way = case.rpartition("-")
    # clipped hard, so that every gradient's norm counts
    changes = {"name": case, "parallel": way, "clip": 0.1, "learning_rate": 1e-3, "micro_batch": 1}
    return replace(tiny.STAGE_SETTINGS, **(STAGES[stage] | changes))


def batches(steps: int = STEPS) -> Batches:
    """Steps of up to five rows, which two processes can't share evenly."""
    chance = np.random.default_rng(steps)
    documents = [
        Encoded(ids, np.arange(len(ids)) > 0, f"d#{i}")
        for i, ids in enumerate(
            chance.integers(260, 460, size=chance.integers(10, 60)).astype(np.int32) for _ in range(200)
        )
    ]
    made = Batches({"a": documents}, {"a": 1.0}, sequence_length=64, rows_per_step=5, pad=0, bos=2, seed=0, epochs=2)
    made._starts_S = made._starts_S[: steps + 1]
    return made


# ------------------------------------------------------------------------------ what the processes do


def main(folder: Path, cases: list[str]) -> None:
    def work() -> None:
        assert processes.size() == 1
        for case in cases:
            case, *kill = case.split(":")
            out = folder / case
            learnt = processes.together(train, folder, case, *map(int, kill))
            write_stage(source_of(folder, case), out / "out", learnt, NEW_IDS)

    processes.led(work)


def source_of(folder: Path, case: str) -> Path:
    return folder / ("tied" if case.startswith("tied") else "untied")


def train(folder: Path, case: str, killed_at: int = 0, killed_rank: int = 0) -> Any:
    assert processes.size() == 2
    read = Killing(killed_at) if killed_at and processes.rank() == killed_rank else batches()
    (folder / case).mkdir(exist_ok=True)
    settings = replace(settings_of(case), checkpoint_seconds=1e-9 if killed_at else 1e9)
    held_out = batches(steps=2) if settings.validates else None
    return train_stage(source_of(folder, case), folder / case, settings, read, NEW_IDS, validation=held_out)


class Killing:
    """Batches whose reader is killed when it comes to a step."""

    def __init__(self, step: int) -> None:
        self.inner, self.last = batches(), step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def from_step(self, first: int, micro_batch: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        for number, made in self.inner.from_step(first, micro_batch):
            if number == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            yield number, made


# -------------------------------------------------------------------------------------------- tests


def start(*command: str | Path) -> subprocess.Popen[str]:
    """Two processes of a Python file or module."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*torchrun, *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run(*command: str | Path) -> tuple[int, str]:
    process = start(*command)
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def logged(folder: Path, what: str = "loss") -> list[float]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry[what] for entry in entries if what in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def error_lines(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for name in ("tied", "untied"):
        tiny.write_checkpoint(folder / name, tiny_tokenizer, "gemma3", tied=name == "tied")
    return folder


def with_sources(folder: Path, sources: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for source in sources.iterdir():
        (folder / source.name).symlink_to(source)
    return folder


QUICK = [f"{stage}-{way}" for way in ("ddp", "fsdp") for stage in ("rows", "all-rows", "lora", "bf16-layers")]
THOROUGH = [c for c in (f"{stage}-{way}" for way in WAYS for stage in STAGES) if c not in QUICK and "dropout" not in c]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, sources: Path) -> Callable[[str], Path]:
    """A stage by two processes, which train all of `QUICK` or of `THOROUGH` one after another."""

    @cache
    def train_all(cases: tuple[str, ...]) -> Path:
        folder = with_sources(tmp_path_factory.mktemp("two"), sources)
        code, out = run(__file__, folder, *cases)
        assert code == 0, out
        return folder

    return lambda case: train_all(tuple(QUICK if case in QUICK else THOROUGH)) / case


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, sources: Path) -> Callable[[str], Path]:
    """A stage by one process, with three rows at a time."""

    @cache
    def train_alone(stage: str) -> Path:
        place = tmp_path_factory.mktemp(stage)
        settings = replace(settings_of(f"{stage}-ddp"), micro_batch=3)
        held_out = batches(steps=2) if settings.validates else None
        run_stage(source_of(sources, stage), place / "out", place, settings, batches(), NEW_IDS, validation=held_out)
        return place

    return train_alone


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in THOROUGH)])
def test_two_processes_learn_what_one_learns(
    trained: Callable[[str], Path], alone: Callable[[str], Path], sources: Path, case: str
) -> None:
    one, two = alone(case.rpartition("-")[0]), trained(case)
    near = NEAR_BF16 if case.startswith("bf16") else NEAR
    assert len(logged(one)) == STEPS
    for what in ("loss", "gradient_norm", "validation_loss"):
        np.testing.assert_allclose(logged(two, what), logged(one, what), rtol=near, err_msg=what)
    before, expected, found = weights(source_of(sources, case)), weights(one / "out"), weights(two / "out")
    assert any(not torch.equal(expected[name], before[name]) for name in before)
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= near * tensor.norm(), name


def test_one_process_is_alone() -> None:
    assert (processes.rank(), processes.size(), processes.launched()) == (0, 1, 1)
    assert processes.together(lambda a, b: (a + b, processes.size()), 1, b=2) == (3, 1)
    assert processes.led(lambda: processes.together(processes.size)) == 1
    assert processes.speaks()


@pytest.mark.parametrize("way", ["fsdp", "zero2"])
def test_states_in_8_bits_are_not_shared_out(tmp_path: Path, way: str) -> None:
    recipe = tiny.write_recipe(tmp_path, tmp_path)
    with pytest.raises(RecipeError, match=f"parallel: {way} shares out the states of optimizer: adamw only; set it"):
        lingraft.load_recipe(recipe, [f"training.parallel={way}", "training.optimizer=adamw_8bit"])


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("case", [f"dropout-{way}" for way in WAYS])
def test_after_a_killed_process_the_same_command_goes_on_to_the_same_bits(
    tmp_path: Path, sources: Path, case: str, killed: int
) -> None:
    whole, broken = (with_sources(tmp_path / name, sources) for name in ("whole", "broken"))
    assert run(__file__, whole, case)[0] == 0
    begin = time.monotonic()
    code, out = run(__file__, broken, f"{case}:12:{killed}")
    assert code != 0
    assert time.monotonic() - begin < 60, "the other process ends soon"
    assert "another process of this run has died" in out
    assert not (broken / case / "out").exists()
    assert len(logged(broken / case)) >= 11
    code, out = run(__file__, broken, case)
    assert code == 0, out
    assert len(logged(broken / case)) == STEPS
    expected, found = weights(whole / case / "out"), weights(broken / case / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def write_recipe(folder: Path, model: Path) -> Path:
    """A recipe whose first stage takes long enough to be interrupted."""
    stages = [
        {"name": "rows", "train": {"input_rows": "new", "output_rows": "new"}, "tokens": 30_000},
        {"name": "lora", "train": {"layers": "lora"}, "lora": {"r": 4, "alpha": 8, "dropout": 0.1}},
    ]
    return tiny.write_recipe(folder, model, stages=stages)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, tiny_gemma: Path) -> tuple[Path, str]:
    """A recipe run by two processes, and what they said."""
    folder = tmp_path_factory.mktemp("run")
    code, out = run("-m", "lingraft", "run", write_recipe(folder, tiny_gemma), "--run-dir", folder / "run")
    assert code == 0, out
    return folder / "run", out


@pytest.mark.slow
def test_a_run_has_one_voice_and_one_report(whole_run: tuple[Path, str]) -> None:
    folder, out = whole_run
    assert "2 processes train together" in out
    assert out.count("final model") == out.count("report  ") == 1
    assert (folder / "report.html").is_file()
    assert lingraft.status(folder)["finished"]
    code, out = run("-m", "lingraft", "run", folder.parent / "recipe.yaml", "--run-dir", folder)
    assert code == 0
    assert out.count("done before") == len(lingraft.status(folder)["steps"])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_terminated_run_stops_at_one_step_and_resumes(
    whole_run: tuple[Path, str], tmp_path: Path, tiny_gemma: Path, way: str
) -> None:
    recipe = write_recipe(tmp_path, tiny_gemma)
    command = ("-m", "lingraft", "run", recipe, "--run-dir", tmp_path / "run", "--set", f"training.parallel={way}")
    process = start(*command, "--set", "training.checkpoint_seconds=1e-6")
    wait_for(tmp_path, "run/.work/*-rows/checkpoint-2", process)
    with pytest.raises(RunError, match="another run is at work"):
        lingraft.run(recipe, tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert error_lines(out) == ["error: interrupted; finished steps are kept, and the same command goes on from there"]
    assert not list(tmp_path.glob("run/*-rows")), "it was in the middle of the stage"
    code, out = run(*command)
    assert code == 0, out
    expected, found = (weights(folder / "model") for folder in (whole_run[0], tmp_path / "run"))
    for name, tensor in expected.items():
        if way == "ddp":
            assert torch.equal(found[name], tensor)
        else:  # sums round otherwise than in the whole run
            assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
