"""Adapters, and the end of a stage: what it learnt goes into the stored weights, and nothing else does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_training import batches
from torch import Tensor, nn

from lingraft.errors import ModelError, TrainingError
from lingraft.model import changes as changes_module
from lingraft.model import shards
from lingraft.model.changes import Adapter, Changes, Rows, check_writable, layer_error, write_changed
from lingraft.model.load import COMPANIONS, body_parameters, input_matrix, load, output_matrix, save
from lingraft.model.lora import adapters, add_lora
from lingraft.training import stage
from lingraft.training.settings import LoraSettings

NEW_IDS = [400, 401, 402, 450]
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")
TEXT = torch.tensor([[2, 300, 401, 17, 305, 450]])
MERGING = ("gemma3", "gemma3-multimodal", "llama", "qwen2", "qwen3")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) * 0.1


def logits(model: Any) -> Tensor:
    return model(input_ids=TEXT).logits.detach()


def stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def cast(folder: Path, dtype: torch.dtype) -> None:
    file = folder / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def with_adapters(model: Any, targets: tuple[str, ...] = TARGETS) -> Any:
    """The model with adapters that do something, as after some training."""
    add_lora(model, r=4, alpha=8, dropout=0.0, targets=targets)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.B.copy_(random(*adapter.B.shape))
    return model.eval()


def test_a_change_by_hand(tmp_path: Path, tiny_gemma: Path) -> None:
    """One of each kind: a row, a layer's adapter of rank 1, a norm."""
    module, norm = "model.layers.0.mlp.up_proj", "model.norm.weight"
    row, a, b = torch.arange(32.0), torch.eye(1, 32), torch.ones(64, 1)
    proof = write_changed(
        tiny_gemma,
        tmp_path,
        Changes(
            input=Rows([401], row.unsqueeze(0)),
            adapters={module: Adapter(a, b, 0.5)},
            parameters={norm: torch.full((32,), 7.0)},
        ),
        NEW_IDS,
    )
    before, after = stored(tiny_gemma), stored(tmp_path)
    assert torch.equal(after["model.embed_tokens.weight"][401], row)
    delta = after[f"{module}.weight"] - before[f"{module}.weight"]
    assert torch.allclose(delta, torch.cat([torch.full((64, 1), 0.5), torch.zeros(64, 31)], dim=1), atol=1e-6)
    assert after[norm].tolist() == [7.0] * 32
    assert proof.changed == ["model.embed_tokens.weight[new rows]", f"{module}.weight", norm]
    assert proof.unchanged == len(before) + 1 - 3, "the embedding counts twice: old rows and new rows"
    assert proof.merge_error is not None
    assert proof.merge_error < 1e-6
    assert (tmp_path / "config.json").read_bytes() == (tiny_gemma / "config.json").read_bytes()
    for name in COMPANIONS:
        assert (tmp_path / name).is_file() == (tiny_gemma / name).is_file()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", MERGING)
def test_merged_logits_are_those_of_the_live_adapters(
    tmp_path: Path, tiny_tokenizer: Path, family: str, tied: bool
) -> None:
    """With every row of the vocabulary changed beside them."""
    source = tiny.write_checkpoint(tmp_path / "source", tiny_tokenizer, family, tied)
    model = with_adapters(load(source))
    new_input, new_output = random(tiny.VOCABULARY, 32), random(tiny.VOCABULARY, 32) * 2
    with torch.no_grad():
        output_matrix(model).copy_(new_output)
        input_matrix(model).copy_(new_input)
    expected = logits(model)
    output = None if tied else Rows(None, new_output)
    proof = write_changed(source, tmp_path / "out", Changes(Rows(None, new_input), output, adapters(model)), NEW_IDS)
    merged = load(tmp_path / "out")
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    assert not torch.allclose(logits(load(source)), expected, atol=0.1)
    assert (output_matrix(merged) is input_matrix(merged)) is tied
    layers, matrices = 2 * len(TARGETS), 1 if tied else 2
    assert len(proof.changed) == layers + 2 * matrices
    assert proof.unchanged == len(stored(source)) - layers - matrices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_precision_is_kept_and_bounds_the_merge(
    tmp_path: Path, tiny_tokenizer: Path, dtype: torch.dtype
) -> None:
    source = tiny.write_checkpoint(tmp_path / "source", tiny_tokenizer, "gemma3", tied=False)
    cast(source, dtype)
    model = with_adapters(load(source, torch.float32))
    expected = logits(model)
    proof = write_changed(source, tmp_path / "out", Changes(adapters=adapters(model)), NEW_IDS)
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {dtype}
    eps = torch.finfo(dtype).eps
    assert eps / 10 < proof.merge_error < eps
    difference = logits(load(tmp_path / "out", torch.float32)) - expected
    assert difference.norm() / expected.norm() < 2 * eps


def test_names_of_either_layout_and_every_body_parameter(tmp_path: Path, tiny_tokenizer: Path) -> None:
    """What a multimodal class calls `model.language_model.…` older files call `language_model.model.…`."""
    for layout in ("legacy", "new"):
        source = tiny.write_checkpoint(tmp_path / layout, tiny_tokenizer, "gemma3-multimodal")
        if layout == "new":
            file = source / "model.safetensors"
            renamed = {
                name.replace("language_model.model.", "language_model."): t for name, t in load_file(file).items()
            }
            save_file({f"model.{name}": t for name, t in renamed.items()}, file, metadata={"format": "pt"})
        body = {name: random(*p.shape) + 1 for name, p in body_parameters(load(source)).items()}
        proof = write_changed(source, tmp_path / f"{layout}-out", Changes(parameters=body), NEW_IDS)
        assert stored(source).keys() == stored(tmp_path / f"{layout}-out").keys()
        assert len(proof.changed) == len(body)
        assert not any("vision" in name or "embed_tokens" in name for name in proof.changed)
        written = body_parameters(load(tmp_path / f"{layout}-out"))
        assert all(torch.equal(written[name], value) for name, value in body.items())


def test_a_head_that_a_tied_model_stores_too_stays_its_copy(tmp_path: Path, tiny_tokenizer: Path) -> None:
    source = tiny.write_checkpoint(tmp_path / "source", tiny_tokenizer)
    tensors = stored(source)
    copied = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | copied, source / "model.safetensors", metadata={"format": "pt"})
    proof = write_changed(source, tmp_path / "out", Changes(Rows(NEW_IDS, random(4, 32))), NEW_IDS)
    assert proof.changed == ["lm_head.weight[new rows]", "model.embed_tokens.weight[new rows]"]
    after = stored(tmp_path / "out")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert torch.equal(after["lm_head.weight"][NEW_IDS], random(4, 32))


def test_blocks_and_shards_make_no_difference(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.write_checkpoint(tmp_path / "source", tiny_tokenizer, "llama", tied=False)
    model = with_adapters(load(source))
    changes = Changes(Rows(NEW_IDS[::-1], random(4, 32)), Rows(None, random(tiny.VOCABULARY, 32)), adapters(model))
    whole = write_changed(source, tmp_path / "whole", changes, NEW_IDS)
    monkeypatch.setattr(shards, "SHARD_BYTES", 30_000)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(changes_module, "BLOCK_BYTES", 1000)
    parts = write_changed(source, tmp_path / "parts", changes, NEW_IDS)
    assert (parts.changed, parts.unchanged) == (whole.changed, whole.unchanged)
    assert parts.merge_error == pytest.approx(whole.merge_error, rel=0.1)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    one, other = stored(tmp_path / "whole"), stored(tmp_path / "parts")
    assert all(torch.allclose(one[name], other[name], rtol=1e-6, atol=1e-7) for name in one)


def test_the_proof_sees_a_frozen_byte_that_changed(
    tmp_path: Path, tiny_gemma: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm, embedding = "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"
    for number, name in enumerate((norm, embedding)):

        def careless(out: Path, pieces: dict[str, shards.Piece], name: str = name) -> None:
            drift = shards.Piece(pieces[name].source, lambda first, block: block.nextafter(torch.tensor(9.0)))
            shards.write_shards(out, pieces | {name: drift})

        monkeypatch.setattr(changes_module, "write_shards", careless)
        with pytest.raises(AssertionError, match=f"frozen tensors changed: {name}"):
            write_changed(tiny_gemma, tmp_path / str(number), Changes(Rows(NEW_IDS, random(4, 32))), NEW_IDS)


def test_a_merge_that_is_off_names_its_layer(tmp_path: Path, tiny_gemma: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "model.layers.1.mlp.down_proj"
    changes = Changes(adapters={module: Adapter(random(4, 64), random(32, 4), 2.0)})
    monkeypatch.setattr(Adapter, "delta", lambda self, first, last: torch.full((last - first, 64), 1e-5))
    with pytest.raises(
        TrainingError, match=rf"{module}\.weight: merged, the layer's output differs .* by .*; .* again"
    ):
        write_changed(tiny_gemma, tmp_path, changes, NEW_IDS)


def test_layer_error_by_hand() -> None:
    """A merge that forgot its adapter errs by the adapter's share of the output."""
    adapter = Adapter(torch.eye(1, 8), torch.eye(8, 1), 3.0)
    old = torch.zeros(8, 8)
    merged = old.clone()
    merged[0, 0] = 3.0
    assert layer_error(old, merged, adapter) == 0
    assert layer_error(old, old, adapter) == 1
    assert layer_error(old, old, Adapter(torch.ones(1, 8), torch.zeros(8, 1), 3.0)) == 0


@pytest.mark.parametrize("bad", [float("nan"), 1e30])
def test_what_is_not_finite_is_refused(tmp_path: Path, tiny_tokenizer: Path, bad: float) -> None:
    source = tiny.write_checkpoint(tmp_path / "source", tiny_tokenizer)
    cast(source, torch.float16)
    rows, module, norm = random(4, 32), "model.layers.0.mlp.up_proj", "model.norm.weight"
    rows[2, 3] = bad
    for changes, name in (
        (Changes(Rows(NEW_IDS, rows)), "model.embed_tokens.weight"),
        (Changes(adapters={module: Adapter(rows, torch.ones(64, 4), 1.0)}), f"{module}.weight"),
        (Changes(parameters={norm: rows[2]}), norm),
    ):
        with pytest.raises(TrainingError, match=f"^{name} is not finite any more in float16: .* lower learning_rate"):
            write_changed(source, tmp_path / "out", changes, NEW_IDS)


def test_parameters_without_a_stored_tensor_of_their_own_are_refused(tmp_path: Path, tiny_tokenizer: Path) -> None:
    save(tiny.qwen3_moe(), tmp_path, tiny_tokenizer)
    body = list(body_parameters(load(tmp_path)))
    fused = [name for name in body if ".experts." in name]
    assert len(fused) == 4
    check_writable(tmp_path, ["model.layers.0.self_attn.q_proj"], [name for name in body if name not in fused])
    with pytest.raises(
        ModelError, match=r"learns in model\.layers\.0\.mlp\.experts\..* not stored by itself.*lora\.targets"
    ):
        check_writable(tmp_path, [], body)
    with pytest.raises(ModelError, match=r"learns in model\.norms\.weight"):
        check_writable(tmp_path, ["model.norms"], [])


def test_rank_stabilised_scaling() -> None:
    for stabilised, scaling in ((False, 2.0), (True, 4.0)):
        model = tiny.llama()
        names = add_lora(model, r=4, alpha=8, dropout=0.0, targets=["q_proj"], rank_stabilised=stabilised)
        assert adapters(model).keys() == set(names)
        assert {adapter.scaling for adapter in adapters(model).values()} == {scaling}


def quantised(model: Any) -> set[str]:
    """Names of the modules whose weights are in 4 bits (in bytes: two to each)."""
    weights = ((name, getattr(module, "weight", None)) for name, module in model.named_modules())
    return {name for name, weight in weights if isinstance(weight, Tensor) and weight.dtype == torch.uint8}


def test_a_text_stage_loads_no_image_parts(tmp_path: Path, tiny_tokenizer: Path) -> None:
    source = tiny.write_checkpoint(tmp_path / "source", tiny_tokenizer, "gemma3-multimodal", tied=False)
    whole, text = load(source), load(source, vision=False)
    assert {name.split(".")[1] for name, _ in text.named_parameters()} == {"language_model", "weight"}
    assert torch.equal(logits(text), logits(whole))
    positions = torch.arange(TEXT.shape[1]).unsqueeze(0)
    state = text.train().base_model(input_ids=TEXT, position_ids=positions, use_cache=False).last_hidden_state
    assert torch.equal(text.get_output_embeddings()(state), logits(whole))
    targets = add_lora(text, r=2, alpha=2, dropout=0.0, targets=["q_proj"])
    assert targets == add_lora(whole, r=2, alpha=2, dropout=0.0, targets=["q_proj"])


@pytest.mark.parametrize("vision", [True, False])
def test_4_bits_hold_the_language_models_linear_layers_only(tmp_path: Path, tiny_tokenizer: Path, vision: bool) -> None:
    pytest.importorskip("bitsandbytes")
    source = tiny.write_checkpoint(tmp_path / "source", tiny_tokenizer, "gemma3-multimodal", tied=False)
    model = load(source, torch.float32, "nf4", vision=vision)
    decoder: Any = model.get_decoder()
    linear = {name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    assert len(linear) == 14
    assert quantised(model) == {f"model.language_model.{name}" for name in linear}
    state = decoder.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True), "double quantisation"
    assert input_matrix(model).dtype == output_matrix(model).dtype == torch.float32


def test_4_bits_leave_out_weights_that_the_model_reads_itself(tmp_path: Path, tiny_tokenizer: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = load(tiny.write_checkpoint(tmp_path, tiny_tokenizer, "gemma3n"), torch.float32, "nf4").train()
    assert not any(".altup." in name for name in quantised(model))
    assert logits(model).isfinite().all()


def test_4_bits_stay_as_they_are_when_the_model_is_read(tmp_path: Path, tiny_tokenizer: Path) -> None:
    """What trains over them after a validation must train over the same weights as before it."""
    pytest.importorskip("bitsandbytes")
    model = load(tiny.write_checkpoint(tmp_path, tiny_tokenizer, "llama"), torch.float32, "nf4").eval()
    weight = model.get_decoder().layers[0].mlp.up_proj.weight
    before = weight.data.clone()
    with torch.no_grad():
        once, twice = logits(model), logits(model)
    assert torch.equal(once, twice)
    assert torch.equal(weight.data, before)
    assert weight.quant_state.nested, "the constants are still in 8 bits"


@pytest.mark.parametrize(("family", "tied"), [*((family, False) for family in MERGING), ("gemma3", True)])
def test_qlora_trains_merges_and_matches(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, family: str, tied: bool
) -> None:
    """With every input and output row trained beside the adapters.

    The merge is exact against the adapters on the unquantised weights. Against the 4-bit model that trained, it
    differs by what NF4 had rounded away from the base: no more than base and 4-bit base do, and half as much for what
    training changed in between.
    """
    pytest.importorskip("bitsandbytes")
    source = tiny.write_checkpoint(tmp_path / "source", tiny_tokenizer, family, tied)
    lora = LoraSettings(r=4, alpha=8, dropout=0.1, rank_stabilised=True, targets=TARGETS)
    settings = replace(
        tiny.STAGE_SETTINGS, input_rows="all", output_rows="all", layers="lora", lora=lora, quantise="nf4"
    )
    seen: dict[str, Any] = {}
    true_changes = stage._Trained.changes

    def noted(self: Any, parallel: Any) -> Changes:
        assert quantised(self.model)
        seen["logits"], seen["changes"] = logits(self.model.eval()), true_changes(self, parallel)
        return seen["changes"]

    monkeypatch.setattr(stage._Trained, "changes", noted)
    result = stage.run_stage(source, tmp_path / "out", tmp_path, settings, batches(epochs=4), NEW_IDS)
    assert result.loop.log[-1]["loss"] < result.loop.log[0]["loss"] - 0.2
    merged = logits(load(tmp_path / "out"))

    live = load(source)
    add_lora(live, r=4, alpha=8, dropout=0.1, targets=TARGETS, rank_stabilised=True)
    with torch.no_grad():
        for name, adapter in adapters(live).items():
            trained = seen["changes"].adapters[name]
            adapter.A.copy_(trained.A)
            adapter.B.copy_(trained.B)
        input_matrix(live).copy_(seen["changes"].input.values)
        if not tied:
            output_matrix(live).copy_(seen["changes"].output.values)
    assert torch.allclose(merged, logits(live.eval()), atol=1e-5)

    base, base_4bit = logits(load(source)), logits(load(source, torch.float32, "nf4"))
    rounded_away = (base_4bit - base).norm() / base.norm()
    off = (seen["logits"] - merged).norm() / merged.norm()
    assert 0 < off < 1.5 * rounded_away
    assert 2 * rounded_away < (merged - base).norm() / merged.norm()
