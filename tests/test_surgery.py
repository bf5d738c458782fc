"""Weight surgery: new rows where they belong, everything else bit for bit as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from lingraft.errors import ModelError
from lingraft.model import shards
from lingraft.model.load import check, input_matrix, is_tied, load, output_matrix, special_ids
from lingraft.model.surgery import (
    VocabularyRows,
    altered,
    open_checkpoint,
    patch_config,
    vocabulary_rows,
    write_grafted,
)

WIDTH = 32
REUSED = [600, 602, 639]
APPENDED = [639, 640, 645]
TEXT = torch.tensor([[2, 300, 301, 17, 305]])


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("base") / request.param, tiny_tokenizer, request.param)


def new_rows(count: int, base: Path, head: bool = True) -> VocabularyRows:
    generator = torch.Generator().manual_seed(1)
    per_layer = open_checkpoint(base).per_layer
    shapes = [(count, WIDTH), (count, WIDTH) if head else None, (count, WIDTH) if per_layer else None]
    return VocabularyRows(*(shape and torch.randn(shape, generator=generator) for shape in shapes))


def logits(folder: Path) -> torch.Tensor:
    return load(folder)(input_ids=TEXT).logits.detach()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def rename(folder: Path, changes: dict[str, str]) -> None:
    """Give tensors other beginnings."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for old, new in changes.items():
        tensors = {name.replace(old, new, 1) if name.startswith(old) else name: t for name, t in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def test_old_logits_stay_and_new_rows_are_what_was_asked(base: Path, tmp_path: Path) -> None:
    new = new_rows(3, base)
    assert write_grafted(base, tmp_path, REUSED, new) == tiny.VOCABULARY
    assert altered(base, tmp_path, REUSED) == []
    model = load(tmp_path)
    assert torch.equal(input_matrix(model)[REUSED], new.input)
    assert torch.equal(output_matrix(model)[REUSED], new.output)
    assert not is_tied(model.config)
    old_ids = sorted(set(range(tiny.VOCABULARY)) - set(REUSED))
    assert torch.equal(logits(tmp_path)[..., old_ids], logits(base)[..., old_ids])
    if new.per_layer is not None:
        assert torch.equal(vocabulary_rows(open_checkpoint(tmp_path)).per_layer[REUSED], new.per_layer)


@pytest.mark.parametrize("head", [True, False], ids=["untied", "tied"])
def test_growth_in_small_shards_and_blocks(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bool
) -> None:
    if "gemma3n" in base.name:
        with pytest.raises(ModelError, match=r"new ids past its 640 rows .* per-layer table ends .* unused slots only"):
            write_grafted(base, tmp_path, APPENDED, new_rows(3, base))
        return
    monkeypatch.setattr(shards, "SHARD_BYTES", 30_000)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 1000)
    new = new_rows(3, base, head)
    assert write_grafted(base, tmp_path, APPENDED, new) == 704
    assert altered(base, tmp_path, APPENDED) == []
    files = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())

    model, old = load(tmp_path), load(base)
    assert is_tied(model.config) is not head
    assert (output_matrix(model) is input_matrix(model)) is not head
    assert torch.equal(input_matrix(model)[APPENDED], new.input)
    assert torch.equal(output_matrix(model)[APPENDED], new.output if head else new.input)
    pads = sorted(set(range(640, 704)) - set(APPENDED))
    mean = input_matrix(old).mean(dim=0).expand(len(pads), -1)
    assert torch.allclose(output_matrix(model)[pads], mean, atol=1e-6)
    grown = logits(tmp_path)
    old_ids = list(range(639))
    assert torch.allclose(grown[..., old_ids], logits(base)[..., old_ids], atol=1e-5)
    assert (grown[..., pads].amax(dim=-1) < grown.amax(dim=-1)).all(), "a pad row must never win"
    text = config_of(tmp_path).get("text_config", config_of(tmp_path))
    assert text["vocab_size"] == 704


def test_names_of_either_layout_are_kept(tmp_path: Path, tiny_tokenizer: Path) -> None:
    legacy = tiny.write_checkpoint(tmp_path / "legacy", tiny_tokenizer, "gemma3-multimodal")
    renamed = tiny.write_checkpoint(tmp_path / "new", tiny_tokenizer, "gemma3-multimodal")
    moved = ("vision_tower.", "multi_modal_projector.")
    rename(renamed, {"language_model.model.": "model.language_model."} | {name: f"model.{name}" for name in moved})
    before = logits(legacy)
    old_ids = sorted(set(range(tiny.VOCABULARY)) - set(REUSED))
    for folder, head in ((legacy, "language_model.lm_head.weight"), (renamed, "lm_head.weight")):
        out = folder.with_name(f"{folder.name}-out")
        write_grafted(folder, out, REUSED, new_rows(3, folder))
        assert open_checkpoint(out).tensors.keys() == open_checkpoint(folder).tensors.keys() | {head}
        assert altered(folder, out, REUSED) == []
        assert torch.equal(logits(out)[..., old_ids], before[..., old_ids])


def test_gemma3n_beside_its_towers(tmp_path: Path, tiny_tokenizer: Path) -> None:
    """The class with vision and audio needs a library of its own; its names and config are all that surgery sees."""
    base = tiny.write_checkpoint(tmp_path / "base", tiny_tokenizer, "gemma3n")
    rename(base, {"model.": "model.language_model."})
    nested = {"model_type": "gemma3n", "audio_config": {"vocab_size": 128}, "text_config": config_of(base)}
    (base / "config.json").write_text(json.dumps(nested))
    new = new_rows(3, base)
    write_grafted(base, tmp_path / "out", REUSED, new)
    assert altered(base, tmp_path / "out", REUSED) == []
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["model.language_model.embed_tokens_per_layer.weight"][REUSED], new.per_layer)
    assert torch.equal(after["lm_head.weight"][REUSED], new.output)
    config = config_of(tmp_path / "out")
    assert config["audio_config"] == {"vocab_size": 128}
    assert config["text_config"]["vocab_size_per_layer_input"] == tiny.VOCABULARY
    assert (config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]) == (False, False)
    with pytest.raises(ModelError, match="per-layer table ends"):
        write_grafted(base, tmp_path / "more", APPENDED, new)


def test_dtypes_of_other_tensors_are_never_touched(tiny_gemma: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    tensors = load_file(tiny_gemma / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
    tensors |= {"odd": torch.arange(7, dtype=torch.uint8), "f8": torch.ones(3).to(torch.float8_e4m3fn)}
    tensors["scale"] = torch.tensor(2.0, dtype=torch.float64)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_bytes((tiny_gemma / "config.json").read_bytes())
    new = new_rows(3, base, head=False)
    write_grafted(base, tmp_path / "out", REUSED, new)
    after = load_file(tmp_path / "out" / "model.safetensors")
    embedding = after.pop("model.embed_tokens.weight")
    assert torch.equal(embedding[REUSED], new.input.bfloat16())
    for name, tensor in after.items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor.flatten().view(torch.uint8), tensors[name].flatten().view(torch.uint8))


def test_what_was_altered_is_named(tiny_gemma: Path, tmp_path: Path) -> None:
    write_grafted(tiny_gemma, tmp_path, REUSED, new_rows(3, tiny_gemma))
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    broken = {name: tensor.clone() for name, tensor in good.items()}
    broken["model.embed_tokens.weight"][601, 5] += 1
    broken["lm_head.weight"][3] *= 2
    broken["model.norm.weight"][0] += 1
    del broken["model.layers.1.mlp.up_proj.weight"]
    save_file(broken, file, metadata={"format": "pt"})
    assert sorted(altered(tiny_gemma, tmp_path, REUSED)) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
    ]


def test_checkpoints_that_cannot_be_grafted(tiny_gemma: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_gemma / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    config = config_of(tiny_gemma)

    def refused(tensors: dict[str, torch.Tensor], message: str, **changes: Any) -> None:
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ModelError, match=message) as raised:
            open_checkpoint(tmp_path)
        assert "\n" not in str(raised.value)

    int8 = {"model.embed_tokens.weight": embedding.to(torch.int8)}
    refused(tensors | int8, "stored as I8.*before it was quantised")
    refused(tensors | {"lm_head.weight": embedding + 1}, r"says tied, but lm_head\.weight differs")
    refused(tensors, r"says untied, but the weights have no lm_head\.weight", tie_word_embeddings=False)
    refused({"model.norm.weight": tensors["model.norm.weight"]}, "none of the 1 weights is named embed_tokens")
    refused(tensors | {"encoder.embed_tokens.weight": embedding.clone()}, "are both vocabularies")


def test_a_head_that_a_tied_model_stores_too_stays_equal(tiny_gemma: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    tensors = load_file(tiny_gemma / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors")
    (base / "config.json").write_bytes((tiny_gemma / "config.json").read_bytes())
    write_grafted(base, tmp_path / "out", REUSED, new_rows(3, base, head=False))
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])


def test_configs_get_the_vocabulary_size_in_every_place() -> None:
    nested = patch_config({"model_type": "gemma3", "text_config": {"hidden_size": 8}}, 128, untied=True)
    assert nested["text_config"] == {"hidden_size": 8, "vocab_size": 128, "tie_word_embeddings": False}
    assert nested["tie_word_embeddings"] is False
    assert "vocab_size" not in nested
    both = {"model_type": "gemma3", "vocab_size": 1, "text_config": {"vocab_size": 1, "tie_word_embeddings": True}}
    patched = patch_config(both, 128, untied=False)
    assert (patched["vocab_size"], patched["text_config"]["vocab_size"]) == (128, 128)
    assert patched["text_config"]["tie_word_embeddings"] is True
    assert "tie_word_embeddings" not in patched
    assert both["vocab_size"] == 1, "the source's config is not changed"


def test_an_order_of_layers_that_llama_cpp_would_guess_wrong_is_written_out() -> None:
    def patched(types: list[str], **more: Any) -> Any:
        config = {"model_type": "gemma3_text", "layer_types": types} | more
        return patch_config(config, 128, untied=False).get("sliding_window_pattern")

    sliding, full = "sliding_attention", "full_attention"
    assert patched([sliding, full]) == [True, False]
    assert patched([sliding] * 5 + [full, sliding]) is None
    assert patched([sliding, full], sliding_window_pattern=2) == 2
    assert patch_config({"model_type": "qwen2", "layer_types": [full]}, 128, untied=False).keys() == {
        "model_type",
        "layer_types",
        "vocab_size",
    }


def test_ids_that_the_configs_name(tmp_path: Path) -> None:
    config = {
        "image_token_index": 9,
        "eos_token_id": [1, 106],
        "pad_token_id": None,
        "text_config": {"bos_token_id": 2},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"forced_eos_token_id": 7, "max_length": 20}')
    assert special_ids(tmp_path) == {1, 2, 7, 9, 106}


def test_the_image_mark_without_a_row_is_no_fault_of_gemma3_text(tiny_gemma: Path) -> None:
    check(tiny_gemma, tokens=tiny.VOCABULARY + 1)
    with pytest.raises(ModelError, match="the tokenizer has 642 tokens but the model only 640 rows"):
        check(tiny_gemma, tokens=tiny.VOCABULARY + 2)
