"""Watching a stage: log, TensorBoard, loss spikes; validation, and keeping the best state."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import lingraft
from lingraft.errors import RecipeError, TrainingError
from lingraft.model.load import load
from lingraft.progress import bar
from lingraft.training.batches import Batches, MicroBatch
from lingraft.training.loss import NextTokenLoss
from lingraft.training.settings import LoraSettings
from lingraft.training.stage import StageResult, run_stage
from lingraft.training.tokens import Encoded
from lingraft.training.validation import validation_steps
from lingraft.training.watch import LossWatch, StageLog

NEW_IDS = [400, 401, 402, 450]
ALL_ROWS = replace(tiny.STAGE_SETTINGS, input_rows="all", output_rows="all", learning_rate=0.1)
LORA = LoraSettings(r=4, alpha=8, dropout=0.1, targets=("q_proj", "down_proj"))


def batches(seed: int = 0, epochs: float = 4) -> Batches:
    """Steps of four rows of random documents; other documents for another seed."""
    ids = np.random.default_rng(seed).integers(260, 460, size=(24, 30)).astype(np.int32)
    documents = [Encoded(row, np.ones(30, bool), f"d{seed}#{i}") for i, row in enumerate(ids)]
    return Batches(
        {"a": documents}, {"a": 1.0}, sequence_length=64, rows_per_step=4, pad=0, bos=2, seed=0, epochs=epochs
    )


def step_of(tokens: int, *origins: str) -> list[MicroBatch]:
    empty = torch.zeros((1, 1), dtype=torch.long)
    return [MicroBatch(empty, empty, empty, origins, tokens)]


def entries(losses: list[float], tokens: int = 100) -> list[dict[str, Any]]:
    return [{"step": step, "loss": loss, "tokens": tokens} for step, loss in enumerate(losses, 1)]


NOISY = [2.0 + 0.1 * (step % 3 - 1) for step in range(60)]  # median 2.0, median absolute deviation 0.1


# ---------------------------------------------------------------------------------------------------------- the loss


def test_a_spike_is_told_once_with_its_step_and_documents(capsys: pytest.CaptureFixture[str]) -> None:
    watch = LossWatch("rows", entries(NOISY))
    limit = 2.0 + 6 * 1.4826 * 0.1
    assert watch.check(61, limit - 0.01, 1.0, step_of(100, "a#1")) is None
    spike = watch.check(62, limit + 0.01, 1.0, step_of(100, "a#2", "a#2", "b#7"))
    assert spike is not None
    assert (spike.usual, spike.documents) == (2.0, ["a#2", "b#7"])
    assert watch.check(63, 3.0, 1.0, step_of(100, "a#3")) is None  # the same spike goes on
    assert watch.check(64, 2.0, 1.0, step_of(100, "a#4")) is None
    assert watch.check(65, 3.0, 1.0, step_of(100, "a#5")) is not None
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0] == "  step 62: the loss is 2.90, far above the usual 2.00; it read a#2, b#7"


def test_a_step_of_few_tokens_may_stray_further() -> None:
    assert LossWatch("rows", entries(NOISY)).check(61, 3.0, 1.0, step_of(100)) is not None
    assert LossWatch("rows", entries(NOISY)).check(61, 3.0, 1.0, step_of(25)) is None


def test_a_resumed_watch_knows_that_a_spike_goes_on() -> None:
    assert LossWatch("rows", entries([*NOISY, 3.5])).check(62, 3.5, 1.0, step_of(100)) is None


def test_exploding_loss_stops() -> None:
    watch = LossWatch("rows", entries([2.0] * 30))
    watch.check(31, 3.9, 1.0, step_of(100, "d#1"))
    cure = "lower learning_rate or look at these documents; finished stages and the newest checkpoint are kept"
    with pytest.raises(
        TrainingError, match=rf"stage rows, step 32: the loss jumped from about 2\.00 to 9\.00; .* read d#1; {cure}"
    ):
        watch.check(32, 9.0, 1.0, step_of(100, "d#1"))


# ----------------------------------------------------------------------------------------------------------- the logs


def scalars(folder: Path, tag: str) -> dict[int, float]:
    """What TensorBoard shows of a tag, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    shown = [(event.step, event.value) for event in accumulator.Scalars(tag)]
    assert len(shown) == len(dict(shown)), "a step is shown twice"
    return dict(shown)


def test_logs_end_where_the_stage_goes_on_from(tmp_path: Path) -> None:
    path, events = tmp_path / "log.jsonl", tmp_path / "tensorboard" / "04-rows"
    for first, losses in ((0, [5.0, 4.0, 3.0]), (1, [4.5, 3.5])):  # killed after a checkpoint at step 1
        log = StageLog(path, first, events)
        for step, loss in enumerate(losses, first + 1):
            log.add({"step": step, "loss": loss, "lr/rows": 0.5, "spike": {"usual": 1.0}})
    log.close()
    assert [entry["loss"] for entry in log.entries] == [5.0, 4.5, 3.5]
    assert [json.loads(line) for line in path.read_text().splitlines()] == log.entries
    assert scalars(events, "loss") == {1: 5.0, 2: 4.5, 3: 3.5}
    assert scalars(events, "lr/rows") == {1: 0.5, 2: 0.5, 3: 0.5}
    log = StageLog(path, 0, events)  # another version of the stage
    log.add({"step": 1, "loss": 7.0})
    log.close()
    assert scalars(events, "loss") == {1: 7.0}


@pytest.mark.parametrize("fault", ["missing", "in the way"])
def test_tensorboard_never_stops_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    events = tmp_path / "events"
    if fault == "missing":
        monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    else:
        events.touch()
    log = StageLog(tmp_path / "log.jsonl", 0, events)
    for step in (1, 2):
        log.add({"step": step, "loss": 1.0})
    log.close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    assert capsys.readouterr().out.count("nothing for TensorBoard from here on (") == 1


def test_a_stage_logs_all_that_it_says(tmp_path: Path, tiny_tokenizer: Path) -> None:
    settings = replace(ALL_ROWS, layers="all", embedding_learning_rate=0.01, warmup=0, schedule="constant")
    result = run(tmp_path, tiny_tokenizer, settings, events=tmp_path / "events").loop
    assert len(result.log) == result.steps == len(batches())
    last = result.log[-1]
    assert {key: last[key] for key in ("step", "lr/rows", "lr/layers", "lr/norms")} == {
        "step": result.steps,
        "lr/rows": 0.01,
        "lr/layers": 0.1,
        "lr/norms": 0.1,
    }
    seconds = [last[f"seconds/{part}"] for part in ("data", "gradients", "update")]
    assert min(seconds) > 0
    assert last["tokens_per_second"] == pytest.approx(last["tokens"] / sum(seconds))
    assert result.seconds == pytest.approx(sum(sum(seconds_of(entry)) for entry in result.log))
    assert 0.05 < last["peak_memory_gb"] < 50
    assert scalars(tmp_path / "events", "gradient_norm")[3] == pytest.approx(result.log[2]["gradient_norm"])


def seconds_of(entry: dict[str, Any]) -> list[float]:
    return [value for key, value in entry.items() if key.startswith("seconds/")]


# --------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("steps", "epochs", "every", "expected"),
    [
        (100, 1, None, {25, 50, 75, 100}),  # at least four times
        (100, 10, None, set(range(10, 101, 10))),  # once an epoch
        (10, 5.5, None, {2, 4, 5, 7, 9, 10}),
        (10, 1, 4, {4, 8, 10}),
        (10, 1, 40, {10}),
        (10, 1, 0.3, {3, 6, 9, 10}),
        (2, 1, 0.1, {1, 2}),
        (3, 1, None, {1, 2, 3}),
    ],
)
def test_when_to_validate(steps: int, epochs: float, every: float | None, expected: set[int]) -> None:
    assert validation_steps(steps, epochs, every) == expected


def run(folder: Path, tokenizer: Path, settings: Any, name: str = "run", **options: Any) -> StageResult:
    """A stage over random documents in `folder/name`, from a tiny model that is the same each time."""
    source = folder / "model"
    if not source.exists():
        tiny.write_checkpoint(source, tokenizer, tied=False)
    work = folder / name
    work.mkdir(exist_ok=True)
    return run_stage(source, work / "out", work, settings, batches(), NEW_IDS, **options)


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "out" / "model.safetensors")


def cut_power(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Let a stage break off at a step, between its gradients and its update."""
    checked = LossWatch.check

    def killed(watch: LossWatch, step: int, *rest: Any) -> Any:
        if step == at:
            raise RuntimeError("power cut")
        return checked(watch, step, *rest)

    monkeypatch.setattr(LossWatch, "check", killed)


def same_bits(folder: Path, one: str, other: str) -> bool:
    first, second = weights(folder, one), weights(folder, other)
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


KINDS = {
    "new rows": {"input_rows": "new", "output_rows": "new"},
    "all rows": {"input_rows": "all", "output_rows": "all"},
    "lora with dropout": {"layers": "lora", "lora": LORA, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_looking_at_held_out_text_changes_nothing(tmp_path: Path, tiny_tokenizer: Path, changes: dict) -> None:
    settings = replace(tiny.STAGE_SETTINGS, **changes)
    run(tmp_path, tiny_tokenizer, settings, "blind")
    result = run(tmp_path, tiny_tokenizer, replace(settings, validate_every=1), "watched", validation=batches(1, 1))
    assert all("validation_loss" in entry for entry in result.loop.log)
    assert same_bits(tmp_path, "blind", "watched")


@torch.no_grad()
def held_out_loss(folder: Path) -> float:
    """Mean loss of the checkpoint's own model on the held-out documents."""
    loss = NextTokenLoss(load(folder))
    found = [batch for _, step in batches(1, 1).from_step(0) for batch in step]
    total = sum(float(loss(batch.input_ids_BT, batch.labels_BT, batch.position_ids_BT)) for batch in found)
    return total / sum(batch.tokens for batch in found)


def test_the_best_state_is_kept(tmp_path: Path, tiny_tokenizer: Path) -> None:
    """Random documents can't be generalised from, so learning them by heart makes held-out ones worse."""
    settings = replace(ALL_ROWS, keep="best", validate_every=2)
    result = run(tmp_path, tiny_tokenizer, settings, validation=batches(1, 1))
    measured = {entry["step"]: entry["validation_loss"] for entry in result.loop.log if "validation_loss" in entry}
    assert result.loop.kept_step == min(measured, key=lambda step: measured[step]) < result.loop.steps
    assert held_out_loss(tmp_path / "run" / "out") == pytest.approx(measured[result.loop.kept_step], rel=1e-5)


@pytest.mark.parametrize("killed_at", [3, 11])
def test_a_killed_stage_keeps_the_same_best(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """Killed at a step past the last checkpoint, before and after the best state."""
    settings = replace(ALL_ROWS, keep="best", validate_every=1)
    whole = run(tmp_path, tiny_tokenizer, settings, "whole", validation=batches(1, 1)).loop
    cut_power(monkeypatch, killed_at)
    often = replace(settings, checkpoint_seconds=1e-9, keep_checkpoints=100)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, tiny_tokenizer, often, "broken", validation=batches(1, 1))
    monkeypatch.undo()
    newest = tmp_path / "broken" / f"checkpoint-{killed_at - 1}"
    newest.rename(newest.with_name("lost"))
    resumed = run(tmp_path, tiny_tokenizer, settings, "broken", validation=batches(1, 1)).loop
    assert 3 <= resumed.kept_step == whole.kept_step < 11
    assert [entry["validation_loss"] for entry in resumed.log] == [entry["validation_loss"] for entry in whole.log]
    assert same_bits(tmp_path, "whole", "broken")


def test_damaged_best_parameters_are_named(tmp_path: Path, tiny_tokenizer: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.safetensors").write_bytes(b"cut")
    with pytest.raises(TrainingError, match=r"best\.safetensors: .* damaged .*; delete .* the stage starts anew"):
        run(tmp_path, tiny_tokenizer, replace(ALL_ROWS, keep="best"), validation=batches(1, 1))


def test_held_out_text_of_which_nothing_is_learnt_is_named(tmp_path: Path, tiny_tokenizer: Path) -> None:
    silent = [Encoded(np.arange(300, 330, dtype=np.int32), np.zeros(30, bool), "chat#1")]
    held_out = Batches({"a": silent}, {"a": 1.0}, sequence_length=64, rows_per_step=4, pad=0, bos=2, seed=0, epochs=1)
    with pytest.raises(TrainingError, match="stage rows: nothing in its held-out documents is learnt"):
        run(tmp_path, tiny_tokenizer, replace(ALL_ROWS, name="rows", validate_every=1), validation=held_out)


def test_a_resumed_stage_keeps_its_micro_batch_and_says_so(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, four = (replace(ALL_ROWS, micro_batch=rows, checkpoint_seconds=1e-9) for rows in (1, 4))
    run(tmp_path, tiny_tokenizer, one, "whole")
    cut_power(monkeypatch, 5)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, tiny_tokenizer, one, "broken")
    monkeypatch.undo()
    capsys.readouterr()
    run(tmp_path, tiny_tokenizer, four, "broken")
    assert "going on with 1 row(s) at a time, as this stage did" in capsys.readouterr().out
    assert same_bits(tmp_path, "whole", "broken")


# ------------------------------------------------------------------------------------------------------ in a recipe


def test_a_recipe_that_keeps_the_best_shows_it(tmp_path: Path, tiny_gemma: Path) -> None:
    path = tiny.write_recipe(tmp_path, tiny_gemma)
    changes = ["stages.lora.keep=best", "stages.lora.learning_rate=0.1", "stages.rows.validate_every=0.5"]
    found = lingraft.run(path, tmp_path / "run", changes)
    steps = sorted(found.run.glob("*-stage-*"))
    manifests = [json.loads((step / "manifest.json").read_text())["results"] for step in steps]
    logs = [[json.loads(line) for line in (step / "log.jsonl").read_text().splitlines()] for step in steps]
    for step, results, log in zip(steps, manifests, logs, strict=True):
        assert results["validation"] == [[e["step"], e["validation_loss"]] for e in log if "validation_loss" in e]
        assert (
            scalars(found.run / "tensorboard" / step.name, "validation_loss").keys()
            == dict(results["validation"]).keys()
        )
        assert results["spikes"] == len(results["first_spikes"]) == sum("spike" in entry for entry in log)
    rows, lora = manifests
    assert rows["kept_step"] == rows["steps"] == rows["validation"][-1][0]
    assert (len(rows["validation"]), len(lora["validation"])) == (2, 4)
    assert lora["kept_step"] == min(lora["validation"], key=lambda pair: pair[1])[0]
    assert not (found.model / "log.jsonl").exists()
    page = found.report.read_text(encoding="utf-8")
    assert f"best, after step {lora['kept_step']}" in page


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"keep": "best"}, "stages[0].keep: best needs held-out documents of the stage's own data; set held_out"),
        ({"validate_every": 10}, "stages[0].validate_every needs held-out documents"),
        (
            {"validate_every": 1.5},
            "training.validate_every: 1.5 is neither a whole number of steps nor a share below 1",
        ),
        ({"validate_every": 0}, "training.validate_every: should be greater than 0"),
    ],
)
def test_recipe_faults(tmp_path: Path, tiny_gemma: Path, change: dict, fault: str) -> None:
    corpus_path = tiny.write_recipe(tmp_path, tiny_gemma)
    overrides = ["corpus.held_out=0", *(f"training.{key}={value}" for key, value in change.items())]
    with pytest.raises(RecipeError) as error:
        lingraft.plan(corpus_path, tmp_path / "run", overrides)
    assert fault in str(error.value)


# ------------------------------------------------------------------------------------------------------- on a terminal


def test_a_resumed_bar_counts_its_own_rate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0.0, 0.0, 10.0, 10.0, 10.0])
    monkeypatch.setattr("lingraft.progress.time.monotonic", lambda: next(seconds, 10.0))
    with bar("rows", 1000, "tokens", done=500) as tick:
        tick(100, loss=2.5, step="6/10")
    assert capsys.readouterr().out == "  rows   60 %  0:00:40 left  loss 2.500  step 6/10  10 tokens/s\n"
