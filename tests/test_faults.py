"""Faults of the machine: kills at any moment, damaged checkpoints, a full disk, numbers that are not finite."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import kill_resume
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lingraft
from lingraft.errors import LingraftError, ModelError, TrainingError
from lingraft.training import checkpoint
from lingraft.training.checkpoint import Position
from lingraft.training.optimizer import make_optimizer
from lingraft.training.parallel import Parallel
from lingraft.training.watch import LossWatch, StageLog

KILLS = [(stage, number) for stage in kill_resume.STAGES for number in (signal.SIGKILL, signal.SIGTERM)]


# ------------------------------------------------------------------------------------------------------- kills


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe of one stage and its finished run in `run/`."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = kill_resume.write_stage_recipe(folder, kill_resume.STAGES["lora"] | {"keep": "best"}, tokens=40_000)
    lingraft.run(recipe, folder / "run")
    return folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stage_killed_and_resumed_ends_in_the_same_bits(
    finished: Path, tmp_path: Path, number: signal.Signals
) -> None:
    hits = kill_resume.disturb(finished / "recipe.yaml", finished, 1, number, seed=0, folder=tmp_path)
    assert hits.total() == 1


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "number"), KILLS)
def test_a_stage_killed_twenty_times_ends_in_the_same_bits(tmp_path: Path, stage: str, number: signal.Signals) -> None:
    assert kill_resume.kill_stage(stage, 20, number, seed=1, folder=tmp_path).total() == 20


# ------------------------------------------------------------------------------------------------- checkpoints


class Trained:
    """A few parameters and their optimiser: two large enough for 8-bit states, a small one, and one that gets no
    gradient before step 3."""

    def __init__(self, kind: str = "adamw", rows: int = 100) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {"a": (rows, 64), "b": (rows, 64), "small": (7,), "late": (5, 5)}
        self.parameters = {name: nn.Parameter(torch.randn(*s, generator=generator)) for name, s in shapes.items()}
        groups = [{"params": list(self.parameters.values()), "lr": 1e-2, "weight_decay": 0.1}]
        self.optimizer = make_optimizer(groups, replace(tiny.STAGE_SETTINGS, optimizer=kind))
        self.done = 0

    def steps(self, until: int) -> None:
        while self.done < until:
            for name, parameter in self.parameters.items():
                late = name == "late" and self.done < 3
                parameter.grad = None if late else torch.sin(parameter.detach() * (self.done + 1))
            self.optimizer.step()
            self.done += 1

    def save(self, work: Path, kept: int = 2) -> None:
        position = Position(self.done, micro_batch=4)
        checkpoint.save(work, position, self.parameters, self.optimizer, kept, Parallel(), lambda: None)

    def resume(self, work: Path) -> Position:
        position = checkpoint.resume(work, self.parameters, self.optimizer, Parallel())
        self.done = position.step
        return position

    def bits(self) -> dict[str, bytes]:
        state = checkpoint._state(self.parameters, self.optimizer, Parallel())
        return {key: torch.as_tensor(value).numpy().tobytes() for key, value in state.items()}


def trained(until: int, kind: str = "adamw") -> Trained:
    run = Trained(kind)
    run.steps(until)
    return run


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A work folder with checkpoints of steps 2 and 4."""
    run = Trained()
    for step in (2, 4):
        run.steps(step)
        run.save(tmp_path)
    return tmp_path


def names(work: Path) -> list[str]:
    return sorted(path.name for path in work.iterdir())


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("saved", [2, 4])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_each_optimiser_goes_on_bit_for_bit(tmp_path: Path, kind: str, saved: int) -> None:
    if kind != "adamw":
        pytest.importorskip("bitsandbytes")
    trained(saved, kind).save(tmp_path)
    resumed = Trained(kind)
    assert resumed.resume(tmp_path) == Position(saved, micro_batch=4)
    assert resumed.bits() == trained(saved, kind).bits()
    resumed.steps(8)
    assert resumed.bits() == trained(8, kind).bits()


def cut(folder: Path) -> None:
    file = folder / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def flip_a_bit(folder: Path) -> None:
    file = folder / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-500] ^= 1
    file.write_bytes(content)


def garble_facts(folder: Path) -> None:
    (folder / "state.json").write_text('{"facts": ')


def other_step(folder: Path) -> None:
    facts = folder / "state.json"
    facts.write_text(re.sub(r'"step": \d', '"step": 7', facts.read_text(), count=1))


def lose_tensors(folder: Path) -> None:
    (folder / "state.safetensors").unlink()


def lose_facts(folder: Path) -> None:
    (folder / "state.json").unlink()


def lose_its_format(folder: Path) -> None:
    (folder / "state.json").write_text('{"step": 4}')


def other_shapes(folder: Path) -> None:
    run = Trained(rows=50)
    run.steps(int(folder.name[-1]))
    shutil.rmtree(folder, ignore_errors=True)
    run.save(folder.parent)


DAMAGES = [cut, flip_a_bit, garble_facts, other_step, lose_tensors, lose_facts, lose_its_format]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    work: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    damage(work / "checkpoint-4")
    resumed = Trained()
    assert resumed.resume(work).step == 2
    assert resumed.bits() == trained(2).bits()
    [line] = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"  checkpoint-4 is damaged \(.+\): going back to checkpoint-2", line)

    resumed.steps(3)
    resumed.save(work)
    assert names(work) == ["checkpoint-2", "checkpoint-3"], "the damaged one is not counted among those kept"


def test_without_a_whole_checkpoint_the_stage_starts_again(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(work / "checkpoint-2")
    cut(work / "checkpoint-4")
    resumed = Trained()
    assert resumed.resume(work) == Position()
    assert resumed.bits() == Trained().bits()
    assert not resumed.optimizer.state
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "going back to checkpoint-2",
        "the stage starts again",
    ]


def test_a_checkpoint_of_another_kind_of_stage_is_not_taken_for_damaged(work: Path) -> None:
    before = names(work)
    other_shapes(work / "checkpoint-4")
    with pytest.raises(TrainingError, match="checkpoint-4: this half-done stage was begun in another way"):
        Trained().resume(work)
    assert names(work) == before


def test_processes_that_find_different_checkpoints_stop(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where one machine does not see the newest folder yet."""
    monkeypatch.setattr(Parallel, "most", lambda self, *numbers: [max(numbers[0], 6.0), numbers[1]])
    with pytest.raises(TrainingError, match="the processes find different checkpoints, of steps 4 to 6"):
        Trained().resume(work)


def test_the_newest_checkpoints_are_kept_and_a_killed_ones_rest_is_removed(work: Path) -> None:
    (work / ".checkpoint-5.partial").mkdir()
    resumed = Trained()
    assert resumed.resume(work).step == 4
    resumed.steps(6)
    resumed.save(work, kept=3)
    assert names(work) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    resumed.steps(7)
    resumed.save(work, kept=1)
    assert names(work) == ["checkpoint-7"]


# --------------------------------------------------------------------------------------------------- full disk


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A real file system of a given size."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_checkpoint_that_finds_no_room_is_said_and_costs_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "300k") as disk:
        run = trained(2)  # 155 kB each
        run.save(disk)
        run.steps(4)
        run.save(disk)
        [line] = capsys.readouterr().out.splitlines()
        assert re.fullmatch(
            r"  no checkpoint at step 4: .*No space left on device.* \(it needs 0\.00015. GB, 0\.0001.. GB are free\); "
            r"a stop now would go back to checkpoint-2",
            line,
        )
        assert names(disk) == ["checkpoint-2"]
        assert Trained().resume(disk).step == 2
    run.steps(6)
    assert run.bits() == trained(6).bits()


def start(recipe: Path, run: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lingraft", "run", str(recipe), "--run-dir", str(run)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_training_outlasts_a_full_disk_and_its_end_waits_for_room(finished: Path, tmp_path: Path) -> None:
    """The disk fills up in the middle of a stage, to the last byte, and is emptied after the run has given up."""
    with small_disk(tmp_path / "disk", "20m") as disk:
        kill_resume.begin_stage_anew(finished, disk / "copy")
        process = start(finished / "recipe.yaml", disk / "copy" / "run")
        run = disk / "copy" / "run"
        work = run / ".work" / kill_resume.STAGE
        while not list(work.glob("checkpoint-*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        fill(disk / "ballast")
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2, err
        assert re.search(r"  no checkpoint at step \d+: .*No space left on device", out)
        assert err.count("\n") == 1, err
        assert "the disk is full: make room and give the same command again" in err
        assert not (run / kill_resume.STAGE).exists()

        (disk / "ballast").unlink()
        again = start(finished / "recipe.yaml", run)
        _, err = again.communicate(timeout=120)
        assert again.returncode == 0, err
        kill_resume.compare(kill_resume.weights(finished), kill_resume.weights(disk / "copy"))
        results = [
            json.loads((r / kill_resume.STAGE / "manifest.json").read_text())["results"]
            for r in (finished / "run", run)
        ]
        assert results[0]["steps"] == results[1]["steps"]
        assert results[0]["tokens"] == results[1]["tokens"]


def fill(file: Path) -> None:
    with open(file, "wb", buffering=0) as ballast:
        for size in (2**16, 1):
            try:
                while ballast.write(b"0" * size):
                    pass
            except OSError:
                continue


# -------------------------------------------------------------------------------------------------- not finite


def fails(recipe: Path, run: Path, *overrides: str) -> LingraftError:
    with pytest.raises(LingraftError) as caught:
        lingraft.run(recipe, run, overrides)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return caught.value


def poisoned(model: Path, folder: Path, token: int) -> Path:
    """A copy of a checkpoint with a NaN in the input row of a token."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token, 3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tokens_of(finished: Path, part: str) -> set[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    texts = [json.loads(line)["text"] for file in (finished / "run/01-corpus" / part).iterdir() for line in file.open()]
    return {token for text in texts for token in tokenizer(text)["input_ids"]}


def test_nan_in_the_base_is_found_when_it_is_measured(finished: Path, tmp_path: Path) -> None:
    base = poisoned(finished / "model", tmp_path / "base", min(tokens_of(finished, "held-out") - {0, 1, 2}))
    error = fails(finished / "recipe.yaml", tmp_path / "run", f"base.model={base}")
    assert isinstance(error, ModelError)
    assert re.search(
        r"base: the model needs nan bits per byte of held-out \w+ text.*lingraft doctor .*base", str(error)
    )


def test_nan_met_in_training_names_step_and_documents_and_the_run_goes_on_once_mended(
    finished: Path, tmp_path: Path
) -> None:
    """An input row that is not finite, of a token that no held-out text has."""
    whole = tiny.write_checkpoint(tmp_path / "whole", finished / "tokenizer", tied=False)
    token = min(tokens_of(finished, "train") - tokens_of(finished, "held-out"))
    base = poisoned(whole, tmp_path / "base", token)
    error = fails(finished / "recipe.yaml", tmp_path / "run", f"base.model={base}")
    assert isinstance(error, TrainingError)
    found = re.fullmatch(r"stage kill, step (\d+): the loss is nan, .*; the step read (.*?); lower .*", str(error))
    assert found
    assert int(found[1]) > 1, "the steps before it were fine"
    assert "english#" in found[2]

    shutil.copy(whole / "model.safetensors", base)
    lingraft.run(finished / "recipe.yaml", tmp_path / "run", [f"base.model={base}"])
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("content", ["", '{"step": 1}\n{"st', "\0\0\n\0\n"])
def test_a_damaged_log_is_one_line_with_its_cure(tmp_path: Path, content: str) -> None:
    (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(TrainingError, match=r"log.jsonl: the stage's log is damaged \(.*\); delete .* starts anew$"):
        StageLog(tmp_path / "log.jsonl", 2, None)


def test_a_hopeless_loss_stops_the_stage_from_its_first_steps_on() -> None:
    with pytest.raises(TrainingError, match=r"stage rows, step 2: the loss is 2\.5e\+09, the gradient norm 1;"):
        LossWatch("rows").check(2, 2.5e9, 1.0, [])


def test_a_hopeless_learning_rate_stops_the_run_and_it_goes_on_with_a_better_one(
    finished: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    kill_resume.begin_stage_anew(finished, copy)
    error = fails(finished / "recipe.yaml", copy / "run", "training.learning_rate=1e9")
    assert re.fullmatch(
        r"stage kill, step [234]: the loss is .*; the step read .*; lower learning_rate or .*", str(error)
    )
    lingraft.run(finished / "recipe.yaml", copy / "run")
    kill_resume.compare(kill_resume.weights(finished), kill_resume.weights(copy))
