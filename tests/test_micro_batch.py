"""How many rows go through the model at a time: by memory, remembered, and smaller where a step does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_invariance import BASE, KINDS, STEPS, documents, series

from lingraft.errors import TrainingError
from lingraft.model.load import load
from lingraft.training import micro_batch
from lingraft.training.batches import Batches
from lingraft.training.loss import NextTokenLoss
from lingraft.training.micro_batch import choose_micro_batch
from lingraft.training.parallel import Parallel

SETTINGS = replace(BASE, micro_batch=None, rows_per_step=32)


def some_batches() -> Batches:
    return Batches({"a": documents()}, {"a": 1.0}, sequence_length=64, rows_per_step=32, pad=0, bos=2, seed=0, epochs=1)


@pytest.fixture
def loss(tmp_path: Path, tiny_tokenizer: Path) -> NextTokenLoss:
    model = load(tiny.write_checkpoint(tmp_path / "model", tiny_tokenizer, tied=False))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return NextTokenLoss(model)


def choose(loss: NextTokenLoss) -> int:
    return choose_micro_batch(loss, some_batches(), SETTINGS, Parallel())


def test_all_rows_where_memory_is_plenty_fewer_where_it_is_not(
    loss: NextTokenLoss, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = sum(p.numel() for p in loss.parameters())
    monkeypatch.setattr(micro_batch, "_free_bytes", lambda device: 10**12)
    assert choose(loss) == 32
    first = some_batches().step(0, 1)[0]
    row = micro_batch._row_bytes(loss, first, torch.device("cpu")) * 64 / first.input_ids_BT.numel()
    free = trained * micro_batch.STATE_BYTES["adamw"] + 5.5 * row / micro_batch.USABLE
    monkeypatch.setattr(micro_batch, "_free_bytes", lambda device: free)
    assert choose(loss) == 5
    monkeypatch.setattr(micro_batch, "_free_bytes", lambda device: 0)
    assert choose(loss) == 1, "one row is always tried"


def test_never_more_tokens_than_make_a_device_faster(loss: NextTokenLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "_free_bytes", lambda device: 10**12)
    monkeypatch.setattr(micro_batch, "ENOUGH_TOKENS", 64 * 3)
    assert choose(loss) == 3


def test_the_trial_leaves_no_gradient(loss: NextTokenLoss) -> None:
    choose(loss)
    assert all(p.grad is None for p in loss.parameters())


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
    with pytest.raises(TrainingError, match=r"stage test, step 1: out of memory with 1 rows of 64 tokens.*micro_batch"):
        series(source, tmp_path / "work", replace(BASE, **KINDS["new rows"], micro_batch=1))
