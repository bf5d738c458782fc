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
from lingraft.training import loop
from lingraft.training.batches import IGNORED, Batches, Encoded, cut, mixture, pack, to_micro_batch
from lingraft.training.loop import learning_rate_factor
from lingraft.training.loss import NextTokenLoss
from lingraft.training.settings import LoraSettings
from lingraft.training.stage import run_stage

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
        "batch_size": 2,
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


def test_the_products_own_proof_catches_a_drifting_row(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path, tiny_tokenizer, "gemma3", tied=False)
    true_train = loop.train

    def drifting(loss_model, *arguments, **named):  # type: ignore[no-untyped-def]
        result = true_train(loss_model, *arguments, **named)
        with torch.no_grad():
            next(loss_model.model.get_decoder().layers[0].mlp.parameters()).add_(1e-6)
        return result

    monkeypatch.setattr("lingraft.training.stage.train", drifting)
    with pytest.raises(AssertionError, match="frozen tensors"):
        run_stage(source, tmp_path / "out", tmp_path, replace(SETTINGS, input_rows="new"), batches(), NEW_IDS)


def test_lora_over_4_bits_merges_into_the_full_weights(tmp_path: Path, tiny_tokenizer: Path) -> None:
    pytest.importorskip("bitsandbytes")
    source = checkpoint(tmp_path, tiny_tokenizer, "gemma3", tied=False)
    settings = replace(SETTINGS, layers="lora", lora=replace(LORA, quantise="nf4"))
    run_stage(source, tmp_path / "out", tmp_path, settings, batches(), NEW_IDS)
    found = changed_parts(source, tmp_path / "out")
    assert found
    assert all(name.endswith(PROJECTIONS) for name in found)


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


@pytest.mark.parametrize("family", ["gemma3", "gemma3-multimodal", "llama"])
def test_packed_documents_do_not_see_each_other(tmp_path: Path, tiny_tokenizer: Path, family: str) -> None:
    model = load(checkpoint(tmp_path, tiny_tokenizer, family, tied=True))
    one, two = documents(2, 20)
    packed = to_micro_batch([[one, two]], pad=0)
    alone = to_micro_batch([[two]], pad=0)
    together = model.base_model(
        input_ids=packed.input_ids_BT, position_ids=packed.position_ids_BT, use_cache=False
    ).last_hidden_state
    by_itself = model.base_model(
        input_ids=alone.input_ids_BT, position_ids=alone.position_ids_BT, use_cache=False
    ).last_hidden_state
    assert torch.allclose(together[:, 20:], by_itself, atol=2e-6)


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


def test_prompts_are_not_learnt() -> None:
    learnt = np.array([False, False, False, True, True])
    batch = to_micro_batch([[Encoded(np.array([2, 5, 6, 7, 8], np.int32), learnt, "chat")]], pad=0)
    assert batch.labels_BT.tolist() == [[IGNORED, IGNORED, 7, 8, IGNORED]]


def test_mixture_follows_the_shares_everywhere() -> None:
    def group(name: str, count: int) -> list[Encoded]:
        return [Encoded(np.zeros(10, np.int32), np.ones(10, bool), f"{name}#{i}") for i in range(count)]

    order = mixture({"ko": group("ko", 50), "en": group("en", 500)}, {"ko": 0.9, "en": 0.1}, 10_000, seed=0)
    assert sum(map(len, order)) == pytest.approx(10_000, rel=0.01)
    for start in range(0, 1000, 100):
        stretch = order[start : start + 100]
        assert sum(d.origin.startswith("ko") for d in stretch) == pytest.approx(90, abs=2)
    korean_first_epoch = [d.origin for d in order if d.origin.startswith("ko")][:50]
    assert len(set(korean_first_epoch)) == 50, "an epoch reads every document once"


def test_packing_keeps_every_document_whole() -> None:
    pieces = [Encoded(np.full(n, n, np.int32), np.ones(n, bool), str(n)) for n in (30, 40, 10, 64, 20, 5, 60)]
    rows = pack(pieces, 64)
    assert all(sum(map(len, row)) <= 64 for row in rows)
    assert sorted(p.origin for row in rows for p in row) == sorted(p.origin for p in pieces)
    assert [[p.origin for p in row] for row in rows] == [["30", "10", "20"], ["40", "5"], ["64"], ["60"]]


def test_long_documents_are_cut_and_start_with_bos_again() -> None:
    document = Encoded(np.arange(2, 27, dtype=np.int32), np.array([False] + [True] * 24), "long")
    pieces = cut(document, 10, bos=2)
    assert [p.ids.tolist() for p in pieces] == [
        list(range(2, 12)),
        [2, *range(12, 21)],
        [2, *range(21, 27)],
    ]
    assert sum(int(p.learnt.sum()) for p in pieces) == 24


def test_learning_rate_warms_up_then_falls() -> None:
    factors = [learning_rate_factor(step, 100, 0.1, "cosine") for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors[99] < 0.01
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert learning_rate_factor(55, 100, 0.1, "linear") == pytest.approx(0.5)
    assert learning_rate_factor(55, 100, 0.1, "constant") == 1.0


def test_gradient_is_the_mean_over_tokens_however_it_is_split(tmp_path: Path, tiny_tokenizer: Path) -> None:
    source = checkpoint(tmp_path, tiny_tokenizer, "gemma3", tied=False)
    settings = replace(SETTINGS, input_rows="all", output_rows="all", layers="all")
    losses = []
    for number, size in enumerate((1, 2, 4)):
        work = tmp_path / str(number)
        work.mkdir()
        result = run_stage(source, work / "out", work, settings, batches(batch_size=size), NEW_IDS)
        losses.append([entry["loss"] for entry in result.loop.log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"input_rows": "new"},
        {"input_rows": "all", "output_rows": "all", "layers": "lora", "lora": replace(LORA, dropout=0.1)},
        {"layers": "all", "gradient_checkpointing": True},
    ],
    ids=["rows", "lora with dropout", "layers"],
)
def test_interrupted_stage_resumes_to_the_same_bits(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    source = checkpoint(tmp_path, tiny_tokenizer, "gemma3", tied=False)
    settings = replace(SETTINGS, **changes)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run_stage(source, whole / "out", whole, settings, batches(), NEW_IDS)

    true_step = Batches.step

    def failing(self: Batches, number: int):  # type: ignore[no-untyped-def]
        if number == 3:
            raise RuntimeError("power cut")
        return true_step(self, number)

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


def test_exploding_loss_stops() -> None:
    watch = loop.LossWatch([2.0] * 30, "rows")
    step = batches().step(0)
    watch.check(30, 3.9, 1.0, step)
    with pytest.raises(
        TrainingError, match=r"stage rows, step 32: the loss jumped from about 2\.\d+ to 9\.00.*read d#"
    ):
        watch.check(31, 9.0, 1.0, step)


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


def test_every_stretch_of_a_stage_has_the_mixture() -> None:
    def group(name: str, count: int) -> list[Encoded]:
        return [Encoded(np.zeros(20, np.int32), np.ones(20, bool), name) for _ in range(count)]

    laid_out = Batches(
        {"ko": group("ko", 90), "en": group("en", 90)},
        {"ko": 0.75, "en": 0.25},
        sequence_length=100,
        batch_size=2,
        rows_per_step=8,
        pad=0,
        bos=2,
        seed=0,
        budget_tokens=16_000,
    )
    assert len(laid_out) == 20
    for step in range(20):
        origins = [origin for batch in laid_out.step(step) for origin in batch.origins]
        assert origins.count("ko") / len(origins) == pytest.approx(0.75, abs=0.06)


def test_padding_is_not_counted_as_tokens() -> None:
    one, two = documents(2, 30)
    batch = to_micro_batch([[one, two], [Encoded(two.ids[:7], two.learnt[:7], "short")]], pad=0)
    assert batch.input_ids_BT.shape == (2, 60)
    assert batch.size == 67
