"""A base tokenizer trained from nothing."""

from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lingraft.errors import TokenizerError
from lingraft.families import family
from lingraft.tokenizer.check import runtime_mismatches, verify
from lingraft.tokenizer.graft import graft, place, unused_slots, write
from lingraft.tokenizer.inspect import fertility
from lingraft.tokenizer.learn import learn
from lingraft.tokenizer.load import BaseTokenizer
from lingraft.tokenizer.new import train_sentencepiece

ENGLISH = "The patient was given 250 mg of the drug.\n\n  It was given twice a day, and the patient was well."
KOREAN = "환자에게 약을 하루 두 번 먹였다.\n환자는 약을 먹고 나았다."
LINES = [ENGLISH, KOREAN, "", "  a  b\n\n\nc\t\td ", "naïve 👩‍⚕️", "<start_of_turn>user\nhi<end_of_turn>", "<unused7>가"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseTokenizer:
    return train_sentencepiece([ENGLISH] * 5, 360, 40, tmp_path_factory.getbasetemp() / "tiny-base")


@pytest.fixture(scope="module")
def folder(base: BaseTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tiny-base"


def test_layout(base: BaseTokenizer) -> None:
    assert len(base) == 360
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "\n", "<0x00>"]
    assert [base.piece_of[i] for i in range(9)] == first
    assert unused_slots(base, family("gemma3_text")) == list(range(320, 360))
    assert fertility(base, ["환자"])["tokens"] == 6


def test_runtimes_agree_and_text_comes_back(base: BaseTokenizer, folder: Path) -> None:
    assert runtime_mismatches(folder, LINES) == []
    assert base.decode(base.encode(LINES)) == LINES
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(LINES, add_special_tokens=False)["input_ids"] == base.encode(LINES)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == 2
    assert len(tokenizer) == 360


def test_merges_follow_the_scores(base: BaseTokenizer) -> None:
    assert base.proto is not None
    scores = {piece.piece: piece.score for piece in base.proto.pieces}
    made = [scores[left + right] for left, right in base.json["model"]["merges"]]
    assert all(earlier >= later for earlier, later in pairwise(made))


def test_same_texts_same_files(folder: Path, tmp_path: Path) -> None:
    train_sentencepiece([ENGLISH] * 5, 360, 40, tmp_path)
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name


def test_chat_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " hi "},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "bye"},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nBe brief.\n\nhi<end_of_turn>\n"
        "<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nbye<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    with pytest.raises(Exception, match="Turns must alternate"):
        tokenizer.apply_chat_template(turns[1:2] * 2, tokenize=False)


def test_korean_grafts_onto_it(base: BaseTokenizer, tmp_path: Path) -> None:
    learnt = learn(base, [(KOREAN, 2.0)], new_tokens=40, scripts=frozenset({"Hangul"}))
    grafted = graft(base, place(base, learnt, family=family("gemma3_text"), slots="unused"))
    write(grafted, tmp_path)
    verify(base, tmp_path, [ENGLISH], LINES)
    assert fertility(base, [KOREAN])["tokens"] > 2.5 * fertility(grafted.tokenizer, [KOREAN])["tokens"]
    grafted_lines = AutoTokenizer.from_pretrained(tmp_path)(LINES, add_special_tokens=False)["input_ids"]
    assert grafted_lines == grafted.tokenizer.encode(LINES)


def test_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"cannot train 4,000 pieces .*; give more text or ask for fewer pieces"):
        train_sentencepiece(["short"], 4_000, 0, tmp_path)
