"""The doctor on healthy models, and on models with each fault planted: exactly that fault must be found."""

from __future__ import annotations

import gzip
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lingraft import cli
from lingraft.doctor import added_words
from lingraft.doctor.examine import CHECKS, Diagnosis, examine
from lingraft.errors import CorpusError, ModelError
from lingraft.families import family
from lingraft.tokenizer import runtimes
from lingraft.tokenizer.graft import graft, place, read_graft, write
from lingraft.tokenizer.learn import Learnt, NewPiece, learn
from lingraft.tokenizer.load import added_tokens_decoder, load
from lingraft.tokenizer.sentencepiece_proto import ModelProto, PieceType

EMBEDDING = "model.embed_tokens.weight"
FIRST_UNUSED = tiny.VOCABULARY - tiny.UNUSED
SYLLABLES = "환자는당뇨병과고혈압으로약물치료를받있며최근단백확인되었다급성심경색증이의"
PIECE = 300  # an ordinary piece of the tiny tokenizer
WITHOUT_BASE = {"old-ids", "old-boundaries", "old-rows", "old-logits"}


@pytest.fixture(autouse=True)
def no_llama_cpp(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp takes seconds to start: only the tests marked for it run it."""
    if "llama_cpp" not in request.fixturenames:
        monkeypatch.setattr(runtimes, "llama_cpp_available", lambda: False)


@pytest.fixture
def llama_cpp() -> None:
    if not runtimes.llama_cpp_available():
        pytest.skip("llama.cpp's Python packages are not installed")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> dict[str, Path]:
    """A healthy model of each kind. Their layer pattern is not Gemma's own, so llama.cpp has to be told."""
    root = tmp_path_factory.mktemp("healthy")
    models = {
        name: tiny.write_checkpoint(root / name, tiny_tokenizer, name)
        for name in ("gemma3", "gemma3-multimodal", "gemma3n", "llama")
    }
    models["llama-untied"] = tiny.write_checkpoint(root / "llama-untied", tiny_tokenizer, "llama", tied=False)
    for model in models.values():
        edit(model / "config.json", _tell_llama_cpp)
    return models


def _tell_llama_cpp(config: dict[str, Any]) -> None:
    text = config.get("text_config", config)
    if "layer_types" in text:
        text["sliding_window_pattern"] = [kind == "sliding_attention" for kind in text["layer_types"]]


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text("utf-8"))
    change(value)
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_proto(folder: Path, change: Callable[[Any], Any]) -> None:
    proto = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    change(proto)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def list_added_tokens(folder: Path) -> None:
    """Bring the list in tokenizer_config.json in line with the tokenizer's changed files."""
    parsed = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    proto = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    listed = added_tokens_decoder(parsed, proto)
    edit(folder / "tokenizer_config.json", lambda config: config.update(added_tokens_decoder=listed))


def set_row(row: int, value: Any) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[EMBEDDING][row] = value(tensors[EMBEDDING]) if callable(value) else value

    return lambda folder: edit_weights(folder, change)


def set_rows(rows: int) -> Callable[[Path], None]:
    """Cut or grow (by random pad rows) the embedding, the config agreeing."""

    def change(tensors: dict[str, Tensor]) -> None:
        pads = torch.randn(max(rows - tiny.VOCABULARY, 0), 32) * 0.02
        tensors[EMBEDDING] = torch.cat([tensors[EMBEDDING], pads])[:rows].contiguous()

    def plant(folder: Path) -> None:
        edit_weights(folder, change)
        edit(folder / "config.json", lambda config: config.update(vocab_size=rows))

    return plant


def set_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", lambda config: config.update(values))


def rename(index: int, piece: str, score: float = -1e6) -> Callable[[Path], None]:
    """An ordinary piece in place of an unused one, in both files of the tokenizer."""

    def in_json(parsed: dict[str, Any]) -> None:
        vocab = parsed["model"]["vocab"]
        old = next(name for name, number in vocab.items() if number == index)
        parsed["model"]["vocab"] = {piece if name == old else name: number for name, number in vocab.items()}
        parsed["added_tokens"] = [token for token in parsed["added_tokens"] if token["id"] != index]

    def in_proto(proto: Any) -> None:
        slot = proto.pieces[index]
        slot.piece, slot.score, slot.type = piece, score, PieceType.NORMAL

    def plant(folder: Path) -> None:
        edit(folder / "tokenizer.json", in_json)
        edit_proto(folder, in_proto)
        list_added_tokens(folder)

    return plant


def add_token(content: str, listed: bool) -> Callable[[Path], None]:
    """An added token past the tokenizer's end, with a row, as `add_tokens` leaves it."""
    token = {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}

    def plant(folder: Path) -> None:
        set_rows(704)(folder)
        new = {"id": tiny.VOCABULARY, **token, "special": False}
        edit(folder / "tokenizer.json", lambda parsed: parsed["added_tokens"].append(new))
        if listed:
            (folder / "added_tokens.json").write_text(json.dumps({content: tiny.VOCABULARY}))

    return plant


def byte_merge(folder: Path) -> None:
    rename(FIRST_UNUSED, "<0xFE><0xFF>")(folder)
    edit(folder / "tokenizer.json", lambda parsed: parsed["model"]["merges"].append(["<0xFE>", "<0xFF>"]))


def merge_first(folder: Path) -> None:
    """A merge before all others in both files, so that "or | s" is cut anew."""
    rename(FIRST_UNUSED, "rs", score=1.0)(folder)
    edit(folder / "tokenizer.json", lambda parsed: parsed["model"]["merges"].insert(0, ["r", "s"]))


def merge_first_among_korean(folder: Path) -> None:
    rename(FIRST_UNUSED, "rs", score=1.0)(folder)
    base = load(folder)
    syllables = [NewPiece(syllable, None, None, 9, "character") for syllable in dict.fromkeys(SYLLABLES)]
    write(graft(base, place(base, Learnt(syllables), family=family("gemma3"))), folder)
    edit(folder / "tokenizer.json", lambda parsed: parsed["model"]["merges"].insert(0, ["r", "s"]))


def reverse_scores(folder: Path) -> None:
    def change(proto: Any) -> None:
        normal = [piece for piece in proto.pieces if piece.type == PieceType.NORMAL]
        for piece, score in zip(normal, [piece.score for piece in normal][::-1], strict=True):
            piece.score = score

    edit_proto(folder, change)


def swap_turn_marks(folder: Path) -> None:
    def in_json(parsed: dict[str, Any]) -> None:
        vocab = parsed["model"]["vocab"]
        one, other = "<start_of_turn>", "<end_of_turn>"
        vocab[one], vocab[other] = vocab[other], vocab[one]
        for token in parsed["added_tokens"]:
            token["id"] = vocab[token["content"]]
        parsed["added_tokens"].sort(key=lambda token: token["id"])

    def in_proto(proto: Any) -> None:
        vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        for mark in ("<start_of_turn>", "<end_of_turn>"):
            proto.pieces[vocab[mark]].piece = mark

    edit(folder / "tokenizer.json", in_json)
    edit_proto(folder, in_proto)
    list_added_tokens(folder)


def listed_twice(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c["added_tokens_decoder"]["5"].update(content="<unused7>"))


def pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_of_a_lost_file(folder: Path) -> None:
    weight_map = {EMBEDDING: "model.safetensors", "model.norm.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def index_of_a_lost_tensor(folder: Path) -> None:
    weight_map = {EMBEDDING: "model.safetensors", "model.layers.9.weight": "model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def other_head(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING] + 1}))


def one_half_tensor(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].bfloat16()}))


def infinite_norm(folder: Path) -> None:
    edit_weights(folder, lambda t: t["model.norm.weight"].__setitem__(3, torch.inf))


def copy_of_a_pad_row(folder: Path) -> None:
    set_rows(704)(folder)
    set_row(PIECE, lambda matrix: matrix[650])(folder)


def unwritten(key: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", lambda config: config.pop(key))


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        text = (folder / name).read_text("utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new), "utf-8")

    return plant


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text, "utf-8") and None


def text_untied_alone(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config["text_config"].update(tie_word_embeddings=False))


def text_of_other_size(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(eos_token_id=[106]))


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


# check, what to plant, a part of what the finding must say
FAULTS: list[tuple[str, Callable[[Path], None], str]] = [
    ("json-files", written("generation_config.json", "{"), "generation_config.json"),
    ("config-file", removed("config.json"), "no config.json"),
    ("pickled-weights", written("pytorch_model.bin", "x"), "beside the safetensors"),
    ("pickled-weights", pickles_only, "no safetensors"),
    ("weight-index", index_of_a_lost_file, "model-00002-of-00002.safetensors"),
    ("weight-index", index_of_a_lost_tensor, "model.layers.9.weight"),
    ("damaged-shards", cut_short, "model.safetensors"),
    ("tied-flag", other_head, "640 of 640 rows differ"),
    ("tied-flag", set_config(tie_word_embeddings=False), "no lm_head.weight"),
    ("rows-and-configs", set_config(vocab_size=704), "has 640 rows; vocab_size is 704"),
    ("rows-and-configs", unwritten("vocab_size"), "262,208"),
    ("tokens-beyond-rows", set_rows(600), "the first token beyond is 600 ('<unused216>')"),
    ("layer-pattern", unwritten("sliding_window_pattern"), "[true, false]"),
    ("layer-pattern", set_config(sliding_window_pattern=[False, False]), "differs at layer 0"),
    ("dtype-mix", one_half_tensor, "1 tensors BF16: model.norm.weight"),
    ("not-finite", set_row(PIECE, torch.nan), f"1 of 640 rows, first {PIECE} ("),
    ("not-finite", infinite_norm, "model.norm.weight: 1 of 32 rows, first 3"),
    ("zero-rows", set_row(PIECE, 0.0), f"row {PIECE} ("),
    ("untrained-rows", set_row(PIECE, lambda matrix: matrix.mean(dim=0)), "the mean of all rows"),
    ("untrained-rows", copy_of_a_pad_row, "an untrained pad row"),
    ("outlier-rows", set_row(PIECE, lambda matrix: 100 * matrix[PIECE]), "far longer"),
    ("outlier-rows", set_row(PIECE, lambda matrix: matrix[PIECE] / 1000), "far shorter"),
    ("tokenizer-file", written("tokenizer.json", "{}"), "cannot be read"),
    ("tokenizer-file", removed("tokenizer.json"), "no tokenizer.json"),
    ("sentencepiece-model", removed("tokenizer.model"), "is missing"),
    ("sentencepiece-model", lambda f: edit_proto(f, lambda p: setattr(p.pieces[PIECE], "piece", "zz")), "1 ids mean"),
    ("sentencepiece-model", add_token("<thought>", listed=False), "<thought>"),
    ("special-ids", set_config(eos_token_id=6), "eos is '<eos>' = 1 in the tokenizer, 6 ('<end_of_turn>')"),
    ("tokenizer-config", replaced("tokenizer_config.json", '"<mask>"', '"<blank>"'), "mask_token '<blank>'"),
    ("tokenizer-config", written("added_tokens.json", '{"<unused7>": 5}'), "id 5 '<unused7>'"),
    ("tokenizer-config", listed_twice, "id 5 '<unused7>'"),
    ("chat-template", replaced("chat_template.jinja", "<end_of_turn>", "<end_of_talk>"), "<end_of_talk>"),
    ("added-words", add_token("zzyzx", listed=True), "'zzyzx'"),
    ("byte-merges", byte_merge, "<0xFE> + <0xFF>"),
    ("unreachable-pieces", rename(FIRST_UNUSED, "qzqz"), "'qzqz' comes out as q | z | q | z"),
]


def sick(source: Path, folder: Path, plant: Callable[[Path], None]) -> Path:
    shutil.copytree(source, folder)
    plant(folder)
    return folder


def found(diagnosis: Diagnosis) -> set[str]:
    return {finding.id for finding in diagnosis.findings if finding.severity != "note"}


def said(diagnosis: Diagnosis, check: str) -> str:
    return " ".join(f"{f.what} {f.where} {f.why} {f.cure}" for f in diagnosis.findings if f.id == check)


def not_checked(diagnosis: Diagnosis) -> set[str]:
    return {check for check, state in diagnosis.checks.items() if state == "not checked"}


@pytest.mark.parametrize(("check", "plant", "says"), FAULTS, ids=[f"{c}-{n}" for n, (c, _, _) in enumerate(FAULTS)])
def test_each_fault_is_found_alone(
    healthy: dict[str, Path], tmp_path: Path, check: str, plant: Callable[[Path], None], says: str
) -> None:
    diagnosis = examine(sick(healthy["gemma3"], tmp_path / "sick", plant))
    assert found(diagnosis) == {check}
    assert says in said(diagnosis, check)
    assert diagnosis.checks[check] in ("fault", "warning")
    assert not any("odd shape" in finding.where for finding in diagnosis.findings)


@pytest.mark.parametrize(
    ("plant", "says"),
    [(text_untied_alone, "tie_word_embeddings is True on top, False in text_config"), (text_of_other_size, "[106]")],
)
def test_two_configs_that_disagree(
    healthy: dict[str, Path], tmp_path: Path, plant: Callable[[Path], None], says: str
) -> None:
    diagnosis = examine(sick(healthy["gemma3-multimodal"], tmp_path / "sick", plant))
    assert "config-twins" in found(diagnosis) <= {"config-twins", "special-ids"}
    assert says in said(diagnosis, "config-twins")


def scale_unused_row(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors[EMBEDDING][FIRST_UNUSED].mul_(1.01))


def scale_a_layer(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].mul_(3))


@pytest.mark.parametrize(
    ("name", "check", "plant", "says"),
    [
        ("llama-untied", "old-rows", scale_unused_row, "the largest change is 0.01 "),
        ("llama-untied", "old-logits", scale_a_layer, "of their spread"),
        ("gemma3", "special-ids", swap_turn_marks, "'<start_of_turn>': 5 → 6, '<end_of_turn>': 6 → 5"),
        ("gemma3", "old-ids", merge_first_among_korean, "became ct | o | rs"),
        ("gemma3", "old-boundaries", merge_first, "ct | or | s"),
    ],
)
def test_each_fault_against_the_base(
    healthy: dict[str, Path], tmp_path: Path, name: str, check: str, plant: Callable[[Path], None], says: str
) -> None:
    diagnosis = examine(sick(healthy[name], tmp_path / "sick", plant), healthy[name], [*tiny.english(20), "환자"])
    assert found(diagnosis) == {check}
    assert says in said(diagnosis, check)


def test_runtimes_that_disagree(healthy: dict[str, Path], tmp_path: Path) -> None:
    diagnosis = examine(sick(healthy["gemma3"], tmp_path / "sick", reverse_scores))
    assert found(diagnosis) == {"sentencepiece-ids"}
    assert " against " in said(diagnosis, "sentencepiece-ids")


def test_llama_cpp(healthy: dict[str, Path], tmp_path: Path, llama_cpp: None) -> None:
    assert examine(healthy["gemma3"], healthy["gemma3"]).findings == []
    diagnosis = examine(sick(healthy["gemma3"], tmp_path / "sick", reverse_scores))
    assert found(diagnosis) == {"sentencepiece-ids", "llama-cpp-ids"}
    assert " against " in said(diagnosis, "llama-cpp-ids")
    # two tokens of one name abort llama.cpp, not the doctor
    diagnosis = examine(sick(healthy["gemma3"], tmp_path / "twice", listed_twice))
    assert found(diagnosis) == {"tokenizer-config", "llama-cpp-ids"}
    assert "cannot run this tokenizer" in said(diagnosis, "llama-cpp-ids")


def byte_level(folder: Path) -> Path:
    """A tokenizer of Qwen's kind: byte-level, NFC, Korean syllables of the examples merged from their bytes."""
    backend = Tokenizer(BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(tiny.korean(20), BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    return folder


def test_llama_cpp_composes_nothing(tmp_path: Path, llama_cpp: None) -> None:
    """Decomposed text, which Qwen's tokenizer composes and llama.cpp does not, is no fault of the tokenizer."""
    folder = byte_level(tmp_path / "qwen")
    diagnosis = examine(folder, texts=[unicodedata.normalize("NFD", text) for text in ["환자", "café"]])
    assert diagnosis.checks["llama-cpp-ids"] == "ok"
    assert "llama.cpp's pre-tokenizer for 'unknown' is not known" in said(
        examine(sick(folder, tmp_path / "unknown", set_config(model_type="unknown"))), "llama-cpp-ids"
    )


def shard(folder: Path) -> None:
    """Two files and their index: the embedding, and all else."""
    tensors = load_file(folder / "model.safetensors")
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    weight_map = {name: first if name == EMBEDDING else second for name in tensors}
    for file in (first, second):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def infinite_norm_in_a_shard(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = torch.inf
    save_file(tensors, file)


def cut_shard_short(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("check", "plant", "says"),
    [
        (None, lambda folder: None, ""),
        ("weight-index", removed("model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors"),
        ("weight-index", removed("model.safetensors.index.json"), "shards without model.safetensors.index.json"),
        ("damaged-shards", cut_shard_short, "model-00002-of-00002.safetensors"),
        ("not-finite", infinite_norm_in_a_shard, "model.norm.weight: 1 of 32 rows, first 3"),
    ],
    ids=["healthy", "file-lost", "index-lost", "cut-short", "not-finite"],
)
def test_sharded_weights(
    healthy: dict[str, Path], tmp_path: Path, check: str | None, plant: Callable[[Path], None], says: str
) -> None:
    folder = sick(healthy["gemma3"], tmp_path / "sharded", shard)
    plant(folder)
    diagnosis = examine(folder)
    assert found(diagnosis) == ({check} if check else set())
    assert says in said(diagnosis, check or "")


@pytest.mark.parametrize("name", ["gemma3", "gemma3-multimodal", "gemma3n", "llama", "llama-untied"])
def test_healthy_models(healthy: dict[str, Path], name: str) -> None:
    diagnosis = examine(healthy[name], healthy[name])
    assert diagnosis.healthy
    assert [finding.id for finding in diagnosis.findings] == ["llama-cpp-ids"]  # not checked
    assert list(diagnosis.checks) == [check for check, _ in CHECKS]
    assert not_checked(examine(healthy[name])) >= WITHOUT_BASE


@pytest.mark.parametrize(("name", "slots"), [("gemma3", "unused"), ("gemma3", "append"), ("llama", "append")])
def test_a_graft_is_healthy(healthy: dict[str, Path], tmp_path: Path, name: str, slots: Any) -> None:
    folder = tmp_path / "grafted"
    shutil.copytree(healthy[name], folder)
    base = load(healthy[name])
    texts = ((text, 1.0) for text in tiny.korean())
    learnt = learn(base, texts, new_tokens=100, min_frequency=3, scripts=frozenset({"Hangul"}))
    write(graft(base, place(base, learnt, family=family(name), slots=slots)), folder)
    set_rows(tiny.VOCABULARY if slots == "unused" else 768)(folder)

    def initialise(tensors: dict[str, Tensor]) -> None:
        for new in read_graft(folder):
            tensors[EMBEDDING][new.id] = tensors[EMBEDDING][new.base_ids].mean(dim=0)

    edit_weights(folder, initialise)
    diagnosis = examine(folder, healthy[name], [*tiny.english(20), *tiny.korean(20)])
    assert [finding for finding in diagnosis.findings if finding.severity != "note"] == []
    assert diagnosis.healthy
    assert not_checked(diagnosis) == {"llama-cpp-ids"}


def test_add_tokens_and_resize(healthy: dict[str, Path], tmp_path: Path) -> None:
    """What transformers' own way of adding words does to a model."""
    tokenizer = AutoTokenizer.from_pretrained(healthy["gemma3"])
    model = AutoModelForCausalLM.from_pretrained(healthy["gemma3"])
    tokenizer.add_tokens(["환자", "당뇨병", "pain", "단백"])
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    diagnosis = examine(tmp_path, healthy["gemma3"])
    assert {"added-words", "untrained-rows", "sentencepiece-model", "old-boundaries"} <= found(diagnosis)
    assert "4 words are added tokens" in said(diagnosis, "added-words")


def test_add_tokens_on_the_real_gemma_3(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "tokenizers/gemma3_262k"
    tokenizer = Tokenizer.from_str(gzip.decompress((source / "tokenizer.json.gz").read_bytes()).decode())
    words = (shared_data / "ko-medical/naive_added_tokens.txt").read_text("utf-8").split("\n")
    tokenizer.add_tokens([word for word in words if word])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(source / "tokenizer.model", tmp_path)

    diagnosis = examine(tmp_path)
    assert {"added-words", "sentencepiece-model", "sentencepiece-ids"} <= found(diagnosis)
    what = said(diagnosis, "added-words")
    assert "23,699 words are added tokens" in what
    assert "into more tokens than BPE alone" in what
    assert "ERCP showed a stone" in what  # English is cut differently too
    assert {"rows-and-configs", "not-finite", "zero-rows"} <= not_checked(diagnosis)


def test_added_words_gain_less_than_merges(
    healthy: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sick(healthy["gemma3"], tmp_path / "sick", add_token("환자", listed=True))
    monkeypatch.setattr(added_words, "COMPARED_LINES", 100)
    assert "merges learnt on 50 other lines by -" in said(examine(folder, texts=tiny.korean(100)), "added-words-gain")
    diagnosis = examine(folder, texts=tiny.korean(99))
    assert "needs --text with 100 lines" in said(diagnosis, "added-words-gain")


def test_a_tokenizer_alone(tiny_tokenizer: Path) -> None:
    diagnosis = examine(tiny_tokenizer)
    assert diagnosis.healthy
    assert {"config-file", "tied-flag", "zero-rows"} <= not_checked(diagnosis)


def test_odd_folders_do_not_crash(healthy: dict[str, Path], tmp_path: Path) -> None:
    odd = {
        "config.json": '{"model_type": 7, "vocab_size": "many", "text_config": [], "layer_types": 3}',
        "tokenizer_config.json": '{"added_tokens_decoder": [1], "bos_token": 5, "chat_template": {"a": 1}}',
        "added_tokens.json": '{"x": null}',
        "graft.json": '{"pieces": [3, {}]}',
        "model.safetensors.index.json": '{"weight_map": {"a": 5}}',
    }
    folder = sick(healthy["gemma3"], tmp_path / "odd", lambda f: [written(n, t)(f) for n, t in odd.items()] and None)
    assert not examine(folder, folder).healthy


def test_models_that_do_not_fit_in_memory(healthy: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    diagnosis = examine(healthy["llama"], healthy["llama"])
    assert not_checked(diagnosis) - {"llama-cpp-ids"} == {"old-logits"}
    assert "more than 60% of the free" in said(diagnosis, "old-logits")


def test_the_verb(healthy: dict[str, Path], tmp_path: Path) -> None:
    run = CliRunner().invoke
    good = run(cli.app, ["doctor", str(healthy["llama"]), "--json"])
    assert good.exit_code == 0
    data = json.loads(good.stdout)
    assert (data["model"], data["base"], data["healthy"]) == (str(healthy["llama"]), None, True)
    assert {"id": "tied-flag", "state": "ok"} in data["checks"]

    folder = sick(healthy["llama"], tmp_path / "sick", other_head)
    (tmp_path / "lines.txt").write_text("환자 a\n\n", "utf-8")
    bad = run(cli.app, ["doctor", str(folder), "--text", str(tmp_path / "lines.txt")])
    assert bad.exit_code == 1
    assert "FAULT  tied-flag: the config says tied, but" in bad.stdout
    assert "not healthy: 1 faults, 0 warnings" in bad.stdout.splitlines()[-1]


def test_unusable_input(healthy: dict[str, Path], tmp_path: Path) -> None:
    from lingraft import api

    with pytest.raises(ModelError, match="no such model folder"):
        api.diagnose(tmp_path / "none")
    with pytest.raises(ModelError, match="neither config"):
        api.diagnose(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "cp949.txt").write_bytes("환자".encode("cp949"))
    for name, why in (("none.txt", "no such text file"), ("empty.txt", "no text"), ("cp949.txt", "not UTF-8")):
        with pytest.raises(CorpusError, match=why):
            api.diagnose(healthy["llama"], texts=[tmp_path / name])
