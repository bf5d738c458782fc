"""`lingraft bench` on a tiny shape: whole stages run, every number is there, and each is what its name says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from lingraft import bench, terminal
from lingraft.cli import app
from lingraft.errors import ModelError, RecipeError, TrainingError
from lingraft.model.load import load


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with nothing but a configuration."""
    folder = tmp_path_factory.mktemp("shape")
    tiny.gemma3().config.save_pretrained(folder)
    return str(folder)


def run(shape: str, **options: Any) -> dict[str, Any]:
    given = {"stage": "1", "dtype": "fp32", "tokens": 64, "steps": 2, "new_rows": 100, **options}
    return bench.bench(shape, **given)[0]


def test_a_stage_from_the_command_line(shape: str) -> None:
    arguments = ["bench", "--shape", shape, "--stage", "2", "--dtype", "bf16", "--tokens", "64", "--steps", "2"]
    result = CliRunner().invoke(app, [*arguments, "--new-rows", "100", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["stage"], found["name"], found["dtype"]) == (2, "new-output-rows", "bf16")
    assert found["tokens_per_second"] == pytest.approx(64 / found["seconds_per_step"])
    assert found["matmul_utilisation"] == pytest.approx(
        found["gflops_per_token"] * found["tokens_per_second"] / found["matmul_gflops_per_second"]
    )
    # 2 matrices of 640 rows × 32; in each of 2 layers 4 norms of 32 and 2 of 16, and the projections; a last norm
    layer = 4 * 32 + 2 * 16 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    assert found["weights_gb"] == pytest.approx(2 * (2 * 640 * 32 + 2 * layer + 32) / 1e9)
    assert found["peak_memory_gb"] > 0
    shown = terminal.bench([found])
    assert "2 new-output-rows" in shown
    assert f"{found['tokens_per_second']:,.1f}" in shown


def test_rows_and_their_micro_batches(tmp_path: Path) -> None:
    bench.write_random(bench.text_model(tiny.gemma3().config), tmp_path / "model", torch.float32)
    stage = bench.eeve_stage(5, {"precision": "fp32", "sequence_length": 64, "micro_batch": 2})
    setup = bench.Setup(stage, 5, row_tokens=64, rows=3, steps=2, new_rows=100)
    found = bench.measure(setup, tmp_path / "model", tmp_path)
    assert (found["tokens_per_step"], found["rows_at_a_time"]) == (3 * 64, 2)
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert sum(found["seconds"].values()) == pytest.approx(found["seconds_per_step"], rel=0.5)


def test_random_checkpoints_are_whole_and_untied(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SHARD_BYTES", 50_000)
    config = bench.text_model(tiny.gemma3_multimodal().config)
    bench.write_random(config, tmp_path / "model", torch.bfloat16)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    model = load(tmp_path / "model")
    assert type(model).__name__ == "Gemma3ForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    heads = [
        tensors["lm_head.weight"]
        for file in (tmp_path / "model").glob("*.safetensors")
        if "lm_head.weight" in (tensors := load_file(file))
    ]
    assert not torch.equal(heads[0], model.get_input_embeddings().weight)


def test_synthetic_tokens_are_new_ones_in_part(shape: str) -> None:
    setup = bench.Setup(bench.eeve_stage(1, {}), 1, row_tokens=500, rows=2, steps=3, new_rows=100)
    batches = bench.synthetic_batches(setup, 1000)
    assert len(batches) == 4  # one to warm up
    ids = torch.cat([m.input_ids_BT.flatten() for step in range(4) for m in batches.step(step)])
    assert ids.min() >= 0
    assert ids.max() == 999
    # 30 % of them, and those of the others that fall on the last tenth: 1 - ln 900 / ln 1000
    assert (ids >= 900).float().mean() == pytest.approx(0.3 + 0.7 * 0.0153, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": "gemma-3-270"}, "no shape is called 'gemma-3-270'; did you mean 'gemma-3-270m'?"),
        ({"stage": "8"}, "no stage '8'; give 1 to 7, or one of new-input-rows"),
        ({"new_rows": 640}, "--new-rows: the shape has 640 rows"),
    ],
)
def test_what_cannot_be_run(shape: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ModelError, RecipeError)) as error:
        run(**{"shape": shape, **changes})
    assert message in str(error.value)


class Killed:
    """A setup that ends the process which reads it."""

    stage = bench.eeve_stage(1, {})

    def __reduce__(self) -> Any:
        return os._exit, (9,)


def test_what_goes_wrong_in_the_stages_process_is_one_line(tmp_path: Path) -> None:
    setup = bench.Setup(Killed.stage, 1, row_tokens=8, rows=1, steps=1, new_rows=10)
    with pytest.raises(ModelError, match="no such model folder"):
        bench.in_own_process(setup, tmp_path / "nowhere", tmp_path)
    with pytest.raises(TrainingError, match="stage new-input-rows: its process ended without a result"):
        bench.in_own_process(Killed(), tmp_path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["gemma-3-270m", "qwen3-0.6b", "llama-3.2-1b"])
@pytest.mark.parametrize("stage", ["1", "2", "4", "7"])
def test_memory_is_predicted(shape: str, stage: str) -> None:
    found = bench.bench(shape, stage=stage, tokens=256, steps=1)[0]
    assert found["peak_memory_gb"] == pytest.approx(found["predicted_memory_gb"], rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("6", {"gradient_checkpointing": True}),
        ("6", {"gradient_checkpointing": True, "optimizer": "adamw_8bit"}),
        ("4", {"optimizer": "adamw_8bit"}),
        ("1", {"gradient_checkpointing": True, "quantise": "nf4"}),
    ],
)
def test_memory_of_what_plan_proposes_is_predicted(stage: str, settings: dict[str, Any]) -> None:
    found = bench.bench("gemma-3-270m", stage=stage, steps=1, settings=settings)[0]
    assert found["peak_memory_gb"] == pytest.approx(found["predicted_memory_gb"], rel=0.15)
