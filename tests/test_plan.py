"""`lingraft plan`: the numbers it gives, counted by hand, against autograd and against what is published."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

import lingraft
from lingraft import terminal
from lingraft.cli import app
from lingraft.errors import GateFailed, ModelError
from lingraft.families.shapes import SHAPES, shape_of_hub_name
from lingraft.model.dimensions import Dimensions, Linear, dimensions, named_config
from lingraft.model.lora import add_lora
from lingraft.training.fit import Job
from lingraft.training.flops import flops_per_token, seconds_per_token
from lingraft.training.memory import Memory, stage_memory, trained_values
from lingraft.training.settings import LoraSettings, StageSettings

# As their publishers and Keras's presets give them, a tied matrix counted once.
PUBLISHED = {
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472,
    "gemma-3-12b": 12_187_325_040,
    "gemma-3-27b": 27_432_406_640,
    "medgemma-4b": 4_300_079_472,
    "medgemma-27b": 27_432_406_640,
    "medgemma-27b-text": 27_009_002_240,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
}

# A decoder small enough to count by hand: one layer of one matrix, 10 × 10, and two matrices of 100 rows.
SMALL = Dimensions(
    rows=100,
    width=10,
    tied=False,
    body=120,
    other=1000,
    linears=(Linear("up_proj", 10, 10),),
    heads=2,
    kv_heads=1,
    head_width=5,
    hidden=10,
    normed=20,
    windows=(None,),
)
NEW = 7


def stage(**changes: Any) -> StageSettings:
    return replace(tiny.STAGE_SETTINGS, **{"gradient_checkpointing": True, "rows_per_step": 4, **changes})


def memory(settings: StageSettings, dims: Dimensions = SMALL, length: int = 8, rows: int = 1, **where: Any) -> Memory:
    return stage_memory(dims, settings, NEW, length, rows, **{"stored_bytes": 4, "device": "cuda", **where})


@pytest.fixture(scope="module")
def medgemma() -> Dimensions:
    return dimensions(named_config("medgemma-4b"), tied=False)


def test_shapes_have_the_published_numbers_of_parameters() -> None:
    found = {name: dimensions(named_config(name), tied=SHAPES[name]["tie_word_embeddings"]) for name in SHAPES}
    assert {name: dims.parameters for name, dims in found.items()} == PUBLISHED


def test_hub_names_have_shapes() -> None:
    names = {
        "google/medgemma-4b-it": "medgemma-4b",
        "google/medgemma-1.5-4b-it": "medgemma-4b",
        "google/medgemma-27b-text-it": "medgemma-27b-text",
        "google/gemma-3-270m": "gemma-3-270m",
        "meta-llama/Llama-3.2-1B-Instruct": "llama-3.2-1b",
        "Qwen/Qwen3-0.6B-Base": "qwen3-0.6b",
        "nobody/no-such-model": None,
    }
    assert {name: shape_of_hub_name(name) for name in names} == names


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_dimensions_count_every_parameter(family: str, tied: bool) -> None:
    model = tiny.FAMILIES[family](tied)
    model.config.architectures = [type(model).__name__]
    dims = dimensions(model.config, tied=tied)
    assert dims.parameters == sum(p.numel() for p in model.parameters())
    assert dims.layers == model.config.get_text_config().num_hidden_layers


# ------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("settings", "weights", "trained"),
    [
        # both matrices of 1,000 and the body of 120 stay; 7 rows of 10 train
        (stage(input_rows="new"), 4 * 2120, 70),
        (stage(output_rows="new", precision="bf16"), 2 * 2120, 70),
        # a matrix that trains whole is not held twice
        (stage(output_rows="all"), 4 * 1120, 1000),
        (stage(input_rows="new", output_rows="all"), 4 * 1120, 1070),
        (stage(input_rows="all", output_rows="all", layers="all"), 0, 2120),
        # 4 bits, and the constants of the one linear layer's 100 values
        (stage(input_rows="new", quantise="nf4"), 4 * 2020 + 100 * (0.5 + 1 / 64 + 1 / 4096), 70),
        # r (inputs + outputs) values
        (stage(layers="lora", lora=LoraSettings(3, 6, targets=("up_proj",))), 4 * 2120, 3 * 20),
    ],
)
def test_what_is_frozen_and_what_trains(settings: StageSettings, weights: float, trained: int) -> None:
    found = memory(settings)
    assert trained_values(SMALL, settings, NEW).total == trained
    assert found.weights == pytest.approx(weights)
    assert found.trained == found.gradients == 4 * trained
    assert found.optimizer == 8 * trained
    eight_bit = memory(replace(settings, optimizer="adamw_8bit"))
    assert eight_bit.optimizer == pytest.approx((2 + 8 / 256) * trained)


def test_tied_rows_count_once() -> None:
    tied = replace(SMALL, tied=True)
    assert trained_values(tied, stage(output_rows="all"), NEW).total == 1000
    assert memory(stage(output_rows="all"), tied).weights == 4 * 120
    assert memory(stage(output_rows="new"), tied).weights == 4 * 1120


def test_frozen_matrices_stay_as_narrow_as_they_are_stored() -> None:
    for settings, weights in ((stage(input_rows="new"), 2 * 2000 + 4 * 120), (stage(output_rows="all"), 2480)):
        assert memory(settings, stored_bytes=2).weights == weights
    narrow = stage(input_rows="new", precision="bf16")
    assert memory(narrow, stored_bytes=4).weights == memory(narrow, stored_bytes=2).weights == 2 * 2120


@pytest.mark.parametrize("family", ["gemma3", "llama", "qwen3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_layers_activations_are_what_autograd_saves(family: str, precision: str, adapters: bool) -> None:
    model = tiny.FAMILIES[family](False).to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision]).train()
    model.config.architectures = [type(model).__name__]
    dims = dimensions(model.config, tied=False)
    settings = stage(input_rows="new", precision=precision, gradient_checkpointing=False)
    model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    if adapters:
        lora = LoraSettings(2, 4, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
        add_lora(model, r=lora.r, alpha=lora.alpha, dropout=0.0, targets=lora.targets)
        settings = replace(settings, layers="lora", lora=lora)
    decoder = model.get_decoder()
    first = decoder.layers[0]

    def saved(layers: int) -> int:
        """Bytes that autograd saves of 32 tokens in a decoder of the first layer, so many times over."""
        decoder.layers = torch.nn.ModuleList([first] * layers)
        weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        storages: dict[int, torch.UntypedStorage] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage
            return tensor

        mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with mixed, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.base_model(torch.arange(32)[None], use_cache=False)
        return sum(storage.nbytes() for storage in storages.values())

    one, two = (memory(settings, replace(dims, windows=(16,) * n, linears=dims.linears[: 7 * n]), 32) for n in (1, 2))
    assert two.activations - one.activations == pytest.approx(saved(2) - saved(1), rel=0.1)


def test_output_rows_alone_keep_no_activations(medgemma: Dimensions) -> None:
    settings = stage(output_rows="new", precision="bf16", gradient_checkpointing=False)
    mask = 2 * 2048**2 * 2
    assert memory(settings, medgemma, 2048).activations == mask
    assert memory(replace(settings, input_rows="new"), medgemma, 2048).activations > 9e9


def test_loss_never_holds_a_batch_of_logits(medgemma: Dimensions) -> None:
    for side, limit in (("input_rows", 0.05), ("output_rows", 0.1)):
        found = memory(stage(**{side: "new"}, precision="bf16"), medgemma, 2048, 4, device="cpu")
        logits = 4 * 2048 * medgemma.rows * 4
        assert found.loss < limit * logits


# --------------------------------------------------------------------------------------- operations and time


@pytest.mark.parametrize(
    ("settings", "trunk", "loss"),
    [
        # forward: 2 × 100 of the matrix, 2 × 2 × 10 of attention for each of (1 + 2 + … + 9) / 9 = 5 positions
        (stage(output_rows="new"), (400, 0), (2000, 2 * 70)),
        (stage(output_rows="all"), (400, 0), (2000, 2 * 1000)),
        # backward: as much again for the matrix's input, and twice attention's
        (stage(input_rows="new"), (400, 200 + 2 * 200), (2000, 2000)),
        (stage(input_rows="new", output_rows="new"), (400, 600), (2000, 2000 + 2 * 70)),
        (stage(layers="all"), (400, 600 + 200), (2000, 2000)),
        (stage(layers="lora", lora=LoraSettings(3, 6, targets=("up_proj",))), (400 + 120, 600 + 240), (2000, 2000)),
    ],
)
def test_operations_of_a_token(settings: StageSettings, trunk: tuple[int, int], loss: tuple[int, int]) -> None:
    found = flops_per_token(SMALL, settings, NEW, 9)
    assert (found.trunk_forward, found.trunk_backward) == trunk
    assert (found.loss_forward, found.loss_backward) == loss
    assert found.total == sum(trunk) + sum(loss)


def test_a_window_shortens_what_attention_sees() -> None:
    # of 4 tokens under a window of 2: 1, 2, 2, 2 positions, 1.75 on average, instead of 2.5
    near, far = (flops_per_token(replace(SMALL, windows=(w,)), stage(output_rows="new"), NEW, 4) for w in (2, None))
    assert far.trunk_forward - near.trunk_forward == 2 * 2 * 10 * (2.5 - 1.75)


def test_time_counts_what_is_computed_again() -> None:
    settings = stage(input_rows="new")
    again, once = (
        seconds_per_token(
            SMALL,
            replace(settings, gradient_checkpointing=on),
            NEW,
            9,
            1,
            flops_per_second=1.0,
            bytes_per_second=float("inf"),
        )
        for on in (True, False)
    )
    assert again - once == 400


# --------------------------------------------------------------------------------------------------- verdicts


def job(dims: Dimensions, **changes: Any) -> Job:
    settings = stage(**{"precision": "bf16", "micro_batch": None, "rows_per_step": 16, **changes})
    rates = {"flops_per_second": 6e13, "bytes_per_second": 7.7e11}
    return Job(dims, settings, 6143, 2048, stored_bytes=2, device="cuda", **rates)


LORA = LoraSettings(
    64, 128, 0.05, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
)
# The bounds for MedGemma 4B: what the reference case expected of stages 1 to 5, and of 6 and 7.
EEVE: list[tuple[dict[str, Any], float]] = [
    ({"input_rows": "new"}, 12),
    ({"output_rows": "new"}, 12),
    ({"input_rows": "new", "output_rows": "new"}, 12),
    ({"output_rows": "all"}, 12),
    ({"input_rows": "new", "output_rows": "all"}, 12),
    ({"input_rows": "all", "output_rows": "all", "layers": "lora", "lora": LORA, "quantise": "nf4"}, 18),
    ({"layers": "lora", "lora": replace(LORA, r=32)}, 18),
]


@pytest.mark.parametrize(("trains", "limit_gb"), EEVE)
def test_medgemma_fits_as_the_reference_hoped(medgemma: Dimensions, trains: dict[str, Any], limit_gb: float) -> None:
    way = job(medgemma, **trains).within(limit_gb * 1e9)
    assert way is not None
    assert "sequence_length" not in way.changes
    assert way.seconds < 1.2 * job(medgemma, **trains).with_changes({}).seconds


def test_the_least_harmful_change_is_named(medgemma: Dimensions) -> None:
    given = job(medgemma, output_rows="all")
    assert given.within(24e9) == given.with_changes({})
    # 8-bit moments change less of what is learnt than 4-bit layers do
    way = given.within(18e9)
    assert way is not None
    assert way.changes == {"optimizer": "adamw_8bit"}
    way = given.within(12e9)
    assert way is not None
    assert way.changes == {"optimizer": "adamw_8bit", "quantise": "nf4"}
    assert given.within(5e9) is None
    # several rows at a time, and all their activations, are the first things to go
    wide = job(medgemma, input_rows="new", micro_batch=8, gradient_checkpointing=False)
    way = wide.within(12e9)
    assert way is not None
    assert set(way.changes) == {"micro_batch", "gradient_checkpointing"}


def test_layers_that_train_are_never_quantised(medgemma: Dimensions) -> None:
    assert not any("quantise" in way.changes for way in job(medgemma, layers="all").ways())


# ---------------------------------------------------------------------------------------------------- the verb


def test_plan_of_a_recipe_without_its_model(tmp_path: Path, hub_is_away: None) -> None:
    plan = lingraft.plan("korean-medgemma-4b", tmp_path / "run", device="a6000")
    assert "the shape medgemma-4b stands in" in plan["base"]["assumed"]
    # 671,252,480 for the second matrix of the untied model
    assert plan["base"]["parameters"] == PUBLISHED["medgemma-4b"] + 262_208 * 2560
    first = plan["stages"][0]
    assert first["trainable"] == 6143 * 2560
    parts = first["memory_gb"]
    always = sum(parts[part] for part in ("weights", "trained", "gradients", "optimizer", "activations"))
    assert parts["peak"] == pytest.approx(always + max(parts["layer"], parts["loss"]))
    assert first["expected_tokens"] is None
    assert set(first["cards"]) == {"16", "24", "48", "80"}
    assert all(way == {**way, "changes": {}} for way in first["cards"].values())
    shown = terminal.plan(plan)
    assert "a6000: 40% of 155 TFLOP/s" in shown
    assert "8-bit Adam is optimizer: adamw_8bit" in shown


def test_another_shape_and_other_cards(tmp_path: Path, tiny_gemma: Path) -> None:
    recipe = tiny.write_recipe(tmp_path, tiny_gemma)
    arguments = ["plan", str(recipe), "--run-dir", str(tmp_path / "run"), "--shape", "gemma-3-27b", "--device", "h100"]
    result = CliRunner().invoke(app, [*arguments, "--memory", "12", "40", "--json"])
    assert result.exit_code == 0
    plan = json.loads(result.stdout)
    assert plan["base"]["rows"] == 262_208
    assert set(plan["stages"][0]["cards"]) == {"12", "40"}
    assert plan["stages"][0]["cards"]["12"] is None


def test_disk_counts_what_a_stage_keeps_beside_its_model(tmp_path: Path, tiny_gemma: Path) -> None:
    recipe = tiny.write_recipe(tmp_path, tiny_gemma)

    def checkpoints(*overrides: str) -> tuple[float, int]:
        stage = lingraft.plan(recipe, tmp_path / "run", overrides)["stages"][0]
        return stage["disk_gb"]["checkpoints"] * 1e9, stage["trainable"]

    # value and two moments in float32; two are kept while the third is written
    size, values = checkpoints("training.keep_checkpoints=2")
    assert size == pytest.approx(3 * 12 * values)
    # the best values, and those that take their place
    size, values = checkpoints("training.keep_checkpoints=1", "training.keep=best")
    assert size == pytest.approx(2 * 12 * values + 2 * 4 * values)


def test_tokens_are_known_from_recipe_run_and_corpus(tmp_path: Path, tiny_gemma: Path) -> None:
    training = {"sequence_length": 128, "precision": "fp32", "gradient_checkpointing": False, "epochs": 1}
    rows = {"name": "rows", "train": {"input_rows": "new"}, "gate": {"en_bpb_rise": -1}}
    recipe, run = tiny.write_recipe(tmp_path, tiny_gemma, training=training, stages=[rows]), tmp_path / "run"

    def expected(*overrides: str) -> tuple[int, str]:
        found = lingraft.plan(recipe, run, overrides)["stages"][0]
        return found["expected_tokens"], found["expected_from"]

    with pytest.raises(GateFailed):  # a run that is not at its end keeps its tokens
        lingraft.run(recipe, run)
    read, origin = expected()
    assert origin == "the finished stage"
    assert expected("training.learning_rate=2e-3") == (read, "the corpus as tokens")
    shutil.rmtree(run / ".work")
    estimate, origin = expected("training.learning_rate=2e-3")
    assert origin == "the corpus's characters"
    assert estimate == pytest.approx(read, rel=0.15)
    assert expected("training.epochs=null", "training.tokens=600") == (600, "the recipe")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "gemma-3-4"}, "no shape is called 'gemma-3-4'; did you mean 'gemma-3-4b'?"),
        ({"device": "a600"}, "no rates are known of 'a600'; did you mean 'a6000'?"),
    ],
)
def test_unknown_names(tmp_path: Path, tiny_gemma: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError) as error:
        lingraft.plan(tiny.write_recipe(tmp_path, tiny_gemma), tmp_path / "run", **options)
    assert message in str(error.value)


@pytest.fixture
def hub_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
