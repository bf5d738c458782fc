"""How many rows go through the model at a time: by memory, remembered, and smaller where a step does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_invariance import BASE, KINDS, STEPS, documents, series

from lingraft.atomic import write_text
from lingraft.errors import TrainingError
from lingraft.training import micro_batch
from lingraft.training.batches import Batches
from lingraft.training.loss import NextTokenLoss
from lingraft.training.micro_batch import choose_micro_batch, micro_batch_for
from lingraft.training.parallel import Parallel
from lingraft.training.settings import LoraSettings, StageSettings

LORA = LoraSettings(r=4, alpha=8, targets=("q_proj", "up_proj"))
SETTINGS = replace(BASE, micro_batch=None, rows_per_step=32)


def some_batches() -> Batches:
    return Batches({"a": documents()}, {"a": 1.0}, sequence_length=64, rows_per_step=32, pad=0, bos=2, seed=0, epochs=1)


def choose(needed: Callable[[int], float]) -> int:
    return choose_micro_batch(needed, some_batches(), SETTINGS, Parallel())


def test_all_rows_where_memory_is_plenty_fewer_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: 1000.0)
    assert choose(lambda rows: 500 + rows) == 32
    assert choose(lambda rows: 500 + 50 * rows) == 6, "80 % of the memory may be used"
    assert choose(lambda rows: 10_000.0) == 1, "one row is always tried"


def test_never_more_tokens_than_make_a_device_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "ENOUGH_TOKENS", 64 * 3)
    assert choose(lambda rows: 0.0) == 3


def test_what_was_chosen_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(settings: StageSettings = SETTINGS) -> int:
        return micro_batch_for(tmp_path, lambda rows: 100.0 * rows, some_batches(), settings, Parallel())

    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: 1000.0)
    assert found() == 8
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: 200.0)
    assert found() == 8, "a resumed stage rounds as it began"
    assert found(replace(SETTINGS, micro_batch=3)) == 3


def test_a_steps_rows_go_round_all_processes(tmp_path: Path) -> None:
    class Eight(Parallel):
        def most(self, *numbers: float) -> list[float]:
            return list(numbers)

    eight = Eight()
    eight.size = 8
    asked = replace(SETTINGS, micro_batch=16)
    assert micro_batch_for(tmp_path, lambda rows: 0.0, some_batches(), asked, eight) == 4
    write_text(tmp_path / "micro-batch.txt", "16\n")  # begun by fewer processes
    assert micro_batch_for(tmp_path, lambda rows: 0.0, some_batches(), SETTINGS, eight) == 4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "trains", [{"layers": "all"}, {"input_rows": "new"}, {"output_rows": "all"}, {"layers": "lora", "lora": LORA}]
)
def test_auto_in_bfloat16_trains_whatever_trains(
    tmp_path: Path, tiny_tokenizer: Path, trains: dict[str, Any], checkpointing: bool
) -> None:
    source = tiny.write_checkpoint(tmp_path / "model", tiny_tokenizer, tied=False)
    settings = replace(BASE, **trains, micro_batch=None, precision="bf16", gradient_checkpointing=checkpointing)
    found = series(source, tmp_path / "auto", settings)
    assert len(found) == STEPS
    assert found[-1] < found[0]


def test_a_step_that_does_not_fit_goes_on_with_smaller_ones(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Out of memory with more than one row: halved until it fits, and the losses are those of one row at a time."""
    source = tiny.write_checkpoint(tmp_path / "model", tiny_tokenizer, tied=False)
    settings = replace(BASE, **KINDS["all rows"])
    expected = series(source, tmp_path / "one", replace(settings, micro_batch=1))
    true_forward = NextTokenLoss.forward

    def scarce(self: NextTokenLoss, ids_BT: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        loss = true_forward(self, ids_BT, *rest, **named)  # gradients of whole matrices are made by now
        if len(ids_BT) > 1:
            raise torch.OutOfMemoryError("no room")
        return loss

    monkeypatch.setattr(NextTokenLoss, "forward", scarce)
    found = series(source, tmp_path / "halved", replace(settings, micro_batch=4))
    assert len(found) == STEPS
    assert found == expected
    assert capsys.readouterr().out.count("out of memory: going on with") == 2  # 4 → 2 → 1


def test_a_single_row_that_does_not_fit_is_one_clear_line(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.write_checkpoint(tmp_path / "model", tiny_tokenizer, tied=False)

    def none_fits(*arguments: Any, **named: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(NextTokenLoss, "forward", none_fits)
    with pytest.raises(
        TrainingError,
        match=r"step 1: out of memory with 1 row\(s\) of 64 tokens at a time; set gradient_checkpointing: true",
    ):
        series(source, tmp_path / "work", replace(BASE, **KINDS["new rows"], micro_batch=1))
