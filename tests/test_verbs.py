"""The verbs without a recipe: `tokenizer graft`, `tokenizer report`, `graft`, by themselves and one after another."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lingraft import api
from lingraft.cli import app
from lingraft.families import family
from lingraft.model.load import input_matrix, load
from lingraft.model.surgery import open_checkpoint, vocabulary_rows
from lingraft.tokenizer.graft import read_graft, unused_slots
from lingraft.tokenizer.load import load as load_tokenizer
from lingraft.tokenizer.pieces import to_bytes

NEW_TOKENS = 200
COMPANIONS = {
    "generation_config.json": '{"max_length": 7}\n',
    "preprocessor_config.json": '{"image_processor_type": "Gemma3ImageProcessor"}',
    "processor_config.json": '{"processor_class": "Gemma3Processor",\r\n "image_seq_length": 4}',
}


def lingraft(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def data_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "ko-1.txt").write_text("\n\n".join(tiny.korean(150)[:80]), encoding="utf-8")
    with gzip.open(folder / "ko-2.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in tiny.korean(150)[80:])
    (folder / "en.txt").write_text("\n\n".join(tiny.english(20)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=["gemma3-multimodal", "gemma3n", "llama"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path, texts: Path):
    """A base, its grafted tokenizer and the grafted model, by the two verbs."""
    folder = tmp_path_factory.mktemp("made")
    base = tiny.write_checkpoint(folder / request.param, tiny_tokenizer, request.param)
    for name, text in COMPANIONS.items():
        (base / name).write_bytes(text.encode())
    learnt = lingraft(
        *("tokenizer", "graft", "--base", base, "--text", texts / "ko-1.txt", texts / "ko-2*", texts / "en.txt"),
        *("--new-tokens", NEW_TOKENS, "--out", folder / "tokenizer", "--json"),
    )
    grafted = lingraft("graft", "--base", base, "--tokenizer", folder / "tokenizer", "--out", folder / "out", "--json")
    return base, folder / "tokenizer", folder / "out", data_of(learnt), data_of(grafted)


def test_new_tokens_are_learnt_placed_and_checked(made: Any) -> None:
    base, tokenizer, _, learnt, _ = made
    slots = 0 if base.name == "llama" else NEW_TOKENS
    assert (learnt["reused_slots"], learnt["appended"]) == (slots, NEW_TOKENS - slots)
    assert learnt["scripts"] == ["Hangul"]
    assert learnt["checks"]["new_pieces"] == len(read_graft(tokenizer)) == NEW_TOKENS
    assert learnt["checks"]["old_texts"] > 5
    assert learnt["economics"]["sources"]["held out"]["saved"] > 0.4
    assert len(AutoTokenizer.from_pretrained(tokenizer)) == learnt["vocabulary_after"]


def test_the_model_opens_with_transformers_and_is_healthy(made: Any) -> None:
    base, _, out, learnt, grafted = made
    assert grafted["rows_after"] == (tiny.VOCABULARY if base.name != "llama" else 896)
    assert grafted["input"] == {"subword_mean": NEW_TOKENS}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    ids = tokenizer("환자는 약을 먹었다", return_tensors="pt")["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(out)(input_ids=ids).logits.isfinite().all()
    diagnosis = api.diagnose(out, base).as_json()
    assert diagnosis["healthy"], diagnosis["findings"]
    assert learnt["new_tokens"] == NEW_TOKENS


def test_companions_survive_byte_for_byte(made: Any) -> None:
    base, tokenizer, out, _, _ = made
    for name in COMPANIONS:
        assert (out / name).read_bytes() == (base / name).read_bytes()
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "graft.json"):
        assert (out / name).read_bytes() == (tokenizer / name).read_bytes()


def test_rows_are_the_means_of_the_parts(made: Any) -> None:
    base, tokenizer, out, _, _ = made
    before, after = (vocabulary_rows(open_checkpoint(folder)) for folder in (base, out))
    piece = next(piece for piece in read_graft(tokenizer) if len(piece.base_ids) > 2)

    def is_scaled_mean(row: torch.Tensor, parts: torch.Tensor) -> bool:
        """A mean of rows is shorter than they are, and is brought to their length."""
        mean = parts.mean(dim=0)
        scale = row.norm() / mean.norm()
        return bool(scale > 1) and torch.allclose(row, mean * scale, atol=1e-6)

    assert is_scaled_mean(after.input[piece.id], before.input[piece.base_ids])
    assert after.output is not None
    lengths = torch.tensor([[float(len(to_bytes(part, "sentencepiece")))] for part in piece.base_pieces])
    weighted = (before.input[piece.base_ids] * lengths).sum(dim=0) / lengths.sum()
    assert torch.allclose(after.output[piece.id], weighted, atol=1e-6)
    assert (after.per_layer is not None) == (base.name == "gemma3n")
    if before.per_layer is not None and after.per_layer is not None:
        assert is_scaled_mean(after.per_layer[piece.id], before.per_layer[piece.base_ids])


def test_image_and_text_logits_of_old_ids_stay(made: Any) -> None:
    base, tokenizer, out, _, _ = made
    if base.name != "gemma3-multimodal":
        pytest.skip("a text model")
    new = {piece.id for piece in read_graft(tokenizer)}
    old = [i for i in range(tiny.VOCABULARY) if i not in new]
    image = {"pixel_values": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))}
    ids = torch.tensor([[2, 300, 10, 9, 9, 9, 9, 11, 301, 17]])
    logits = [load(folder)(input_ids=ids, **image).logits[..., old] for folder in (base, out)]
    assert torch.equal(*logits)
    without = load(base)(input_ids=ids, pixel_values=-image["pixel_values"]).logits[..., old]
    assert not torch.equal(without, logits[0]), "the image must matter for this to prove anything"


def test_the_report_compares_sources(made: Any, texts: Path) -> None:
    base, tokenizer, _, _, _ = made
    command = ("tokenizer", "report", tokenizer, "--base", base, "--text", texts / "ko-1.txt", texts / "en.txt")
    data = data_of(lingraft(*command, "--json"))
    korean, english = data["sources"].values()
    assert korean["saved"] > 0.4
    assert english["saved"] == 0
    assert data["unreachable"] == 0
    shown = lingraft(*command).output
    assert "tokens/character" in shown
    assert "together" in shown


def test_a_tied_model_can_stay_tied(tiny_gemma: Path, texts: Path, tmp_path: Path) -> None:
    tokenizer, out = tmp_path / "tokenizer", tmp_path / "out"
    api.graft_tokenizer(tiny_gemma, [str(texts / "ko-1.txt")], tokenizer, new_tokens=20, slots="append")
    data = api.graft_model(tiny_gemma, tokenizer, out, tie="keep", input_rule="length_weighted")
    assert (data["tied"], data["rows_after"], data["input"]) == (True, 704, {"length_weighted": 20})
    assert input_matrix(load(out)).shape[0] == 704


def test_a_tokenizer_without_a_model(tiny_tokenizer: Path, texts: Path, tmp_path: Path) -> None:
    data = api.graft_tokenizer(
        tiny_tokenizer,
        [str(texts)],
        tmp_path / "new" / "out",
        new_tokens=30,
        slots="unused",
        held_out=[str(texts / "ko-1.txt")],
    )
    assert (data["reused_slots"], data["appended"]) == (30, 0)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


def test_slots_that_a_config_ends_turns_with_are_kept(tiny_gemma: Path, texts: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_gemma, tmp_path / "base")
    first_slot = load_tokenizer(base).vocab["<unused0>"]
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, first_slot]}))
    api.graft_tokenizer(base, [str(texts / "ko-1.txt")], tmp_path / "out", new_tokens=3)
    assert [piece.id for piece in read_graft(tmp_path / "out")] == [first_slot + 1, first_slot + 2, first_slot + 3]


def graft_of(base: Path, text: Path, out: Path, *more: object) -> Result:
    return lingraft("tokenizer", "graft", "--base", base, "--text", text, "--new-tokens", 9, "--out", out, *more)


def refused(capsys: pytest.CaptureFixture[str], result: Result, *parts: str) -> None:
    line = result.output.strip() or capsys.readouterr().err.strip()
    assert result.exit_code == 2
    assert line.startswith("error: ")
    assert "\n" not in line
    for part in parts:
        assert part in line


def test_what_cannot_be_grafted_says_so_in_one_line(
    tiny_gemma: Path, tiny_tokenizer: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = texts / "ko-1.txt", tmp_path / "out"
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "table.tsv").write_text("ko\ten\n환자\tpatient\n")
    refused(capsys, graft_of(tmp_path / "nowhere", text, out), "nowhere/tokenizer.json: no such file")
    refused(capsys, graft_of(tiny_gemma, tmp_path / "empty.txt", out), "no text in", "empty.txt")
    refused(capsys, graft_of(tiny_gemma, tmp_path / "none-*.txt", out), "nothing at", "none-*.txt")
    refused(capsys, graft_of(tiny_gemma, tmp_path / "table.tsv", out), "no column 'text'", "ko, en")
    refused(capsys, graft_of(tiny_gemma, text, out, "--scripts", "Thai"), "nothing of Thai")
    refused(capsys, graft_of(tiny_gemma, text, out, "--scripts", "hangul"), "--scripts: 'hangul'", "Hangul")
    refused(capsys, graft_of(tiny_gemma / "tokenizer.json", text, out), "tokenizer.json: a file; give the folder")
    refused(capsys, graft_of(tiny_gemma, text, tmp_path / "empty.txt" / "out"), "--out:", "give another folder")
    slots = len(unused_slots(load_tokenizer(tiny_gemma), family("gemma3")))
    too_many = ("--slots", "unused", "--new-tokens", slots + 1)
    refused(capsys, graft_of(tiny_gemma, text, out, *too_many), f"at most {slots:,} new tokens")
    for damage in (b'{"a":', b"[]", b"\xff\xfe"):
        damaged = shutil.copytree(tiny_gemma, tmp_path / "damaged", dirs_exist_ok=True)
        (damaged / "tokenizer_config.json").write_bytes(damage)
        refused(capsys, graft_of(damaged, text, out), "tokenizer_config.json: damaged", "download it again")
    for kind in ("Unigram", "WordPiece"):
        broken = tmp_path / kind
        broken.mkdir()
        vocab: Any = [["<unk>", 0.0]] if kind == "Unigram" else {"[UNK]": 0}
        model = {"type": kind, "vocab": vocab} | ({"unk_id": 0} if kind == "Unigram" else {"unk_token": "[UNK]"})
        more = {} if kind == "Unigram" else {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
        parsed = {"version": "1.0", "added_tokens": [], "model": model | more}
        (broken / "tokenizer.json").write_text(json.dumps(parsed))
        refused(capsys, graft_of(broken, text, out), f"a {kind} tokenizer", "needs a BPE")
    llama = tiny.write_checkpoint(tmp_path / "llama", tiny_tokenizer, "llama")
    refused(capsys, graft_of(llama, text, out, "--slots", "unused"), "no unused slots", "llama")
    gemma3n = tiny.write_checkpoint(tmp_path / "gemma3n", tiny_tokenizer, "gemma3n")
    refused(capsys, graft_of(gemma3n, text, out, "--slots", "append"), "nothing can be appended", "per-layer table")
    assert not out.exists()

    out.mkdir()
    (out / "precious").write_text("x")
    refused(capsys, graft_of(tiny_gemma, text, out), "is there already and is never overwritten")
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_weights_and_tokenizer_that_do_not_belong_together(
    tiny_gemma: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, out = tmp_path / "tokenizer", tmp_path / "out"
    api.graft_tokenizer(tiny_gemma, [str(texts / "ko-1.txt")], tokenizer, new_tokens=20)

    def graft(base: Path, tokenizer: Path, *more: object) -> Result:
        return lingraft("graft", "--base", base, "--tokenizer", tokenizer, "--out", out, *more)

    refused(capsys, graft(tiny_gemma, tiny_gemma), "graft.json: no such file", "tokenizer graft")
    refused(capsys, graft(tmp_path / "nowhere", tokenizer), "nowhere")
    refused(capsys, graft(tiny_gemma, tokenizer, "--input", "focus"), "--input: focus needs", "use it in a recipe")
    refused(capsys, graft(tiny_gemma, tokenizer, "--output", "mean"), "--output: no rule named 'mean'", "subword_mean")
    other = tmp_path / "other"
    tiny.train_sentencepiece(tiny.english(150), 600, 64, other)
    other = tiny.write_checkpoint(tmp_path / "other-model", other)
    refused(capsys, graft(other, tokenizer), "grafted on another base: id", "graft this model's own tokenizer")
    report = ("tokenizer", "report", tokenizer, "--base", other, "--text", texts / "ko-1.txt")
    refused(capsys, lingraft(*report), "grafted on another base: id")
    twice = tmp_path / "twice"
    for folder, start in ((tmp_path / "once", tiny_gemma), (twice, tmp_path / "once")):
        api.graft_tokenizer(start, [str(texts / "ko-1.txt")], folder, new_tokens=20, slots="append")
    refused(capsys, graft(tiny_gemma, twice), "grafted on another base: id", "is missing in")
    for damage in ('{"pieces', "[]", "{}", '{"pieces": [{"id": 1}]}'):
        damaged = shutil.copytree(tokenizer, tmp_path / "damaged", dirs_exist_ok=True)
        (damaged / "graft.json").write_text(damage)
        refused(capsys, graft(tiny_gemma, damaged), "graft.json: damaged", "graft the tokenizer again")
    api.graft_model(tiny_gemma, tokenizer, tmp_path / "grafted")
    refused(capsys, graft(tmp_path / "grafted", tokenizer), "has 20 of the 20 new tokens already")
    assert not out.exists()
