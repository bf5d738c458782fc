"""The training engine: what changes, what must not, packing, mixture, and resuming bit for bit."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from lingraft.errors import TrainingError
from lingraft.model.load import input_matrix, is_tied, load, load_tokenizer, output_matrix, read_config
from lingraft.training.batches import IGNORED, Batches, to_micro_batch
from lingraft.training.loop import learning_rate_factor
from lingraft.training.loss import NextTokenLoss
from lingraft.training.settings import LoraSettings
from lingraft.training.stage import run_stage
from lingraft.training.tokens import Encoded

NEW_IDS = [400, 401, 402, 450]
SETTINGS = tiny.STAGE_SETTINGS
LORA = LoraSettings(r=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"))
# What each of the seven EEVE stages trains, and the tensors that may differ afterwards (untied).
IN_NEW, IN_OLD = "embed_tokens.weight[new rows]", "embed_tokens.weight[old rows]"
OUT_NEW, OUT_OLD = "lm_head.weight[new rows]", "lm_head.weight[old rows]"
PROJECTIONS = ("q_proj.weight", "v_proj.weight", "down_proj.weight")
SEVEN = {
    "1": ({"input_rows": "new"}, {IN_NEW}),
    "2": ({"output_rows": "new"}, {OUT_NEW}),
    "3": ({"input_rows": "new", "output_rows": "new"}, {IN_NEW, OUT_NEW}),
    "4": ({"output_rows": "all"}, {OUT_NEW, OUT_OLD}),
    "5": ({"input_rows": "new", "output_rows": "all"}, {IN_NEW, OUT_NEW, OUT_OLD}),
    "6": (
        {"input_rows": "all", "output_rows": "all", "layers": "lora", "lora": LORA},
        {IN_NEW, IN_OLD, OUT_NEW, OUT_OLD, *PROJECTIONS},
    ),
    "7": ({"layers": "lora", "lora": LORA}, set(PROJECTIONS)),
}


def documents(count: int = 24, length: int = 30) -> list[Encoded]:
    """Random documents over ordinary and new ids."""
    choices = np.random.default_rng(0).integers(260, 460, size=(count, length)).astype(np.int32)
    learnt = np.ones(length, bool)
    learnt[0] = False
    return [Encoded(ids, learnt, f"d#{i}") for i, ids in enumerate(choices)]


def batches(**changes: object) -> Batches:
    settings = {
        "sequence_length": 64,
        "rows_per_step": 4,
        "pad": 0,
        "bos": 2,
        "seed": 0,
        "epochs": 2,
    } | changes
    return Batches({"a": documents()}, {"a": 1.0}, **settings)  # type: ignore[arg-type]


def checkpoint(folder: Path, tokenizer: Path, family: str, tied: bool) -> Path:
    return tiny.write_checkpoint(folder / f"{family}-{tied}", tokenizer, family, tied)


def changed_parts(before: Path, after: Path) -> set[str]:
    """Names of tensors that differ between two checkpoints' files, vocabulary matrices by old and new rows.

    Read from the files themselves, independently of the product's own proof.
    """
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert old.keys() == new.keys()
    found = set()
    for name, tensor in old.items():
        if tensor.shape[0] == tiny.VOCABULARY:
            rows = torch.zeros(tiny.VOCABULARY, dtype=torch.bool)
            rows[NEW_IDS] = True
            for label, chosen in (("new rows", rows), ("old rows", ~rows)):
                if not torch.equal(tensor[chosen], new[name][chosen]):
                    found.add(f"{name}[{label}]")
        elif not torch.equal(tensor, new[name]):
            found.add(name)
    return found


@pytest.mark.parametrize("family", ["gemma3", "llama"])
@pytest.mark.parametrize("stage", SEVEN)
def test_untied_stage_changes_exactly_what_it_should(
    tmp_path: Path, tiny_tokenizer: Path, family: str, stage: str
) -> None:
    source = checkpoint(tmp_path, tiny_tokenizer, family, tied=False)
    changes, expected = SEVEN[stage]
    run_stage(source, tmp_path / "out", tmp_path, replace(SETTINGS, **changes), batches(), NEW_IDS)
    found = changed_parts(source, tmp_path / "out")
    assert {ending for ending in expected if any(name.endswith(ending) for name in found)} == expected
    assert all(any(name.endswith(ending) for ending in expected) for name in found), found
    assert not is_tied(read_config(tmp_path / "out"))


@pytest.mark.parametrize("family", ["gemma3", "llama", "gemma3-multimodal"])
@pytest.mark.parametrize("stage", ["3", "4", "6", "7"])
def test_tied_stage_changes_exactly_what_it_should(
    tmp_path: Path, tiny_tokenizer: Path, family: str, stage: str
) -> None:
    source = checkpoint(tmp_path, tiny_tokenizer, family, tied=True)
    changes, expected = SEVEN[stage]
    tied_expected = {name.replace("lm_head", "embed_tokens") for name in expected}
    run_stage(source, tmp_path / "out", tmp_path, replace(SETTINGS, **changes), batches(), NEW_IDS)
    found = changed_parts(source, tmp_path / "out")
    assert {ending for ending in tied_expected if any(name.endswith(ending) for name in found)} == tied_expected
    assert all(any(name.endswith(ending) for ending in tied_expected) for name in found), found
    model = load(tmp_path / "out")
    assert output_matrix(model) is input_matrix(model)


def test_bf16_training_of_fp32_weights_leaves_frozen_ones_exact(tmp_path: Path, tiny_tokenizer: Path) -> None:
    source = checkpoint(tmp_path, tiny_tokenizer, "gemma3", tied=False)
    settings = replace(SETTINGS, input_rows="new", precision="bf16")
    run_stage(source, tmp_path / "out", tmp_path, settings, batches(), NEW_IDS)
    assert {name.rpartition(".embed")[2] for name in changed_parts(source, tmp_path / "out")} == {
        "_tokens.weight[new rows]"
    }


def test_training_lowers_the_loss(tmp_path: Path, tiny_tokenizer: Path) -> None:
    source = checkpoint(tmp_path, tiny_tokenizer, "gemma3", tied=True)
    settings = replace(SETTINGS, input_rows="all", output_rows="all", layers="all")
    result = run_stage(source, tmp_path / "out", tmp_path, settings, batches(epochs=8), NEW_IDS)
    assert result.loop.log[-1]["loss"] < result.loop.log[0]["loss"] - 0.5


def test_loss_is_the_same_packed_padded_and_split(tmp_path: Path, tiny_tokenizer: Path) -> None:
    loss = NextTokenLoss(load(checkpoint(tmp_path, tiny_tokenizer, "gemma3", tied=True)))

    def total(rows: list[list[Encoded]]) -> float:
        batch = to_micro_batch(rows, pad=0)
        return loss(batch.input_ids_BT, batch.labels_BT, batch.position_ids_BT).item()

    one, two, three = documents(3, 20)
    short = Encoded(three.ids[:9], three.learnt[:9], "short")
    expected = total([[one]]) + total([[two]]) + total([[short]])
    assert total([[one, two, short]]) == pytest.approx(expected, rel=1e-5)
    assert total([[one, two], [short]]) == pytest.approx(expected, rel=1e-5)


def test_loss_equals_transformers_own(tmp_path: Path, tiny_tokenizer: Path) -> None:
    model = load(checkpoint(tmp_path, tiny_tokenizer, "llama", tied=False))
    batch = to_micro_batch([[documents(1, 40)[0]]], pad=0)
    labels = torch.where(torch.arange(40) > 0, batch.input_ids_BT, IGNORED)
    theirs = model(input_ids=batch.input_ids_BT, labels=labels).loss * 39
    ours = NextTokenLoss(model)(batch.input_ids_BT, batch.labels_BT, batch.position_ids_BT)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_learning_rate_warms_up_then_falls() -> None:
    factors = [learning_rate_factor(step, 100, 0.1, "cosine") for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors[99] < 0.01
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert learning_rate_factor(55, 100, 0.1, "linear") == pytest.approx(0.5)
    assert learning_rate_factor(55, 100, 0.1, "constant") == 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {"input_rows": "new"},
        {"input_rows": "all", "output_rows": "all", "layers": "lora", "lora": replace(LORA, dropout=0.1)},
        {"layers": "all", "gradient_checkpointing": True},
        {"output_rows": "all", "layers": "lora", "lora": LORA, "quantise": "nf4", "optimizer": "adamw_8bit"},
    ],
    ids=["rows", "lora with dropout", "layers", "qlora with 8-bit states"],
)
def test_interrupted_stage_resumes_to_the_same_bits(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    if "quantise" in changes:
        pytest.importorskip("bitsandbytes")
    source = checkpoint(tmp_path, tiny_tokenizer, "gemma3", tied=False)
    settings = replace(SETTINGS, **changes)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run_stage(source, whole / "out", whole, settings, batches(), NEW_IDS)

    true_step = Batches.step

    def failing(self: Batches, number: int, micro_batch: int = 1):  # type: ignore[no-untyped-def]
        if number == 3:
            raise RuntimeError("power cut")
        return true_step(self, number, micro_batch)

    monkeypatch.setattr(Batches, "step", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        run_stage(source, broken / "out", broken, replace(settings, checkpoint_seconds=1e-9), batches(), NEW_IDS)
    monkeypatch.setattr(Batches, "step", true_step)
    assert (broken / "checkpoint-3").is_dir()
    result = run_stage(source, broken / "out", broken, settings, batches(), NEW_IDS)
    assert changed_parts(whole / "out", broken / "out") == set()
    assert len(result.loop.log) == result.loop.steps


def test_damaged_newest_checkpoint_falls_back(
    tmp_path: Path, tiny_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path, tiny_tokenizer, "gemma3", tied=False)
    settings = replace(SETTINGS, input_rows="new", checkpoint_seconds=1e-9)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run_stage(source, whole / "out", whole, settings, batches(), NEW_IDS)
    run_stage(source, broken / "out", broken, settings, batches(), NEW_IDS)
    newest = max(broken.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    (newest / "state.safetensors").write_bytes(b"cut short")
    run_stage(source, broken / "again", broken, settings, batches(), NEW_IDS)
    assert "damaged" in capsys.readouterr().out
    assert changed_parts(whole / "out", broken / "again") == set()


def test_loss_that_is_not_finite_stops_with_step_and_documents(tmp_path: Path, tiny_tokenizer: Path) -> None:
    source = checkpoint(tmp_path, tiny_tokenizer, "gemma3", tied=False)
    model = load(source)
    with torch.no_grad():
        input_matrix(model)[300] = math.nan
    model.save_pretrained(source)
    with pytest.raises(TrainingError, match=r"stage test, step \d: the loss is nan.* read d#\d+, .*learning_rate"):
        run_stage(source, tmp_path / "out", tmp_path, replace(SETTINGS, input_rows="new"), batches(), NEW_IDS)


def test_final_folder_loads_with_plain_transformers(tmp_path: Path, tiny_tokenizer: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = checkpoint(tmp_path, tiny_tokenizer, "gemma3", tied=False)
    run_stage(source, tmp_path / "out", tmp_path, replace(SETTINGS, input_rows="new"), batches(), NEW_IDS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    encoded = tokenizer("Pneumonia is", return_tensors="pt")
    assert model.generate(**encoded, max_new_tokens=3, do_sample=False).shape[1] > encoded["input_ids"].shape[1]
    assert len(load_tokenizer(tmp_path / "out")) <= input_matrix(model).shape[0]


def test_bf16_checkpoint_keeps_its_precision_whatever_trains(tmp_path: Path, tiny_tokenizer: Path) -> None:
    source = checkpoint(tmp_path, tiny_tokenizer, "gemma3", tied=True)
    load(source).bfloat16().save_pretrained(source)
    for precision in ("bf16", "fp32"):
        settings = replace(SETTINGS, precision=precision, input_rows="new", layers="all")
        run_stage(source, tmp_path / precision, tmp_path, replace(settings, name=precision), batches(), NEW_IDS)
        stored = load_file(tmp_path / precision / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        assert changed_parts(source, tmp_path / precision)
        for old in tmp_path.glob("checkpoint-*"):
            shutil.rmtree(old)
