"""Continued BPE on published tokenizers and real text: no harm, and how much is gained."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from real_lines import LONG_RUNS_OF_TABS, write_base
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from lingraft.families import family
from lingraft.tokenizer.check import verify
from lingraft.tokenizer.graft import GraftedTokenizer, graft, place, unused_slots, write
from lingraft.tokenizer.inspect import fertility
from lingraft.tokenizer.learn import learn
from lingraft.tokenizer.load import BaseTokenizer, load
from lingraft.tokenizer.runtimes import llama_cpp_available

HANGUL = frozenset({"Hangul"})
ODD_LINES = [
    "",
    " ",
    "a  b\n\n\n  c\t\td",
    "가  나\n\n   다\t라  ",
    "👩‍⚕️ 환자 😀",
    "ᄒᆞᆫ글 漢字 かな",
    "뷁쀍",
    "<h1>검역</h1><unused0>",
]


@pytest.fixture(scope="module")
def health_law(shared_data: Path) -> list[str]:
    with gzip.open(shared_data / "ko-medical/health_law.jsonl.gz", "rt") as lines:
        return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def reviews(shared_data: Path) -> list[str]:
    with gzip.open(shared_data / "ko-general/nsmc_reviews.tsv.gz", "rt") as lines:
        return [line.split("\t")[1] for line in lines][1:8001]


@pytest.fixture(scope="module")
def english(shared_data: Path) -> list[str]:
    with gzip.open(shared_data / "en-medical/medquad.jsonl.gz", "rt") as lines:
        return [json.loads(next(lines))["answer"] for _ in range(300)]


@pytest.fixture(scope="module")
def held_out(health_law: list[str], reviews: list[str], shared_data: Path) -> list[str]:
    """Korean law and reviews that nothing is learnt from, and documentation full of code."""
    with gzip.open(shared_data / "ko-general/docs/react_ko.jsonl.gz", "rt") as lines:
        code = json.loads(next(lines))["text"].split("\n")
    return health_law[0].split("\n")[:300] + reviews[:300] + code[:300] + ODD_LINES


@pytest.fixture(scope="module")
def gemma3(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseTokenizer:
    return load(write_base(shared_data, "gemma3_262k", tmp_path_factory.mktemp("gemma3")))


def agrees(transformers_tokenizer: PreTrainedTokenizerBase, tokenizer: BaseTokenizer, texts: list[str]) -> bool:
    theirs = transformers_tokenizer(texts, add_special_tokens=False)["input_ids"]
    return len(transformers_tokenizer) == len(tokenizer) and theirs == tokenizer.encode(texts)


def check(
    base: BaseTokenizer,
    grafted: GraftedTokenizer,
    out: Path,
    english: list[str],
    texts: list[str],
    pre_tokenizer: str = "default",
) -> int:
    """What `verify` proves, and that transformers loads the folder to the same tokenizer.

    Returns on how many texts the runtimes disagree, as they did on the base.
    """
    write(grafted, out)
    counts = verify(base, out, english, texts, pre_tokenizer)
    assert agrees(AutoTokenizer.from_pretrained(out), grafted.tokenizer, english[:50] + texts)
    return counts["runtimes_disagree_as_before"]


def test_gemma3_in_unused_slots(
    gemma3: BaseTokenizer, health_law: list[str], english: list[str], held_out: list[str], tmp_path: Path
) -> None:
    slots = unused_slots(gemma3, family("gemma3"))
    assert (len(slots), slots[0], slots[-1]) == (6_143, 256_001, 262_143)

    texts = [(text, 1.0) for text in health_law[1:8]]
    learnt = learn(gemma3, texts, new_tokens=500, min_frequency=5, scripts=HANGUL)
    grafted = graft(gemma3, place(gemma3, learnt, family=family("gemma3")))
    assert check(gemma3, grafted, tmp_path, english, held_out) == 0
    assert verify(gemma3, tmp_path, LONG_RUNS_OF_TABS, [])["runtimes_disagree_as_before"] == len(LONG_RUNS_OF_TABS)

    assert grafted.tokenizer.decode(grafted.tokenizer.encode(held_out)) == held_out
    assert [piece.id for piece in grafted.pieces] == list(range(256_001, 256_501))
    kept = range(256_001)
    assert [grafted.tokenizer.piece_of[i] for i in kept] == [gemma3.piece_of[i] for i in kept]
    assert len(grafted.tokenizer) == 262_145
    law = held_out[:300]
    assert fertility(grafted.tokenizer, law)["tokens"] < 0.9 * fertility(gemma3, law)["tokens"]


def test_qwen2(
    shared_data: Path, health_law: list[str], english: list[str], held_out: list[str], tmp_path: Path
) -> None:
    base = load(write_base(shared_data, "qwen2_151k", tmp_path))
    assert base.kind == "byte_level"

    texts = [(text, 1.0) for text in health_law[1:8]]
    learnt = learn(base, texts, new_tokens=500, min_frequency=5, scripts=HANGUL)
    grafted = graft(base, place(base, learnt, family=family("qwen2")))
    assert [piece.id for piece in grafted.pieces] == list(range(151_646, 152_146))
    assert grafted.tokenizer.vocab["<|im_end|>"] == base.vocab["<|im_end|>"] == 151_645
    assert check(base, grafted, tmp_path / "out", english, held_out, pre_tokenizer="qwen2") == 0
    assert verify(base, tmp_path / "out", ["</s>"], [], "qwen2")["runtimes_disagree_as_before"] == llama_cpp_available()


def test_a_base_that_spells_korean_in_bytes(
    shared_data: Path,
    health_law: list[str],
    reviews: list[str],
    english: list[str],
    held_out: list[str],
    tmp_path: Path,
) -> None:
    base = load(shared_data / "models/stories260K/hf")
    texts = [(text, 1.0) for text in health_law[1:20] + reviews[300:]]
    learnt = learn(base, texts, new_tokens=3_000, min_frequency=3, scripts=HANGUL)
    kinds = [new.kind for new in learnt.pieces]
    characters = kinds.count("character")
    assert kinds == ["character"] * characters + ["merge"] * (3_000 - characters)
    assert 500 < characters < 2_000

    grafted = graft(base, place(base, learnt, family=family("llama")))
    assert grafted.pieces[0].id == 512
    check(base, grafted, tmp_path, english, held_out)
    for texts_of_one_kind in (held_out[:300], held_out[300:600]):
        before = fertility(base, texts_of_one_kind)["tokens_per_character"]
        after = fertility(grafted.tokenizer, texts_of_one_kind)["tokens_per_character"]
        assert before > 2.5 * after


def test_gemma2_has_one_usable_slot_and_appends(shared_data: Path, tmp_path: Path) -> None:
    """<unused0> to <unused98> are protected (fine-tunes use some as marks); <unused99> is the only other one."""
    base = load(write_base(shared_data, "gemma2", tmp_path))
    [slot] = unused_slots(base, family("gemma2"))
    assert (slot, base.piece_of[slot]) == (255_999, "<unused99>")
    learnt = learn(base, [("환자에게 약을 먹였다. " * 9, 1.0)], new_tokens=3, scripts=HANGUL)
    assert place(base, learnt, family=family("gemma2")).ids == [255_999, 256_000, 256_001]


def test_a_conversion_that_differs_from_its_model_keeps_its_ids(
    shared_data: Path, health_law: list[str], english: list[str], held_out: list[str], tmp_path: Path
) -> None:
    """transformers' tokenizer.json of Llama 2 puts no space in front of a text that begins with one."""
    source = write_base(shared_data, "llama2", tmp_path / "source")
    LlamaTokenizer.from_pretrained(source).save_pretrained(tmp_path / "base")
    shutil.copy(source / "tokenizer.model", tmp_path / "base")
    base = load(tmp_path / "base")
    assert base.encode([" a"]) != load(source).encode([" a"])

    texts = [(text, 1.0) for text in health_law[1:8]]
    learnt = learn(base, texts, new_tokens=1_000, min_frequency=3, scripts=HANGUL)
    grafted = graft(base, place(base, learnt, family=family("llama")))
    indented = sum(text.startswith(" ") for text in held_out + english)
    assert check(base, grafted, tmp_path / "out", english, held_out) >= indented > 0
